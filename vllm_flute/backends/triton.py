"""The Triton backend: fused kernels for GPUs without native ones, and the same in Triton's interpreter on a CPU.

The host side of triton_kernels.py. It reads nothing from the device, so that calls can be captured in CUDA graphs once
Triton has compiled for them, which the first call of each kind does (vLLM runs every size before it captures it).
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import counters, ops
from ..errors import FluteError
from ..layout import ROWS, Layout
from . import Kernel, rows

SLOT = 30  # of the page of counters: the last but the portable backend's
NAME = "triton"
_OLDEST = (3, 6)  # of torch 2.11, the oldest that this project supports
_CAPABILITY = (8, 0)  # of the first GPUs with bf16 in their matrix units
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Plan(NamedTuple):
    """The tile of a program, its warps and pipeline stages, and how many slices K is cut in."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    slices: int = 1


# Tile (M, N, K), warps, stages and wanted programs for each multiprocessor, by the most tokens. None of it is measured.
# One token: two 16-byte loads of 4-bit codes a thread, in two rows, which share their x. Up to 16 and 64: 16 is the
# least side of a tl.dot, 64 rows are what a warpgroup of Hopper takes. More: the largest tile whose sums (64 registers
# a thread) leave room for operands. Programs: with `stages` - 1 blocks of 4 KB (4 bits) ahead, two keep 24 KB of loads
# under way, what 4.8 TB/s on 132 multiprocessors at 0.7 us of latency needs; large tiles are bound by arithmetic.
_TILES = (
    (1, (1, 16, 512), 4, 4, 2),
    (16, (16, 64, 128), 4, 4, 2),
    (64, (64, 64, 128), 4, 3, 2),
    (2**63, (128, 128, 64), 8, 3, 1),
)
_FP32_BLOCK_K = 32  # fp32 has no matrix unit: a longer tile is unrolled to thousands of instructions
_LEAST_BLOCKS = 4  # of a slice of K, so that its pipeline fills
_ADD_BLOCK = 1024  # outputs of a program of add_slices: 8 for each of 128 threads


def plan(m: int, shards: Sequence[int], k: int, dtype: torch.dtype, multiprocessors: int) -> Plan:
    """How M tokens are multiplied with weights of K inputs and these output rows.

    K is cut only where whole tiles would leave multiprocessors idle: the slices cost a pass over M * N sums.
    """
    _, tile, warps, stages, programs = next(row for row in _TILES if m <= row[0])
    if dtype == torch.float32 and m > 1:
        tile = (*tile[:2], _FP32_BLOCK_K)
    one = Plan(*tile, warps, stages)
    blocks = -(-k // one.block_k)
    slices = max(1, min(blocks // _LEAST_BLOCKS, programs * multiprocessors // _tiles(m, shards, one)))
    # Of equally many blocks, so that none is without.
    return one._replace(slices=-(-blocks // -(-blocks // slices)))


def _tiles(m: int, shards: Sequence[int], chosen: Plan) -> int:
    return -(-m // chosen.block_m) * sum(-(-n // chosen.block_n) for n in shards)


def available() -> str:
    """Why these kernels do not run on this machine's GPU (asked only where there is one), or an empty string."""
    try:
        import triton
    except ImportError as e:
        return f"triton is not importable: {e}"
    oldest, capability = ".".join(map(str, _OLDEST)), ".".join(map(str, _CAPABILITY))
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"triton {triton.__version__} is older than {oldest}: install the one that your torch requires"
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < _CAPABILITY:
        name = torch.cuda.get_device_name()
        return f"{name} is of compute capability {found[0]}.{found[1]}, these kernels need {capability} or later"
    return ""


def kernels() -> list[Kernel]:
    why = available()
    return [Kernel(NAME, "triton", "weights in the dtype of x", SLOT, not why, why)]


def layout(codebooks: torch.Tensor, one_scale: bool = False) -> int:
    """The layout to pack weights in."""
    return ROWS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _constants(spec: Layout, chosen: Plan) -> dict:
    """What a kernel is compiled for, besides dtypes and alignment."""
    return {
        "BITS": spec.bits,
        "UNIT": min(spec.group_size & -spec.group_size, chosen.block_k),
        "WHOLE": spec.k % chosen.block_k == 0,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "STAGES": chosen.stages,
        "num_warps": chosen.warps,
        "enable_fp_fusion": True,  # Triton 3.9 warns where it is not said
    }


def linear(x: torch.Tensor, packed: torch.Tensor, header: torch.Tensor, bias: torch.Tensor | None = None):
    """``x[..., K] @ W^T + bias`` -> ``[..., N]`` in x's dtype, accumulated in fp32; equal calls have equal results.

    Args:
        x: bf16, fp16 or fp32 ``[..., K]``, on a GPU, or on a CPU where TRITON_INTERPRET=1 is set.
        packed: what rows.pack made, on x's device.
        header: int64, on the CPU.
        bias: ``[N]`` or None.

    Raises FluteError for a wrong shape, dtype or header, and on a CPU without the interpreter.
    """
    spec, qweight, scales, codebooks = rows.read(packed, header)
    if x.shape[-1] != spec.k or x.dtype not in _DTYPES:
        raise FluteError(f"x is {x.dtype} {list(x.shape)}, the weights need bf16, fp16 or fp32 [..., {spec.k}]")
    if bias is not None and bias.shape != (spec.n,):
        raise FluteError(f"bias is {list(bias.shape)}, the weights need [{spec.n}]")
    from . import triton_kernels

    if not x.is_cuda and not triton_kernels.INTERPRETED:
        raise FluteError(
            f"kernel {NAME!r} runs on {x.device.type} only interpreted: set TRITON_INTERPRET=1 before Python starts"
        )
    m, n, k = x.numel() // spec.k, spec.n, spec.k
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0:
        return y
    x, words = x.contiguous(), qweight.view(torch.int32)
    bias = None if bias is None else bias.contiguous()
    chosen = plan(m, spec.shards, k, x.dtype, _multiprocessors(x.device))
    cut = chosen.slices > 1
    sums = (x.new_empty((chosen.slices, m, n), dtype=torch.float32) if cut else y).view(-1)
    constants = _constants(spec, chosen)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        row = 0
        for first in range(0, len(spec.shards), triton_kernels.SHARDS):
            shards = spec.shards[first : first + triton_kernels.SHARDS]
            ends = list(itertools.accumulate(shards))
            ends += ends[-1:] * (triton_kernels.SHARDS - len(shards))
            grid = (_tiles(m, shards, chosen), chosen.slices)
            add = None if cut or bias is None else bias[row:]  # where K is cut, add_slices adds it
            tensors = (x, words[row:], scales[row:], codebooks[first:], add, sums[row:])
            sizes = (n, k, words.shape[1], spec.groups, spec.group_size, *ends)
            if m == 1:
                triton_kernels.gemv[grid](*tensors, *sizes, **constants)
            else:
                triton_kernels.gemm[grid](*tensors, m, *sizes, BLOCK_M=chosen.block_m, **constants)
            row += ends[-1]
        if cut:
            grid = (-(-m * n // _ADD_BLOCK),)
            triton_kernels.add_slices[grid](sums, bias, y, m, n, chosen.slices, BLOCK=_ADD_BLOCK)
    counters.add(SLOT, m, packed.numel())
    return y


def _linear(x, packed, header, bias, N, kernel):
    n = Layout.read(header).n
    if kernel not in ("", NAME):
        raise FluteError(f"kernel {kernel!r} does not run on {x.device}: this backend has only {NAME!r}")
    if n != N:
        raise FluteError(f"the weights have N={n}, the caller said N={N}")
    return linear(x, packed, header, bias)


def register(dispatch_key: str) -> None:
    """Implement the operators with this backend for one dispatch key (CPU, CUDA)."""
    for name, function in ((ops.LINEAR, _linear), (ops.PACK, rows.pack), (ops.UNPACK, rows.unpack)):
        ops.library.impl(name, function, dispatch_key)
