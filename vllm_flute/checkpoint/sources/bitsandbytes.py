"""bitsandbytes' NF4 and FP4 as transformers saves them.

A layer P has P.weight (two codes a byte, the first in the high nibble, rows one after the other), P.weight.absmax (one
scale for each block of `blocksize` weights), P.weight.quant_map (the table) and P.weight.quant_state.bitsandbytes__*
(JSON in bytes). Nested ("double", QLoRA, arXiv 2305.14314, section 3) quantization stores absmax as codes of a table
of 256 values, with scales of their own and an offset. `bitsandbytes.functional.QuantState` defines the names.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import FluteError
from ...format import LutTensor
from ..config import LayerSpec
from .base import Converted, Directory, settings
from .scales import ROUNDED, narrow, stored_group

NAME = "bitsandbytes"
_TABLES = ("nf4", "fp4")
_STATE = "weight.quant_state.bitsandbytes__"
_STATE_LIMIT = 1 << 16  # the JSON is of about 160 bytes
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# bnb_4bit_quant_storage: the bytes may be called something else, for shards of one dtype.
_STORAGE = ("U8", "I8", "BF16", "F16", "F32")


class State(NamedTuple):
    """What a layer's JSON says: weights in a block, the matrix [N, K] and its dtype, and of nested scales their block
    and offset."""

    blocksize: int
    shape: tuple[int, int]
    dtype: str
    nested_blocksize: int | None
    nested_offset: float


def _whole(value) -> bool:
    return type(value) is int and 0 < value < 1 << 48


def parse_state(blob: torch.Tensor, name: str) -> State:
    """Parse ``quant_state`` (uint8, JSON); raises FluteError naming what is wrong in it."""
    if blob.dtype != torch.uint8 or blob.numel() > _STATE_LIMIT:
        raise FluteError(f"{name} is {blob.dtype} {list(blob.shape)}, expected JSON in torch.uint8: fetch it again")
    try:
        found = json.loads(bytes(blob.flatten().tolist()).decode())
    except (ValueError, RecursionError) as e:
        raise FluteError(f"{name} is not JSON ({e}): fetch the checkpoint again") from None
    if not isinstance(found, dict):
        raise FluteError(f"{name} holds a {type(found).__name__}, expected a JSON object: fetch the checkpoint again")

    def refuse(key: str, expected: str):
        raise FluteError(f"{name}: {key} is {found.get(key)!r}, expected {expected}: fetch the checkpoint again")

    shape = found.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_whole, shape)):
        refuse("shape", "[N, K]")
    if not _whole(found.get("blocksize")):
        refuse("blocksize", "a positive whole number")
    dtype = found.get("dtype")
    if dtype not in ("float32", "float16", "bfloat16"):
        refuse("dtype", "float32, float16 or bfloat16")
    nested, offset = found.get("nested_blocksize"), found.get("nested_offset", 0.0)
    if nested is not None and not _whole(nested):
        refuse("nested_blocksize", "a positive whole number")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        refuse("nested_offset", "a number")
    return State(found["blocksize"], (shape[0], shape[1]), dtype, nested, float(offset))


def group_size(state: State, name: str) -> int:
    """The lut-v1 group size of a layer; raises FluteError where blocks straddle rows."""
    _, k = state.shape
    if group := stored_group(state.blocksize, k):
        return group
    raise FluteError(
        f"{name} has blocks of {state.blocksize} weights in rows of {k}: a block that straddles rows is no group of "
        "lut-v1; quantize with a blocksize that divides the row"
    )


def _floats(parts: dict[str, torch.Tensor], key: str, size: int, name: str) -> torch.Tensor:
    """A table or vector of ``size`` floats, in fp32."""
    if key not in parts:
        raise FluteError(f"{name}.{key} is missing: fetch the checkpoint again")
    t = parts[key]
    if t.dtype not in _FLOATS or t.numel() != size:
        raise FluteError(f"{name}.{key} is {t.dtype} {list(t.shape)}, expected {size} values in torch.float32")
    return t.flatten().to(torch.float32)


def absmax(parts: dict[str, torch.Tensor], state: State, blocks: int, name: str) -> torch.Tensor:
    """The scales of all blocks, fp32 ``[blocks]``, nested ones computed as bitsandbytes does, in fp32."""
    if state.nested_blocksize is None:
        return _floats(parts, "weight.absmax", blocks, name)
    codes = parts["weight.absmax"]
    if codes.dtype != torch.uint8 or codes.numel() != blocks:
        raise FluteError(f"{name}.weight.absmax is {codes.dtype} {list(codes.shape)}, expected torch.uint8 [{blocks}]")
    outer = -(-blocks // state.nested_blocksize)
    scales = _floats(parts, "weight.nested_absmax", outer, name)
    table = _floats(parts, "weight.nested_quant_map", 256, name)
    each = scales.repeat_interleave(min(state.nested_blocksize, blocks))[:blocks]
    return table[codes.flatten().to(torch.int64)] * each + torch.tensor(state.nested_offset, dtype=torch.float32)


def to_lut(parts: dict[str, torch.Tensor], state: State, name: str) -> Converted:
    """One layer; ``parts`` by the names above without "P.".

    Scales are in bf16 where that holds each of them, as it does for weights that were in bf16 and scales that are not
    nested. Others are in fp16: exact for weights that were in fp16, else rounded, and the note says by how much.

    Raises FluteError for parts that do not fit the state, and for blocks that straddle rows.
    """
    n, k = state.shape
    group = group_size(state, name)
    packed = parts["weight"].contiguous().view(torch.uint8).flatten()
    if packed.numel() * 2 != n * k:
        raise FluteError(f"{name}.weight has {packed.numel()} bytes, expected {n * k // 2} of {n} x {k} 4-bit codes")
    table = _floats(parts, "weight.quant_map", 16, name)
    wide = absmax(parts, state, n * k // state.blocksize, name).view(n, k // state.blocksize)
    # Not of nested ones, which bf16 holds by chance: parts that vLLM fuses need one dtype.
    plain = state.nested_blocksize is None and state.dtype != "float16"
    dtype = torch.bfloat16 if plain and torch.equal(wide.bfloat16().float(), wide) else torch.float16
    scales, exact = narrow(wide, dtype, f"{name}.weight.absmax")
    scales = scales.repeat_interleave(state.blocksize // group, dim=1)
    qweight = ((packed << 4) | (packed >> 4)).view(n, k // 2)  # lut-v1 has the first code in the low nibble
    return Converted(LutTensor(qweight, scales, table, name=name), exact, "" if exact else ROUNDED)


class BitsAndBytes(Directory):
    parts = (
        "weight.absmax",
        "weight",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *(f"{_STATE}{table}" for table in _TABLES),
    )

    def __init__(self, path: Path):
        super().__init__(path)
        tables = {name.rpartition("__")[2] for name in self._owned if _STATE in name and name in self.headers}
        self.kind = f"{NAME}-{'-'.join(sorted(tables))}" if tables else NAME
        if any(name.endswith((".SCB", ".weight_format")) for name in self.headers):
            raise FluteError(f"{path} is bitsandbytes' 8-bit format: lut-v1 has 2, 3 and 4 bits; quantize the original")

    def state(self, layer: str) -> State:
        found = [f"{layer}.{_STATE}{table}" for table in _TABLES if f"{layer}.{_STATE}{table}" in self.headers]
        if len(found) != 1:
            raise FluteError(f"{self.path} has {len(found)} {layer}.{_STATE}*, expected one: save it again")
        if self.headers[found[0]].nbytes > _STATE_LIMIT:
            raise FluteError(f"{found[0]} is of {self.headers[found[0]].nbytes} bytes, expected a short JSON object")
        return parse_state(self.tensor(found[0]), found[0])

    def spec(self, layer: str) -> LayerSpec:
        state = self.state(layer)
        header = self.headers.get(f"{layer}.weight")
        if header is None or header.dtype not in _STORAGE or header.nbytes * 2 != state.shape[0] * state.shape[1]:
            found = f"{header.dtype} {list(header.shape)}" if header else "missing"
            raise FluteError(f"{layer}.weight is {found}, expected {state.shape[0]} x {state.shape[1]} 4-bit codes")
        return LayerSpec(4, group_size(state, layer))

    def convert(self, layer: str) -> Converted:
        names = {part: f"{layer}.{part}" for part in self.parts if _STATE not in part}
        parts = {part: self.tensor(name) for part, name in names.items() if name in self.headers}
        return to_lut(parts, self.state(layer), layer)


def detect(path: Path, config: dict) -> bool:
    return settings(config).get("quant_method") == NAME


def open_(path: Path) -> BitsAndBytes:
    return BitsAndBytes(path)
