"""The measured dispatch table of a machine: its file, and the rule that derives it from measurements.

`vllm-flute bench kernels --write-table` writes one small JSON file for each CPU model, instruction set, number of
threads and set of kernels; backends/cpu.py hands its lines to the native library, which asks them before its analytic
default (kernels/include/flute.h, TableLine). A table says nothing about a machine other than its own, so one that was
measured elsewhere, or before the kernels changed, is refused.
"""

import hashlib
import json
import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import FluteError

ENV = "VLLM_FLUTE_TABLE"  # "off", or the path of a table
VERSION = 1
KINDS = {"ternary": 1, "2": 2, "3": 3, "4": 4}  # of weights, with flute.h's numbers
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # of activations, likewise
CHANGES_RESULTS = ("int8",)  # arithmetic that a table may not bring in: it is for the user to ask for
NOISE = 0.03  # a kernel replaces the default where it is faster by more than this


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


def machine(isa: str, threads: int, kernel_names: Iterable[str]) -> dict:
    """What a table is measured on, and valid for."""
    digest = hashlib.sha256("\n".join(kernel_names).encode()).hexdigest()[:12]
    return {"cpu": cpu_model(), "isa": isa, "threads": threads, "kernels": digest}


def default_path(on: dict) -> Path:
    """Where this machine's table is, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpu = re.sub(r"\W+", "-", on["cpu"]).strip("-").lower()
    return cache / "vllm-flute" / f"cpu-{cpu}-{on['isa']}-{on['threads']}t-{on['kernels']}.json"


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
