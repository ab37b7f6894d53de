"""Codes of 2, 3 or 4 bits as bytes: the little-endian bit stream of the lut-v1 format.

Code ``k`` of a row takes bits ``k*bits .. k*bits+bits-1`` of that row, the lowest bit of a byte first.
"""

import torch

from .codebook import check_bits
from .errors import FluteError


def _positions(bits: int) -> list[tuple[int, int, int]]:
    """(code, byte, shift) of each of the eight codes that fill ``bits`` whole bytes."""
    return [(i, i * bits // 8, i * bits % 8) for i in range(8)]


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes uint8 ``[N, K]`` (each below ``2**bits``, K a multiple of 8) to uint8 ``[N, K*bits//8]``."""
    check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % 8:
        raise FluteError(
            f"codes are {codes.dtype} {list(codes.shape)}, expected torch.uint8 [N, K] with K a multiple of 8"
        )
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise FluteError(f"code {int(codes.max())} is beyond the codebook: {bits} bits hold codes 0 to {2**bits - 1}")
    n, k = codes.shape
    octets = codes.reshape(n, k // 8, 8)
    out = torch.zeros(n, k // 8, bits, dtype=torch.uint8, device=codes.device)
    for i, byte, shift in _positions(bits):
        out[..., byte] |= octets[..., i] << shift
        if shift + bits > 8:  # the code continues in the next byte
            out[..., byte + 1] |= octets[..., i] >> (8 - shift)
    return out.view(n, k * bits // 8)


def unpack_codes(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo pack_codes: uint8 ``[N, K*bits//8]`` to codes uint8 ``[N, K]``."""
    check_bits(bits)
    if qweight.dtype != torch.uint8 or qweight.dim() != 2 or qweight.shape[1] % bits:
        raise FluteError(
            f"qweight is {qweight.dtype} {list(qweight.shape)}, expected torch.uint8 [N, K*{bits}/8] "
            f"with a row of a multiple of {bits} bytes"
        )
    n, row = qweight.shape
    stream = qweight.reshape(n, row // bits, bits)
    codes = torch.empty(n, row // bits, 8, dtype=torch.uint8, device=qweight.device)
    for i, byte, shift in _positions(bits):
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.view(n, row * 8 // bits)
