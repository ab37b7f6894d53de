"""`vllm-flute serve-admin`: the operator's service beside a running server."""

import os
from typing import Annotated

import typer


def serve_admin(
    url: Annotated[str, typer.Option(help="The vLLM server to report on.")] = "http://127.0.0.1:8000",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8001,
    api_key: Annotated[
        str,
        typer.Option(
            help="The server's API key, which callers of this service must present too. "
            "Better given by the environment's VLLM_API_KEY: arguments are visible to other users."
        ),
    ] = None,
) -> None:
    """Serve health, readiness, a status page and the plugin's metrics of a running vLLM server."""
    from urllib.parse import urlsplit

    import uvicorn

    from ..errors import FluteError
    from ..serve.admin import Upstream, create_app
    from .doctor import collect

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.username:
        raise FluteError(f"--url {url!r}: expected http://HOST:PORT of a vLLM server, without a path")
    key = api_key if api_key is not None else os.environ.get("VLLM_API_KEY", "")
    if not key and host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo(f"warning: no API key: everybody who reaches {host}:{port} can read this server's figures", err=True)
    machine = collect()
    with Upstream(url, key) as upstream:
        uvicorn.run(create_app(upstream, key, machine), host=host, port=port, log_level="warning", server_header=False)
