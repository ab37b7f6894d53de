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


def calls(checker, kind: str, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype, tokens: tuple[int, ...]):
    """(kernel, packed layer, tokens, what a failure is called) for all kernels with these operators."""
    _, packed = checker.layer(matrix, bits, group_size, dtype)
    for name, m in itertools.product((name for name in checker.kernels if name != TRITON), tokens):
        if m <= max(checker.tokens):
            yield name, packed[name], m, f"{kind} {matrix.name} {bits} bits g{group_size} {dtype} M={m}"
    checker.results.by_kind[kind] += 1


def one_launch(checker, name: str, what: str, by_name: dict) -> None:
    for of, call in by_name.items():
        if (count := launches(call)) != 1:
            checker.results.fail(name, what, f"{of} is {count} launches, not 1")


def gated(checker, *layer) -> None:
    """silu(gate) * up of the operator beside the product's own halves: within one rounding of silu's exponential where
    the sums are those of the product alone, else of what halves give that differ by one rounding.

    layer: matrix, bits, group size and dtype.
    """
    matrix, *_, dtype = layer
    for name, packed, m, what in calls(checker, "gated", *layer, (1, 8, 17, 64, 200)):
        x, bias = checker.activations(m, matrix.k, dtype), checker.activations(1, matrix.n, dtype)[0]
        weights = packed.packed, packed.header, bias, packed.n, name

        def case(name=name, weights=weights, x=x, what=what):
            y, found = ops.lut_linear_op(x, *weights), ops.lut_linear_silu_op(x, *weights)
            expected, slack = ops.silu_and_mul(y).float(), 2 * torch.finfo(x.dtype).eps
            around = torch.stack([ops.silu_and_mul(neighbour).float() for neighbour in neighbours(y)])
            spread = (around - expected).abs().amax(0) if name in OTHER_SUMS else 0
            checker.results.calls[name] += 1
            if ((found.float() - expected).abs() > slack * expected.abs() + spread + 1e-6).any():
                worst = (found.float() - expected).abs().max().item()
                checker.results.fail(name, what, f"silu(gate) * up differs by {worst:.3g}")
            if checker.device == "cuda" and name in ONE_LAUNCH:
                product, swiglu = (lambda op=op: op(x, *weights) for op in (ops.lut_linear_op, ops.lut_linear_silu_op))
                one_launch(checker, name, what, {"the product": product, "SwiGLU": swiglu})

        checker.guarded(name, what, case)


def normed(checker, *layer) -> None:
    """A norm divided between two layers: the first's outputs are those of its product, rounded alike; the second's
    product differs from that of the norm itself as its input does, by a rounding.

    layer: matrix, bits, group size and dtype.
    """
    matrix, *_, dtype = layer
    for name, packed, m, what in calls(checker, "normed", *layer, (1, 8, 17, 32, 40)):
        x, residual = checker.activations(m, matrix.k, dtype), checker.activations(m, matrix.n, dtype)
        weight, bias = checker.activations(2, matrix.n, dtype)
        weights = packed.packed, packed.header, bias, packed.n, name
        squares = torch.rand(ops.NORM_TOKENS, ops.norm_parts(matrix.k), device=x.device) + 0.5  # of x, any

        def case(name=name, weights=weights, x=x, norm=(residual, weight, EPSILON), squares=squares, m=m, what=what):
            residual, weight, _ = norm
            scaled, total, made = ops.lut_linear_add_norm_op(x, *norm, *weights)
            sums = ops.lut_linear_op(x, *weights).float() + residual.float()
            eps, mean = torch.finfo(x.dtype).eps, sums.square().mean(-1, keepdim=True)
            if m <= ops.NORM_TOKENS:
                right = torch.equal(scaled, (sums * weight.float()).to(x.dtype))
                found = made[:m].sum(-1, keepdim=True) / sums.shape[-1]
                right &= ((found - mean).abs() <= 1e-4 * mean).all().item()
            else:
                exact = sums * torch.rsqrt(mean + EPSILON) * weight.float()
                right = ((scaled.float() - exact).abs() <= 2 * eps * exact.abs() + 1e-6).all().item()
            checker.results.calls[name] += 1
            if not right or not torch.equal(total, sums.to(x.dtype)):
                checker.results.fail(name, what, "the sum, or what becomes of it, is not that of the product")

            expected = ops.lut_linear_op(ops.scale_tokens(x, squares, EPSILON), *weights).float()
            found = ops.lut_linear_normed_op(x, squares, EPSILON, *weights).float()
            checker.results.calls[name] += 1
            # The inputs' roundings add up as random numbers do, to some units of the largest result.
            if not ((found - expected).abs() <= 4 * eps * expected.abs().max()).all():
                worst = (found - expected).abs().max().item()
                checker.results.fail(name, what, f"the product of normed tokens differs by {worst:.3g}")
            hopper = checker.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
            if hopper and name == "mma" and m <= ops.NORM_TOKENS:
                before = lambda: ops.lut_linear_add_norm_op(x, *norm, *weights)  # noqa: E731
                after = lambda: ops.lut_linear_normed_op(x, squares, EPSILON, *weights)  # noqa: E731
                one_launch(checker, name, what, {"the layer before a norm": before, "the layer after a norm": after})

        checker.guarded(name, what, case)
