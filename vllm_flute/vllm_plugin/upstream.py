"""Checkpoints of the package flute-kernel, served as they are: each matrix becomes lut-v1 as vLLM reads it."""

from pathlib import Path

import torch
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoint.sources import open_source
from ..checkpoint.sources.upstream_flute import PARTS, qweight
from .linear import FluteLinearMethod

_REPLACED = ("weight", "tables")  # by qweight and codebook; scales are the same
_UNUSED = tuple(part for part in PARTS if part not in (*_REPLACED, "scales"))


def check(path: Path) -> None:
    """Check a directory by its headers; raises FluteError."""
    open_source(path).quantized()


class UpstreamLinearMethod(FluteLinearMethod):
    """`FluteLinearMethod` for upstream's tensors; a matrix is converted whole, so any number of ranks can share it."""

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        super().create_weights(layer, *args, **kwargs)

        def load_weight(param, loaded_weight, *shard_id):
            codes = qweight(loaded_weight, self.spec.bits, self.prefix)
            layer.qweight.weight_loader(layer.qweight, codes, *shard_id)

        def load_tables(param, loaded_weight, *shard_id):
            layer.codebook.weight_loader(layer.codebook, loaded_weight.float(), *shard_id)

        def ignore(param, loaded_weight, *shard_id):
            pass

        loaders = {"weight": load_weight, "tables": load_tables} | dict.fromkeys(_UNUSED, ignore)
        for part, loader in loaders.items():
            param = Parameter(torch.empty(0, device="meta"), requires_grad=False)
            set_weight_attrs(param, {"weight_loader": loader})
            layer.register_parameter(part, param)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for part in (*_REPLACED, *_UNUSED):
            delattr(layer, part)
        super().process_weights_after_loading(layer)
