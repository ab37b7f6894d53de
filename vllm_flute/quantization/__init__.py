"""Quantization methods, one a file. `quantize` is the data-free entry point."""

from .round_to_nearest import METHODS, quantize

__all__ = ["METHODS", "quantize"]
