"""GGUF's quantized types as lut-v1: blocks of codes with their scales become rows of codes and rows of scales.

Blocks as in ggml-common.h and ggml-quants.c (https://github.com/ggml-org/ggml); what is no table times a scale is
decoded by the `gguf` package.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ...codebook import pad_codebook
from ...errors import FluteError
from ...format import LutTensor
from ...packing import pack_codes, unpack_codes
from ..config import LayerSpec
from .gguf_file import GgufFile
from .scales import narrow, split_power

FLOAT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # doubled
# Weights that are worked on at once: a few MB, which stay in a cache.
_CHUNK_WEIGHTS = 1 << 20


class _Decoded(NamedTuple):
    """Of blocks ``[..., blocks]``: packed codes uint8, scales and offsets fp32, each block's in the last axes."""

    packed: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None


def _half(data: np.ndarray) -> np.ndarray:
    """fp16 values stored in bytes ``[..., 2n]`` as fp32 ``[..., n]``."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """4-bit codes in the order of lut-v1, from groups of 2n in bytes ``[..., n]`` with codes (i, i + n) in each."""
    pairs = np.ascontiguousarray(data).view("<u2")
    low = (pairs & 0x000F) | (pairs >> 4 & 0x00F0)
    high = (pairs >> 4 & 0x000F) | (pairs >> 8 & 0x00F0)
    return np.concatenate([low.astype(np.uint8), high.astype(np.uint8)], axis=-1)


def _quarters(data: np.ndarray) -> np.ndarray:
    """2-bit codes in the order of lut-v1, from groups of 128 in bytes ``[..., 32]`` (i, i + 32, i + 64, i + 96)."""
    words = np.ascontiguousarray(data).view("<u4")
    parts = []
    for shift in (0, 2, 4, 6):
        codes = words >> shift & 0x03030303
        parts.append((codes | codes >> 6 | codes >> 12 | codes >> 18).astype(np.uint8))
    return np.concatenate(parts, axis=-1)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[..., 256]`` packed."""
    return pack_codes(torch.from_numpy(codes.reshape(-1, 256)), bits).numpy().reshape(*codes.shape[:-1], -1)


def _q4(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks[..., 2:]), _half(blocks[..., :2]))


def _q4_1(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _mxfp4(blocks: np.ndarray) -> _Decoded:
    """A power of two 2**(e - 127), halved as the table is doubled, before the codes."""
    return _Decoded(_nibbles(blocks[..., 1:]), np.ldexp(np.float32(1), blocks[..., :1].astype(np.int32) - 128))


def _iq4_xs(blocks: np.ndarray) -> _Decoded:
    """Eight groups of 32 with 6-bit scales: 4 low bits in bytes 4..7, 2 high bits in the 16 bits of bytes 2..3."""
    high = np.ascontiguousarray(blocks[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).reshape(high.shape)
    scales = _half(blocks[..., :2]) * ((low | high << 4).astype(np.float32) - 32)
    return _Decoded(_nibbles(blocks[..., 8:].reshape(*scales.shape, 16)), scales)


def _q4_k(blocks: np.ndarray) -> _Decoded:
    """Eight groups of 32: fp16 units of scales and of minima, both 6 bits (12 bytes for all), then the codes."""
    first, second, third = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=-1).astype(np.float32)
    minima = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=-1).astype(np.float32)
    packed = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32))
    return _Decoded(packed, _half(blocks[..., :2]) * scales, -_half(blocks[..., 2:4]) * minima)


def _q3_k(blocks: np.ndarray) -> _Decoded:
    """Sixteen groups of 16: a mask of high bits (32 bytes), low 2-bit codes (64), 6-bit scales (12), their unit (2)."""
    lead = blocks.shape[:-1]
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    low = (blocks[..., 32:96].reshape(*lead, 2, 1, 32) >> shifts & 3).reshape(*lead, 256)
    high = (blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(*lead, 256)
    first = blocks[..., 96:104]
    nibbles = np.concatenate([first & 15, first >> 4], axis=-1)
    top = (blocks[..., None, 104:108] >> shifts & 3).reshape(*lead, 16)
    scales = (nibbles | top << 4).astype(np.float32) - 32
    return _Decoded(_packed(low | high << 2, 3), _half(blocks[..., 108:110]) * scales)


def _q2_k(blocks: np.ndarray) -> _Decoded:
    """Sixteen groups of 16: 4-bit scales and minima (a byte each), codes (64 bytes), units of scales and of minima."""
    scales, minima = (blocks[..., :16] & 15).astype(np.float32), (blocks[..., :16] >> 4).astype(np.float32)
    packed = _quarters(blocks[..., 16:80].reshape(*blocks.shape[:-1], 2, 32))
    return _Decoded(packed, _half(blocks[..., 80:82]) * scales, -_half(blocks[..., 82:84]) * minima)


def _tq1_0(blocks: np.ndarray) -> _Decoded:
    """Five ternary digits a byte, as fractions of 256: the next digit is the top of byte * 3**i * 3 / 256."""

    def digits(part: np.ndarray, run: int, count: int) -> np.ndarray:
        powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
        rest = part.reshape(*part.shape[:-1], -1, 1, run) * powers
        return (rest.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*part.shape[:-1], -1)

    parts = digits(blocks[..., :32], 32, 5), digits(blocks[..., 32:48], 16, 5), digits(blocks[..., 48:52], 4, 4)
    return _Decoded(_packed(np.concatenate(parts, axis=-1), 2), _half(blocks[..., 52:54]))


def _tq2_0(blocks: np.ndarray) -> _Decoded:
    if (blocks[..., :64] & blocks[..., :64] >> 1 & 0x55).any():
        raise FluteError("it has the code 3, which TQ2_0 (-1, 0, 1) does not have: fetch the file again")
    packed = _quarters(blocks[..., :64].reshape(*blocks.shape[:-1], 2, 32))
    return _Decoded(packed, _half(blocks[..., 64:66]))


class _Type(NamedTuple):
    """A type that is a table times a scale, and an offset in some; a block has so many weights and bytes."""

    spec: LayerSpec
    table: tuple[int, ...]
    block_weights: int
    block_bytes: int
    decode: Callable[[np.ndarray], _Decoded]
    affine: bool = False


_FOUR = LayerSpec(4, 32)
TABLES = {
    "Q4_0": _Type(_FOUR, tuple(range(-8, 8)), 32, 18, _q4),
    "Q4_1": _Type(_FOUR, tuple(range(16)), 32, 20, _q4_1, True),
    "IQ4_NL": _Type(_FOUR, _IQ4, 32, 18, _q4),
    "IQ4_XS": _Type(_FOUR, _IQ4, 256, 136, _iq4_xs),
    "MXFP4": _Type(_FOUR, (*_E2M1, *(-v for v in _E2M1)), 32, 17, _mxfp4),
    "Q4_K": _Type(_FOUR, tuple(range(16)), 256, 144, _q4_k, True),
    "Q3_K": _Type(LayerSpec(3, 16), tuple(range(-4, 4)), 256, 110, _q3_k),
    "Q2_K": _Type(LayerSpec(2, 16), tuple(range(4)), 256, 84, _q2_k, True),
    "TQ1_0": _Type(LayerSpec(2, 256), (-1, 0, 1), 256, 54, _tq1_0),
    "TQ2_0": _Type(LayerSpec(2, 256), (-1, 0, 1), 256, 66, _tq2_0),
}


def to_lut(rows: np.ndarray, kind: str, name: str) -> tuple[LutTensor, bool]:
    """(layer, whether nothing was rounded) from the stored rows uint8 ``[N, bytes]`` of a type.

    Args:
        kind: one of `TABLES`.
        name: of the tensor, for errors.

    Raises FluteError for scales that are not finite, and for codes that the type does not have.
    """
    spec, table, block_weights, block_bytes, decode, affine = TABLES[kind]
    n, blocks = len(rows), rows.shape[1] // block_bytes
    k = blocks * block_weights
    qweight = torch.empty(n, k * spec.bits // 8, dtype=torch.uint8)
    scales = torch.empty(n, k // spec.group_size)
    offsets = torch.empty_like(scales) if affine else None
    step = max(1, _CHUNK_WEIGHTS // k)
    for i in range(0, n, step):
        try:
            found = decode(rows[i : i + step].reshape(-1, blocks, block_bytes))
        except FluteError as e:
            raise FluteError(f"{name}: {e}") from None
        for whole, part in zip((qweight, scales, offsets), found, strict=True):
            if whole is not None:
                whole[i : i + step] = torch.from_numpy(part).view(-1, whole.shape[1])
    levels = torch.tensor(table, dtype=torch.float32)
    # Powers of two of 8 bits, which fp16 has not.
    dtype = torch.bfloat16 if kind == "MXFP4" else torch.float16
    narrowed, exact = narrow(scales, dtype, name)
    if not exact:
        # Scales of more bits than fp16 has: at about 1 they have all of fp16's precision, the table takes the rest.
        power = split_power(scales.abs().max().item())[1]
        narrowed, _ = narrow(scales / power, dtype, name)
        levels *= power
    if affine:
        offsets, same = narrow(offsets, dtype, name)
        exact = exact and same
    return LutTensor(qweight, narrowed, pad_codebook(levels, spec.bits), name, offsets), exact


def widen(t: LutTensor, spec: LayerSpec, affine: bool) -> LutTensor:
    """The same weights, to agree with a fused layer: more bits, groups that divide its own, offsets of 0."""
    qweight = t.qweight if t.bits == spec.bits else pack_codes(unpack_codes(t.qweight, t.bits), spec.bits)
    scales, offsets = (
        part if part is None else part.repeat_interleave(t.group_size // spec.group_size, dim=1)
        for part in (t.scales, t.offsets)
    )
    if affine and offsets is None:
        offsets = torch.zeros_like(scales)
    return LutTensor(qweight, scales, pad_codebook(t.codebook, spec.bits), t.name, offsets)


def dequantize_rows(file: GgufFile, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any type, decoded in fp32 by the `gguf` package and rounded to ``dtype``, by parts.

    Raises NotImplementedError for a type that the package cannot decode.
    """
    from gguf import GGMLQuantizationType, dequantize

    t = file.tensors[name]
    kind = GGMLQuantizationType[t.type]
    k = t.shape[-1]
    out = torch.empty(file.row_count(name), k, dtype=dtype)
    step = max(1, _CHUNK_WEIGHTS // k)
    for i in range(0, len(out), step):
        out[i : i + step] = torch.from_numpy(dequantize(file.rows(name, i, i + step), kind))
    return out.view(t.shape)
