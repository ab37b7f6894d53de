"""The native CUDA backend: kernels/ built with nvcc to one shared library, for the GPUs that its machine code is for.

The library loads beside any torch and without a GPU. It registers the operators for CUDA when it is asked to, and
exports a small C interface for what is not an operator: its list of kernels, its choice, the table it chooses by, the
page of counters.
"""

import ctypes
import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from .. import counters
from ..layout import MMA64
from . import Kernel, table

_PATH = Path(__file__).resolve().parent.parent / "libvllm_flute_cuda.so"


class Gpu(NamedTuple):
    """torch's current GPU; ``arch`` is its compute capability as major * 10 + minor."""

    index: int
    name: str
    arch: int
    multiprocessors: int


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not _PATH.exists():
        return None, (
            f"{_PATH.name} was not built: reinstall (pip install .) where there are nvcc and a CUDA build of torch"
        )
    try:
        native = ctypes.CDLL(str(_PATH))
    except OSError as e:
        return None, f"{_PATH.name} does not load: {e}"
    for name in ("flute_cuda_describe", "flute_cuda_device", "flute_cuda_choose"):
        getattr(native, name).restype = ctypes.c_char_p
    native.flute_cuda_describe.argtypes = [ctypes.c_int]
    native.flute_cuda_device.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)]
    native.flute_cuda_choose.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    native.flute_cuda_set_counters.argtypes = [ctypes.c_void_p]
    native.flute_cuda_set_table.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    native.flute_cuda_register.restype = None
    counters.subscribe(native.flute_cuda_set_counters)
    return native, ""


@functools.cache
def gpu() -> Gpu:
    """What torch says of its current GPU. Starts CUDA in this process."""
    index = torch.cuda.current_device()
    found = torch.cuda.get_device_properties(index)
    return Gpu(index, found.name, found.major * 10 + found.minor, found.multi_processor_count)


@functools.cache
def load() -> str:
    """Load the library and register its operators; returns why not, or an empty string."""
    native, why = _load()
    if why:
        return why
    arch, multiprocessors = ctypes.c_int(), ctypes.c_int()
    failed = native.flute_cuda_device(gpu().index, arch, multiprocessors)
    if failed:  # such as a driver older than the CUDA runtime in the library
        return f"{_PATH.name}, of {describe()['compiler']}, cannot use the GPU: {failed.decode()}"
    if describe()["error"]:
        return describe()["error"]
    native.flute_cuda_register()
    use_table()
    return ""


def describe(arch: int | None = None) -> dict:
    """What the library has: ``archs``, ``compiler``, and for one compute capability ``error`` and ``kernels``.

    ``arch`` is as in Gpu; None is this GPU's. Without the library ``why`` says so and there are no kernels.
    """
    native, why = _load()
    if why:
        return {"why": why, "error": why, "kernels": []}
    return json.loads(native.flute_cuda_describe(gpu().arch if arch is None else arch))


def built() -> str:
    """How the library was built, or why it is not there; needs no GPU."""
    found = describe(0)
    return found.get("why") or f"{found['compiler']}, compute capabilities {found['archs']}"


def kernels() -> list[Kernel]:
    return [Kernel(**k) for k in describe()["kernels"]]


def isa() -> str:
    return f"sm_{gpu().arch}"


def layout(codebooks: torch.Tensor, one_scale: bool = False) -> int:
    """The layout to pack weights in."""
    return MMA64


def choose(header: torch.Tensor, m: int, dtype: torch.dtype) -> str:
    """The name of the kernel that the dispatcher takes for M tokens of this dtype on this GPU."""
    return choose_for(header, m, dtype, gpu().arch)


def choose_for(header: torch.Tensor, m: int, dtype: torch.dtype, arch: int) -> str:
    """`choose` for another GPU."""
    code = table.DTYPES[str(dtype).removeprefix("torch.")]
    return _load()[0].flute_cuda_choose(header.data_ptr(), m, code, arch).decode()


# ---- the measured table ----


def machine() -> dict:
    """What a table that is measured now is valid for."""
    return table.gpu_machine(gpu().name, isa(), gpu().multiprocessors, (kernel.name for kernel in kernels()))


def table_path() -> Path | None:
    """The file of the table in use; None: the analytic default decides alone."""
    return _table.path


def default_choice(header: torch.Tensor, m: int, dtype: torch.dtype) -> str:
    """What `choose` would answer without a table; for benchmarks, not beside running kernels."""
    with _table.without():
        return choose(header, m, dtype)


def use_table() -> None:
    """Look for the table of this GPU, and choose by it; a bad one is logged."""
    _table.look_for(machine())


_table = table.InUse(
    lambda: {kernel.name: kernel.slot for kernel in kernels()},
    lambda lines, count: _load()[0].flute_cuda_set_table(lines, count),
)
