"""Running and asking a `vllm serve` process: what evaluation, benchmarks and tests share."""

from .client import Client
from .process import Server

__all__ = ["Client", "Server"]
