"""Codes of 2, 3 or 4 bits as bytes: the little-endian bit stream of the lut-v1 format.

Code ``k`` of a row takes bits ``k*bits .. k*bits+bits-1`` of that row, the lowest bit of a byte first.
"""

import torch

from .codebook import check_bits
from .errors import FluteError


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
    # Eight codes fill `bits` whole bytes.
    octets = codes.reshape(n, k // 8, 8).to(torch.int64)
    word = (octets << (torch.arange(8, device=codes.device) * bits)).sum(-1, keepdim=True)
    stream = (word >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return stream.to(torch.uint8).reshape(n, k * bits // 8)


def unpack_codes(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo pack_codes: uint8 ``[N, K*bits//8]`` to codes uint8 ``[N, K]``."""
    check_bits(bits)
    if qweight.dtype != torch.uint8 or qweight.dim() != 2 or qweight.shape[1] % bits:
        raise FluteError(
            f"qweight is {qweight.dtype} {list(qweight.shape)}, expected torch.uint8 [N, K*{bits}/8] "
            f"with a row of a multiple of {bits} bytes"
        )
    n, row = qweight.shape
    octets = qweight.reshape(n, row // bits, bits).to(torch.int64)
    word = (octets << (torch.arange(bits, device=qweight.device) * 8)).sum(-1, keepdim=True)
    codes = (word >> (torch.arange(8, device=qweight.device) * bits)) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(n, row * 8 // bits)
