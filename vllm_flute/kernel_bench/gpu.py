"""Timing on a GPU: a turn replays a CUDA graph of some calls, which leaves out what the host does to launch one."""

import torch

from .candidates import Candidate, calls_for


class GraphCandidate(Candidate):
    """A Candidate whose calls are captured in a graph, each with the next of the copies."""

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        self._x = x.to(self._dtype)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what compiles, allocates or waits must have done so before a capture
            y = self._call(self._x, next(self._copies))
            self._calls = 2
            seconds = self._timed(lambda: [self._call(self._x, next(self._copies)) for _ in range(self._calls)])
        torch.cuda.current_stream().wait_stream(side)
        self._calls = calls_for(seconds)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(self._calls):
                self._call(self._x, next(self._copies))
        self._graph.replay()
        return y

    def _timed(self, run) -> float:
        """Seconds of one of the calls that ``run`` makes, by the device's clock."""
        begin, end = self._events
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self._calls

    def turn(self) -> list[float]:
        """Mean seconds of a call of one replay."""
        return [self._timed(self._graph.replay)]
