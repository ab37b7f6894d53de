"""llama.cpp's kernels, or a fork's, through the library that kernels/benchmarks/ggml_peer/build.py builds.

ggml's calls are timed inside the library, without what a call from Python costs: to ggml's advantage. Its threads sleep
between its turns.
"""

import ctypes
import math
from pathlib import Path

import torch

from ..errors import FluteError
from .candidates import Rotation, calls_for

# ggml's types for each kind of weights.
TYPES = {"ternary": ("tq1_0", "tq2_0"), "2": ("q2_K",), "3": ("q3_K",), "4": ("q4_0", "q4_K", "iq4_nl")}
# vlut.cpp's, with 1.6 and 2 bits a weight. Its other types are those of an older ggml: nothing to compare with.
VEC_LUT_TYPES = {"ternary": ("i1_v_2", "i2_v_8"), "2": (), "3": (), "4": ()}
_FLOATS = ctypes.POINTER(ctypes.c_float)


def _floats(t: torch.Tensor):
    return ctypes.cast(t.data_ptr(), _FLOATS)


class Library:
    """A libggml_peer.so; ``name`` is what the user calls it."""

    def __init__(self, name: str, path: Path):
        self.name = name
        try:
            self.native = native = ctypes.CDLL(str(path.resolve()))
            for function in ("describe", "error", "buffer"):
                getattr(native, f"ggml_peer_{function}").restype = ctypes.c_char_p
            native.ggml_peer_size.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
            native.ggml_peer_size.restype = ctypes.c_int64
            native.ggml_peer_open.restype = ctypes.c_void_p
            native.ggml_peer_open.argtypes = [ctypes.c_char_p, _FLOATS, *[ctypes.c_int64] * 3, ctypes.c_int]
            native.ggml_peer_buffer.argtypes = [ctypes.c_void_p]
            doubles = ctypes.POINTER(ctypes.c_double)
            native.ggml_peer_turn.argtypes = [
                ctypes.c_void_p,
                ctypes.c_int64,
                _FLOATS,
                _FLOATS,
                ctypes.c_int,
                doubles,
            ]
            native.ggml_peer_close.argtypes = [ctypes.c_void_p]
        except (OSError, AttributeError) as e:
            raise FluteError(f"--peer {name}={path} is no ggml peer library: {e}") from e
        self.description = native.ggml_peer_describe().decode()

    def types(self, kind: str) -> list[str]:
        known = VEC_LUT_TYPES if self.size(VEC_LUT_TYPES["ternary"][0], 32, 32) else TYPES
        return [name for name in known[kind] if self.size(name, 32, 256)]

    def size(self, type_name: str, n: int, k: int) -> int:
        """Bytes of a weight ``[n, k]`` in a type; 0: this ggml does not have it."""
        return self.native.ggml_peer_size(type_name.encode(), n, k)


class GgmlCandidate:
    """candidates.Candidate in one ggml type; raises FluteError for a shape that the type does not take."""

    def __init__(self, library: Library, type_name: str, weight: torch.Tensor, threads: int, rotation: Rotation):
        n, k = weight.shape
        if "_v" in type_name and k % 32:  # not checked there
            raise FluteError(f"{type_name} takes K in multiples of 32")
        self._native, self._n, self._threads = library.native, n, threads
        self._handle = None
        self.nbytes = library.size(type_name, n, k)
        count = rotation.count(self.nbytes)
        self._handle = self._native.ggml_peer_open(type_name.encode(), _floats(weight), n, k, count, threads)
        if not self._handle:
            raise FluteError(self._native.ggml_peer_error().decode())
        self.name, self.source = f"{library.name} {type_name}", library.name
        self.pool = library.name
        self.detail = f"{library.description}; buffer {self._native.ggml_peer_buffer(self._handle).decode()}"

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        self._x = x.float().contiguous()
        self._y = torch.empty(x.shape[0], self._n)
        self._calls = 1
        self._calls = calls_for(self.turn()[0])
        return self._y

    def turn(self) -> list[float]:
        seconds = (ctypes.c_double * self._calls)(*[math.nan] * self._calls)
        m = self._x.shape[0]
        if self._native.ggml_peer_turn(self._handle, m, _floats(self._x), _floats(self._y), self._calls, seconds):
            raise RuntimeError(f"{self.name} failed to compute")
        return list(seconds)

    def __del__(self):
        if self._handle:
            self._native.ggml_peer_close(self._handle)
