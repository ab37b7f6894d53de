"""The portable backend: dequantize and multiply with torch, on any device.

The slow path for a machine that no native kernel supports; dispatch says so when it is taken. Packed layout: rows.py.
"""

import torch

from .. import counters, ops
from ..errors import FluteError
from ..format import LutTensor
from ..layout import ROWS
from . import Kernel, rows

SLOT = counters.SLOTS - 1
NAME = "portable"


def kernels() -> list[Kernel]:
    return [Kernel(NAME, "torch", "weights in the dtype of x", SLOT, True, "")]


def layout(codebooks: torch.Tensor, one_scale: bool = False) -> int:
    """The layout to pack weights in."""
    return ROWS


def _linear(x, packed, header, bias, N, kernel):
    spec, qweight, scales, codebooks = rows.read(packed, header)
    if kernel not in ("", NAME):
        raise FluteError(f"kernel {kernel!r} does not run on {x.device}: this backend has only {NAME!r}")
    if x.shape[-1] != spec.k or spec.n != N:
        raise FluteError(f"x has K={x.shape[-1]} for weights of N={spec.n}, K={spec.k} (caller said N={N})")
    qweight = qweight[:, : spec.k * spec.bits // 8]
    shards = zip(qweight.split(spec.shards), scales.split(spec.shards), codebooks, strict=True)
    weight = torch.cat([LutTensor(q, s, c).dequantize(x.dtype) for q, s, c in shards])
    counters.add(SLOT, x.numel() // spec.k, packed.numel())
    return torch.nn.functional.linear(x, weight, bias)


def register(dispatch_key: str) -> None:
    """Implement the operators with this backend for one dispatch key (CPU, CUDA)."""
    for name, function in ((ops.LINEAR, _linear), (ops.PACK, rows.pack), (ops.UNPACK, rows.unpack)):
        ops.library.impl(name, function, dispatch_key)
