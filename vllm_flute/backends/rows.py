"""Packed layout ROWS: lut-v1's own order in one buffer, for the backends that are written in Python.

codebooks fp32 ``[S, 2^bits]``, scales ``[N, G]``, qweight uint8 ``[N, bytes of a row]``, one after the other. Scales
are padded to 16 bytes, so that qweight can be read in wide words, and every row of codes to whole groups of 32 codes,
which are ``bits`` words of 32 bits whatever ``bits`` is; for K a multiple of 32 a row is as it is on disk.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..errors import FluteError
from ..layout import ROWS, Layout

CODES = 32  # that a row is padded to: of 2, 3 and 4 bits they are whole 32-bit words
_ALIGN = 16  # bytes of the widest load of a GPU thread


class Rows(NamedTuple):
    """What a packed buffer holds, as views of it; a row of qweight has its padding."""

    spec: Layout
    qweight: torch.Tensor
    scales: torch.Tensor
    codebooks: torch.Tensor


def _row_bytes(k: int, bits: int) -> int:
    return -(-k // CODES) * CODES * bits // 8


def pack(qweight: torch.Tensor, scales: torch.Tensor, codebooks: torch.Tensor, header: torch.Tensor) -> torch.Tensor:
    """The operator lut_pack: the parts of a layer as one uint8 buffer ``[bytes]``."""
    spec = Layout.read(header)
    row = pad(qweight, (0, _row_bytes(spec.k, spec.bits) - qweight.shape[1]))
    scale_bytes = scales.contiguous().view(torch.uint8).reshape(-1)
    scale_bytes = pad(scale_bytes, (0, -scale_bytes.numel() % _ALIGN))
    return torch.cat([codebooks.contiguous().view(torch.uint8).reshape(-1), scale_bytes, row.reshape(-1)])


def read(packed: torch.Tensor, header: torch.Tensor) -> Rows:
    """The parts of a packed buffer, without a copy; raises FluteError where it is not what its header says."""
    spec = Layout.read(header)
    scale_bytes = spec.n * spec.groups * spec.scale_dtype.itemsize
    sections = [len(spec.shards) * 2**spec.bits * 4, scale_bytes, -scale_bytes % _ALIGN]
    sections.append(spec.n * _row_bytes(spec.k, spec.bits))
    if spec.layout != ROWS or packed.numel() != sum(sections):
        raise FluteError(
            f"packed weights of {packed.numel()} bytes do not match their header {spec}: "
            f"expected layout rows and {sum(sections)} bytes; pack them again on this backend"
        )
    codebooks, scales, _, qweight = packed.split(sections)
    return Rows(
        spec,
        qweight.view(spec.n, -1),
        scales.view(spec.scale_dtype).view(spec.n, -1),
        codebooks.view(torch.float32).view(len(spec.shards), -1),
    )


def unpack(packed: torch.Tensor, header: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator lut_unpack: (qweight, scales, codebooks) as they were before `pack`."""
    spec, qweight, scales, codebooks = read(packed, header)
    codes = qweight[:, : spec.k * spec.bits // 8].clone(memory_format=torch.contiguous_format)
    return codes, scales.clone(), codebooks.clone()
