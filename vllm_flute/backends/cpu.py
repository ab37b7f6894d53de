"""The native CPU backend: kernels/ built to one shared library, chosen by ISA at run time.

The library registers the operators for the CPU itself (torch's stable ABI) and exports a small C interface for
what is not an operator: its list of kernels, its choice, the table it chooses by, the page of counters.
"""

import ctypes
import functools
import json
from pathlib import Path

import torch

from .. import counters
from ..layout import TERNARY16, TILE16, TRIT20
from . import Kernel, table

_PATH = Path(__file__).resolve().parent.parent / "libvllm_flute_cpu.so"
# Where layout TRIT20 pays (measured on Zen 4, one core, weights in its cache, against 2 bits): with bf16 multiply-adds
# one token takes 3% more time, two to four a sixth less, many in the vector LUT 7% more. In fp32 nothing is gained but
# the bytes, in AVX2 decoding costs 40% more, and the tiles of AMX do not read it.
_TRIT_ISAS = ("avx512bf16",)

_threads = None  # that the table in use was looked up for


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
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    native.flute_cpu_search_scales.restype = None
    native.flute_cpu_search_scales.argtypes = [pointer, size, size, pointer, ctypes.c_int, pointer, size, pointer]
    counters.subscribe(native.flute_cpu_set_counters)
    return native, ""


def load() -> str:
    """Load the library and register its operators; returns why not, or an empty string."""
    why = _load()[1]
    if not why:
        _follow_threads()
    return why


def describe() -> dict:
    """What the library found: ``isa`` in use, ``kernels``."""
    native, why = _load()
    return json.loads(native.flute_cpu_describe()) if native else {"isa": "none", "why": why, "kernels": []}


def kernels() -> list[Kernel]:
    return [Kernel(**k) for k in describe()["kernels"]]


def layout(codebooks: torch.Tensor, one_scale: bool = False) -> int:
    """The layout to pack weights of these codebooks (fp32 ``[S, 2**bits]``) in: ternary ones have their own.

    Those with one scale a row take 1.6 bits where that pays, see _TRIT_ISAS; no int8 kernel reads them.
    """
    _follow_threads()  # a vLLM worker sets its number of threads after the library is loaded, and before it packs
    ternary = codebooks.shape[1] == 4 and torch.equal(codebooks[:, 2], codebooks[:, 3])
    if not ternary:
        return TILE16
    found = describe()
    return TRIT20 if one_scale and found["isa"] in _TRIT_ISAS and found["activations"] == "16" else TERNARY16


def choose(header: torch.Tensor, m: int, dtype: torch.dtype) -> str:
    """The name of the kernel that the dispatcher takes for M tokens of this dtype."""
    code = table.DTYPES[str(dtype).removeprefix("torch.")]
    return _load()[0].flute_cpu_choose(header.data_ptr(), m, code).decode()


def search_scales(groups: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor | None:
    """The scales that `quantization.search_scales` wants, on the calling thread; None where there is no library.

    Args:
        groups: fp32 ``[count, group_size]``.
        levels: fp32, the table's at most 16 distinct values, ascending.
        importance: fp32 ``[period, group_size]``, repeated over the groups, or None.

    Returns fp32 ``[count]``, NaN for groups with values that are not finite.
    """
    native, _ = _load()
    if not native:
        return None
    given = [groups, levels] + ([] if importance is None else [importance])
    if not all(t.dtype == torch.float32 and t.is_contiguous() and t.is_cpu for t in given):
        raise ValueError("search_scales takes contiguous fp32 tensors on the CPU")
    count, size = groups.shape
    if not 1 <= len(levels) <= 16 or (importance is not None and importance.shape[-1:] != (size,)):
        raise ValueError(f"search_scales takes 1 to 16 levels and an importance of each of {size} weights")
    scales = torch.empty(count, dtype=torch.float32, device="cpu")  # whatever the defaults, which vLLM changes
    importances, period = (importance.data_ptr(), len(importance)) if importance is not None else (None, 1)
    native.flute_cpu_search_scales(
        groups.data_ptr(), count, size, levels.data_ptr(), len(levels), importances, period, scales.data_ptr()
    )
    return scales


# ---- the measured table ----


def machine() -> dict:
    """What a table that is measured now is valid for."""
    found = describe()
    return table.machine(found["isa"], torch.get_num_threads(), (kernel["name"] for kernel in found["kernels"]))


def table_path() -> Path | None:
    """The file of the table in use; None: the analytic default decides alone."""
    return _table.path


def default_choice(header: torch.Tensor, m: int, dtype: torch.dtype) -> str:
    """What `choose` would answer without a table; for benchmarks, not beside running kernels."""
    with _table.without():
        return choose(header, m, dtype)


def use_table() -> None:
    """Look for the table of this machine and torch's number of threads, and choose by it; a bad one is logged once."""
    global _threads
    _threads = torch.get_num_threads()
    # VLLM_FLUTE_ACTIVATIONS=int8 asks for kernels that no table may hold, and that a table would come before.
    _table.clear() if describe().get("activations") == "int8" else _table.look_for(machine())


def _follow_threads() -> None:
    if _threads != torch.get_num_threads() and not describe().get("error"):
        use_table()


_table = table.InUse(
    lambda: {kernel.name: kernel.slot for kernel in kernels()},
    lambda lines, count: _load()[0].flute_cpu_set_table(lines, count),
)
