"""Checkpoints of the package flute-kernel (arXiv 2407.10960): 2, 3 or 4 bits in the order of its GPU kernel.

A layer P of N outputs and K inputs has ``P.weight`` int16 ``[N/16*bits, K]``, ``P.scales`` ``[N, K/group_size]``,
``P.tables`` ``[2**bits]`` and ``P.tables2`` (all pairs of table values). Words belong to pairs of columns: that of the
even column k and that of k+1 hold the codes of both columns for several rows, 32 rows apart.
"""

from pathlib import Path

import torch

from ...codebook import check_bits
from ...errors import FluteError
from ...format import QUANT_METHOD, LutTensor
from ...packing import pack_codes
from ..config import HEAD, LayerSpec, LutConfig, check_pattern
from ..reader import read_json
from .base import Converted, Directory

NAME = "flute-upstream"
SETTINGS = "flute_config.json"
# Suffixes of a layer's tensors; the last three say nothing that is needed.
PARTS = ("tables", "weight", "scales", "tables2", "template_id", "_extra_state")
ROWS = {2: 256, 3: 512, 4: 128}  # that words interleave: N is a multiple of it
_SLICES = 3  # of a 3-bit layer: three pairs of words hold 16 sub-blocks


def _whole_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 2 or 4 bits, which divide a word: int16 ``[P, K]`` to uint8 ``[blocks, sub-blocks, 32, K/2, 2]``."""
    p, k = words.shape
    words = words.view(p // 32, 32, k // 2, 2)
    in_word = 8 // bits
    codes = words.new_empty(p // 32, 2 * in_word, 32, k // 2, 2, dtype=torch.uint8)
    for a in range(2 * in_word):
        word = words[..., a // in_word]
        for column in (0, 1):  # the odd one is lower
            codes[:, a, ..., column] = (word >> (2 * (a % in_word) + 1 - column) * bits) & (2**bits - 1)
    return codes


def _slices(words: torch.Tensor) -> torch.Tensor:
    """Codes of 3 bits: int16 ``[P, K]`` to uint8 ``[blocks, 16, 32, K/2, 2]``."""
    p, k = words.shape
    blocks = p // (_SLICES * 32)
    words = words.to(torch.int32) & 0xFFFF
    first, rest = words.split([blocks * 32, blocks * 64])
    slices = [first.view(blocks, 32, k // 2, 2), *rest.view(blocks, 2, 32, k // 2, 2).unbind(1)]
    codes = words.new_empty(blocks, 16, 32, k // 2, 2, dtype=torch.uint8)
    last = 0
    for s, pair in enumerate(slices):
        low, high = pair.unbind(-1)
        stream = low | (high & 0x3FFF) << 16
        for i in range(5):
            for column in (0, 1):
                codes[:, s + 3 * i, ..., column] = (stream >> (6 * i + 3 * (1 - column))) & 7
        last = last | (high >> 14) << 2 * s
    codes[:, 15, ..., 0], codes[:, 15, ..., 1] = last >> 3, last & 7
    return codes


def qweight(weight: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    """lut-v1's codes uint8 ``[N, K*bits/8]`` of upstream's int16 ``[N/16*bits, K]``.

    Raises FluteError for another dtype and shapes that its packer does not make.
    """
    rows = ROWS[check_bits(bits)] // 16 * bits
    if weight.dtype != torch.int16 or weight.dim() != 2 or weight.shape[0] % rows or weight.shape[1] % 8:
        raise FluteError(
            f"{name}.weight is {weight.dtype} {list(weight.shape)}, expected int16 [N/16*{bits}, K] with N a multiple "
            f"of {ROWS[bits]} and K of 8"
        )
    weight = weight.contiguous()
    codes = _slices(weight) if bits == 3 else _whole_words(weight, bits)
    return pack_codes(codes.view(-1, weight.shape[1]), bits)


def settings(path: Path | None, config: dict) -> dict | None:
    """The quantization settings of an upstream checkpoint, or None where this is none.

    Args:
        path: its directory, where older ones have a file of their own; None: unknown.
        config: config.json.
    """
    found = config.get("quantization_config")
    if isinstance(found, dict):
        return found if found.get("quant_method") == QUANT_METHOD and "num_bits" in found else None
    file = path / SETTINGS if path else None
    return read_json(file) if file and file.is_file() else None


def lut_config(found: dict, where: str) -> LutConfig:
    """Upstream's settings as those of lut-v1. Raises FluteError for values that are none."""
    bits, group = found.get("num_bits"), found.get("group_size")
    skipped = found.get("modules_to_not_convert") or []
    if type(bits) is not int or type(group) is not int or group < 8 or group % 8:
        raise FluteError(f"{where}: num_bits is {bits!r} and group_size {group!r}, expected 2 to 4 and a multiple of 8")
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise FluteError(f"{where}: modules_to_not_convert is {skipped!r}, expected a list of names")
    ignore = [check_pattern(name) for name in dict.fromkeys([*skipped, HEAD])]
    return LutConfig(check_bits(bits), group, NAME, tuple(ignore))


class UpstreamFlute(Directory):
    kind, parts = NAME, PARTS

    def __init__(self, path: Path, found: dict):
        super().__init__(path)
        self.lut = lut_config(found, str(path))

    def spec(self, layer: str) -> LayerSpec:
        bits, group = self.lut.bits, self.lut.group_size
        weight = self.header(layer, "weight", ("I16",), 2)
        scales = self.header(layer, "scales", ("F16", "BF16"), 2)
        self.header(layer, "tables", ("F16", "BF16", "F32"), 1)
        n, k = weight.shape[0] * 16 // bits, weight.shape[1]
        if scales.shape != (n, k // group) or k % group:
            raise FluteError(
                f"{layer}.scales is {list(scales.shape)} in {scales.file}, expected [{n}, {k}/{group}] for {bits} bits "
                f"and groups of {group}: is {SETTINGS} or config.json that of this checkpoint?"
            )
        return LayerSpec(bits, group)

    def convert(self, layer: str) -> Converted:
        codes = qweight(self.tensor(f"{layer}.weight"), self.lut.bits, layer)
        scales, table = self.tensor(f"{layer}.scales"), self.tensor(f"{layer}.tables").float()
        return Converted(LutTensor(codes, scales, table, layer), exact=True)


def detect(path: Path, config: dict) -> bool:
    try:
        return path.is_dir() and settings(path, config) is not None
    except FluteError:  # its settings are no JSON: opening it will say so
        return True


def open_(path: Path) -> UpstreamFlute:
    return UpstreamFlute(path, settings(path, read_json(path / "config.json")))
