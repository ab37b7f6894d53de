"""The service's endpoints. It is a process of its own, so that it can say that the server is dead.

Nothing of a request's content passes through here: the figures come from /metrics alone, and the only prompt that is
ever sent is the probe's own.
"""

import base64
import hashlib
import logging
import secrets
from importlib import metadata, resources

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ... import __version__
from .status import figures, layers, plugin_metrics
from .upstream import Upstream

# Nothing is fetched from elsewhere, and nothing of this page can be shown inside another.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_ASSETS = {"status.css": "text/css", "status.js": "text/javascript"}
logger = logging.getLogger("vllm_flute")


def _given_key(request: Request) -> str:
    """The key of a Bearer token, or the password of HTTP Basic, which is what a browser asks its user for."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def _digest(key: str) -> bytes:
    """Of one length whatever the key, so that comparing takes one time."""
    return hashlib.sha256(key.encode()).digest()


def _distribution(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class _OwnMetrics:
    """What this service says of itself on /metrics."""

    def __init__(self, upstream: Upstream):
        self.upstream = upstream

    def collect(self):
        up, of = self.upstream.window()[1] is not None, "the server's metrics"
        yield GaugeMetricFamily("vllm_flute_admin:upstream_up", f"1 where {of} were read last time", float(up))
        yield CounterMetricFamily("vllm_flute_admin:upstream_readings", f"Readings of {of}", self.upstream.readings)
        yield CounterMetricFamily("vllm_flute_admin:upstream_failures", "Readings that failed", self.upstream.failures)


def create_app(upstream: Upstream, key: str = "", host: dict | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        upstream: the server that it reports on, reading already.
        key: what callers must present, as vLLM's ``--api-key``; "" lets everybody in. /healthz and /readyz are open:
            they tell no more than whether there is a service.
        host: what `vllm-flute doctor` found on this machine, shown in /v1/flute/info.
    """
    expected = _digest(key) if key else None

    def authorized(request: Request) -> None:
        if expected and not secrets.compare_digest(_digest(_given_key(request)), expected):
            raise HTTPException(401, "wrong or missing API key", {"WWW-Authenticate": 'Basic realm="vllm-flute"'})

    app = FastAPI(title="vllm-flute", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    guarded = [Depends(authorized)]
    registry = CollectorRegistry()
    registry.register(_OwnMetrics(upstream))

    @app.middleware("http")
    async def headers(request: Request, call_next):
        response = await call_next(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(HTTPException)
    def refused(request: Request, e: HTTPException) -> JSONResponse:
        return JSONResponse({"error": {"message": e.detail, "code": e.status_code}}, e.status_code, e.headers)

    @app.exception_handler(Exception)
    def failed(request: Request, e: Exception) -> JSONResponse:
        logger.error("%s %s: %s", request.method, request.url.path, type(e).__name__, exc_info=e)
        return JSONResponse({"error": {"message": "internal error", "code": 500}}, 500)

    def status() -> dict:
        before, after = upstream.window()
        server = {"url": upstream.url, "up": after is not None, "reason": upstream.error}
        server |= {"models": upstream.models, "vllm": upstream.version}
        return {"server": server, "figures": figures(before, after) if after else None}

    def require_samples():
        before, after = upstream.window()
        if after is None:
            raise HTTPException(503, f"{upstream.url}: {upstream.error}")
        return before, after

    @app.get("/healthz")
    def healthz() -> dict:
        """Whether this service lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz() -> JSONResponse:
        """200 only while the model answers."""
        ready, reason = upstream.readiness()
        return JSONResponse({"ready": ready, "reason": reason}, 200 if ready else 503)

    @app.get("/v1/flute/info", dependencies=guarded)
    def info() -> dict:
        """Format, kernels chosen and why, memory, versions."""
        _, after = require_samples()
        return {
            "models": upstream.models,
            "versions": {"vllm-flute": __version__, "vllm": upstream.version, "torch": _distribution("torch")},
            "build": after.labels("vllm_flute:build_info"),
            "layers": layers(after),
            "memory_bytes": figures(after, after)["memory_bytes"],
            # Reckoned on the machine of this service, which is the server's where both run side by side.
            "this_machine": host,
        }

    @app.get("/v1/flute/status", dependencies=guarded)
    def live() -> dict:
        """The figures of the status page."""
        return status()

    @app.get("/metrics", dependencies=guarded)
    def metrics() -> PlainTextResponse:
        """The plugin's metrics as the server gave them last, and this service's own."""
        _, after = upstream.window()
        text = generate_latest(registry).decode() + (plugin_metrics(after.text) if after else "")
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    def asset(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    @app.get("/", dependencies=guarded)
    def page() -> HTMLResponse:
        return HTMLResponse(asset("status.html"))

    @app.get("/assets/{name}", dependencies=guarded)
    def assets(name: str) -> PlainTextResponse:
        if name not in _ASSETS:
            raise HTTPException(404, "no such file")
        return PlainTextResponse(asset(name), media_type=_ASSETS[name])

    return app
