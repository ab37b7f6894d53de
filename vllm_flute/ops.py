"""Operator schemas and their fakes; the backends register the implementations.

``lut_linear`` is the one operator of a quantized layer: it is functional, reads nothing on the host but the
header (a CPU tensor), and chooses a kernel by M inside, out of sight of torch.compile. The ABI version is part
of each name, because a compiled graph that is cached on disk refers to the operator by name only.
"""

import torch

from .layout import ABI

library = torch.library.Library("vllm_flute", "DEF")

LINEAR, LINEAR_SILU, PACK, UNPACK = (
    f"{name}_v{ABI}" for name in ("lut_linear", "lut_linear_silu", "lut_pack", "lut_unpack")
)

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
