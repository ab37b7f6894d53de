"""What a source of `vllm-flute import` is: a quantized checkpoint that is read layer by layer as lut-v1."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ...errors import FluteError
from ...format import LutTensor
from ..config import HEAD, LayerSpec
from ..output import copy_files
from ..reader import Checkpoint, Header

# What other tools call the settings that lut-v1 replaces.
_SETTINGS = ("quantization_config", "compression_config", "_pre_quantization_dtype")
# Of a decoder block, but for norms.
_MATRIX = re.compile(r"model\.layers\.\d+\.(?!.*norm[^.]*\.weight).+\.weight")


class Converted(NamedTuple):
    """One source layer as lut-v1.

    Attributes:
        lut: the layer; what it dequantizes to is compared with the source in float32.
        exact: equal to the source's own dequantization bit by bit in float32.
        note: what is not exact and by how much, or what else a user should know; one short line.
    """

    lut: LutTensor
    exact: bool
    note: str = ""


class Source(Protocol):
    """A checkpoint of another format. Opening it reads headers only; each call below reads one tensor or layer.

    Attributes:
        kind: what the format is called, such as "gptq"; also the codebook's label in config.json.
        path: directory or file.
        files: whose size and time tell whether an interrupted import may continue.
        nbytes: of all tensors.
        notes: what a user should know about the whole, one line each.
        lossy: layers of ``quantized`` that no table fits, and what they are; `convert` quantizes them again.
    """

    kind: str
    path: Path
    files: list[Path]
    nbytes: int
    notes: list[str]
    lossy: Mapping[str, str]

    def config(self) -> dict:
        """config.json of the plain model, without a quantization_config."""

    def tensors(self) -> list[str]:
        """Names of the output's units, in Hugging Face's spelling: "P.weight" of each linear, every plain tensor."""

    def quantized(self) -> dict[str, LayerSpec]:
        """Bits and group size in lut-v1 of each quantized layer P, from headers alone."""

    def convert(self, layer: str) -> Converted: ...

    def plain(self, layer: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]`` of a quantized layer, computed in fp32 and rounded once."""

    def tensor(self, name: str) -> torch.Tensor:
        """A plain tensor as it is."""

    def extra_files(self, out: Path) -> None:
        """Write tokenizer, generation_config.json and the like into ``out``."""


def settings(config: dict) -> dict:
    """What a config.json says of its quantization; {} where it says nothing."""
    found = config.get("quantization_config") or config.get("compression_config")  # older compressed-tensors
    return found if isinstance(found, dict) else {}


class Directory(ABC):
    """The parts of `Source` that a Hugging Face directory in safetensors has in common with others.

    A subclass sets ``kind`` and ``parts`` (suffixes of the tensors that a quantized layer P has, the packed weight's
    first), and writes ``spec(layer)`` and ``convert(layer)``.
    """

    kind: str
    parts: tuple[str, ...]

    def __init__(self, path: Path):
        self.checkpoint = Checkpoint(path)
        self.path = self.checkpoint.path
        self.files = [self.path / name for name in [*self.checkpoint.files, "config.json"]]
        self.nbytes = self.checkpoint.nbytes
        self.notes: list[str] = []
        self.lossy: dict[str, str] = {}
        self.headers = self.checkpoint.headers
        marker = f".{self.parts[0]}"
        self.layers = [name.removesuffix(marker) for name in self.headers if name.endswith(marker)]
        self._owned = {f"{layer}.{part}" for layer in self.layers for part in self.parts}

    def config(self) -> dict:
        return {key: value for key, value in self.checkpoint.config.items() if key not in _SETTINGS}

    def tensors(self) -> list[str]:
        return [f"{layer}.weight" for layer in self.layers] + [n for n in self.headers if n not in self._owned]

    def quantized(self) -> dict[str, LayerSpec]:
        if not self.layers:
            raise FluteError(
                f"{self.path}: config.json says {self.kind}, but no tensor is called *.{self.parts[0]}: fetch it again"
            )
        return {layer: self.spec(layer) for layer in self.layers}

    @abstractmethod
    def spec(self, layer: str) -> LayerSpec: ...

    def header(self, layer: str, part: str, dtypes: tuple[str, ...], dims: int) -> Header:
        """The header of a layer's tensor; FluteError where it is missing, of another dtype or has no such shape."""
        name = f"{layer}.{part}"
        found = self.headers.get(name)
        if found is None:
            raise FluteError(f"{self.path} lacks {name}, which a {self.kind} layer has: fetch the checkpoint again")
        if found.dtype not in dtypes or len(found.shape) != dims or 0 in found.shape:
            raise FluteError(
                f"{name} is {found.dtype} {list(found.shape)} in {found.file}, expected {' or '.join(dtypes)} of "
                f"{dims} dimensions: is this really {self.kind}?"
            )
        return found

    @abstractmethod
    def convert(self, layer: str) -> Converted: ...

    def plain(self, layer: str, dtype: torch.dtype) -> torch.Tensor:
        return self.convert(layer).lut.dequantize(dtype)

    def tensor(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name)

    def extra_files(self, out: Path) -> None:
        copy_files(self.path, out)


def plain_linears(source: Source) -> list[str]:
    """Linear layers, routers too, and the head, that the source has not quantized."""
    quantized = source.quantized()
    names = [name.removesuffix(".weight") for name in source.tensors() if _MATRIX.fullmatch(name)]
    names += [HEAD] if f"{HEAD}.weight" in source.tensors() else []
    return [name for name in names if name not in quantized]
