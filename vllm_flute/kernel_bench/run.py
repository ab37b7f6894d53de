"""The benchmark of kernels: what is measured, how turns are taken, what a row says."""

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import psutil
import torch

from .. import __version__, dispatch
from ..backends import cpu, cuda, table
from ..errors import FluteError
from . import candidates, ggml, gpu

KINDS = list(table.KINDS)
GPU_KINDS = [kind for kind in KINDS if kind != "ternary"]  # whose kernels have it as 2 bits
TORCH = candidates.TORCH
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# torch's OpenMP threads spin before they sleep: 300,000 pauses in libgomp, some 15 ms on the slowest CPUs.
SETTLE_SECONDS = 0.02
CHECKED_TOKENS = 64
# Nothing that multiplies with these weights is further off than 3-bit rounding of a normal distribution.
WRONG = 0.5


@dataclasses.dataclass
class Settings:
    """What to measure; see `vllm-flute bench kernels --help`."""

    shapes: list[tuple[int, int]]
    kinds: list[str]
    tokens: list[int]
    group_size: int = 64
    dtype: str = "bf16"
    cold: bool = True
    copies_mb: int = 1024
    kernels: list[str] | None = None  # None: all that run here but the reference
    peers: list[str] | None = None  # sources: torch, vllm, names of libraries; None: all
    libraries: dict[str, Path] = dataclasses.field(default_factory=dict)
    rounds: int = 60
    seconds: float = 4.0
    device: str = "cpu"  # or "cuda"

    def wants(self, source: str) -> bool:
        return self.peers is None or source in self.peers


@dataclasses.dataclass
class Row:
    """One candidate on one shape, kind and M; times are medians."""

    n: int
    k: int
    kind: str
    m: int
    name: str
    source: str
    us: float
    gops: float  # 2*M*N*K operations
    gbs: float  # of packed bytes
    nbytes: int
    error: float  # rms of y - x W^T over rms of x W^T, the weights' own rounding included
    chosen: bool  # by the dispatcher
    default: bool  # by its analytic default
    calls: int  # timed
    copies: int  # of the weights
    detail: str  # ours: the arithmetic
    ratio: dict[str, float] = dataclasses.field(default_factory=dict)  # a baseline's time over this one's

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.k}"


def native(device: str):
    """The backend of a device, "cpu" or "cuda"; raises FluteError where it is not of native kernels."""
    if device == "cuda" and not torch.cuda.is_available():
        raise FluteError("--device cuda: torch finds no GPU")
    module, why = dispatch.backend(device)
    if module not in (cpu, cuda):
        raise FluteError(f"native kernels are what is timed, and {device} has none: {why}")
    return module


def kernel_names(module, asked: list[str] | None) -> list[str]:
    """The kernels of a backend to time; raises FluteError for one that is not known or does not run here."""
    known = {kernel.name: kernel for kernel in module.kernels()}
    for name in asked or ():
        if name not in known:
            raise FluteError(f"--kernels: unknown kernel {name!r} (known: {', '.join(known)})")
        if not known[name].available:
            raise FluteError(f"--kernels: {name} does not run here: {known[name].why}")
    fast = [name for name, kernel in known.items() if kernel.available and name != "reference"]
    return asked or fast or ["reference"]


def measure(takes_turns: list, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each candidate's calls. Those of one thread pool follow each other; then it goes to sleep."""
    order = sorted(takes_turns, key=lambda candidate: (candidate.pool != candidates.OPENMP, candidate.pool))
    times: dict[str, list[float]] = {candidate.name: [] for candidate in order}
    end = time.perf_counter() + seconds
    for i in range(rounds):
        pool = None
        for candidate in order:
            if pool == candidates.OPENMP != candidate.pool:
                time.sleep(SETTLE_SECONDS)
            pool = candidate.pool
            times[candidate.name] += candidate.turn()
        if i >= 2 and time.perf_counter() > end:
            break
    return times


class Benchmark:
    """Runs Settings and collects rows; ``absent`` says why a peer is not among them."""

    def __init__(self, settings: Settings, progress: Callable[[str], None] = lambda line: None):
        self.settings, self.progress = settings, progress
        self.module = native(settings.device)
        self.names = kernel_names(self.module, settings.kernels)
        self.rows: list[Row] = []
        self.absent: dict[str, str] = {}
        wanted = {name: path for name, path in settings.libraries.items() if settings.wants(name)}
        self.libraries = [ggml.Library(name, path) for name, path in wanted.items()]
        self.vllm = None
        if settings.device == "cuda":
            if wanted:
                raise FluteError("--peer: these libraries multiply on the CPU, and --device is cuda")
            self.absent["vLLM's matmuls"] = "kernels/benchmarks/gpu measures them"
            return
        if not self.libraries:
            self.absent["llama.cpp"] = "no --peer ggml=PATH (kernels/benchmarks/ggml_peer/build.py builds it)"
        if settings.wants("vllm"):
            self.vllm = self._vllm()

    def _vllm(self):
        try:
            from ..vllm_plugin import peers
        except ImportError as e:
            self.absent["vLLM"] = f"not importable: {e}"
            return None
        if why := peers.missing():
            self.absent["vLLM"] = why
        return None if why else peers

    def check_baselines(self, baselines: list[str]) -> None:
        """Raise FluteError for a baseline that is nobody's name."""
        known = [*self.names, *([TORCH] if self.settings.wants("torch") else [])]
        for kind in self.settings.kinds:
            known += self.vllm.MATMULS[kind] if self.vllm else []
            known += [f"{library.name} {name}" for library in self.libraries for name in library.types(kind)]
        for baseline in baselines:
            if baseline not in known:
                raise FluteError(
                    f"--baseline {baseline!r} is not measured (measured: {', '.join(dict.fromkeys(known))})"
                )

    def run(self) -> list[Row]:
        for n, k in self.settings.shapes:
            for kind in self.settings.kinds:
                self.progress(f"{n}x{k}, {kind}: making weights")
                header, entrants, weight = self._enter(kind, n, k)
                for m in self.settings.tokens:
                    self.progress(f"{n}x{k}, {kind}, M={m}")
                    self.rows += self._compete(kind, n, k, m, header, entrants, weight)
                del header, entrants, weight
                gc.collect()  # before the next ones are made
        return self.rows

    def _enter(self, kind: str, n: int, k: int):
        """(header, candidates, fp32 weight [N, K]) of one shape and kind."""
        s = self.settings
        t = candidates.random_weight(kind, n, k, s.group_size, s.device)
        weight = t.dequantize(torch.float32)
        matmuls = self.vllm.MATMULS[kind] if self.vllm else {}
        types = [(library, name) for library in self.libraries for name in library.types(kind)]
        sets = 2 + len(matmuls) + len(types)
        free = psutil.virtual_memory().available if s.device == "cpu" else torch.cuda.mem_get_info()[0]
        self._rotation = rotation = candidates.Rotation(
            min(s.copies_mb << 20, int(free * 0.6) // sets) if s.cold else None
        )
        make = candidates.Candidate if s.device == "cpu" else gpu.GraphCandidate
        header, entrants = candidates.ours(self.names, t, DTYPES[s.dtype], rotation, make)
        if s.wants("torch"):
            entrants.append(candidates.torch_bf16(weight, rotation, make))
        for name, prepare in matmuls.items():
            try:
                size, build = prepare(weight, s.group_size)
                copies = rotation.of(build, size)
            except (RuntimeError, ValueError) as e:
                self._absent(name, n, k, e)
                continue
            entrants.append(candidates.Candidate(name, "vllm", size, lambda x, f: f(x), copies, torch.bfloat16))
        for library, name in types:
            try:
                entrants.append(ggml.GgmlCandidate(library, name, weight, torch.get_num_threads(), rotation))
            except FluteError as e:
                self._absent(f"{library.name} {name}", n, k, e)
        return header, entrants, weight

    def _absent(self, name: str, n: int, k: int, why: Exception) -> None:
        self.absent[f"{name} at {n}x{k}"] = str(why).splitlines()[0]

    def _compete(self, kind, n, k, m, header, entrants, weight) -> list[Row]:
        s = self.settings
        x = torch.randn(m, k, device=s.device).bfloat16().float()  # the same values in every dtype
        expected = x[:CHECKED_TOKENS] @ weight.t()
        ready, errors = [], {}
        pool = candidates.OPENMP
        for candidate in entrants:
            if pool == candidates.OPENMP != candidate.pool:
                time.sleep(SETTLE_SECONDS)
            pool = candidate.pool
            try:
                y = candidate.prepare(x)[:CHECKED_TOKENS].float()
            except RuntimeError as e:  # a dtype, a group size or a shape that it does not take
                self._absent(f"{candidate.name}, {kind}", n, k, e)
                continue
            errors[candidate.name] = float((y - expected).norm() / expected.norm())
            ready.append(candidate)
        dtype = DTYPES[s.dtype]
        chosen, default = self.module.choose(header, m, dtype), self.module.default_choice(header, m, dtype)
        times = measure(ready, s.rounds, s.seconds)
        rows = []
        for candidate in ready:
            samples = times[candidate.name]
            seconds = statistics.median(samples)
            rows.append(
                Row(
                    n=n,
                    k=k,
                    kind=kind,
                    m=m,
                    name=candidate.name,
                    source=candidate.source,
                    us=seconds * 1e6,
                    gops=2 * m * n * k / seconds / 1e9,
                    gbs=candidate.nbytes / seconds / 1e9,
                    nbytes=candidate.nbytes,
                    error=errors[candidate.name],
                    chosen=candidate.name == chosen,
                    default=candidate.name == default,
                    calls=len(samples),
                    copies=self._rotation.count(candidate.nbytes),
                    detail=candidate.detail,
                )
            )
        return rows


def add_ratios(rows: list[Row], baselines: list[str]) -> None:
    """Fill ``ratio`` from the rows of the same shape, kind and M."""
    us = {(row.n, row.k, row.kind, row.m, row.name): row.us for row in rows}
    for baseline in baselines:
        for row in rows:
            if base := us.get((row.n, row.k, row.kind, row.m, baseline)):
                row.ratio[baseline] = base / row.us


def measurements(module, rows: list[Row], dtype: str) -> list[table.Measurement]:
    """What backends/table.py derives a table from: a backend's kernels, but none that changes results."""
    arithmetic = {kernel.name: kernel.arithmetic for kernel in module.kernels()}
    if module.describe().get("activations") == "int8":
        raise FluteError("--write-table: a table holds no int8 kernels: unset VLLM_FLUTE_ACTIVATIONS")
    found: dict[tuple, table.Measurement] = {}
    for row in rows:
        if row.source != "flute":
            continue
        key = (row.kind, str(DTYPES[dtype]).removeprefix("torch."), row.n, row.k, row.m)
        each = found.get(key) or table.Measurement(*key, "", {})
        if row.default:
            each = each._replace(default=row.name)
        if arithmetic[row.name] not in table.CHANGES_RESULTS:
            each.seconds[row.name] = row.us / 1e6
        found[key] = each
    for key, each in found.items():
        if each.default not in each.seconds:
            raise FluteError(f"--write-table: the analytic default's kernel was not measured for {key}")
    return list(found.values())


def write_table(device: str, rows: list[Row], dtype: str) -> Path:
    """Write this machine's table; lines of kinds and dtypes that were not measured now stay. Returns its path."""
    module = native(device)
    on, names = module.machine(), [kernel.name for kernel in module.kernels()]
    path = table.default_path(on)
    lines = table.derive(measurements(module, rows, dtype))
    measured = {(line.kind, line.dtype) for line in lines}
    with contextlib.suppress(FluteError):  # there is none, or none that says anything
        lines += [line for line in table.read(path, on, names) if (line.kind, line.dtype) not in measured]
    table.write(path, on, lines)
    return path


# ---- the result ----


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def facts(settings: Settings, roofs: dict[str, float]) -> dict:
    """Machine, versions and settings, as the JSON has them."""
    module = native(settings.device)
    used = module.table_path()
    return {
        "machine": module.machine()
        | {"cores": len(os.sched_getaffinity(0)), "memory_bytes": psutil.virtual_memory().total}
        | {"table": str(used) if used else None},
        "versions": {"vllm-flute": __version__, "torch": torch.__version__, "vllm": _version("vllm")},
        "settings": dataclasses.asdict(settings) | {"libraries": {k: str(v) for k, v in settings.libraries.items()}},
        "roofs": roofs,
    }


def as_dict(row: Row) -> dict:
    return {"shape": row.shape} | dataclasses.asdict(row)
