"""compressed-tensors' pack-quantized integers of 2, 3 and 4 bits, with or without zero points and act-order.

P.weight_packed int32 [N, ceil(K / (32 // bits))] (codes plus 2**(bits-1), the first one lowest; a word of 3-bit codes
has 10), P.weight_scale [N, G], [1] or [], P.weight_shape [2], P.weight_zero_point int32 packed the same way along N,
[ceil(N / (32 // bits)), G], P.weight_g_idx int32 [K], the group of each input. Source: compressed_tensors.compressors.
"""

from typing import NamedTuple

import torch

from ...codebook import BITS
from ...errors import FluteError
from ...packing import pack_codes, unpack_codes
from ..config import LayerSpec
from .base import Converted, Directory
from .gptq import input_order
from .scales import stored_group
from .zero_points import affine

_FLOATS = ("BF16", "F16", "F32")


class Shape(NamedTuple):
    n: int
    k: int
    bits: int
    groups: int


def unpack(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """lut-v1's qweight uint8 ``[N, K*bits/8]`` of int32 words ``[N, ceil(K / (32 // bits))]``, first code lowest."""
    if 32 % bits == 0:  # the words are already a little-endian bit stream
        return packed.contiguous().view(torch.uint8)[:, : k * bits // 8].contiguous()
    return pack_codes(_codes(packed, bits)[:, :k].contiguous(), bits)


def _codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[N, W * (32 // bits)]`` of int32 words ``[N, W]``."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    return ((packed.unsqueeze(2) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)


def shape(source: Directory, layer: str) -> Shape:
    """What a layer's headers and weight_shape say; raises FluteError where they do not agree."""
    packed, name = source.header(layer, "weight_packed", ("I32",), 2), f"{layer}.weight_shape"
    stored = source.headers.get(name)
    if not stored or stored.numel != 2 or stored.dtype not in ("I64", "I32"):
        raise FluteError(f"{name} is missing or not two integers: fetch the checkpoint again")
    n, k = source.tensor(name).flatten().tolist()
    bits = [b for b in BITS if k > 0 and -(-k // (32 // b)) == packed.shape[1]]
    if n != packed.shape[0] or len(bits) != 1 or k % 8:
        raise FluteError(
            f"{layer}.weight_packed is I32 {list(packed.shape)} of a weight [{n}, {k}]: expected words of 2, 3 or 4 "
            "bits, K a multiple of 8"
        )
    scales = source.headers.get(f"{layer}.weight_scale")
    sizes = scales.shape if scales else None
    one = sizes in ((), (1,), (1, 1))
    if not scales or scales.dtype not in _FLOATS or not (one or (len(sizes) == 2 and sizes[0] == n and sizes[1])):
        found = f"{scales.dtype} {list(sizes)}" if scales else "missing"
        raise FluteError(f"{layer}.weight_scale is {found}, expected BF16, F16 or F32 [{n}, K/group]")
    groups = 1 if one else sizes[1]
    for part, expected in (("weight_zero_point", (-(-n // (32 // bits[0])), groups)), ("weight_g_idx", (k,))):
        header = source.headers.get(f"{layer}.{part}")
        if header and (header.dtype != "I32" or header.shape != expected):
            raise FluteError(
                f"{layer}.{part} is {header.dtype} {list(header.shape)}, expected I32 {list(expected)}: "
                "fetch the checkpoint again"
            )
    return Shape(n, k, bits[0], groups)


def spec(source: Directory, layer: str) -> LayerSpec:
    _, k, bits, groups = shape(source, layer)
    group = stored_group(k // groups, k) if k % groups == 0 else None
    if group is None:
        raise FluteError(f"{layer} has {groups} groups in rows of {k}: lut-v1 has groups of 16 to 256 or a row")
    return LayerSpec(bits, group)


def convert(source: Directory, layer: str) -> Converted:
    """One layer; see `zero_points.affine` for what is exact."""
    n, k, bits, groups = shape(source, layer)
    qweight = unpack(source.tensor(f"{layer}.weight_packed"), bits, k)
    perm = None
    if f"{layer}.weight_g_idx" in source.headers:
        perm = input_order(source.tensor(f"{layer}.weight_g_idx"), groups, layer)
        if perm is not None:
            qweight = pack_codes(unpack_codes(qweight, bits).index_select(1, perm), bits)
    scales = source.tensor(f"{layer}.weight_scale")
    scales = scales.expand(n, 1) if scales.numel() == 1 else scales
    zeros = torch.tensor([[2 ** (bits - 1)]], dtype=torch.uint8)
    if f"{layer}.weight_zero_point" in source.headers:
        zeros = _codes(source.tensor(f"{layer}.weight_zero_point").T, bits)[:, :n].T
    return affine(qweight, scales, zeros, bits, layer, k // groups // spec(source, layer).group_size, perm)
