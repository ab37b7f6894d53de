"""Quantization methods, one a file. `quantize` is the data-free entry point."""

from .fitted import FITTED
from .gptq import gptq
from .round_to_nearest import DATA_FREE, quantize

METHODS = ("scale-search", "absmax", "gptq", "learned")

__all__ = ["DATA_FREE", "FITTED", "METHODS", "gptq", "quantize"]
