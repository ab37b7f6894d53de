"""Parameters that hold lut-v1 tensors while a checkpoint loads, and the loaders that shard them.

vLLM's own loaders narrow a tensor by the parameter's shape along ``output_dim`` (rows) and ``input_dim``
(columns), which is right for packed codes of any width as they are. Scales and codebooks need a step before.
"""

import torch
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

from ..errors import FluteError


def _parameter(data: torch.Tensor, loader, **attrs) -> Parameter:
    param = Parameter(data, requires_grad=False)
    param.loaded = 0  # elements written so far, to tell a missing tensor from a loaded one

    def counted(param, loaded_weight, *shard_id):
        loader(param, loaded_weight, *shard_id)
        param.loaded += 1

    set_weight_attrs(param, {"weight_loader": counted, **attrs})
    return param


def codes(n: int, row_bytes: int, loader) -> Parameter:
    """``qweight`` uint8 ``[n, row_bytes]`` of one rank."""
    data = torch.empty(n, row_bytes, dtype=torch.uint8)
    return _parameter(data, loader, input_dim=1, output_dim=0)


def scales(n: int, groups: int, repeat: int, loader, name: str) -> Parameter:
    """``scales`` bf16 or fp16 ``[n, groups]`` of one rank; the checkpoint decides the dtype.

    ``repeat``: where a rank's share of K cuts a group, the rank works with smaller groups (their greatest
    common divisor) and each stored scale counts ``repeat`` times, which is exact.
    """

    def load(param, loaded_weight, *shard_id):
        if param.dtype != loaded_weight.dtype:
            if param.loaded:
                raise FluteError(
                    f"{name}.scales: parts of one fused layer are stored as {param.dtype} and {loaded_weight.dtype}; "
                    "store them alike"
                )
            param.data = param.data.to(loaded_weight.dtype)
        if repeat > 1:
            loaded_weight = loaded_weight.repeat_interleave(repeat, dim=1)
        loader(param, loaded_weight, *shard_id)

    return _parameter(torch.zeros(n, groups, dtype=torch.bfloat16), load, input_dim=1, output_dim=0)


def codebooks(shards: int, size: int) -> Parameter:
    """``codebook`` fp32 ``[shards, size]``: one row for each matrix of a fused layer, the same on every rank."""

    def load(param, loaded_weight, shard_id=None):
        match shard_id:
            case None:
                rows = slice(None)
            case str():
                rows = "qkv".index(shard_id)
            case tuple():
                rows = slice(shard_id[0], shard_id[-1] + 1)
            case _:
                rows = shard_id
        param.data[rows] = loaded_weight

    return _parameter(torch.zeros(shards, size, dtype=torch.float32), load)


def offsets(n: int, groups: int, repeat: int, loader) -> Parameter:
    """``offsets`` fp32 ``[n, groups]`` of one rank; 0 for matrices of a fused layer that have none."""

    def load(param, loaded_weight, *shard_id):
        loader(param, loaded_weight.to(torch.float32).repeat_interleave(repeat, dim=1), *shard_id)

    return _parameter(torch.zeros(n, groups, dtype=torch.float32), load, input_dim=1, output_dim=0)


def perm(k: int, ranks: int, name: str) -> Parameter:
    """``perm`` int32 ``[k]``, the order of the layer's inputs, the same for all matrices of a fused layer.

    ``ranks``: that share K, which such a layer cannot do: its inputs would come from other ranks.
    """

    def load(param, loaded_weight, shard_id=None):
        if ranks > 1:
            raise FluteError(
                f"{name} has its inputs permuted (act-order), which tensor parallelism over them cannot serve: serve "
                "with --tensor-parallel-size 1, or quantize the source without act-order"
            )
        if param.loaded and not torch.equal(param.data, loaded_weight.to(param.device)):
            raise FluteError(f"{name}: parts of one fused layer have their inputs in different orders (perm)")
        param.data.copy_(loaded_weight)

    return _parameter(torch.zeros(k, dtype=torch.int32), load)
