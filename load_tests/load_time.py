"""Time and memory of loading a model in vLLM: plain, quantized while it loads, and from a quantized checkpoint.

    python load_tests/load_time.py BF16 4BIT [--rounds 3] [--output result.json]

Every load is a process of its own that has vLLM's own worker load the model, until its weights are packed for the
device; rounds alternate between the three. The checkpoints are read once before, so that disks do not count. Memory is
what the load adds to the process before it: its largest anonymous part (pages of mapped checkpoint files can be dropped
at any time and are told apart) and what stays; on a GPU torch's own figures too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vllm_flute.errors import FluteError
from vllm_flute.serve import cpu_environment

MODES = ("plain", "online", "offline")
MIB = 2**20
POLL_SECONDS = 0.01


def resident(pid: int | str) -> dict[str, int]:
    """Bytes of a process: RssAnon, and RssFile with what it has mapped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines) if "Rss" in key
    }


def load(path: str, quantization: str | None) -> None:
    """In the child: have vLLM's worker for this device load the model; a line of JSON before and after."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.import_utils import resolve_obj_by_qualname

    args = EngineArgs(path, quantization=quantization, dtype="bfloat16", max_model_len=512, enforce_eager=True)
    config = args.create_engine_config()
    gpu = torch.cuda.is_available()
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as store:
        method = f"file://{store.name}"
        worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)(config, 0, 0, method, is_driver_worker=True)
        worker.init_device()
        print(json.dumps(resident("self")), flush=True)
        begin = time.perf_counter()
        worker.load_model()
        if gpu:
            torch.cuda.synchronize()
        told = resident("self") | {"seconds": time.perf_counter() - begin}
        if gpu:
            told |= {"gpu_peak": torch.cuda.max_memory_allocated(), "gpu_kept": torch.cuda.memory_allocated()}
        print(json.dumps(told), flush=True)


def measure(model: Path, quantization: str | None) -> dict[str, float]:
    """One load in a process of its own."""
    for file in model.glob("*.safetensors"):
        with open(file, "rb") as f:
            while f.read(64 * MIB):
                pass
    command = [sys.executable, __file__, "--load", str(model), *([quantization] if quantization else [])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, env=os.environ | cpu_environment())
        peak = {"RssAnon": 0, "RssFile": 0}
        while process.poll() is None:
            try:
                now = resident(process.pid)
                peak = {key: max(value, now[key]) for key, value in peak.items()}
            except (OSError, KeyError):  # it has just ended
                pass
            time.sleep(POLL_SECONDS)
        out.seek(0)
        told = [json.loads(line) for line in out.read().splitlines() if line.startswith("{")]
        if process.returncode or len(told) != 2:
            log.seek(0)
            raise FluteError(f"loading {model} failed: {(log.read().splitlines() or ['no output'])[-1]}")
    before, after = told
    figures = {"seconds": after["seconds"]}
    figures |= {"peak_bytes": peak["RssAnon"] - before["RssAnon"], "kept_bytes": after["RssAnon"] - before["RssAnon"]}
    figures |= {"mapped_bytes": peak["RssFile"] - before["RssFile"]}
    return figures | {key: after[key] for key in ("gpu_peak", "gpu_kept") if key in after}


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        return load(sys.argv[2], *(sys.argv[3:] or [None]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path, help="a checkpoint in bf16")
    parser.add_argument("quantized", type=Path, help="the same in lut-v1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write every figure as JSON")
    args = parser.parse_args()
    what = {"plain": (args.plain, None), "online": (args.plain, "flute"), "offline": (args.quantized, "flute")}
    found = {mode: [] for mode in MODES}
    for number in range(args.rounds):
        for mode in MODES:
            found[mode].append(measure(*what[mode]))
            figures = ", ".join(
                f"{k} {v:.1f}" if k == "seconds" else f"{k} {v / MIB:.0f} MiB" for k, v in found[mode][-1].items()
            )
            print(f"round {number + 1}, {mode}: {figures}", flush=True)
    keys = list(found["plain"][0])
    print(f"\n| median of {args.rounds} | seconds | {' | '.join(f'{key}, MiB' for key in keys[1:])} |")
    print("|---" * (len(keys) + 1) + "|")
    for mode, rounds in found.items():
        seconds, *memory = (statistics.median(figures[key] for figures in rounds) for key in keys)
        print(f"| {mode} | {seconds:.1f} | {' | '.join(f'{value / MIB:.0f}' for value in memory)} |")
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except FluteError as e:
        sys.exit(f"load_time: {e}")
