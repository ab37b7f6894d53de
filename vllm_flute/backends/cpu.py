"""The native CPU backend: kernels/ built to one shared library, chosen by ISA at run time.

The library registers the operators for the CPU itself (torch's stable ABI) and exports a small C interface for
what is not an operator: its list of kernels, its choice, the page of counters.
"""

import ctypes
import functools
import json
from pathlib import Path

import torch

from .. import counters
from ..layout import TERNARY16, TILE16
from . import Kernel

_PATH = Path(__file__).resolve().parent.parent / "libvllm_flute_cpu.so"
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not _PATH.exists():
        return None, f"{_PATH.name} was not built: reinstall with a C++ compiler (pip install .)"
    try:
        torch.ops.load_library(str(_PATH))
        native = ctypes.CDLL(str(_PATH))
    except OSError as e:
        return None, f"{_PATH.name} does not load: {e}"
    native.flute_cpu_describe.restype = ctypes.c_char_p
    native.flute_cpu_choose.restype = ctypes.c_char_p
    native.flute_cpu_choose.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    native.flute_cpu_set_counters.argtypes = [ctypes.c_void_p]
    native.flute_cpu_set_table.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    counters.subscribe(native.flute_cpu_set_counters)
    return native, ""


def load() -> str:
    """Load the library and register its operators; returns why not, or an empty string."""
    return _load()[1]


def describe() -> dict:
    """What the library found: ``isa`` in use, ``kernels``."""
    native, why = _load()
    return json.loads(native.flute_cpu_describe()) if native else {"isa": "none", "why": why, "kernels": []}


def kernels() -> list[Kernel]:
    return [Kernel(**k) for k in describe()["kernels"]]


def layout(codebooks: torch.Tensor) -> int:
    """The layout to pack weights of these codebooks (fp32 ``[S, 2**bits]``) in: ternary ones have kernels of their own."""
    ternary = codebooks.shape[1] == 4 and torch.equal(codebooks[:, 2], codebooks[:, 3])
    return TERNARY16 if ternary else TILE16


def choose(header: torch.Tensor, m: int, dtype: torch.dtype) -> str:
    """The name of the kernel that the dispatcher takes for M tokens of this dtype."""
    return _load()[0].flute_cpu_choose(header.data_ptr(), m, _DTYPE_CODE[dtype]).decode()
