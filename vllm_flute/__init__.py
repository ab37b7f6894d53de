"""Lookup-table (LUT) quantized LLMs for vLLM: the format, its quantizer and its kernels.

    t = LutTensor.from_codes(codes, scales, codebook)
    t = quantize(weight, bits=4, group_size=64, codebook="nf")
    y = lut_linear(x, t, bias=None, kernel=None)
"""

from .dispatch import lut_linear
from .errors import FluteError
from .format import LutTensor
from .quantization import quantize

__version__ = "0.1.0"
__all__ = ["FluteError", "LutTensor", "lut_linear", "quantize"]
