"""MXFP4 as gpt-oss stores it: P_blocks uint8 [N, K/32, 16] and P_scales uint8 (e8m0) [N, K/32], P with or without
".weight". Its mixtures of experts, of four dimensions and with biases, are refused: the plugin serves no such layer.
"""

from pathlib import Path

from ...errors import FluteError
from ..config import LayerSpec
from .base import Converted, Directory, settings
from .fp4 import MX_GROUP, mxfp4

NAME = "mxfp4"


class MxFp4(Directory):
    kind = NAME
    parts = ("weight_blocks", "weight_scales")

    def __init__(self, path: Path):
        super().__init__(path)
        for name, header in self.headers.items():
            if name.endswith("_blocks") and ("experts" in name or len(header.shape) == 4):
                raise FluteError(
                    f"{name} {list(header.shape)}: gpt-oss's experts have biases and a limit on SwiGLU, which this "
                    "plugin does not serve; vLLM serves the checkpoint itself without --quantization flute"
                )
            if name.endswith("_blocks") and name not in self._owned:  # P_blocks without ".weight"
                layer = name.removesuffix("_blocks")
                self.layers.append(layer)
                self._owned |= {name, f"{layer}_scales"}

    def _name(self, layer: str, part: str) -> str:
        name = f"{layer}.weight_{part}"
        return name if name in self.headers else f"{layer}_{part}"

    def spec(self, layer: str) -> LayerSpec:
        names = self._name(layer, "blocks"), self._name(layer, "scales")
        blocks, scales = (self.headers.get(name) for name in names)
        good = blocks and blocks.dtype == "U8" and len(blocks.shape) == 3 and blocks.shape[2] == MX_GROUP // 2
        if not good or 0 in blocks.shape:
            found = f"{blocks.dtype} {list(blocks.shape)}" if blocks else "missing"
            raise FluteError(f"{names[0]} is {found}, expected U8 [N, K/32, 16]: fetch the checkpoint again")
        if not scales or scales.dtype not in ("U8", "F8_E8M0") or scales.shape != blocks.shape[:2]:
            found = f"{scales.dtype} {list(scales.shape)}" if scales else "missing"
            raise FluteError(f"{names[1]} is {found}, expected U8 {list(blocks.shape[:2])}: fetch the checkpoint again")
        return LayerSpec(4, MX_GROUP)

    def convert(self, layer: str) -> Converted:
        blocks, scales = (self.tensor(self._name(layer, part)) for part in ("blocks", "scales"))
        return mxfp4(blocks.flatten(1), scales, layer)


def detect(path: Path, config: dict) -> bool:
    return settings(config).get("quant_method") == NAME


def open_(path: Path) -> MxFp4:
    return MxFp4(path)
