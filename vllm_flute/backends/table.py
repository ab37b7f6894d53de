"""The measured dispatch table of a machine: its file, and the rule that derives it from measurements.

`vllm-flute bench kernels --write-table` writes one small JSON file for each CPU model, instruction set, number of
threads and set of kernels, or for each GPU and set of kernels; backends/cpu.py and cuda.py hand its lines to their
native libraries, which ask them before their analytic defaults (kernels/include/flute.h, TableLine). A table says
nothing about a machine other than its own: one that was measured elsewhere, or before the kernels changed, is refused.
"""

import contextlib
import ctypes
import hashlib
import json
import logging
import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import FluteError

logger = logging.getLogger(__name__)

ENV = "VLLM_FLUTE_TABLE"  # "off", or the path of a table
VERSION = 1
KINDS = {"ternary": 1, "2": 2, "3": 3, "4": 4}  # of weights, with flute.h's numbers
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # of activations, likewise
CHANGES_RESULTS = ("int8",)  # arithmetic that a table may not bring in: it is for the user to ask for
NOISE = 0.03  # a kernel replaces the default where it is faster by more than this
_NO_LIMIT = 2**63 - 1


class Measurement(NamedTuple):
    """Median seconds of the kernels on one shape and M; ``default`` is the analytic default's choice."""

    kind: str
    dtype: str
    n: int
    k: int
    m: int
    default: str
    seconds: dict[str, float]


class Line(NamedTuple):
    """Calls of this kind and dtype with at most so many tokens and weights (N*K) take ``kernel``; None: no limit."""

    kind: str
    dtype: str
    max_tokens: int | None
    max_weights: int | None
    kernel: str


def derive(measurements: Iterable[Measurement]) -> list[Line]:
    """The table of some measurements; of its lines the first that matches a call decides.

    1. A measured M decides for every M from it down to the next smaller one, a measured N*K likewise; the largest of
       each decides for all above. Shapes of one N*K are one size: their times are added.
    2. Where the fastest kernel is faster than the default by more than NOISE it is taken, elsewhere the default.
    3. Neighbouring M with one kernel become one line, neighbouring sizes with the same lines one size.
    """
    sizes: dict[tuple, dict] = defaultdict(lambda: defaultdict(dict))
    for each in measurements:
        sizes[each.kind, each.dtype][each.n * each.k].setdefault(each.m, []).append(each)
    table = []
    for (kind, dtype), by_size in sorted(sizes.items()):
        merged: list[tuple[float, list]] = []
        for size, by_tokens in sorted(by_size.items()):
            steps: list[tuple[float, str]] = []
            for m, each in sorted(by_tokens.items()):
                kernel = _fastest(each)
                if steps and steps[-1][1] == kernel:
                    steps.pop()
                steps.append((m, kernel))
            steps[-1] = (math.inf, steps[-1][1])
            if merged and merged[-1][1] == steps:
                merged.pop()
            merged.append((size, steps))
        merged[-1] = (math.inf, merged[-1][1])
        for size, steps in merged:
            limit = None if size == math.inf else size
            table += [Line(kind, dtype, None if m == math.inf else m, limit, kernel) for m, kernel in steps]
    return table


def _fastest(measurements: list[Measurement]) -> str:
    """The choice of one M and size."""
    common = set.intersection(*(set(each.seconds) for each in measurements))
    total = {name: sum(each.seconds[name] for each in measurements) for name in sorted(common)}
    default = measurements[0].default
    best = min(total, key=total.get, default=default)
    return best if default not in total or total[best] < total[default] * (1 - NOISE) else default


# ---- the machine and the file ----


def cpu_model() -> str:
    """The CPU's name; Arm's /proc/cpuinfo has numbers in its place."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    for fields in (("model name",), ("CPU implementer", "CPU part")):
        found = [re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE) for field in fields]
        if all(found):
            return " ".join(match[1].strip() for match in found)
    return platform.processor() or platform.machine()


def _digest(kernel_names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(kernel_names).encode()).hexdigest()[:12]


def machine(isa: str, threads: int, kernel_names: Iterable[str]) -> dict:
    """What a table of CPU kernels is measured on, and valid for."""
    return {"cpu": cpu_model(), "isa": isa, "threads": threads, "kernels": _digest(kernel_names)}


def gpu_machine(name: str, arch: str, multiprocessors: int, kernel_names: Iterable[str]) -> dict:
    """What a table of GPU kernels is measured on, and valid for."""
    return {"gpu": name, "isa": arch, "multiprocessors": multiprocessors, "kernels": _digest(kernel_names)}


def default_path(on: dict) -> Path:
    """Where this machine's table is, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = "cpu" if "cpu" in on else "gpu"
    name = re.sub(r"\W+", "-", on[device]).strip("-").lower()
    size = f"{on['threads']}t" if device == "cpu" else f"{on['multiprocessors']}sm"
    return cache / "vllm-flute" / f"{device}-{name}-{on['isa']}-{size}-{on['kernels']}.json"


def find(on: dict) -> Path | None:
    """The table to read: VLLM_FLUTE_TABLE's, or this machine's if it has one."""
    asked = os.environ.get(ENV)
    if asked:
        return None if asked == "off" else Path(asked)
    path = default_path(on)
    return path if path.exists() else None


def write(path: Path, on: dict, lines: list[Line]) -> None:
    """Write a table whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"version": VERSION, "machine": on, "lines": [line._asdict() for line in lines]}
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def read(path: Path, on: dict, kernel_names: Iterable[str]) -> list[Line]:
    """The lines of a table; raises FluteError, one line, for one that is broken or not this machine's."""
    again = "measure it again with 'vllm-flute bench kernels --write-table'"
    try:
        content = json.loads(path.read_text())
        version, found = content["version"], dict(content["machine"])
        lines = [Line(**line) for line in content["lines"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise FluteError(f"dispatch table {path} cannot be read ({type(e).__name__}: {e}): {again}") from e
    if version != VERSION:
        raise FluteError(f"dispatch table {path} is of version {version!r}, expected {VERSION}: {again}")
    for key, value in on.items():
        if found.get(key) != value:
            raise FluteError(f"dispatch table {path} is of {key} {found.get(key)!r}, here it is {value!r}: {again}")
    names = list(kernel_names)
    for line in lines:
        limits = (line.max_tokens, line.max_weights)
        known = line.kind in list(KINDS) and line.dtype in list(DTYPES) and line.kernel in names
        if not known or not all(limit is None or (type(limit) is int and limit > 0) for limit in limits):
            raise FluteError(f"dispatch table {path} has a line that means nothing here, {tuple(line)}: {again}")
    return lines


# ---- the table in use ----


class _NativeLine(ctypes.Structure):
    """flute.h's TableLine."""

    _fields_ = [(name, ctypes.c_int64) for name in ("bits", "dtype", "max_tokens", "max_weights", "slot")]


class InUse:
    """The lines that a native library chooses by.

    Attributes:
        path: the file that they are from; None: the analytic default decides alone, or `set` was called.
    """

    def __init__(self, slots: Callable[[], dict[str, int]], set_native: Callable[[int | None, int], None]):
        """``slots()`` is the kernels' slots by name; ``set_native(address, lines)`` hands lines to the library."""
        self.path: Path | None = None
        self._slots, self._set_native = slots, set_native
        self._lines: list[Line] = []
        self._buffers = []  # every table that the library was given: a kernel may be choosing in another thread

    def set(self, lines: list[Line]) -> None:
        """Choose by these lines first, and by the analytic default where none decides; without lines, by that alone."""
        slots, rows = self._slots(), []
        for line in lines:
            limits = (line.max_tokens or _NO_LIMIT, line.max_weights or _NO_LIMIT)
            rows.append((KINDS[line.kind], DTYPES[line.dtype], *limits, slots[line.kernel]))
        buffer = (_NativeLine * len(rows))(*rows)
        self._buffers.append(buffer)
        self._set_native(ctypes.addressof(buffer) if rows else None, len(rows))
        self._lines = lines

    @contextlib.contextmanager
    def without(self):
        """The analytic default alone, for a while; for benchmarks, not beside running kernels."""
        lines = self._lines
        self.set([])
        try:
            yield
        finally:
            self.set(lines)

    def look_for(self, on: dict) -> None:
        """Find the table of this machine and choose by it; a bad one is logged."""
        self.path, lines = find(on), []
        if self.path:
            try:
                lines = read(self.path, on, self._slots())
            except FluteError as e:
                self.path = None
                logger.warning("the analytic default chooses kernels: %s", e)
            else:
                logger.info("kernels are chosen by the measured table %s", self.path)
        self.set(lines)

    def clear(self) -> None:
        """Choose by the analytic default alone."""
        self.path = None
        self.set([])
