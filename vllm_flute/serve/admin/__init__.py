"""The operator's service beside a vLLM server: health, readiness, what runs and why, a status page, metrics."""

from .app import create_app
from .upstream import Upstream

__all__ = ["Upstream", "create_app"]
