"""vLLM's own CPU matrix multiplications, called as its linear layers call them, for `vllm-flute bench kernels`.

Each function takes a weight, fp32 ``[N, K]``, and a group size, prepares it once, and returns (bytes of the prepared
weight, build): ``build()`` makes one more copy and returns ``x bf16 [M, K] -> [M, N]``. The forms are those of
vllm/model_executor/kernels/linear/{mixed_precision,scaled_mm}/cpu.py and layers/utils.py of vLLM 0.32. All of them
raise RuntimeError where the build for this CPU has no such operator. vLLM itself takes W4A8 only where there is AMX.
"""

from collections.abc import Callable

import torch
from vllm import _custom_ops as custom
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

Prepared = tuple[int, Callable[[], Callable[[torch.Tensor], torch.Tensor]]]
_CACHED_PRIMITIVES = 32  # oneDNN handles' cache size, as vLLM sets it
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ZERO_POINTS = -2004318072  # 0x88888888: eight zero points of 8


def onednn_bf16(weight: torch.Tensor, group_size: int) -> Prepared:
    dense = weight.bfloat16()

    def build():
        handle = custom.create_onednn_mm(dense.t(), _CACHED_PRIMITIVES)
        return lambda x: custom.onednn_mm(handle, x, None)

    return dense.numel() * 2, build


def w8a8(weight: torch.Tensor, group_size: int) -> Prepared:
    """int8 by output row; the call quantizes x by token first."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)

    def build():
        handle = custom.create_onednn_scaled_mm(codes.t(), scales, torch.bfloat16, True, False, _CACHED_PRIMITIVES)

        def call(x):
            y = torch.empty(
                x.shape[0], scales.shape[0], dtype=x.dtype
            )  # scales live on here: the handle points to them
            x, x_scales, _ = custom.onednn_scaled_int8_quant(x)
            return custom.onednn_scaled_mm(handle, x, y, x_scales, None, None, None)

        return call

    return codes.numel() + scales.numel() * 4, build


def _uint4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int32 ``[K, N]`` with a zero point of 8, scales bf16 ``[K/group_size, N]``)."""
    groups = weight.unflatten(1, (-1, group_size))
    scales = groups.abs().amax(2) / 7
    codes = (groups / scales[..., None]).round().to(torch.int32) + 8
    return codes.flatten(1).t().contiguous(), scales.t().contiguous().bfloat16()


def _require(name: str) -> None:
    """Raises RuntimeError where vLLM's build for this CPU lacks an operator: the one for AVX2 has fewer."""
    if not hasattr(torch.ops._C, name):
        raise RuntimeError(f"vLLM's operators for this CPU have no {name}")


def w4a16(weight: torch.Tensor, group_size: int) -> Prepared:
    _require("cpu_gemm_wna16")
    codes, scales = _uint4(weight, group_size)
    k = weight.shape[1]
    packed = pack_quantized_values_into_int32(codes, scalar_types.uint4b8, 1)
    packed = packed.view(k, -1, 2).permute(1, 0, 2).reshape(-1, k * 2).contiguous()  # blocks of 16 outputs
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def build():
        copy = packed.clone(), scales.clone()
        return lambda x: custom.cpu_gemm_wna16(x, *copy, None, None, 8, isa)

    return packed.numel() * 4 + scales.numel() * 2, build


def w4a8(weight: torch.Tensor, group_size: int) -> Prepared:
    _require("int4_scaled_mm_cpu")
    codes, scales = _uint4(weight, group_size)
    codes = codes.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1)
    packed = pack_quantized_values_into_int32(codes, scalar_types.uint4, 1).contiguous()
    zeros = torch.full((scales.shape[0], scales.shape[1] // 8), _ZERO_POINTS, dtype=torch.int32)
    packed, zeros, scales = custom.convert_weight_packed_scale_zp(packed, zeros, scales, custom.CPUQuantAlgo.AWQ)

    def build():
        copy = packed.clone(), zeros.clone(), scales.clone()
        return lambda x: custom.int4_scaled_mm_cpu(x, *copy, None)

    return sum(t.numel() * t.element_size() for t in (packed, zeros, scales)), build


# By kind of weights; the first two do not depend on it.
_DENSE = {"vLLM bf16": onednn_bf16, "vLLM W8A8": w8a8}
MATMULS = {"ternary": _DENSE, "2": _DENSE, "3": _DENSE, "4": _DENSE | {"vLLM W4A16": w4a16, "vLLM W4A8": w4a8}}


def missing() -> str:
    """Why vLLM has none of them here, or an empty string."""
    if not current_platform.is_cpu():
        return f"this vLLM is built for {current_platform.device_type}, not for CPUs"
    return "" if hasattr(torch.ops._C, "onednn_mm") else "vLLM's operators for this CPU did not load"
