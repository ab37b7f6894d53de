"""Mixtures of experts: each expert's matrices packed like a linear layer, multiplied expert by expert.

On a CPU the tokens are sorted by expert and each expert multiplies its own. A CUDA graph cannot contain a loop over
sizes that only the device knows, so on a GPU every token passes every expert, and those it was not routed to get the
weight 0: correct and capturable, at the cost of all experts. A grouped GPU kernel would replace that.
"""

from functools import partial
from math import gcd

import torch
from torch.nn import Parameter
from torch.nn import functional as F
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoint import LayerSpec
from ..checkpoint.quantize import fit_group
from ..dispatch import pack_parts
from ..errors import FluteError
from ..format import PARTS
from ..layout import ABI
from ..ops import library, lut_linear_op
from . import metrics
from .linear import is_dummy_load
from .online import plain_weight

logger = init_logger("vllm.flute")

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}

_NAME = f"lut_experts_v{ABI}"
# x [M, H], weights [M, top_k], ids [M, top_k]; of w13 (gate and up, [2*I, H]) and w2 ([H, I]) packed weights uint8
# [E, bytes], their headers int64 [E, fields] on the CPU, and how many bytes of each row count; N, the rows of w13
# -> [M, H] in x's dtype.
library.define(
    f"{_NAME}(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w13_headers, int[] w13_bytes, "
    "Tensor w2, Tensor w2_headers, int[] w2_bytes, SymInt N, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
experts_op = getattr(torch.ops.vllm_flute, _NAME)


@torch.library.register_fake(f"vllm_flute::{_NAME}", lib=library)
def _experts_fake(x, *args):
    return torch.empty_like(x)


def _expert(e: int, x, w13, w13_headers, w13_bytes, w2, w2_headers, w2_bytes, n: int, activation: str) -> torch.Tensor:
    """Expert ``e`` for all rows of x: fp32 ``[M, H]``."""
    gate_up = lut_linear_op(x, w13[e, : w13_bytes[e]], w13_headers[e], None, n, "")
    gate, up = gate_up.float().chunk(2, dim=-1)
    hidden = (_ACTIVATIONS[activation](gate) * up).to(x.dtype)
    return lut_linear_op(hidden, w2[e, : w2_bytes[e]], w2_headers[e], None, x.shape[1], "").float()


def _experts_grouped(x, weights, ids, *layer) -> torch.Tensor:
    top_k = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    tokens, weights = order // top_k, weights.flatten()[order].float()
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    counts = ids.flatten().bincount(minlength=layer[0].shape[0]).tolist()
    for e, (rows, share) in enumerate(zip(tokens.split(counts), weights.split(counts), strict=True)):
        if len(rows):
            y.index_add_(0, rows, _expert(e, x[rows], *layer) * share[:, None])
    return y.to(x.dtype)


def _experts_dense(x, weights, ids, *layer) -> torch.Tensor:
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(layer[0].shape[0]):
        share = (weights * (ids == e)).sum(dim=1, keepdim=True)
        y += _expert(e, x, *layer) * share
    return y.to(x.dtype)


library.impl(_NAME, _experts_grouped, "CPU")
library.impl(_NAME, _experts_dense, "CUDA")


class FluteMoEMethod(FusedMoEMethodBase):
    """The experts of one layer in lut-v1: ``w13`` ``[2*I, H]`` (gate and up) and ``w2`` ``[H, I]``.

    Raises FluteError for what these experts do not do: bias, other activations, routing weights on the input,
    expert parallelism, LoRA.
    """

    def __init__(self, moe, w13: LayerSpec, w2: LayerSpec, config, prefix: str):
        super().__init__(moe)
        self.specs, self.config, self.prefix = {"w13": w13, "w2": w2}, config, prefix
        self.activation = getattr(moe.activation, "value", moe.activation)
        refused = {
            "a bias": moe.has_bias,
            f"the activation {self.activation!r}": self.activation not in _ACTIVATIONS,
            "a limit on SwiGLU": moe.swiglu_limit is not None,
            "expert parallelism": moe.moe_parallel_config.use_ep,
            "LoRA": moe.is_lora_enabled,
        }
        for what, found in refused.items():
            if found:
                raise FluteError(
                    f"{prefix}: LUT-quantized experts do not support {what}: leave it out, or quantize with "
                    "--ignore experts"
                )

    def get_fused_moe_quant_config(self, layer):
        return None

    def create_weights(
        self, layer, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, params_dtype, **kwargs
    ) -> None:
        if layer.apply_router_weight_on_input:
            raise FluteError(f"{self.prefix}: LUT-quantized experts do not support routing weights on the input")
        ranks, rank = self.moe.moe_parallel_config.tp_size, self.moe.moe_parallel_config.tp_rank
        inner = intermediate_size_per_partition
        # Of each kind: the shards' rows on a rank, K, K on a rank.
        shapes = {"w13": ([inner, inner], hidden_size, hidden_size), "w2": ([hidden_size], inner * ranks, inner)}
        self.shards = {kind: shards for kind, (shards, _, _) in shapes.items()}
        self.groups, self.dummy = {}, is_dummy_load()
        for kind, (shards, k, own_k) in shapes.items():
            bits, stored = self.specs[kind]
            if self.config.online:
                stored = fit_group(stored, k, f"{self.prefix}.{kind}")
                self.specs[kind] = LayerSpec(bits, stored)
            if k % stored or own_k % 8:
                raise FluteError(
                    f"{self.prefix}.{kind}: K={k} on {ranks} ranks does not fit groups of {stored} and whole bytes: "
                    "serve with fewer ranks, or quantize with another group size"
                )
            group = self.groups[kind] = gcd(stored, own_k)
            n = sum(shards)
            parts = {
                "qweight": torch.empty(num_experts, n, own_k * bits // 8, dtype=torch.uint8),
                "scales": torch.zeros(num_experts, n, own_k // group, dtype=torch.bfloat16),
                "codebook": torch.zeros(num_experts, len(shards), 2**bits, dtype=torch.float32),
            }
            for part, data in parts.items():
                param = Parameter(data, requires_grad=False)
                param.loaded = 0
                load = partial(self._load, part=part, rank=rank, repeat=stored // group)
                set_weight_attrs(param, {"weight_loader": load})
                layer.register_parameter(f"{kind}_{part}", param)
            if self.config.online:
                load = partial(self._quantize, layer, kind)
                layer.register_parameter(f"{kind}_weight", plain_weight((num_experts, n, own_k), params_dtype, load))

    def _load(
        self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False, *, part, rank, repeat
    ) -> bool:
        """Write one matrix's part, whole as it is stored, where this rank keeps its share."""
        if part == "scales":
            if param.dtype != loaded_weight.dtype:
                if param.loaded:
                    raise FluteError(
                        f"{weight_name}: the experts' scales are stored as {param.dtype} and {loaded_weight.dtype}; "
                        "store them alike"
                    )
                param.data = param.data.to(loaded_weight.dtype)
            loaded_weight = loaded_weight.repeat_interleave(repeat, dim=1)
        at = param.data[expert_id]
        if part == "codebook":
            at[1 if shard_id == "w3" else 0] = loaded_weight
        elif shard_id == "w2":
            at.copy_(loaded_weight.narrow(1, rank * at.shape[1], at.shape[1]))
        else:
            at = at.chunk(2)[1 if shard_id == "w3" else 0]
            at.copy_(loaded_weight.narrow(0, rank * at.shape[0], at.shape[0]))
        param.loaded += 1
        return True

    def _quantize(self, layer, kind, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        """A plain matrix's loader: on as the parts of a quantized one."""
        weight = loaded_weight.to(getattr(layer, f"{kind}_qweight").device)
        t = self.config.lut.quantize(weight, self.specs[kind], weight_name)
        for part in PARTS:
            stored = getattr(layer, f"{kind}_{part}")
            stored.weight_loader(stored, getattr(t, part), weight_name, shard_id, expert_id)
        return True

    def process_weights_after_loading(self, layer) -> None:
        """Re-arrange each expert for this device and free what was loaded."""
        for kind, shards in self.shards.items():
            stored = [getattr(layer, f"{kind}_{part}") for part in PARTS]
            for part, param in zip(PARTS, stored, strict=True):
                missing = len(param) * len(shards) - param.loaded
                if missing > 0 and not self.dummy:
                    raise FluteError(
                        f"{self.prefix}: {missing} tensors for {kind}_{part} are missing from the checkpoint although "
                        "its config.json says that the experts are quantized; run 'vllm-flute inspect' on it"
                    )
            experts = [pack_parts(*parts, self.groups[kind], shards) for parts in zip(*stored, strict=True)]
            for part in (*PARTS, *(["weight"] if self.config.online else [])):
                delattr(layer, f"{kind}_{part}")
            sizes = [packed.numel() for packed, _ in experts]
            row = -(-max(sizes) // 64) * 64  # every expert starts on a cache line
            packed = stored[0].new_zeros(len(experts), row)
            for e, (weights, _) in enumerate(experts):
                packed[e, : sizes[e]] = weights
            headers = torch.stack([header for _, header in experts])
            layer.register_parameter(f"{kind}_weight_packed", Parameter(packed, requires_grad=False))
            layer.register_buffer(f"{kind}_headers", headers, persistent=False)
            setattr(layer, f"{kind}_bytes", sizes)
            setattr(layer, f"{kind}_rows", sum(shards))
            metrics.layer_loaded(f"{self.prefix}.{kind}", self.config, packed, headers[0])
        if packed.is_cuda:
            logger.warning_once(
                "mixture of experts on a GPU: every token passes all %d experts, which is slow but what CUDA graphs "
                "can hold",
                len(packed),
            )

    def apply(self, layer, x, topk_weights, topk_ids, *args, **kwargs) -> torch.Tensor:
        w13 = layer.w13_weight_packed, layer.w13_headers, layer.w13_bytes
        w2 = layer.w2_weight_packed, layer.w2_headers, layer.w2_bytes
        return experts_op(x, topk_weights, topk_ids, *w13, *w2, layer.w13_rows, self.activation)
