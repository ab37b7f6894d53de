"""What a decode step counts on: SwiGLU and RMS norms in the kernels of layers beside them, and one launch a call."""

import itertools

import torch
from weights import TRITON, Matrix

from vllm_flute import ops

GATES = (Matrix("gate.a", (1024, 1024), 640), Matrix("gate.b", (200, 200), 384), Matrix("gate.c", (14336, 14336), 4096))
SMALL_GATE = Matrix("small.gate", (24, 24), 128)
NORMS = (Matrix("norm.a", (4096,), 1024), Matrix("norm.b", (264,), 640))
SMALL_NORM = Matrix("small.norm", (24,), 128)
EPSILON = 1e-5
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


def normed(checker, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype) -> None:
    """A norm divided between two layers: the first's outputs are those of its product, rounded alike; the second's
    product differs from that of the norm itself as its input does, by a rounding.
    """
    _, packed = checker.layer(matrix, bits, group_size, dtype)
    for name in checker.kernels:
        if name == TRITON:
            continue
        layer = packed[name]
        for m in (1, 8, 17, 32, 40):
            if m > max(checker.tokens):
                continue
            x, residual = checker.activations(m, matrix.k, dtype), checker.activations(m, matrix.n, dtype)
            weight, bias = checker.activations(2, matrix.n, dtype)
            what = f"normed {matrix.name} {bits} bits g{group_size} {dtype} M={m}"

            def case(name=name, layer=layer, x=x, residual=residual, weight=weight, bias=bias, m=m, what=what):
                call, weights = (residual, weight, EPSILON), (layer.packed, layer.header, bias, layer.n, name)
                scaled, total, squares = ops.lut_linear_add_norm_op(x, *call, *weights)
                sums = ops.lut_linear_op(x, *weights).float() + residual.float()
                eps, mean = torch.finfo(x.dtype).eps, sums.square().mean(-1, keepdim=True)
                if m <= ops.NORM_TOKENS:
                    right = torch.equal(scaled, (sums * weight.float()).to(x.dtype))
                    found = squares[:m].sum(-1, keepdim=True) / layer.n
                    right &= ((found - mean).abs() <= 1e-4 * mean).all().item()
                else:
                    exact = sums * torch.rsqrt(mean + EPSILON) * weight.float()
                    right = ((scaled.float() - exact).abs() <= 2 * eps * exact.abs() + 1e-6).all().item()
                checker.results.calls[name] += 1
                if not right or not torch.equal(total, sums.to(x.dtype)):
                    checker.results.fail(name, what, "the sum, or what becomes of it, is not that of the product")

                parts = -(-matrix.k // ops.STRIP_ROWS) * ops.STRIP_PARTS
                of_x = torch.rand(ops.NORM_TOKENS, parts, device=x.device) + 0.5
                expected = ops.lut_linear_op(ops._normed(x, of_x, EPSILON), *weights).float()
                found = ops.lut_linear_normed_op(x, of_x, EPSILON, *weights).float()
                checker.results.calls[name] += 1
                # The inputs' roundings add up as random numbers do, to some units of the largest result.
                if not ((found - expected).abs() <= 4 * eps * expected.abs().max()).all():
                    worst = (found - expected).abs().max().item()
                    checker.results.fail(name, what, f"the product of normed tokens differs by {worst:.3g}")
                if (
                    checker.device == "cuda"
                    and name == "mma"
                    and m <= ops.NORM_TOKENS
                    and torch.cuda.get_device_capability() == (9, 0)
                ):
                    for of, op in (
                        ("the layer before a norm", lambda: ops.lut_linear_add_norm_op(x, *call, *weights)),
                        ("the layer after a norm", lambda: ops.lut_linear_normed_op(x, of_x, EPSILON, *weights)),
                    ):
                        if (count := launches(op)) != 1:
                            checker.results.fail(name, what, f"{of} is {count} launches, not 1")

            checker.guarded(name, what, case)
    checker.results.by_kind["normed"] += 1
