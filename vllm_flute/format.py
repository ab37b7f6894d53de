"""lut-v1: one LUT-quantized weight matrix, and the rules that its parts obey."""

from dataclasses import dataclass, field

import torch

from . import reference
from .codebook import check_bits, pad_codebook
from .errors import FluteError
from .packing import pack_codes, unpack_codes

FORMAT = "lut-v1"
QUANT_METHOD = "flute"
GROUP_SIZES = (16, 32, 64, 128, 256)
SCALE_DTYPES = (torch.bfloat16, torch.float16)
# The tensors of a quantized layer P are P.qweight, P.scales and P.codebook.
PARTS = ("qweight", "scales", "codebook")


def check_group_size(group_size: int, k: int) -> int:
    """Return ``group_size``; raise FluteError unless it is a multiple of 8 that divides K."""
    if group_size < 8 or group_size % 8 or k % group_size:
        raise FluteError(f"group size {group_size} does not fit K={k}: it must be a multiple of 8 that divides K")
    return group_size


@dataclass(frozen=True, eq=False)
class LutTensor:
    """A weight ``W[n, k] = codebook[code[n, k]] * scales[n, k // group_size]``.

    Attributes:
        qweight: uint8 ``[N, K*bits/8]``, the packed codes (see packing.py).
        scales: bf16 or fp16 ``[N, K/group_size]``.
        codebook: fp32 ``[2**bits]``.
        name: what errors call this tensor.

    Raises:
        FluteError: parts whose dtypes or shapes do not agree.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor
    name: str = "weight"
    # Re-arranged copies by layout, filled by ops.lut_linear so that a repeated call packs once.
    packed: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        book, scales, qweight = self.codebook, self.scales, self.qweight
        size = book.numel()
        if book.dtype != torch.float32 or book.dim() != 1 or size & (size - 1):
            raise FluteError(
                f"{self.name}.codebook is {book.dtype} {list(book.shape)}, expected torch.float32 [4], [8] or [16]"
            )
        try:
            check_bits(self.bits)
        except FluteError as e:
            raise FluteError(f"{self.name}.codebook has {size} values: {e}") from None
        if qweight.dtype != torch.uint8 or qweight.dim() != 2 or qweight.shape[1] * 8 % (8 * self.bits):
            raise FluteError(
                f"{self.name}.qweight is {qweight.dtype} {list(qweight.shape)}, "
                f"expected torch.uint8 [N, K*{self.bits}/8]"
            )
        n, k = self.shape
        if scales.dtype not in SCALE_DTYPES or scales.dim() != 2 or scales.shape[0] != n or not scales.shape[1]:
            raise FluteError(
                f"{self.name}.scales is {scales.dtype} {list(scales.shape)}, "
                f"expected bfloat16 or float16 [{n}, K/group_size]"
            )
        if k % scales.shape[1]:
            raise FluteError(f"{self.name}.scales has {scales.shape[1]} groups a row, which does not divide K={k}")
        try:
            check_group_size(self.group_size, k)
        except FluteError as e:
            raise FluteError(f"{self.name}: {e}") from None

    @classmethod
    def from_codes(cls, codes, scales, codebook, bits: int | None = None, name: str = "weight") -> "LutTensor":
        """Build from codes uint8 ``[N, K]``, scales ``[N, G]`` and a codebook of 2 to 16 values.

        ``bits`` defaults to the smallest supported width that holds the codebook.
        Raises FluteError for codes beyond the codebook and for shapes that do not agree.
        """
        if bits is None:
            bits = max(2, (codebook.numel() - 1).bit_length())
        if codes.numel() and int(codes.max()) >= codebook.numel():
            raise FluteError(f"{name}: code {int(codes.max())} is beyond the codebook of {codebook.numel()} values")
        return cls(pack_codes(codes, bits), scales, pad_codebook(codebook, bits), name=name)

    @property
    def bits(self) -> int:
        return self.codebook.numel().bit_length() - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): outputs and inputs of the layer."""
        return self.qweight.shape[0], self.qweight.shape[1] * 8 // self.bits

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.qweight, self.scales, self.codebook))

    def codes(self) -> torch.Tensor:
        """Codes uint8 ``[N, K]``."""
        return unpack_codes(self.qweight, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[N, K]``, computed in fp32 and rounded once to ``dtype``."""
        return reference.dequantize(self, dtype)
