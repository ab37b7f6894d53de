"""What a decode step counts on: gate and up projections with SwiGLU in their kernel, and one launch a call."""

import torch
from weights import TRITON, Matrix

from vllm_flute import ops

GATES = (Matrix("gate.a", (1024, 1024), 640), Matrix("gate.b", (200, 200), 384), Matrix("gate.c", (14336, 14336), 4096))
SMALL_GATE = Matrix("small.gate", (24, 24), 128)
ONE_LAUNCH = ("mma", "wgmma")  # kernels that are one launch whatever is fused to them


def launches(call) -> int:
    """Kernels, copies and fills of the device that a call starts, once its workspace is there."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def gated(checker, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype) -> None:
    """silu(gate) * up of the operator beside the product's own halves, within one rounding of silu's exponential."""
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
                expected = ops.silu_and_mul(y)
                checker.results.calls[name] += 1
                if not torch.allclose(found, expected, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-6):
                    worst = (found.float() - expected.float()).abs().max().item()
                    checker.results.fail(name, what, f"silu(gate) * up differs by {worst:.3g}")
                if checker.device == "cuda" and name in ONE_LAUNCH:
                    for of, op in (("the product", ops.lut_linear_op), ("SwiGLU", ops.lut_linear_silu_op)):
                        count = launches(lambda op=op: op(x, *weights))
                        if count != 1:
                            checker.results.fail(name, what, f"{of} is {count} launches, not 1")

            checker.guarded(name, what, case)
    checker.results.by_kind["gated"] += 1
