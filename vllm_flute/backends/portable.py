"""The portable backend: dequantize and multiply with torch, on any device.

The slow path for a machine that no native kernel supports; dispatch says so when it is taken. Packed layout
ROWS: codebooks fp32 [S, 2^bits], then scales [N, G], then qweight [N, K*bits/8], as bytes.
"""

import torch

from .. import counters, ops
from ..errors import FluteError
from ..format import LutTensor
from ..layout import ROWS, Layout
from . import Kernel

SLOT = counters.SLOTS - 1
NAME = "portable"


def kernels() -> list[Kernel]:
    return [Kernel(NAME, "torch", "weights in the dtype of x", SLOT, True, "")]


def layout(codebooks: torch.Tensor, one_scale: bool = False) -> int:
    """The layout to pack weights in."""
    return ROWS


def _sections(spec: Layout) -> tuple[int, int, int]:
    return len(spec.shards) * 2**spec.bits * 4, spec.n * spec.groups * 2, spec.n * spec.k * spec.bits // 8


def _pack(qweight, scales, codebooks, header):
    return torch.cat([t.contiguous().view(torch.uint8).reshape(-1) for t in (codebooks, scales, qweight)])


def _unpack(packed, header):
    spec = Layout.read(header)
    sections = _sections(spec)
    if spec.layout != ROWS or packed.numel() != sum(sections):
        raise FluteError(
            f"packed weights of {packed.numel()} bytes do not match their header {spec}: "
            f"expected layout rows and {sum(sections)} bytes; pack them again on this backend"
        )
    codebooks, scales, qweight = packed.split(sections)
    return (
        qweight.view(spec.n, -1).clone(),
        scales.view(spec.scale_dtype).view(spec.n, -1).clone(),
        codebooks.view(torch.float32).view(len(spec.shards), -1).clone(),
    )


def _linear(x, packed, header, bias, N, kernel):
    spec = Layout.read(header)
    if kernel not in ("", NAME):
        raise FluteError(f"kernel {kernel!r} does not run on {x.device}: this backend has only {NAME!r}")
    if x.shape[-1] != spec.k or spec.n != N:
        raise FluteError(f"x has K={x.shape[-1]} for weights of N={spec.n}, K={spec.k} (caller said N={N})")
    qweight, scales, codebooks = _unpack(packed, header)
    rows = zip(qweight.split(spec.shards), scales.split(spec.shards), codebooks, strict=True)
    weight = torch.cat([LutTensor(q, s, c).dequantize(x.dtype) for q, s, c in rows])
    counters.add(SLOT, x.numel() // spec.k, packed.numel())
    return torch.nn.functional.linear(x, weight, bias)


def register(dispatch_key: str) -> None:
    """Implement the operators with this backend for one dispatch key (CPU, CUDA)."""
    for name, function in ((ops.LINEAR, _linear), (ops.PACK, _pack), (ops.UNPACK, _unpack)):
        ops.library.impl(name, function, dispatch_key)
