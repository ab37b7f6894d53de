"""MXFP4 and NVFP4: e2m1 values with a scale for each 32 or 16 inputs, as lut-v1.

OCP Microscaling Formats (MX) Specification 1.0 for e2m1 and e8m0; NVFP4 (two e2m1 a byte, the even input in the low
nibble, e4m3 scales, one fp32 factor a matrix) as NVIDIA's ModelOpt and compressed-tensors store it. The nibbles are
already a lut-v1 row.
"""

import torch

from ...codebook import make_codebook
from ...errors import FluteError
from ...format import LutTensor
from .base import Converted
from .scales import split_power

MX_GROUP, NV_GROUP = 32, 16
_E8M0_NAN = 255
_ORDER = "float32 rounding in another order: relative difference at most 2^-22"


def _check(tensor: torch.Tensor, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise FluteError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {' or '.join(map(str, dtypes))} {list(shape)}: "
            "fetch or write the source again"
        )


def _rows(packed: torch.Tensor, group: int, name: str) -> tuple[int, int]:
    """(N, K) of packed nibbles; raises FluteError where they do not come in whole groups."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] * 2 % group or 0 in packed.shape:
        raise FluteError(
            f"{name} is {packed.dtype} {list(packed.shape)}, expected torch.uint8 [N, K/2] with K a multiple of {group}"
        )
    return packed.shape[0], packed.shape[1] * 2


def mxfp4(packed: torch.Tensor, scales: torch.Tensor, name: str) -> Converted:
    """``e2m1 * 2**(scale - 127)``: packed uint8 ``[N, K/2]``, scales uint8 (or e8m0) ``[N, K/32]``. Exact.

    Raises FluteError for other shapes and for the scale 255, which is a NaN.
    """
    n, k = _rows(packed, MX_GROUP, name)
    _check(scales, f"scales of {name}", (torch.uint8, torch.float8_e8m0fnu), (n, k // MX_GROUP))
    exponents = scales.view(torch.uint8)
    if (exponents == _E8M0_NAN).any():
        raise FluteError(f"scales of {name} hold 255, which is a NaN in e8m0: quantize the source again")
    # bf16 has the same exponents: its bits are the exponent's, except for 2**-127, which it holds as a subnormal.
    bits = (exponents.to(torch.int16) << 7).masked_fill(exponents == 0, 1 << 6)
    return Converted(LutTensor(packed, bits.view(torch.bfloat16), make_codebook("fp4", 4), name=name), True)


def nvfp4(packed: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor, divide: bool, name: str) -> Converted:
    """``e2m1 * scale * factor``: packed uint8 ``[N, K/2]``, scales e4m3 ``[N, K/16]``, factor fp32 of one value.

    Args:
        divide: the factor divides (compressed-tensors' weight_global_scale) instead (ModelOpt's weight_scale_2).

    The factor's power of two goes into the scales, exactly, the rest of it into the codebook. The source computes
    ``e2m1 * fl(scale * factor)`` in fp32, lut-v1 ``fl(e2m1 * factor) * scale``: the same but for fp32's rounding,
    unless the factor is a power of two. Raises FluteError for other shapes, NaN scales and an impossible factor.
    """
    n, k = _rows(packed, NV_GROUP, name)
    _check(scales, f"scales of {name}", (torch.float8_e4m3fn,), (n, k // NV_GROUP))
    if factor.numel() != 1 or not factor.is_floating_point():
        raise FluteError(f"factor of {name} is {factor.dtype} {list(factor.shape)}, expected torch.float32 [1]")
    given = factor.to(torch.float64).item()
    if not 2.0**-100 < given < 2.0**100:  # beyond it, no weight would be a normal fp32
        raise FluteError(f"factor of {name} is {given}, expected a positive number: quantize the source again")
    wide = scales.to(torch.float32)
    if wide.isnan().any():
        raise FluteError(f"scales of {name} have NaNs: quantize the source again")
    mantissa, power = split_power(1 / given if divide else given)
    # From the factor itself, so that the quotient is rounded once.
    table = make_codebook("fp4", 4).to(torch.float64)
    table = table / (given * power) if divide else table * mantissa
    lut = LutTensor(packed, (wide * power).to(torch.bfloat16), table.to(torch.float32), name=name)
    exact = mantissa == 1.0
    return Converted(lut, exact, "" if exact else _ORDER)
