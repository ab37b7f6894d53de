"""The plugin's metrics on vLLM's ``/metrics``.

Kernels run in worker processes, the endpoint lives in the API server. The first process makes a directory and
passes it on in the environment; each worker keeps a page of counters (counters.py) and a small JSON file there;
the API server's stat logger adds what is new to ordinary Prometheus counters after every engine step. With
several API servers each publishes under one lock what none has published yet, and prometheus-client's
multiprocess mode adds them up.
docs/metrics.md lists them with types and units.
"""

import atexit
import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from .. import __version__, counters, dispatch
from ..layout import ABI, LAYOUTS, Layout

ENV = "FLUTE_METRICS_DIR"
DECODE_M, PREFILL_M = 1, 512
MEMORY_SECONDS = 1.0  # between two looks at the workers' memory; a scrape is rarer
_directory: str | None = None  # made by this process


def share_directory() -> None:
    """Make the directory in a server's first process; the processes that vLLM starts from it inherit it.

    A variable that is set already counts only in those: whatever started the server may have served before.
    """
    global _directory
    inherited = ENV in os.environ and multiprocessing.parent_process() is not None
    if inherited or _directory:
        return
    _directory = directory = tempfile.mkdtemp(prefix="vllm-flute-")
    os.environ[ENV] = directory
    owner = os.getpid()
    # A forked child inherits the handler, but not the ownership.
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(directory, ignore_errors=True))


class _Worker:
    """This process's page of counters and its description, once a quantized layer has loaded here."""

    def __init__(self, directory: Path, device: torch.device, online: bool):
        self.path = directory / f"{os.getpid()}.json"
        counters.attach(self.path.with_suffix(".page"))
        kernels = dispatch.kernels(device.type)
        self.info = {
            "build": {"version": __version__, "abi": str(ABI), "torch": torch.__version__, "device": device.type}
            | {"isa": dispatch.isa(device.type), "table": _table(device)}
            | {"quantized": "online" if online else "offline"},
            "kernels": {k.slot: {"kernel": k.name, "isa": k.isa} for k in kernels},
            "groups": {},
        }

    def add(self, prefix: str, codebook: str, packed: torch.Tensor, header: torch.Tensor) -> None:
        spec = Layout.read(header)
        dtype, device = torch.get_default_dtype(), packed.device.type
        labels = {
            "layer_group": prefix.rpartition(".")[2],
            "bits": str(spec.bits),
            "group_size": str(spec.group_size),
            "codebook": codebook,
            "layout": LAYOUTS[spec.layout],
            "decode_kernel": dispatch.choose(header, DECODE_M, dtype, device),
            "prefill_kernel": dispatch.choose(header, PREFILL_M, dtype, device),
        }
        group = self.info["groups"].setdefault("|".join(labels.values()), {"labels": labels, "layers": [], "bytes": 0})
        group["layers"].append(prefix)
        group["bytes"] += packed.numel()
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.info))
        partial.replace(self.path)


def _table(device: torch.device) -> str:
    """The file name of the measured table that chooses kernels here, or what does without one."""
    path = dispatch.table_path(device.type)
    return path.name if path else "analytic default"


_worker: _Worker | None = None


def layer_loaded(prefix: str, config, packed: torch.Tensor, header: torch.Tensor) -> None:
    """Count a layer of the model of this FluteConfig that has been packed in this worker."""
    global _worker
    if ENV not in os.environ:
        return
    if _worker is None:
        _worker = _Worker(Path(os.environ[ENV]), packed.device, config.online)
    _worker.add(prefix, config.lut.codebook, packed, header)


_KERNEL = ("kernel", "isa", "m_bucket")
_GROUP = ("layer_group", "bits", "group_size", "codebook", "layout", "decode_kernel", "prefill_kernel")
_BUILD = ("version", "abi", "torch", "isa", "device", "table", "quantized")


class _Publisher:
    """Turns the workers' files into Prometheus metrics of this process; one per API server."""

    def __init__(self, directory: Path):
        self.directory = directory
        # Every API server sees the same files: "max" shows a gauge once, whoever has set it.
        gauge = {"multiprocess_mode": "max"}
        self.build = Gauge("vllm_flute:build_info", "Build and device of the LUT kernels", _BUILD, **gauge)
        self.layers = Gauge("vllm_flute:layers", "Quantized layers by format and kernel", _GROUP, **gauge)
        self.bytes = Gauge(
            "vllm_flute:quantized_weight_bytes", "Resident bytes of packed weights", ("layer_group",), **gauge
        )
        self.memory = Gauge(
            "vllm_flute:worker_resident_memory_bytes",
            "Resident memory of the worker processes in bytes",
            multiprocess_mode="mostrecent",
        )
        self.memory_read = -MEMORY_SECONDS
        self.fields = (
            Counter("vllm_flute:kernel_calls", "Operator calls", _KERNEL),
            Counter("vllm_flute:kernel_tokens", "Tokens in operator calls", _KERNEL),
            Counter("vllm_flute:weight_bytes_streamed", "Bytes of packed weights read by kernels", _KERNEL),
        )
        self.workers: dict[Path, dict] = {}

    def publish(self) -> None:
        """Add what the workers counted since the last call of any API server."""
        paths = set(self.directory.glob("*.json"))
        if not paths:
            return
        if paths != self.workers.keys():
            self.workers = {path: json.loads(path.read_text()) for path in paths}
            self._describe(self.workers.values())
        self._measure_memory()
        with open(self.directory / "published", "a+b") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            done = np.frombuffer(f.read(), dtype=np.uint64).reshape(-1, *counters.SHAPE)
            done = done[0] if len(done) else np.zeros(counters.SHAPE, dtype=np.uint64)
            now = sum((counters.read(path.with_suffix(".page")) for path in paths), np.zeros_like(done))
            new = now - done
            if not new.any():
                return
            f.truncate(0)
            f.write(now.tobytes())
        names = next(iter(self.workers.values()))["kernels"]
        for slot, bucket in zip(*np.nonzero(new.any(axis=2)), strict=True):
            labels = names[str(slot)] | {"m_bucket": counters.M_BUCKETS[bucket]}
            for counter, value in zip(self.fields, new[slot, bucket], strict=True):
                counter.labels(**labels).inc(int(value))

    def _measure_memory(self) -> None:
        """vLLM exposes the API server's memory (process_resident_memory_bytes), not that of the workers."""
        if time.monotonic() - self.memory_read < MEMORY_SECONDS:
            return
        self.memory_read = time.monotonic()
        total = 0
        for path in self.workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += psutil.Process(int(path.stem)).memory_info().rss
        self.memory.set(total)

    def _describe(self, workers) -> None:
        layers: dict[tuple, set] = {}
        resident: dict[str, int] = {}
        for info in workers:
            self.build.labels(**info["build"]).set(1)
            for group in info["groups"].values():
                key, name = tuple(group["labels"].values()), group["labels"]["layer_group"]
                # Tensor-parallel ranks hold parts of the same layers, pipeline ranks hold different ones.
                layers.setdefault(key, set()).update(group["layers"])
                resident[name] = resident.get(name, 0) + group["bytes"]
        for key, value in layers.items():
            self.layers.labels(*key).set(len(value))
        for name, value in resident.items():
            self.bytes.labels(name).set(value)


_publisher: _Publisher | None = None


class FluteStatLogger(StatLoggerBase):
    """Entry point of ``vllm.stat_logger_plugins``: vLLM makes one per engine in each API server."""

    def __init__(self, vllm_config, engine_index: int = 0):
        global _publisher
        # An API server that is a process of its own, started by the one that made the directory, or that one itself; a
        # variable that only happens to be set is of another server.
        shared = _directory or (multiprocessing.parent_process() is not None and os.environ.get(ENV))
        if _publisher is None and shared:
            _publisher = _Publisher(Path(shared))

    def record(self, scheduler_stats=None, iteration_stats=None, *args, **kwargs) -> None:
        if _publisher is not None:
            _publisher.publish()

    def log_engine_initialized(self) -> None:
        self.record()
