"""Timing: candidates of one shape and M take turns; a turn is a graph of many calls that rotate over cold weights."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.nn.functional import linear

CUBLAS = "cublas bf16"
_TURN_SECONDS = 1.2e-3  # of a graph: a hundred times what starting one takes
_MAX_CALLS = 256
ROUNDS = 9
_COLD = 2  # times the L2 cache that the weights which take turns fill


def reason(e: Exception) -> str:
    """An exception in one line."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__


class Candidate(NamedTuple):
    """A way to multiply by one weight.

    Attributes:
        name: a kernel's or a peer's.
        source: "flute", "torch" or the peer, as in peers.PEERS.
        bits, group_size: of the weights; 16 and 0: bf16.
        nbytes: of the weights that a call reads.
        call: (x ``[M, K]``, one of ``copies``) to ``[M, N]``.
        copies: of the weights, in memory of their own.
        chosen: whether the dispatcher would take it for a number of tokens.
        takes: whether it is to be timed for a number of tokens.
    """

    name: str
    source: str
    bits: int
    group_size: int
    nbytes: int
    call: Callable[[torch.Tensor, object], torch.Tensor]
    copies: list
    chosen: Callable[[int], bool] = lambda m: False
    takes: Callable[[int], bool] = lambda m: True


def copies_for(nbytes: int, cache_bytes: int) -> int:
    """How many copies of weights make every call find them cold."""
    return max(2, math.ceil(_COLD * cache_bytes / nbytes) + 1)


def cublas(n: int, k: int, generator: torch.Generator, cache_bytes: int) -> Candidate:
    """``torch.nn.functional.linear`` in bf16."""
    nbytes = 2 * n * k
    weights = [
        torch.randn(n, k, generator=generator, device=generator.device, dtype=torch.bfloat16)
        for _ in range(copies_for(nbytes, cache_bytes))
    ]
    return Candidate(CUBLAS, "torch", 16, 0, nbytes, linear, weights)


class GraphTurn:
    """Calls of a candidate captured in one CUDA graph."""

    def __init__(self, candidate: Candidate, x: torch.Tensor):
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, allocates, and says how long a call is
            for copy in candidate.copies[:2]:
                candidate.call(x, copy)
            self.begin.record()
            for copy in candidate.copies[:2]:
                candidate.call(x, copy)
            self.end.record()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        seconds = self.begin.elapsed_time(self.end) / 2e3  # with what a launch takes: the graph may be shorter for it
        count = len(candidate.copies)
        rotations = max(1, min(math.ceil(_TURN_SECONDS / seconds / count), _MAX_CALLS // count))
        self.calls = rotations * count
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.calls):
                candidate.call(x, candidate.copies[i % count])
        self.graph.replay()

    def seconds(self) -> float:
        self.begin.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3 / self.calls


class CpuTurn:
    """The same with a host clock, for a dry run."""

    def __init__(self, candidate: Candidate, x: torch.Tensor):
        self.candidate, self.x, self.calls = candidate, x, len(candidate.copies)

    def seconds(self) -> float:
        begin = time.perf_counter()
        for copy in self.candidate.copies:
            self.candidate.call(self.x, copy)
        return (time.perf_counter() - begin) / self.calls


def time_point(candidates: Iterable[Candidate], x: torch.Tensor, n: int, rounds: int = ROUNDS) -> list[dict]:
    """Rows of one shape and M, in the order of the candidates, as report.py describes them.

    ``us`` is the median over the rounds, ``gb_s`` bytes of weights over it, ``ratio`` cuBLAS's median over it. One that
    fails has ``error`` in their place. ``prepare_s`` is what its first calls and the capture took.
    """
    m, k = x.shape
    make = GraphTurn if x.is_cuda else CpuTurn
    turns: list[tuple[Candidate, GraphTurn | CpuTurn, list[float]]] = []
    rows = []
    for candidate in candidates:
        fields = {name: getattr(candidate, name) for name in ("name", "source", "bits", "group_size", "nbytes")}
        row = {"n": n, "k": k, "m": m} | fields | {"chosen": candidate.chosen(m)}
        begin = time.perf_counter()
        try:
            turns.append((candidate, make(candidate, x), []))
        except Exception as e:
            rows.append(row | {"error": reason(e)})
            if isinstance(e, torch.AcceleratorError):
                raise
        else:
            rows.append(row)
        rows[-1]["prepare_s"] = time.perf_counter() - begin
    for _ in range(rounds):
        for _, turn, seconds in turns:
            seconds.append(turn.seconds())
    timed = iter(turns)
    for row in rows:
        if "error" in row:
            continue
        _, turn, seconds = next(timed)
        us = statistics.median(seconds) * 1e6
        row |= {"us": us, "us_min": min(seconds) * 1e6, "us_max": max(seconds) * 1e6, "gb_s": row["nbytes"] / us / 1e3}
        row |= {"rounds": rounds, "calls": turn.calls}
    baseline = next((row["us"] for row in rows if row["name"] == CUBLAS and "us" in row), None)
    for row in rows:
        if "us" in row and baseline:
            row["ratio"] = baseline / row["us"]
    return rows


def copy_gb_s(nbytes: int, device: str) -> dict:
    """Device-to-device copy: GB/s of bytes read plus bytes written, median of ten, with the extremes."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * nbytes / 1e9, device)


def matmul_tflop_s(size: int, device: str) -> dict:
    """torch's bf16 product of random ``size`` x ``size`` matrices, TFLOP/s, median of ten, with the extremes."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return _rate(lambda: a @ b, 2 * size**3 / 1e12, device)


def elapsed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, on the device's clock where it has one."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _rate(run: Callable[[], object], work: float, device: str) -> dict:
    for _ in range(3):
        run()
    rates = [work / elapsed(run, device) for _ in range(10)]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
