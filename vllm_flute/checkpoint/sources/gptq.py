"""GPTQ checkpoints (arXiv 2210.17323) of AutoGPTQ, GPTQModel and AutoRound: 2, 3 or 4 bits, with or without act-order.

A layer P of N outputs and K inputs has ``P.qweight`` int32 ``[K*bits/32, N]``, ``P.qzeros`` int32
``[G, N*bits/32]``, ``P.scales`` ``[G, N]`` and maybe ``P.g_idx`` int32 ``[K]``, the group of each input. Codes down a
column, and zero points along a row, are a little-endian bit stream over the words, also those of 3 bits, which cross
words. The format "gptq" stores zero points less one, "gptq_v2" as they are.
"""

from pathlib import Path

import torch

from ...codebook import BITS
from ...errors import FluteError
from ...packing import pack_codes, unpack_codes
from ..config import LayerSpec
from ..reader import read_json
from .base import Converted, Directory
from .scales import stored_group
from .zero_points import affine

NAME = "gptq"
METHODS = ("gptq", "auto-round", "autoround", "intel/auto-round")
SETTINGS = "quantize_config.json"  # beside config.json, where older tools wrote them
_FORMATS = ("gptq", "gptq_v2")
_CACHED = 256  # outputs that are reordered at a time: 4096 inputs of them take half a megabyte
# GPTQModel subtracted these from each three words of 3-bit zero points before it shifted single ones; only its own
# files need them.
_OLD_WORDS = (
    0b00100100100100100100100100100100,
    0b10010010010010010010010010010010,
    0b01001001001001001001001001001001,
)


def _stream(words: torch.Tensor) -> torch.Tensor:
    """int32 words ``[R, W]`` as uint8 ``[R, 4*W]``, the lowest byte first."""
    return words.contiguous().view(torch.uint8)


def _plus(words: torch.Tensor, numbers) -> torch.Tensor:
    """int32 words ``[G, W]`` plus repeated 32-bit numbers, with wrap-around."""
    numbers = torch.tensor(numbers, dtype=torch.int64).repeat(words.shape[1] // len(numbers))
    total = (words.to(torch.int64) + numbers) & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def zero_points(qzeros: torch.Tensor, bits: int, v2: bool, symmetric: bool) -> torch.Tensor:
    """Zero points uint8 ``[G, N]`` of ``P.qzeros``.

    Tools disagree on whether one is subtracted. A symmetric layer has the zero point ``2**(bits-1)`` everywhere, so
    there the reading that gives this is taken; else ``v2`` decides.
    """

    def stored() -> torch.Tensor:
        return unpack_codes(_stream(qzeros), bits)

    def less_one() -> torch.Tensor:
        if bits == 3:
            return (stored() + 1) & 7
        # Written by a subtraction from whole words, which borrows from the next zero point where one is 0.
        return unpack_codes(_stream(_plus(qzeros, [sum(1 << i for i in range(0, 32, bits))])), bits)

    def old() -> torch.Tensor:
        return unpack_codes(_stream(_plus(qzeros, _OLD_WORDS)), bits)

    first = stored() if v2 else less_one()
    if symmetric:
        for reading in (lambda: first, less_one if v2 else stored, *([old] if bits == 3 else [])):
            zeros = reading()
            if (zeros == 2 ** (bits - 1)).all():
                return zeros
    return first


def input_order(g_idx: torch.Tensor, groups: int, name: str) -> torch.Tensor | None:
    """int32 ``[K]``: the inputs sorted by group; None where they are in order already.

    Raises FluteError where the groups are not of one size.
    """
    k = g_idx.numel()
    order = g_idx.to(torch.int64).argsort(stable=True)
    if not torch.equal(g_idx[order].to(torch.int64), torch.arange(groups).repeat_interleave(k // groups)):
        raise FluteError(f"{name}.g_idx does not give each of {groups} groups {k // groups} inputs: fetch it again")
    return None if torch.equal(order, torch.arange(k)) else order.to(torch.int32)


def reorder(words: torch.Tensor, perm: torch.Tensor, bits: int) -> torch.Tensor:
    """``P.qweight`` int32 ``[K*bits/32, N]`` with its K codes in the order ``perm``."""
    if 32 % bits:  # codes cross words
        codes = unpack_codes(_stream(words.T), bits).index_select(1, perm)
        return pack_codes(codes, bits).view(torch.int32).T
    each = 32 // bits
    rows, shifts = (perm // each).view(-1, each), (perm % each * bits).view(-1, each)
    out = torch.zeros_like(words)
    for part, made in zip(words.split(_CACHED, 1), out.split(_CACHED, 1), strict=True):
        part = part.contiguous()
        for i in range(each):
            code = part.index_select(0, rows[:, i]).bitwise_right_shift_(shifts[:, i : i + 1])
            made |= code.bitwise_and_(2**bits - 1).bitwise_left_shift_(bits * i)
    return out


class Gptq(Directory):
    kind = NAME
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, path: Path, found: dict):
        super().__init__(path)
        self.found = found
        form = found.get("checkpoint_format") or found.get("format")
        packing = str(found.get("packing_format") or "")
        if found.get("quant_method") in METHODS[1:]:
            self.kind = "auto-round"
            form = "gptq_v2" if packing.endswith("gptqmodel") else "gptq"
        if form not in (None, *_FORMATS):
            raise FluteError(f"{path}: checkpoint_format {form!r} is not supported (supported: {', '.join(_FORMATS)})")
        self.v2 = form == "gptq_v2"

    def spec(self, layer: str) -> LayerSpec:
        qweight = self.header(layer, "qweight", ("I32",), 2)
        qzeros = self.header(layer, "qzeros", ("I32",), 2)
        scales = self.header(layer, "scales", ("F16", "BF16", "F32"), 2)
        (rows, n), groups = qweight.shape, scales.shape[0]
        bits = qzeros.shape[1] * 32 // n
        k = rows * 32 // bits if bits else 0
        if bits not in BITS:
            raise FluteError(f"{layer} has {bits} bits, lut-v1 holds 2, 3 and 4: serve it with vLLM's own gptq")
        if qzeros.shape != (groups, n * bits // 32) or scales.shape != (groups, n) or rows * 32 % bits or k % groups:
            raise FluteError(
                f"{layer}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
                f"do not agree on {bits} bits: fetch {qweight.file} again"
            )
        if (order := self.headers.get(f"{layer}.g_idx")) and (order.shape != (k,) or order.dtype not in ("I32", "I64")):
            raise FluteError(f"{layer}.g_idx is {order.dtype} {list(order.shape)}, expected I32 [{k}]: fetch it again")
        group = stored_group(k // groups, k)
        if group is None or n % 32 or k % 32:
            raise FluteError(f"{layer}: [{n}, {k}] in groups of {k // groups} does not fit lut-v1")
        return LayerSpec(bits, group)

    def convert(self, layer: str) -> Converted:
        bits, group = self.spec(layer)
        words, scales, perm = self.tensor(f"{layer}.qweight"), self.tensor(f"{layer}.scales"), None
        if f"{layer}.g_idx" in self.headers:
            perm = input_order(self.tensor(f"{layer}.g_idx"), scales.shape[0], layer)
            words = words if perm is None else reorder(words, perm, bits)
        # A word's bytes are in the stream's order: turning the matrix of words makes lut-v1's rows.
        codes = _stream(words.T)
        zeros = zero_points(self.tensor(f"{layer}.qzeros"), bits, self.v2, bool(self.found.get("sym", False)))
        repeat = codes.shape[1] * 8 // bits // scales.shape[0] // group
        return affine(codes, scales.T.contiguous(), zeros.T, bits, layer, repeat, perm)


def _settings(path: Path, config: dict) -> dict | None:
    found = config.get("quantization_config")
    if found is None and path.is_dir() and (path / SETTINGS).is_file():
        found = {"quant_method": NAME} | read_json(path / SETTINGS)
    if not isinstance(found, dict) or found.get("quant_method") not in METHODS:
        return None
    return None if str(found.get("packing_format", "")).endswith("auto_awq") else found


def detect(path: Path, config: dict) -> bool:
    try:
        return _settings(path, config) is not None
    except FluteError:  # its settings are no JSON: opening it will say so
        return True


def open_(path: Path) -> Gptq:
    return Gptq(path, _settings(path, read_json(path / "config.json")))
