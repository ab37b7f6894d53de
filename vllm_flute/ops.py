"""Operator schemas and their fakes; the backends register the implementations.

``lut_linear`` is the one operator of a quantized layer: it is functional, reads nothing on the host but the
header (a CPU tensor), and chooses a kernel by M inside, out of sight of torch.compile. The ABI version is part
of each name, because a compiled graph that is cached on disk refers to the operator by name only.
"""

import torch

from .layout import ABI

library = torch.library.Library("vllm_flute", "DEF")

LINEAR, LINEAR_SILU, LINEAR_ADD_NORM, LINEAR_NORMED, LINEAR_NORMED_SILU, PACK, UNPACK = (
    f"lut_{name}_v{ABI}"
    for name in ("linear", "linear_silu", "linear_add_norm", "linear_normed", "linear_normed_silu", "pack", "unpack")
)
NORM_TOKENS = 32  # kernels/cuda/launch.h: kNormTokens

# x [..., K] bf16, fp16 or fp32 -> y [..., N] in x's dtype, accumulated in fp32. kernel "": dispatch.
library.define(
    f"{LINEAR}(Tensor x, Tensor packed, Tensor header, Tensor? bias, SymInt N, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
# The same, and of its halves silu(y[..., :N/2]) * y[..., N/2:] -> [..., N/2]: SwiGLU of fused gate and up projections.
library.define(
    f"{LINEAR_SILU}(Tensor x, Tensor packed, Tensor header, Tensor? bias, SymInt N, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
# A residual and the RMS norm after a layer, divided between that layer and those that read the norm, so that at few
# tokens it is no kernel of its own. Up to NORM_TOKENS tokens, lut_linear_add_norm -> (scaled [..., N], sum [..., N],
# squares fp32 [NORM_TOKENS, parts of N]): sum = residual + y, scaled = sum * weight, and a token's squares add up to
# those of its sum. The norm is scaled / sqrt(all squares / N + epsilon), and lut_linear_normed(scaled, squares, ...) is
# lut_linear of that. Of more tokens `scaled` is the norm itself and squares mean nothing.
library.define(
    f"{LINEAR_ADD_NORM}(Tensor x, Tensor residual, Tensor weight, float epsilon, Tensor packed, Tensor header, "
    "Tensor? bias, SymInt N, str kernel) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
for _name in (LINEAR_NORMED, LINEAR_NORMED_SILU):
    library.define(
        f"{_name}(Tensor x, Tensor squares, float epsilon, Tensor packed, Tensor header, "
        "Tensor? bias, SymInt N, str kernel) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )
# qweight uint8 [N, K*bits/8], scales bf16/fp16 [N, G], codebooks fp32 [S, 2^bits] -> packed uint8 [bytes].
library.define(
    f"{PACK}(Tensor qweight, Tensor scales, Tensor codebooks, Tensor header) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The inverse of pack, for tests and for moving weights between backends.
library.define(
    f"{UNPACK}(Tensor packed, Tensor header) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

lut_linear_op = getattr(torch.ops.vllm_flute, LINEAR)
lut_linear_silu_op = getattr(torch.ops.vllm_flute, LINEAR_SILU)
lut_linear_add_norm_op = getattr(torch.ops.vllm_flute, LINEAR_ADD_NORM)
lut_linear_normed_op = getattr(torch.ops.vllm_flute, LINEAR_NORMED)
lut_linear_normed_silu_op = getattr(torch.ops.vllm_flute, LINEAR_NORMED_SILU)
lut_pack_op = getattr(torch.ops.vllm_flute, PACK)
lut_unpack_op = getattr(torch.ops.vllm_flute, UNPACK)


@torch.library.register_fake(f"vllm_flute::{LINEAR}", lib=library)
def _linear_fake(x, packed, header, bias, N, kernel):
    return x.new_empty((*x.shape[:-1], N))


@torch.library.register_fake(f"vllm_flute::{LINEAR_SILU}", lib=library)
def _linear_silu_fake(x, packed, header, bias, N, kernel):
    return x.new_empty((*x.shape[:-1], N // 2))


def _linear_silu(x, packed, header, bias, N, kernel):
    """Where no backend does both at once."""
    return silu_and_mul(lut_linear_op(x, packed, header, bias, N, kernel))


library.impl(LINEAR_SILU, _linear_silu, "CompositeExplicitAutograd")


def silu_and_mul(y: torch.Tensor) -> torch.Tensor:
    """``y [..., N]`` -> ``silu(y[..., :N/2]) * y[..., N/2:]``, rounded after each of the two as vLLM's layer does."""
    half = y.shape[-1] // 2
    return torch.nn.functional.silu(y[..., :half]) * y[..., half:]


def norm_parts(N):
    """Sums of squares that a token of N values has: four for 64, as kernels/cuda/launch.h."""
    return (N + 63) // 64 * 4


@torch.library.register_fake(f"vllm_flute::{LINEAR_ADD_NORM}", lib=library)
def _linear_add_norm_fake(x, residual, weight, epsilon, packed, header, bias, N, kernel):
    y = x.new_empty((*x.shape[:-1], N))
    return y, torch.empty_like(y), x.new_empty((NORM_TOKENS, norm_parts(N)), dtype=torch.float32)


@torch.library.register_fake(f"vllm_flute::{LINEAR_NORMED}", lib=library)
def _linear_normed_fake(x, squares, epsilon, packed, header, bias, N, kernel):
    return x.new_empty((*x.shape[:-1], N))


@torch.library.register_fake(f"vllm_flute::{LINEAR_NORMED_SILU}", lib=library)
def _linear_normed_silu_fake(x, squares, epsilon, packed, header, bias, N, kernel):
    return x.new_empty((*x.shape[:-1], N // 2))


def _linear_add_norm(x, residual, weight, epsilon, packed, header, bias, N, kernel):
    """Where no backend does both at once, as are the two below."""
    if residual.shape != (*x.shape[:-1], N) or weight.shape != (N,):
        raise RuntimeError(
            f"vllm_flute: residual is {list(residual.shape)} and the norm's weight {list(weight.shape)}, "
            f"expected {[*x.shape[:-1], N]} and [{N}]"
        )
    total = lut_linear_op(x, packed, header, bias, N, kernel).float() + residual.float()
    *_, squares = _linear_add_norm_fake(x, residual, weight, epsilon, packed, header, bias, N, kernel)
    sums, tokens = total.square().sum(-1), total.numel() // N
    if tokens > NORM_TOKENS:
        normed = (total * torch.rsqrt(sums / N + epsilon).unsqueeze(-1)).to(x.dtype) * weight
        return normed, total.to(x.dtype), squares.fill_(torch.nan)
    squares.zero_()[:tokens, 0] = sums.flatten()
    return (total * weight.float()).to(x.dtype), total.to(x.dtype), squares


def scale_tokens(x: torch.Tensor, squares: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The norm ``[..., K]`` of lut_linear_add_norm's outputs, in x's dtype."""
    tokens = x.numel() // x.shape[-1]
    if tokens > NORM_TOKENS:
        return x
    factors = torch.rsqrt(squares[:tokens].sum(-1) / x.shape[-1] + epsilon)
    return (x.float() * factors.reshape(*x.shape[:-1], 1)).to(x.dtype)


def _linear_normed(x, squares, epsilon, packed, header, bias, N, kernel):
    return lut_linear_op(scale_tokens(x, squares, epsilon), packed, header, bias, N, kernel)


def _linear_normed_silu(x, squares, epsilon, packed, header, bias, N, kernel):
    return lut_linear_silu_op(scale_tokens(x, squares, epsilon), packed, header, bias, N, kernel)


library.impl(LINEAR_ADD_NORM, _linear_add_norm, "CompositeExplicitAutograd")
library.impl(LINEAR_NORMED, _linear_normed, "CompositeExplicitAutograd")
library.impl(LINEAR_NORMED_SILU, _linear_normed_silu, "CompositeExplicitAutograd")


@torch.library.register_fake(f"vllm_flute::{PACK}", lib=library)
def _pack_fake(qweight, scales, codebooks, header):
    return qweight.new_empty((torch.library.get_ctx().new_dynamic_size(),))


@torch.library.register_fake(f"vllm_flute::{UNPACK}", lib=library)
def _unpack_fake(packed, header):
    ctx = torch.library.get_ctx()
    n, row, groups, shards, size = (ctx.new_dynamic_size() for _ in range(5))
    return (
        packed.new_empty((n, row)),
        packed.new_empty((n, groups), dtype=torch.bfloat16),
        packed.new_empty((shards, size), dtype=torch.float32),
    )
