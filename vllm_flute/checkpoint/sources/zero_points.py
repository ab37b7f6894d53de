"""Integer codes with a zero point for each group, ``W = scale * (code - zero)``, as lut-v1."""

import torch

from ...errors import FluteError
from ...format import LutTensor
from .base import Converted
from .scales import ROUNDED, narrow


def affine(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    name: str,
    repeat: int = 1,
    perm: torch.Tensor | None = None,
) -> Converted:
    """A layer from lut-v1's packed codes and the source's scales and zero points.

    One zero point everywhere (a symmetric source) goes into the table. Others become the extension ``offsets``:
    ``scale * (code - zero) = (code - middle) * scale + scale * (middle - zero)``, where the table that is centred keeps
    the offsets small. Every product and the sum are exact in float32: scales have at most 11 significant bits.

    Args:
        qweight: uint8 ``[N, K*bits/8]``.
        scales: bf16, fp16 or fp32 ``[N, G]``; those in fp32 are rounded to fp16, and the note says by how much.
        zeros: whole numbers ``[N, G]``.
        repeat: groups of lut-v1 in one of the source.
        perm: see LutTensor.
    """
    exact = True
    if scales.dtype == torch.float32:
        scales, exact = narrow(scales, torch.float16, f"{name}.scales")
    elif not torch.isfinite(scales).all():
        raise FluteError(f"{name}.scales has values that are not finite: quantize the source again")
    table, middle = torch.arange(2**bits, dtype=torch.float32), int(zeros[0, 0])
    offsets = None
    if not (zeros == middle).all():
        middle = 2 ** (bits - 1)
        offsets = (scales.float() * (middle - zeros.float())).repeat_interleave(repeat, dim=1)
    scales = scales.repeat_interleave(repeat, dim=1)
    lut = LutTensor(qweight, scales, table - middle, name, offsets, perm)
    return Converted(lut, exact, "" if exact else ROUNDED)
