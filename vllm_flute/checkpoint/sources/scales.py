"""Scales of other formats as the 16-bit scales of lut-v1, exactly where that is possible."""

import math

import torch

from ...errors import FluteError
from ...format import GROUP_SIZES

# Below fp16's smallest normal number, 2^-14, the bound is relative to that number.
ROUNDED = "scales rounded to float16: relative error at most 2^-11"


def narrow(scales: torch.Tensor, dtype: torch.dtype, name: str) -> tuple[torch.Tensor, bool]:
    """(scales in ``dtype``, whether every one is exact).

    Args:
        scales: fp32, any shape.
        name: of the tensor, for errors.

    Raises FluteError for scales that are not finite, or too large for ``dtype``.
    """
    rounded = scales.to(dtype)
    if not torch.isfinite(rounded).all():
        label = str(dtype).removeprefix("torch.")
        raise FluteError(f"{name} has values that are not finite in {label}: quantize the source again")
    return rounded, torch.equal(rounded.to(torch.float32), scales)


def split_power(factor: float) -> tuple[float, float]:
    """``factor = mantissa * power`` with 1 <= |mantissa| < 2 and a power of two.

    A factor of the whole matrix goes into the codebook as its mantissa and into the scales, where it rounds nothing,
    as its power, so that tables keep the size that kernels with 16-bit tables expect.
    """
    mantissa, exponent = math.frexp(factor)
    return 2 * mantissa, 2.0 ** (exponent - 1)


def stored_group(block: int, k: int) -> int | None:
    """The lut-v1 group size for blocks of ``block`` weights in rows of K: K, the block, or 256 for longer ones.

    None where the block does not divide a row or is no multiple of 16.
    """
    if block < 1 or k % block:
        return None
    if block == k:
        return k if k % 8 == 0 else None
    return next((g for g in reversed(GROUP_SIZES) if block == g or (g == GROUP_SIZES[-1] and block % g == 0)), None)
