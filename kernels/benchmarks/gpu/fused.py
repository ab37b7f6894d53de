"""What a decode step counts on: gate and up projections with SwiGLU in their kernel, and one launch a call."""

import itertools

import torch
from weights import TRITON, Matrix

from vllm_flute import ops

GATES = (Matrix("gate.a", (1024, 1024), 640), Matrix("gate.b", (200, 200), 384), Matrix("gate.c", (14336, 14336), 4096))
SMALL_GATE = Matrix("small.gate", (24, 24), 128)
ONE_LAUNCH = ("mma", "wgmma")  # kernels that are one launch whatever is fused to them


OTHER_SUMS = ("mma",)  # kernels that divide the work otherwise where SwiGLU is fused to them


def neighbours(y: torch.Tensor) -> list[torch.Tensor]:
    """``y [M, N]`` with each of its halves one rounding up or down, and as far as sums in fp32 of another order may be.

    Those have a part in 2^24 of the terms' magnitudes as an error for each of some additions; of random terms, whose
    sums y are, the magnitudes together are some ten times the largest y.
    """
    gate, up = y.float().chunk(2, dim=-1)
    eps, order = torch.finfo(y.dtype).eps, 2**-19 * y.float().abs().max()
    steps = [(1 + sign * eps, sign * order) for sign in (-1, 0, 1)]
    far = [[half * by + (half.sign() * plus) for by, plus in steps] for half in (gate, up)]
    return [torch.cat(pair, dim=-1).to(y.dtype) for pair in itertools.product(*far)]


def launches(call) -> int:
    """Kernels, copies and fills of the device that a call starts, once its workspace is there."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def gated(checker, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype) -> None:
    """silu(gate) * up of the operator beside the product's own halves: within one rounding of silu's exponential where
    the sums are those of the product alone, else of what halves give that differ by one rounding.
    """
    _, packed = checker.layer(matrix, bits, group_size, dtype)
    for name in checker.kernels:
        if name == TRITON:
            continue
        layer = packed[name]
        for m in (1, 8, 17, 64, 200):
            if m > max(checker.tokens):
                continue
            x, bias = checker.activations(m, matrix.k, dtype), checker.activations(1, matrix.n, dtype)[0]
            what = f"gated {matrix.name} {bits} bits g{group_size} {dtype} M={m}"

            def case(name=name, layer=layer, x=x, bias=bias, what=what):
                weights = layer.packed, layer.header, bias, layer.n, name
                y, found = ops.lut_linear_op(x, *weights), ops.lut_linear_silu_op(x, *weights)
                expected, slack = ops.silu_and_mul(y).float(), 2 * torch.finfo(x.dtype).eps
                around = torch.stack([ops.silu_and_mul(neighbour).float() for neighbour in neighbours(y)])
                spread = (around - expected).abs().amax(0) if name in OTHER_SUMS else 0
                checker.results.calls[name] += 1
                if ((found.float() - expected).abs() > slack * expected.abs() + spread + 1e-6).any():
                    worst = (found.float() - expected).abs().max().item()
                    checker.results.fail(name, what, f"silu(gate) * up differs by {worst:.3g}")
                if checker.device == "cuda" and name in ONE_LAUNCH:
                    for of, op in (("the product", ops.lut_linear_op), ("SwiGLU", ops.lut_linear_silu_op)):
                        count = launches(lambda op=op: op(x, *weights))
                        if count != 1:
                            checker.results.fail(name, what, f"{of} is {count} launches, not 1")

            checker.guarded(name, what, case)
    checker.results.by_kind["gated"] += 1
