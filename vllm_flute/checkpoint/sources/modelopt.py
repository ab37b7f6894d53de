"""NVIDIA ModelOpt's NVFP4: P.weight uint8 [N, K/2], P.weight_scale e4m3 [N, K/16], P.weight_scale_2 fp32.

The settings are config.json's quantization_config or the file hf_quant_config.json.
"""

from pathlib import Path

from ...errors import FluteError
from ..config import LayerSpec
from ..reader import read_json
from .base import Converted, Directory, settings
from .fp4 import NV_GROUP, nvfp4

NAME = "modelopt NVFP4"
SETTINGS = "hf_quant_config.json"
_LEFT_OUT = (".k_scale", ".v_scale", ".input_scale")


class ModelOpt(Directory):
    kind = NAME
    parts = ("weight_scale_2", "weight", "weight_scale", "input_scale")

    def __init__(self, path: Path):
        super().__init__(path)
        self.notes.append("weights only: neither activations nor the KV cache are quantized here")
        for name, header in self.headers.items():
            layer, _, part = name.rpartition(".")
            if part == "pre_quant_scale":
                raise FluteError(f"{name}: inputs are rescaled (AWQ), which lut-v1 does not do: use plain NVFP4")
            if part == "weight_scale" and layer not in self.layers:
                raise FluteError(f"{layer} has a {header.dtype} scale alone: import reads ModelOpt's NVFP4 layers only")

    def tensors(self) -> list[str]:
        return [name for name in super().tensors() if not name.endswith(_LEFT_OUT)]

    def spec(self, layer: str) -> LayerSpec:
        weight = self.header(layer, "weight", ("U8",), 2)
        scales = self.header(layer, "weight_scale", ("F8_E4M3",), 2)
        n, k = weight.shape[0], weight.shape[1] * 2
        if k % NV_GROUP or scales.shape != (n, k // NV_GROUP) or self.headers[f"{layer}.weight_scale_2"].numel != 1:
            raise FluteError(
                f"{layer} has weight {list(weight.shape)}, weight_scale {list(scales.shape)} and weight_scale_2 "
                f"{list(self.headers[f'{layer}.weight_scale_2'].shape)}, expected [N, K/2], [N, K/16] and [1]"
            )
        return LayerSpec(4, NV_GROUP)

    def convert(self, layer: str) -> Converted:
        parts = (self.tensor(f"{layer}.{part}") for part in ("weight", "weight_scale", "weight_scale_2"))
        return nvfp4(*parts, divide=False, name=layer)


def detect(path: Path, config: dict) -> bool:
    if found := settings(config):
        return found.get("quant_method") in ("modelopt", "modelopt_fp4")
    if not path.is_dir() or not (path / SETTINGS).is_file():
        return False
    try:
        found = read_json(path / SETTINGS).get("quantization")
    except (FluteError, OSError):
        return False
    return isinstance(found, dict) and "NVFP4" in str(found.get("quant_algo"))


def open_(path: Path) -> ModelOpt:
    return ModelOpt(path)
