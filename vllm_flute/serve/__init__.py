"""Running and asking a `vllm serve` process: what evaluation, benchmarks and tests share."""

from .client import Client
from .process import Server, cpu_environment

__all__ = ["Client", "Server", "cpu_environment"]
