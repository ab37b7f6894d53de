"""Lookup-table (LUT) quantized LLMs for vLLM: the format, its quantizer and its kernels.

t = LutTensor.from_codes(codes, scales, codebook)
t = quantize(weight, bits=4, group_size=64, codebook="nf")
y = lut_linear(x, t, bias=None, kernel=None)
"""

from importlib import import_module

__version__ = "0.1.0"
_HOME = {"FluteError": "errors", "LutTensor": "format", "lut_linear": "dispatch", "quantize": "quantization"}
__all__ = [*_HOME]


def __getattr__(name: str):
    """Import torch on first use only: `vllm-flute --help` and vLLM's plugin discovery need none of it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
