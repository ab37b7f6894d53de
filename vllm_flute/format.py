"""lut-v1: one LUT-quantized weight matrix, and the rules that its parts obey."""

from collections.abc import Mapping
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
# Those that a layer may have besides; config.json's ``extensions`` lists the ones in use.
EXTENSIONS = ("offsets", "perm")
OFFSET_DTYPES = (torch.float32, *SCALE_DTYPES)


def check_group_size(group_size: int, k: int) -> int:
    """Return ``group_size``; raise FluteError unless it is a multiple of 8 that divides K."""
    if group_size < 8 or group_size % 8 or k % group_size:
        raise FluteError(f"group size {group_size} does not fit K={k}: it must be a multiple of 8 that divides K")
    return group_size


@dataclass(frozen=True, eq=False)
class LutTensor:
    """A weight ``W[n, k] = codebook[code[n, k]] * scales[n, k // group_size]``.

    With the extensions ``W[n, perm[k]] = codebook[code[n, k]] * scales[n, g] + offsets[n, g]``, where ``g`` is
    ``k // group_size``.

    Attributes:
        qweight: uint8 ``[N, K*bits/8]``, the packed codes (see packing.py).
        scales: bf16 or fp16 ``[N, K/group_size]``.
        codebook: fp32 ``[2**bits]``.
        name: what errors call this tensor.
        offsets: fp32, bf16 or fp16 ``[N, K/group_size]``, or None: what a group's zero point adds.
        perm: int32 ``[K]``, or None: the input that each column of codes multiplies (GPTQ's act-order).

    Raises:
        FluteError: parts whose dtypes or shapes do not agree.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor
    name: str = "weight"
    offsets: torch.Tensor | None = None
    perm: torch.Tensor | None = None
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
        self._check_extensions(k)

    def _check_extensions(self, k: int) -> None:
        offsets, perm = self.offsets, self.perm
        if offsets is not None and (offsets.dtype not in OFFSET_DTYPES or offsets.shape != self.scales.shape):
            raise FluteError(
                f"{self.name}.offsets is {offsets.dtype} {list(offsets.shape)}, "
                f"expected float32, bfloat16 or float16 {list(self.scales.shape)}"
            )
        if perm is None:
            return
        if perm.dtype != torch.int32 or perm.shape != (k,):
            raise FluteError(f"{self.name}.perm is {perm.dtype} {list(perm.shape)}, expected torch.int32 [{k}]")
        if not torch.equal(perm.sort().values, torch.arange(k, dtype=torch.int32, device=perm.device)):
            raise FluteError(f"{self.name}.perm is no permutation of 0 to {k - 1}")

    @classmethod
    def from_codes(
        cls, codes, scales, codebook, bits: int | None = None, name: str = "weight", offsets=None, perm=None
    ) -> "LutTensor":
        """Build from codes uint8 ``[N, K]``, scales ``[N, G]`` and a codebook of 2 to 16 values.

        ``bits`` defaults to the smallest supported width that holds the codebook.
        Raises FluteError for codes beyond the codebook and for shapes that do not agree.
        """
        if bits is None:
            bits = max(2, (codebook.numel() - 1).bit_length())
        if codes.numel() and int(codes.max()) >= codebook.numel():
            raise FluteError(f"{name}: code {int(codes.max())} is beyond the codebook of {codebook.numel()} values")
        return cls(pack_codes(codes, bits), scales, pad_codebook(codebook, bits), name, offsets, perm)

    @classmethod
    def from_parts(cls, parts: Mapping[str, torch.Tensor], name: str = "weight") -> "LutTensor":
        """Build from the tensors that `parts` gives."""
        required = (parts[part] for part in PARTS)
        return cls(*required, name, *(parts.get(part) for part in EXTENSIONS))

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors of the layer by what they are called on disk."""
        named = {part: getattr(self, part) for part in (*PARTS, *EXTENSIONS)}
        return {part: tensor for part, tensor in named.items() if tensor is not None}

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
        return sum(t.nbytes for t in self.parts().values())

    def codes(self) -> torch.Tensor:
        """Codes uint8 ``[N, K]``."""
        return unpack_codes(self.qweight, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[N, K]``, computed in fp32 and rounded once to ``dtype``."""
        return reference.dequantize(self, dtype)
