"""Other kernels of few bits, each where its package can be imported; what is timed is what a server would call.

Their formats are not ours: NF4 of bitsandbytes is a table of 16 values with a scale for 64 weights, the others are
symmetric integers times a scale. Each comes with the weight ``[N, K]`` that it stands for, to check that it was called
as it is meant. Codes rotate over cold memory as ours do; of most peers all copies share the scales, to their advantage.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import Candidate, copies_for, reason


class Peer(NamedTuple):
    """A peer's candidate and the dense weight, bf16 ``[N, K]``, that it multiplies with."""

    candidate: Candidate
    weight: torch.Tensor


def _known(function: Callable, **values: object) -> dict:
    """Those of ``values`` that the function has a parameter for: vLLM's change from release to release."""
    return {name: value for name, value in values.items() if name in inspect.signature(function).parameters}


def _integers(n: int, k: int, bits: int, group: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(codes uint8 ``[N, K]``, scales bf16 ``[N, K/group]``, dense bf16 ``[N, K]``) of symmetric integers."""
    on = {"generator": generator, "device": generator.device}
    codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, **on)
    scales = (torch.rand(n, k // group, **on) * 0.1 + 0.05).bfloat16()
    values = codes.bfloat16() - 2 ** (bits - 1)
    return codes, scales, (values.view(n, -1, group) * scales[:, :, None]).view(n, k)


def _gptq(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes ``[N, K]`` as GPTQ has them: int32 ``[K/8, N]``, the lowest input in the lowest bits."""
    octets = codes.T.reshape(codes.shape[1] // 8, 8, codes.shape[0]).to(torch.int64)
    packed = sum(octets[:, i] << 4 * i for i in range(8))
    return (packed - (packed >> 31 << 32)).to(torch.int32)


def bitsandbytes(n: int, k: int, bits: int, group: int, generator: torch.Generator, cache: int) -> Peer:
    from bitsandbytes import functional, matmul_4bit

    weight = torch.randn(n, k, generator=generator, device=generator.device, dtype=torch.bfloat16) * 0.1
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nbytes = codes.nbytes + state.absmax.nbytes

    def call(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return matmul_4bit(x, copy.t(), quant_state=state)

    copies = [codes.clone() for _ in range(copies_for(nbytes, cache))]
    candidate = Candidate("bitsandbytes nf4", "bitsandbytes nf4", 4, 64, nbytes, call, copies)
    return Peer(candidate, functional.dequantize_4bit(codes, state))


def marlin(n: int, k: int, bits: int, group: int, generator: torch.Generator, cache: int) -> Peer:
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    codes, scales, dense = _integers(n, k, bits, group, generator)
    none = torch.empty(0, dtype=torch.int32, device=generator.device)
    repack = _custom_ops.gptq_marlin_repack
    sizes = {"size_k": k, "size_n": n, "num_bits": 4}
    weight = repack(**_known(repack, b_q_weight=_gptq(codes), perm=none, **sizes))
    permuted = marlin_utils.marlin_permute_scales(scales.T.contiguous(), k, n, group)
    workspace = marlin_utils.marlin_make_workspace_new(generator.device, 4)
    apply = marlin_utils.apply_gptq_marlin_linear
    fixed = {
        "weight_scale": permuted,
        "weight_zp": none,
        "g_idx": none,
        "g_idx_sort_indices": none,
        "workspace": workspace,
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": n,
        "input_size_per_partition": k,
        "is_k_full": True,
    }
    fixed = _known(apply, **fixed)
    nbytes = weight.nbytes + permuted.nbytes
    copies = [weight.clone() for _ in range(copies_for(nbytes, cache))]
    candidate = Candidate(
        "vllm marlin", "vllm marlin", 4, group, nbytes, lambda x, copy: apply(x, copy, **fixed), copies
    )
    return Peer(candidate, dense)


def machete(n: int, k: int, bits: int, group: int, generator: torch.Generator, cache: int) -> Peer:
    from vllm import _custom_ops
    from vllm.scalar_type import scalar_types

    codes, scales, dense = _integers(n, k, bits, group, generator)
    # Packed along the inputs, and column-major, as its prepacking wants it.
    packed = _gptq(codes).t().contiguous().t()
    weight = _custom_ops.machete_prepack_B(packed, torch.bfloat16, scalar_types.uint4b8, torch.bfloat16)
    group_scales = scales.T.contiguous()

    def call(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        options = {"b_type": scalar_types.uint4b8, "b_group_scales": group_scales, "b_group_size": group}
        return _custom_ops.machete_mm(a=x, b_q=copy, **options)

    nbytes = weight.nbytes + group_scales.nbytes
    copies = [weight.clone(memory_format=torch.preserve_format) for _ in range(copies_for(nbytes, cache))]
    return Peer(Candidate("vllm machete", "vllm machete", 4, group, nbytes, call, copies), dense)


def gemlite(n: int, k: int, bits: int, group: int, generator: torch.Generator, cache: int) -> Peer:
    from gemlite.core import DType, GemLiteLinear

    codes, scales, dense = _integers(n, k, bits, group, generator)
    zeros = torch.full_like(scales, 2 ** (bits - 1))

    def make() -> GemLiteLinear:
        types = {"input_dtype": DType.BF16, "output_dtype": DType.BF16}
        layer = GemLiteLinear(bits, group_size=group, in_features=k, out_features=n, **types)
        layer.pack(codes.clone(), scales.clone(), zeros.clone(), None)
        return layer

    nbytes = codes.numel() * bits // 8 + scales.nbytes + zeros.nbytes
    copies = [make() for _ in range(copies_for(nbytes, cache))]
    name = f"gemlite {bits} bits"
    return Peer(Candidate(name, "gemlite", bits, group, nbytes, lambda x, layer: layer(x), copies), dense)


def humming(n: int, k: int, bits: int, group: int, generator: torch.Generator, cache: int) -> Peer:
    from humming.layer import HummingLayer

    def make() -> HummingLayer:
        config = {"dtype": f"int{bits}", "group_size": group}
        layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
        layer.load_from_unquantized(dense)
        layer.transform()
        layer.prepare_default_kernel_configs()
        return layer

    _, scales, dense = _integers(n, k, bits, group, generator)
    nbytes = n * k * bits // 8 + scales.nbytes
    copies = [make() for _ in range(copies_for(nbytes, cache))]
    name = f"humming {bits} bits"
    return Peer(Candidate(name, "humming", bits, group, nbytes, lambda x, layer: layer(x), copies), dense)


# By the candidates' source: what has to be importable, the widths that are timed, and what makes one.
PEERS = {
    "bitsandbytes nf4": ("bitsandbytes", (4,), bitsandbytes),
    "vllm marlin": ("vllm", (4,), marlin),
    "vllm machete": ("vllm", (4,), machete),
    "gemlite": ("gemlite", (4, 2), gemlite),
    "humming": ("humming", (4, 3, 2), humming),
}
_TOLERANCE = 0.03  # of the norm: bf16 results and scales; a wrong layout gives about 1.4


def absent() -> dict[str, str]:
    """{source: why it is not timed} of those whose package does not import."""
    found = {}
    for name, (package, _, _) in PEERS.items():
        try:
            __import__(package)
        except Exception as e:  # a package may fail in any way where its CUDA part does not fit
            found[name] = reason(e)
    return found


def candidates(
    n: int, k: int, group: int, generator: torch.Generator, cache: int, missing: dict[str, str]
) -> list[Candidate]:
    """The peers' candidates of a shape; one that fails, or whose result is not its weight's, joins ``missing``."""
    found = []
    for name, (_, widths, make) in PEERS.items():
        for bits in widths:
            if name in missing:
                continue
            try:
                candidate, dense = make(n, k, bits, group, generator, cache)
                x = torch.randn(16, k, generator=generator, device=generator.device).bfloat16()
                exact = x.float() @ dense.float().T
                error = ((candidate.call(x, candidate.copies[0]).float() - exact).norm() / exact.norm()).item()
                if not error <= _TOLERANCE:
                    raise RuntimeError(f"its result is wrong by {error:.3g} of the norm")
                found.append(candidate)
            except Exception as e:
                missing[name] = f"{n}x{k}, {bits} bits: {reason(e)}"
                if isinstance(e, torch.AcceleratorError):
                    raise
    return found
