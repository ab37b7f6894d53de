"""compressed-tensors (llm-compressor): mxfp4-pack-quantized, nvfp4-pack-quantized, and pack-quantized integers.

A layer P has P.weight_packed and P.weight_scale; their dtypes tell the three apart, so that a checkpoint of several
config_groups needs no matching of targets. Source of the layouts: compressed_tensors.compressors.
"""

from pathlib import Path

import torch

from ...errors import FluteError
from ..config import LayerSpec
from . import packed_integers
from .base import Converted, Directory, settings
from .fp4 import MX_GROUP, NV_GROUP, mxfp4, nvfp4

NAME = "compressed-tensors"
_KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")


class CompressedTensors(Directory):
    kind = NAME
    parts = (
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
    )

    def __init__(self, path: Path):
        super().__init__(path)
        config = settings(self.checkpoint.config)
        formats = {str(config.get("format"))}
        groups = config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict):
                formats.add(str(group.get("format")))
                if group.get("input_activations"):
                    self.notes.append("activations are not quantized here, as config.json asks: weights only")
        self.notes = self.notes[:1]
        known = formats & {"mxfp4-pack-quantized", "nvfp4-pack-quantized", "pack-quantized"}
        self.kind = f"{NAME} {' '.join(sorted(known))}".strip()
        if config.get("transform_config"):
            raise FluteError(f"{path}: rotated weights (transform_config) are no lut-v1: quantize without transforms")
        for name, header in self.headers.items():
            if name.endswith((".weight_scale", ".weight_zero_point", ".bitmask")) and name not in self._owned:
                layer = name.rpartition(".")[0]
                raise FluteError(
                    f"{layer} has {name} ({header.dtype}) but no weight_packed: import reads mxfp4-, nvfp4- and "
                    f"pack-quantized layers, not {', '.join(sorted(formats))}"
                )
        if any(name.endswith(_KV_SCALES) for name in self.headers):
            self.notes.append("scales of a quantized KV cache are left out")

    def tensors(self) -> list[str]:
        return [name for name in super().tensors() if not name.endswith(_KV_SCALES)]

    def spec(self, layer: str) -> LayerSpec:
        packed = self.header(layer, "weight_packed", ("U8", "I32"), 2)
        if packed.dtype == "I32":
            return packed_integers.spec(self, layer)
        scales = self.header(layer, "weight_scale", ("U8", "F8_E8M0", "F8_E4M3"), 2)
        group = NV_GROUP if scales.dtype == "F8_E4M3" else MX_GROUP
        n, k = packed.shape[0], packed.shape[1] * 2
        if k % group or scales.shape != (n, k // group):
            raise FluteError(
                f"{layer}.weight_scale is {scales.dtype} {list(scales.shape)}, expected [{n}, {k}/{group}] beside "
                f"weight_packed {list(packed.shape)}: fetch the checkpoint again"
            )
        if f"{layer}.weight_zero_point" in self.headers:
            raise FluteError(f"{layer} has zero points beside fp4 values, which no tool writes: fetch it again")
        if group == NV_GROUP:
            self._factor(layer)
        return LayerSpec(4, group)

    def _factor(self, layer: str) -> str:
        name = f"{layer}.weight_global_scale"
        if name not in self.headers or self.headers[name].numel != 1:
            found = list(self.headers[name].shape) if name in self.headers else "missing"
            raise FluteError(f"{name} is {found}, expected one float32 value: fetch the checkpoint again")
        return name

    def convert(self, layer: str) -> Converted:
        if self.headers[f"{layer}.weight_packed"].dtype == "I32":
            return packed_integers.convert(self, layer)
        packed, scales = self.tensor(f"{layer}.weight_packed"), self.tensor(f"{layer}.weight_scale")
        if scales.dtype == torch.float8_e4m3fn:
            return nvfp4(packed, scales, self.tensor(self._factor(layer)), divide=True, name=layer)
        return mxfp4(packed, scales, layer)


def detect(path: Path, config: dict) -> bool:
    return settings(config).get("quant_method") == NAME


def open_(path: Path) -> CompressedTensors:
    return CompressedTensors(path)
