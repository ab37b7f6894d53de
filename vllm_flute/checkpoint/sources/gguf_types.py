"""GGUF's quantized types as lut-v1: blocks of codes with their scales become rows of codes and rows of scales.

Blocks as in ggml-common.h and ggml-quants.c (https://github.com/ggml-org/ggml); what is no table times a scale is
decoded by the `gguf` package.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
_CHUNK_WEIGHTS = 1 << 19


class _Decoded(NamedTuple):
    """Of each block: packed codes uint8, scales fp32 and offsets fp32 or None, all ``[blocks, ...]``."""

    packed: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None


def _column(blocks: np.ndarray, at: int, dtype: str) -> np.ndarray:
    """The numbers at byte ``at`` of every block, copied in one long loop; blocks are uint8 ``[blocks, bytes]``."""
    return np.ndarray(len(blocks), dtype, blocks, at, blocks.strides[:1]).copy()


def _half(blocks: np.ndarray, at: int = 0) -> np.ndarray:
    """The fp16 numbers at byte ``at`` as fp32 ``[blocks, 1]``."""
    return _column(blocks, at, "<f2").astype(np.float32)[:, None]


def _every_other(x: np.ndarray) -> np.ndarray:
    """The low nibbles of eight bytes (uint64) side by side (uint32)."""
    x = x & 0x0F0F0F0F0F0F0F0F
    for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        x |= x >> shift
        x &= mask
    return x.astype(np.uint32)


def _nibbles(blocks: np.ndarray, first: int, size: int) -> np.ndarray:
    """4-bit codes in the order of lut-v1, uint8 ``[blocks, bytes]``, from byte ``first`` of each block on.

    ``size`` bytes hold ``2 * size`` codes, code i and code i + size in byte i; so to the end of a block.
    """
    words = size // 8
    groups = (blocks.shape[1] - first) // size
    out = np.empty((len(blocks), groups, 2, words), np.uint32)
    for group in range(groups):
        for word in range(words):
            x = _column(blocks, first + group * size + word * 8, "<u8")
            out[:, group, 0, word] = _every_other(x)
            out[:, group, 1, word] = _every_other(x >> 4)
    return out.view(np.uint8).reshape(len(blocks), -1)


def _quarters(data: np.ndarray) -> np.ndarray:
    """2-bit codes in the order of lut-v1, from groups of 4n in bytes ``[..., n]`` (i, i + n, i + 2n, i + 3n)."""
    words = np.ascontiguousarray(data).view("<u4")
    out = np.empty((*data.shape[:-1], 4, words.shape[-1]), np.uint8)
    for i in range(4):
        codes = words >> 2 * i & 0x03030303
        codes |= codes >> 6
        codes |= codes >> 12
        out[..., i, :] = codes
    return out.reshape(data.shape)


def _eighths(codes: np.ndarray) -> np.ndarray:
    """3-bit codes, one a byte ``[..., 8n]``, packed ``[..., 3n]``."""
    x = codes.view("<u8")
    for shift, mask in ((5, 0x003F003F003F003F), (10, 0x00000FFF00000FFF), (20, 0x0000000000FFFFFF)):
        x = (x | x >> shift) & mask
    return np.ascontiguousarray(x.view(np.uint8).reshape(*x.shape, 8)[..., :3]).reshape(*x.shape[:-1], -1)


def _q4(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks, 2, 16), _half(blocks))


def _q4_1(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks, 4, 16), _half(blocks), _half(blocks, 2))


def _mxfp4(blocks: np.ndarray) -> _Decoded:
    """A power of two 2**(e - 127), halved as the table is doubled, before the codes."""
    return _Decoded(_nibbles(blocks, 1, 16), np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128))


def _iq4_xs(blocks: np.ndarray) -> _Decoded:
    """Eight groups of 32 with 6-bit scales: 4 low bits in bytes 4..7, 2 high bits in the 16 bits of bytes 2..3."""
    high = _column(blocks, 2, "<u2")[:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).reshape(high.shape)
    scales = _half(blocks) * ((low | high << 4).astype(np.float32) - 32)
    return _Decoded(_nibbles(blocks, 8, 16), scales)


def _q4_k(blocks: np.ndarray) -> _Decoded:
    """Eight groups of 32: fp16 units of scales and of minima, both 6 bits (12 bytes for all), then the codes."""
    first, second, third = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=-1).astype(np.float32)
    minima = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=-1).astype(np.float32)
    return _Decoded(_nibbles(blocks, 16, 32), _half(blocks) * scales, -_half(blocks, 2) * minima)


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
    return _Decoded(_eighths(low | high << 2), _half(blocks, 108) * scales)


def _q2_k(blocks: np.ndarray) -> _Decoded:
    """Sixteen groups of 16: 4-bit scales and minima (a byte each), codes (64 bytes), units of scales and of minima."""
    scales, minima = (blocks[..., :16] & 15).astype(np.float32), (blocks[..., :16] >> 4).astype(np.float32)
    packed = _quarters(blocks[..., 16:80].reshape(*blocks.shape[:-1], 2, 32))
    return _Decoded(packed, _half(blocks, 80) * scales, -_half(blocks, 82) * minima)


# The five ternary digits of a byte, most significant first, as a fraction of 256: digit i is the top of
# byte * 3**i * 3 / 256. Four of them side by side, and the fifth.
_DIGITS = np.arange(256)[:, None] * np.array([1, 3, 9, 27, 81]) % 256 * 3 >> 8
_FIRST_FOUR = (_DIGITS[:, :4] << np.array([0, 2, 4, 6])).sum(1).astype(np.uint8)
_FIFTH = _DIGITS[:, 4].astype(np.uint8)


def _tq1_0(blocks: np.ndarray) -> _Decoded:
    """Codes i, i + n, .. i + 4n in byte i of 32, then of 16 bytes, the last 16 codes in 4 bytes."""
    first, fifth = _FIRST_FOUR[blocks[:, :52]], _FIFTH[blocks[:, :48]]
    parts = []
    for begin, end in ((0, 32), (32, 48)):
        parts += [_quarters(first[:, begin:end]), _quarters(fifth[:, begin:end])[:, : (end - begin) // 4]]
    return _Decoded(np.concatenate([*parts, _quarters(first[:, 48:])], axis=-1), _half(blocks, 52))


def _tq2_0(blocks: np.ndarray) -> _Decoded:
    if (blocks[..., :64] & blocks[..., :64] >> 1 & 0x55).any():
        raise FluteError("it has the code 3, which TQ2_0 (-1, 0, 1) does not have: fetch the file again")
    packed = _quarters(blocks[..., :64].reshape(*blocks.shape[:-1], 2, 32))
    return _Decoded(packed, _half(blocks, 64))


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
    n, k = len(rows), rows.shape[1] // block_bytes * block_weights
    qweight = torch.empty(n, k * spec.bits // 8, dtype=torch.uint8)
    scales = torch.empty(n, k // spec.group_size)
    offsets = torch.empty_like(scales) if affine else None
    step = max(1, _CHUNK_WEIGHTS // k)

    def convert(i: int) -> None:
        found = decode(rows[i : i + step].reshape(-1, block_bytes))
        for whole, part in zip((qweight, scales, offsets), found, strict=True):
            if whole is not None:
                whole[i : i + step] = torch.from_numpy(part).view(-1, whole.shape[1])

    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(convert, range(0, n, step)):
                pass
    except FluteError as e:
        raise FluteError(f"{name}: {e}") from None
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
