"""AWQ checkpoints (arXiv 2306.00978) of AutoAWQ and AutoRound, 4 bits in the "gemm" order, with zero points.

A layer P of N outputs and K inputs has ``P.qweight`` int32 ``[K, N/8]``, ``P.qzeros`` int32 ``[G, N/8]`` and
``P.scales`` ``[G, N]``. The eight codes of a word, the lowest bits first, are those of its outputs 0, 2, 4, 6, 1, 3, 5
and 7.
"""

from pathlib import Path

import torch

from ...errors import FluteError
from ..config import LayerSpec
from ..reader import read_json
from .base import Converted, Directory
from .gptq import METHODS as AUTO_ROUND
from .scales import stored_group
from .zero_points import affine

NAME = "awq"
_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LOW = 0x0F0F0F0F  # the lower code of each byte
_COLUMN = [_ORDER.index(i) for i in range(8)]  # where in a word each output is


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """The codes uint8 ``[R, N]`` of int32 words ``[R, N/8]``, in order."""
    packed = words.contiguous().view(torch.uint8).view(len(words), -1, 4)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(2)
    return codes[:, :, _COLUMN].flatten(1)


def qweight(words: torch.Tensor) -> torch.Tensor:
    """lut-v1's codes uint8 ``[N, K/2]`` of AWQ's int32 ``[K, N/8]``; K is even.

    On whole words as long as possible: the words of two rows become two words with a byte of two codes for each of
    four outputs, are turned, and only then taken apart.
    """
    k, n = words.shape[0], words.shape[1] * 8
    even, odd = words.contiguous().view(k // 2, 2, n // 8).unbind(1)
    low = (even & _LOW) | (odd & _LOW) << 4
    high = (even >> 4 & _LOW) | (odd & ~_LOW)
    codes = torch.empty(n // 8, 8, k // 2, dtype=torch.uint8)
    for pairs, outputs in ((low, _ORDER[::2]), (high, _ORDER[1::2])):
        pairs = pairs.T.contiguous().view(torch.uint8).view(n // 8, k // 2, 4)
        for byte, output in enumerate(outputs):
            codes[:, output] = pairs[..., byte]
    return codes.view(n, k // 2)


class Awq(Directory):
    kind = NAME
    parts = ("qweight", "qzeros", "scales")

    def __init__(self, path: Path, found: dict):
        super().__init__(path)
        version = str(found.get("version") or "gemm").lower()
        if version != "gemm" or found.get("backend", "autoawq") not in ("autoawq", "auto", None):
            raise FluteError(f"{path}: AWQ version {version!r} is not supported (supported: 'gemm' of AutoAWQ)")

    def spec(self, layer: str) -> LayerSpec:
        qweight = self.header(layer, "qweight", ("I32",), 2)
        qzeros = self.header(layer, "qzeros", ("I32",), 2)
        scales = self.header(layer, "scales", ("F16", "BF16", "F32"), 2)
        (k, words), groups, n = qweight.shape, scales.shape[0], scales.shape[1]
        if words * 32 != n * _BITS or qzeros.shape != (groups, words) or k % groups:
            raise FluteError(
                f"{layer}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
                f"are not those of {_BITS}-bit AWQ in the gemm order"
            )
        group = stored_group(k // groups, k)
        if group is None:
            raise FluteError(f"{layer}: K={k} in groups of {k // groups} does not fit lut-v1")
        return LayerSpec(_BITS, group)

    def convert(self, layer: str) -> Converted:
        group = self.spec(layer).group_size
        codes, scales = qweight(self.tensor(f"{layer}.qweight")), self.tensor(f"{layer}.scales")
        zeros = _outputs(self.tensor(f"{layer}.qzeros"))
        repeat = codes.shape[1] * 2 // scales.shape[0] // group
        return affine(codes, scales.T.contiguous(), zeros.T, _BITS, layer, repeat)


def detect(path: Path, config: dict) -> bool:
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return False
    packing = str(found.get("packing_format", ""))
    return found.get("quant_method") == NAME or (
        found.get("quant_method") in AUTO_ROUND and packing.endswith("auto_awq")
    )


def open_(path: Path) -> Awq:
    return Awq(path, read_json(path / "config.json")["quantization_config"])
