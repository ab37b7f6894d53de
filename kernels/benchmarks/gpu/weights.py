"""Layers to check and to time: their shapes, random weights for them, and the calls that run them."""

import os
from typing import NamedTuple

import torch

from vllm_flute import dispatch, ops
from vllm_flute.backends import rows, triton
from vllm_flute.dispatch import pack_parts
from vllm_flute.format import LutTensor
from vllm_flute.layout import ROWS, Layout

TRITON = "triton"


class Matrix(NamedTuple):
    """A linear layer as vLLM fuses it: output rows of each shard, and inputs."""

    name: str
    shards: tuple[int, ...]
    k: int
    splits_inputs: bool = False  # tensor parallelism gives each GPU a part of the inputs, not of the rows

    @property
    def n(self) -> int:
        return sum(self.shards)

    def split(self, ways: int) -> "Matrix":
        """One GPU's part under tensor parallelism."""
        if self.splits_inputs:
            return self._replace(name=f"{self.name}/{ways}", k=self.k // ways)
        return self._replace(name=f"{self.name}/{ways}", shards=tuple(rows // ways for rows in self.shards))


# meta-llama/Meta-Llama-3-8B and -70B, config.json: hidden 4096 and 8192, intermediate 14336 and 28672, heads of 128: 32
# and 64, of keys and values 8.
LLAMA = (
    Matrix("8b.qkv", (4096, 1024, 1024), 4096),
    Matrix("8b.o", (4096,), 4096, True),
    Matrix("8b.gate_up", (14336, 14336), 4096),
    Matrix("8b.down", (4096,), 14336, True),
    Matrix("70b.qkv", (8192, 1024, 1024), 8192),
    Matrix("70b.o", (8192,), 8192, True),
    Matrix("70b.gate_up", (28672, 28672), 8192),
    Matrix("70b.down", (8192,), 28672, True),
)


class Layer(NamedTuple):
    """lut-v1 parts of a layer with one codebook a shard: see vllm_flute.dispatch.pack_parts."""

    matrix: Matrix
    qweight: torch.Tensor
    scales: torch.Tensor
    codebooks: torch.Tensor

    @property
    def bits(self) -> int:
        return self.codebooks.shape[1].bit_length() - 1

    @property
    def group_size(self) -> int:
        return self.matrix.k // self.scales.shape[1]

    def shards(self) -> list[LutTensor]:
        qweight, scales = (part.split(self.matrix.shards) for part in (self.qweight, self.scales))
        return [LutTensor(*parts) for parts in zip(qweight, scales, self.codebooks, strict=True)]


def random_layer(
    matrix: Matrix, bits: int, group_size: int, scales_in: torch.dtype, generator: torch.Generator
) -> Layer:
    """Random codes, scales about 0.1 and codebooks of normal numbers, on the generator's device."""
    on = {"generator": generator, "device": generator.device}
    qweight = torch.randint(256, (matrix.n, matrix.k * bits // 8), dtype=torch.uint8, **on)
    scales = torch.rand(matrix.n, matrix.k // group_size, **on) * 0.1 + 0.05
    codebooks = torch.randn(len(matrix.shards), 2**bits, **on).sort(dim=1).values
    return Layer(matrix, qweight, scales.to(scales_in), codebooks)


class Packed(NamedTuple):
    """A layer packed for a kernel; call() runs it as a model would."""

    kernel: str  # empty: the dispatcher's choice
    n: int
    packed: torch.Tensor
    header: torch.Tensor

    def call(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x[M, K] @ W^T + bias``, ``[M, N]``."""
        if self.kernel == TRITON:
            return triton.linear(x, self.packed, self.header, bias)
        return ops.lut_linear_op(x, self.packed, self.header, bias, self.n, self.kernel)

    def copy(self) -> "Packed":
        """The same in other memory."""
        return self._replace(packed=self.packed.clone())


def pack(layer: Layer, kernel: str) -> Packed:
    """Pack a layer in the layout that a kernel reads."""
    parts = layer.qweight, layer.scales, layer.codebooks
    if kernel == TRITON:
        fields = ROWS, layer.bits, layer.group_size, layer.matrix.k, layer.scales.dtype, layer.matrix.shards
        header = Layout(*fields).header()
        return Packed(kernel, layer.matrix.n, rows.pack(*parts, header), header)
    return Packed(kernel, layer.matrix.n, *pack_parts(*parts, layer.group_size, layer.matrix.shards))


def call(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Packed.call with the arguments in the order in which candidates are called."""
    return packed.call(x)


def kernels(device: str) -> tuple[dict[str, str], dict[str, str]]:
    """({kernel: its arithmetic}, {kernel: why it does not run}) of a device, Triton's with them."""
    listed = dispatch.kernels(device)
    missing = {kernel.name: kernel.why for kernel in listed if not kernel.available}
    found = {kernel.name: kernel.arithmetic for kernel in listed if kernel.available}
    why = triton.available()
    if why:
        missing[TRITON] = why
    elif device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        found[TRITON] = next(kernel.arithmetic for kernel in triton.kernels() if kernel.name == TRITON)
    return found, missing
