"""The GGUF container: metadata and tensor table, every count and offset checked against the file before it is used.

Layout: the specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's reader trusts
these numbers and keeps every page that it touched; here a corrupt file is refused before anything is allocated for it.
"""

import mmap
import re
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import FluteError

_VERSIONS = (2, 3)
# Vocabularies take about 10 MB; what is far beyond describes no model.
_METADATA_LIMIT = 128 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgufTensor(NamedTuple):
    """One tensor: ``shape`` in torch's order, of weights; ``offset`` and ``nbytes`` of its data in ``path``."""

    path: Path
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Scan:
    """Reads forward through the head of a file and never beyond its end."""

    def __init__(self, path: Path, data):
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), _METADATA_LIMIT)

    def refuse(self, what: str):
        raise FluteError(f"{self.path} is damaged or no GGUF model: {what}; fetch it again")

    def take(self, size: int, what: str) -> int:
        """The position of the next ``size`` bytes."""
        start = self.at
        if size > self.end - start:
            self.refuse(f"{what} of {size} bytes at {start} goes beyond the {self.end} bytes that may hold it")
        self.at += size
        return start

    def number(self, code: str, what: str):
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        size = self.number("Q", what)
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} at {start} is not UTF-8")

    def value(self, key: str):
        """A metadata value: number, bool, string, list of strings or numpy array."""
        kind = self.number("I", key)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            self.refuse(f"metadata {key!r} has the unknown type {kind}")
        item, count = self.number("I", key), self.number("Q", key)
        if item == _STRING:
            if count * 8 > self.end - self.at:
                self.refuse(f"metadata {key!r} claims {count} strings in {self.end - self.at} bytes")
            return [self.string(key) for _ in range(count)]
        if item not in _SCALARS:
            self.refuse(f"metadata {key!r} is an array of the unknown type {item}")
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        size = count * dtype.itemsize
        start = self.take(size, key)
        return np.frombuffer(self.data[start : start + size], dtype)


class GgufFile:
    """An opened GGUF model, all parts of a split one: ``metadata`` by key, ``tensors`` by name; no weights in memory.

    Args:
        path: the file; of a split model any part, beside the others.

    Raises:
        FluteError: the file is no GGUF, is damaged or cut off, or a part is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, GgufTensor] = {}
        self.files = self._parts(path)
        self.metadata: dict = {}
        for file in self.files:
            metadata, tensors = self._read(file)
            self.metadata = self.metadata or metadata
            if twice := sorted(tensors.keys() & self.tensors.keys()):
                raise FluteError(f"{file} has the tensor {twice[0]}, which another part has too: fetch the parts again")
            self.tensors |= tensors
        count = self.metadata.get("split.count", 1)
        if type(count) is not int or count not in (0, len(self.files)):
            raise FluteError(
                f"{path} is a part of a model split into {str(count)[:20]} files: keep them together under their names "
                "(NAME-00001-of-0000N.gguf)"
            )

    @staticmethod
    def _parts(path: Path) -> list[Path]:
        """All files of the model, the one with the metadata first."""
        found = _SPLIT.fullmatch(path.name)
        if not found or int(found[3]) > 1000:
            return [path]
        parts = [path.with_name(f"{found[1]}-{i + 1:05d}-of-{found[3]}.gguf") for i in range(int(found[3]))]
        if missing := [part for part in parts if not part.is_file()]:
            raise FluteError(f"{missing[0]} is missing, a part of the same model as {path.name}: fetch it")
        return parts or [path]

    def _read(self, path: Path) -> tuple[dict, dict[str, GgufTensor]]:
        try:
            size = path.stat().st_size
            if size < 24:
                raise FluteError(f"{path} has {size} bytes and is no GGUF model: fetch it again")
            with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return self._scan(path, _Scan(path, data), size)
        except OSError as e:
            raise FluteError(f"{path} cannot be read: {e.strerror}") from None

    @staticmethod
    def _scan(path: Path, scan: _Scan, size: int) -> tuple[dict, dict[str, GgufTensor]]:
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError:
            raise FluteError(f"{path} needs the gguf package: pip install 'vllm-flute[quantize]'") from None

        if scan.data[:4] != b"GGUF":
            raise FluteError(f"{path} is no GGUF file (it begins with {scan.data[:4]!r}, not with b'GGUF')")
        scan.at = 4
        version = scan.number("I", "version")
        if version not in _VERSIONS:
            big = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise FluteError(f"{path} is GGUF version {version}{big}, this reads 2 and 3: convert the model again")
        tensor_count, key_count = scan.number("Q", "tensor count"), scan.number("Q", "metadata count")
        for what, count, least in (("tensors", tensor_count, 24), ("metadata entries", key_count, 13)):
            if count * least > scan.end:
                scan.refuse(f"it claims {count} {what} in {scan.end} bytes")

        metadata = {}
        for _ in range(key_count):
            key = scan.string("metadata key")
            if key in metadata:
                scan.refuse(f"metadata {key!r} is there twice")
            metadata[key] = scan.value(key)

        table = []
        for _ in range(tensor_count):
            name = scan.string("tensor name")
            dims = scan.number("I", name)
            if not 1 <= dims <= 4:
                scan.refuse(f"tensor {name!r} has {dims} dimensions")
            shape = tuple(scan.number("Q", name) for _ in range(dims))[::-1]
            table.append((name, shape, scan.number("I", name), scan.number("Q", name)))

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            scan.refuse(f"general.alignment is {alignment!r}")
        start = -(-scan.at // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in table:
            try:
                kind = GGMLQuantizationType(number)
                block, stored = GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise FluteError(
                    f"{path}: tensor {name!r} has the type {number}, which the installed gguf package does not know: "
                    "upgrade gguf"
                ) from None
            if 0 in shape or shape[-1] % block:
                scan.refuse(f"tensor {name!r} is {kind.name} {list(shape)}, its rows must be multiples of {block}")
            nbytes = prod(shape) // block * stored
            if start + offset + nbytes > size:
                raise FluteError(
                    f"{path} is cut off: it has {size} bytes, tensor {name!r} {list(shape)} ends at "
                    f"{start + offset + nbytes}; fetch it again"
                )
            if name in tensors or offset % alignment:
                scan.refuse(f"tensor {name!r} is there twice or at an odd place ({offset})")
            tensors[name] = GgufTensor(path, kind.name, shape, start + offset, nbytes)
        if sum(t.nbytes for t in tensors.values()) > size:
            scan.refuse("its tensors overlap")
        return metadata, tensors

    def row_count(self, name: str) -> int:
        return prod(self.tensors[name].shape[:-1])

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Stored bytes of rows ``first .. last - 1`` of a tensor: uint8 ``[rows, bytes per row]``."""
        t, count = self.tensors[name], self.row_count(name)
        last = count if last is None else min(last, count)
        row = t.nbytes // count
        try:
            data = np.fromfile(t.path, np.uint8, (last - first) * row, offset=t.offset + first * row)
        except OSError as e:
            raise FluteError(f"{t.path}: cannot read {name}: {e.strerror}") from None
        if data.size != (last - first) * row:
            raise FluteError(f"{t.path} became shorter while it was read: fetch it again")
        return data.reshape(last - first, row)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
