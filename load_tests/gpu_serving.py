"""Serving on one GPU, measured part by part: bf16, this project and vLLM's own quantizations side by side.

    python load_tests/gpu_serving.py PART --out DIR [--minutes 8.5] [--model MODEL --expected FILE] [--dry-run]
    python load_tests/gpu_serving.py report --out DIR

`text`: the embedded model (--model: bf16 and quantized here, or quantized already) answers as on the CPU, where the
same command without --expected wrote DIR/expected.json. `8b-*` and `70b`: LLaMA-3 shapes with dummy weights, in-process
engines; every part measures bf16 anew, and ratios are to that. `8b-serve`: `vllm serve` and `vllm bench serve`. A part
ends in time, writes DIR/PART.json after every figure and says why a variant is missing. `--together` starts a part's
engines side by side on one GPU, in batches that fit its memory; each then measures alone. `--dry-run` takes tiny shapes
and says so.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import gpu_serving_report
from gpu_serving_models import Variant, kv_bytes, write_dummy

from vllm_flute.errors import FluteError
from vllm_flute.serve import Server, cpu_environment

WORKER = Path(__file__).with_name("gpu_serving_worker.py")
STREAMS = (1, 8, 32, 128)
DECODE_TOKENS, PREFILL_TOKENS, ROUNDS = 128, 4096, 3
PROFILED = (1, 32)  # streams whose decode step is taken apart, see gpu_serving_profile.py
# (name, concurrent streams, prompt tokens, generated tokens, requests a stream) of `vllm bench serve`.
SERVED = (*((f"serve x{n}", n, 128, 128, 2) for n in STREAMS), ("serve prefill-heavy x32", 32, 2048, 32, 2))
PARTS = {
    "text": ("flute-4-g64-head", "flute-3-g64-head"),
    "8b-4bit": ("bf16", "flute-4-g128-head", "flute-4-g64-head", "flute-4-g128"),
    "8b-3bit": ("bf16", "flute-3-g128-head", "flute-3-g64-head", "flute-3-g128"),
    "8b-2bit": ("bf16", "flute-2-g128-head", "flute-2-g64-head", "flute-2-g128"),
    "8b-peers": ("bf16", "flute-4-g128", "gptq-4-g128", "gptq-4-g128-head", "awq-4-g128", "fp8"),
    "8b-serve": ("bf16", "flute-4-g128-head", "flute-3-g128-head", "gptq-4-g128-head"),
    # bf16 is larger than one GPU's memory.
    "70b": ("flute-4-g128-head", "flute-3-g128-head", "gptq-4-g128-head", "fp8"),
}
# vLLM 0.25.1 samples with flashinfer unless told; the offline bundle leaves it out (deploy/bundle.py).
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
# An engine of one GPU talks to itself alone: a host without a network may not know its own name.
ENVIRONMENT |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# A variant that has less time than this is not begun: an engine's start alone takes most of it.
LEAST_SECONDS = 45
MAX_MODEL_LEN = 8192
# What an engine of --together is given besides its weights and its KV cache: the CUDA context, activations, graphs.
# vLLM does not look at the GPU's memory where it is told the KV cache's size; what it asks to be free at the start is
# FREE_SHARE of it, whatever else is there.
ENGINE_BYTES, FREE_SHARE, BATCHED_TOKENS = int(3.5 * 2**30), 0.02, 4096
# Of --together: what measuring one engine takes at most, so that it is begun with those that have started.
MEASURE_SECONDS = 20

# The one variant of `text` where --model is quantized already.
STORED = "stored"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The largest planet of the solar system is",
    "Once upon a time there was a",
    "The three primary colors are",
)
ANSWER_TOKENS = 32
# Two log-probabilities of bf16 logits are a tie within twice four rounding steps of 1/16 (tests/test_serve.py).
TIE = 0.5


class Part:
    """The result of one part, on disk after every change."""

    def __init__(self, name: str, out: Path, seconds: float, dry_run: bool):
        self.path = out / f"{name}.json"
        if self.path.exists():
            raise FluteError(f"{self.path} exists: choose another --out, or remove it to measure again")
        out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + seconds
        self.data = {"part": name, "dry_run": dry_run, "machine": machine(), "variants": {}}
        self.save()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        os.replace(partial, self.path)

    def add(self, variant: str, **values) -> None:
        self.data["variants"].setdefault(variant, {"figures": {}}).update(values)
        self.save()

    def figure(self, variant: str, name: str, value) -> None:
        entry = self.data["variants"].setdefault(variant, {"figures": {}})
        entry["figures"][name] = value
        self.save()
        print(f"  {variant}: {name} {value}", flush=True)

    def profile(self, variant: str, load: str, step: dict) -> None:
        self.data["variants"][variant].setdefault("profile", {})[load] = step
        self.save()


def machine() -> dict:
    """What the figures belong to."""
    import torch

    versions = {}
    for name in ("vllm", "vllm-flute", "torch", "triton", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = {"gpu_bytes": torch.cuda.get_device_properties(0).total_memory} if gpu else {}
    return {"gpu": gpu, **memory, "cpus": os.cpu_count(), "python": platform.python_version(), **versions}


def last_error(log: Path) -> str:
    """The line of a log that says why."""
    text = log.read_text(errors="replace")
    # An engine's process puts its name before every line, and its logger a time.
    lines = [re.sub(r"^\(.*?\)\s*(ERROR \S+ \S+ \[\S+\]\s*)?", "", line.strip()) for line in text.splitlines()]
    lines = [line for line in lines if re.search(r"^[\w.]*(Error|Exception)(:|$)|error:", line)]
    # An engine's own message comes before the one that says that the engine failed.
    why = [line for line in lines if "Engine core initialization failed" not in line] or lines or ["no error line"]
    return why[-1][:300]


def end(process: subprocess.Popen) -> None:
    """End a process and everything that it started (they share one process group)."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Worker:
    """One engine's process, and the lines that it writes."""

    def __init__(self, variant: str, job: dict, log: Path):
        self.variant, self.log = variant, log
        self.out, self.go, self.seen = log.with_suffix(".jsonl"), log.with_suffix(".go"), 0
        for file in (self.out, self.go):  # of a run before, where logs are kept
            file.unlink(missing_ok=True)
        spec = log.with_suffix(".job.json")
        spec.write_text(json.dumps(job | {"out": str(self.out)}))
        environment = os.environ | ENVIRONMENT | cpu_environment()
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), str(spec)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def lines(self) -> list[dict]:
        """Those that are new."""
        found = self.out.read_text().splitlines(keepends=True) if self.out.exists() else []
        new = [line for line in found[self.seen :] if line.endswith("\n")]
        self.seen += len(new)
        return [json.loads(line) for line in new]

    def follow(self, seconds: float):
        """Yield lines as they come, until the process ends, says that it is done, or the time is over."""
        until = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            for line in self.lines():
                if "done" in line:
                    return
                yield line
            if ended or time.monotonic() > until:
                return
            time.sleep(0.1)

    def end(self) -> None:
        end(self.process)


def run_worker(part: Part, variant: str, job: dict, log: Path):
    """Run one engine and yield its lines as they come; the reason of a failure goes into the part."""
    worker = Worker(variant, job, log)
    try:
        yield from worker.follow(part.left())
        if worker.process.poll() is None and part.left() > 0:  # it is done
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(part.left())
        ended = worker.process.poll()
    finally:
        worker.end()
    if ended is None:
        part.add(variant, missing="out of time while it ran")
    elif ended:
        part.add(variant, missing=last_error(log))


def weights_gib(log: Path) -> float | None:
    """What vLLM says that the model's weights take."""
    found = re.search(r"[Mm]odel loading took ([\d.]+) GiB", log.read_text(errors="replace"))
    return float(found[1]) if found else None


def engine_options(dry_run: bool, streams: int) -> dict:
    common = {"load_format": "dummy", "dtype": "bfloat16", "enable_prefix_caching": False, "max_num_seqs": streams}
    if dry_run:
        return common | {"max_model_len": 512, "enforce_eager": True}
    return common | {"max_model_len": MAX_MODEL_LEN, "gpu_memory_utilization": 0.92}


def loads(dry_run: bool, profiled: tuple[int, ...] | None = None) -> list[dict]:
    """What is measured; ``profiled``: streams whose step is taken apart, None: PROFILED."""
    streams, decode, prefill = ((1, 2), 8, 64) if dry_run else (STREAMS, DECODE_TOKENS, PREFILL_TOKENS)
    if profiled is None:
        profiled = streams if dry_run else PROFILED
    decodes = [
        {"name": f"decode x{n}", "kind": "decode", "streams": n, "tokens": decode, "profile": n in profiled}
        for n in streams
    ]
    return [*decodes, {"name": f"prefill {prefill}", "kind": "prefill", "streams": 1, "tokens": prefill}]


def turns(part: Part, variants: list[str]):
    """The variants that there is time for."""
    longest = LEAST_SECONDS
    for variant in variants:
        if part.left() < longest:
            part.add(variant, missing=f"out of time: {part.left():.0f} s were left, {longest:.0f} s are needed")
            continue
        print(f"{variant}, {part.left():.0f} s left", flush=True)
        begin = time.monotonic()
        yield variant
        # Part of a variant is kept as well: begin one where two thirds of the longest so far are left.
        longest = max(longest, (time.monotonic() - begin) * 2 / 3)


def offline_job(shape: str, variant: str, args, folder: Path) -> dict:
    """The job of an in-process engine: decoding at several numbers of streams, and prefill."""
    wanted = loads(args.dry_run, args.profile)
    streams = [load["streams"] for load in wanted if load["kind"] == "decode"]
    engine = engine_options(args.dry_run, max(streams))
    if not args.dry_run:  # a graph for what is measured; more only take time to capture
        engine["compilation_config"] = {"cudagraph_capture_sizes": streams}
    traces = folder / f"{variant}-traces"
    if any(load.get("profile") for load in wanted):
        profiler = {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_with_stack": False}
        engine["profiler_config"] = profiler
    return {
        "model": str(write_dummy(folder / variant, shape, Variant.parse(variant))),
        "engine": engine,
        "traces": str(traces),
        "loads": wanted,
        "rounds": 1 if args.dry_run else args.rounds,
        "prompts": [],
    }


def record(part: Part, variant: str, line: dict) -> None:
    if "profile" in line:
        part.profile(variant, line["load"], line["profile"])
    elif "load" in line:
        part.figure(variant, line["load"], line["rates"])
    else:
        part.add(variant, start_seconds=line["start_seconds"])


def record_sizes(part: Part, shape: str, variant: str, log: Path) -> None:
    part.add(variant, checkpoint_gib=Variant.parse(variant).weight_bytes(shape) / 2**30, weights_gib=weights_gib(log))


def offline(part: Part, shape: str, variants: list[str], args, folder: Path) -> None:
    """One in-process engine after the other."""
    for variant in turns(part, variants):
        log = folder / f"{variant}.log"
        for line in run_worker(part, variant, offline_job(shape, variant, args, folder), log):
            record(part, variant, line)
        record_sizes(part, shape, variant, log)


# ---- engines started side by side ----


def together_options(shape: str, streams: int) -> dict:
    """An engine's share of a GPU that others use too; the same for every variant."""
    tokens = max(MAX_MODEL_LEN, streams * (DECODE_TOKENS + 64)) + BATCHED_TOKENS
    options = {"kv_cache_memory_bytes": tokens * kv_bytes(shape), "gpu_memory_utilization": FREE_SHARE}
    return options | {"max_num_batched_tokens": BATCHED_TOKENS}


def batches(shape: str, variants: list[str], kv_cache: int, memory: int | None) -> list[list[str]]:
    """Variants, in order, whose engines fit ``memory`` bytes at once; one that never fits is alone."""
    found, free = [[]], memory
    for variant in variants:
        need = Variant.parse(variant).weight_bytes(shape) + kv_cache + ENGINE_BYTES
        if memory is not None and need > free and found[-1]:
            found, free = [*found, []], memory
        found[-1].append(variant)
        free = None if memory is None else free - need
    return found


def together(part: Part, shape: str, variants: list[str], args, folder: Path) -> None:
    """Engines that start side by side, and then measure one at a time: nothing else runs on the GPU meanwhile."""
    part.data["together"] = "engines were started side by side (start_seconds do not compare), each measured alone"
    part.save()
    options = {} if args.dry_run else together_options(shape, max(STREAMS))
    memory = part.data["machine"].get("gpu_bytes")
    for batch in batches(shape, variants, options.get("kv_cache_memory_bytes", 0), memory):
        if part.left() < LEAST_SECONDS:
            for variant in batch:
                part.add(variant, missing=f"out of time: {part.left():.0f} s were left, {LEAST_SECONDS} s are needed")
            continue
        workers = []
        try:
            for variant in batch:
                job, log = offline_job(shape, variant, args, folder), folder / f"{variant}.log"
                job["engine"] |= options
                workers.append(Worker(variant, job | {"go": str(log.with_suffix(".go"))}, log))
            ready = wait_for_starts(part, workers)
            for i, worker in enumerate(ready):
                print(f"{worker.variant} measures, {part.left():.0f} s left", flush=True)
                worker.go.touch()
                # One that hangs must leave the others their time.
                for line in worker.follow(part.left() / (len(ready) - i)):
                    record(part, worker.variant, line)
                ended, done = worker.process.poll(), all_measured(part, worker, args)
                worker.end()
                if not done:
                    part.add(worker.variant, missing=last_error(worker.log) if ended else "out of time while it ran")
        finally:
            for worker in workers:
                worker.end()
        for variant in batch:
            record_sizes(part, shape, variant, folder / f"{variant}.log")


def all_measured(part: Part, worker: Worker, args) -> bool:
    entry = part.data["variants"].get(worker.variant, {"figures": {}})
    wanted = loads(args.dry_run, args.profile)
    profiles = {load["name"] for load in wanted if load.get("profile")}
    return {load["name"] for load in wanted} <= entry["figures"].keys() and profiles <= entry.get("profile", {}).keys()


def wait_for_starts(part: Part, workers: list[Worker]) -> list[Worker]:
    """Those that have started, once each has or has ended, or once the others need the time; the rest is ended."""
    ready, starting = [], list(workers)
    while starting and part.left() > MEASURE_SECONDS * max(len(ready), 1):
        for worker in list(starting):
            ended, lines = worker.process.poll(), worker.lines()
            if lines:
                record(part, worker.variant, lines[0])
                print(f"{worker.variant} started, {part.left():.0f} s left", flush=True)
                ready.append(worker)
            elif ended is not None:
                part.add(worker.variant, missing=last_error(worker.log))
                print(f"{worker.variant}: {last_error(worker.log)}", flush=True)
                worker.end()
            else:
                continue
            starting.remove(worker)
        time.sleep(0.1)
    for worker in starting:
        part.add(worker.variant, missing="out of time while it started")
        worker.end()
    return [worker for worker in workers if worker in ready]


def served(part: Part, shape: str, variants: list[str], dry_run: bool, folder: Path) -> None:
    """`vllm serve` measured by `vllm bench serve`: tokens per second and latencies as clients see them."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    runs = (("serve x1", 1, 16, 8, 1), ("serve x2", 2, 16, 8, 1)) if dry_run else SERVED
    options = engine_options(dry_run, max(run[1] for run in runs))
    arguments = ["--load-format", "dummy", "--dtype", "bfloat16", "--no-enable-prefix-caching"]
    arguments += ["--max-num-seqs", str(options["max_num_seqs"]), "--max-model-len", str(options["max_model_len"])]
    arguments += (
        ["--enforce-eager"] if dry_run else ["--gpu-memory-utilization", str(options["gpu_memory_utilization"])]
    )
    environment = ENVIRONMENT | cpu_environment()
    for variant in turns(part, variants):
        log, begin = folder / f"{variant}.log", time.monotonic()
        model = write_dummy(folder / variant, shape, Variant.parse(variant))
        try:
            with Server(model, log, arguments, environment, start_seconds=max(part.left(), 1)) as server:
                part.add(variant, start_seconds=time.monotonic() - begin)
                for name, streams, prompt, tokens, each in runs:
                    if part.left() < 0:
                        raise FluteError("out of time while it ran")
                    result = folder / f"{variant}-{len(part.data['variants'][variant]['figures'])}.json"
                    command = [vllm, "bench", "serve", "--backend", "vllm", "--base-url", server.url, "--seed", "0"]
                    command += ["--model", "model", "--tokenizer", str(model), "--dataset-name", "random"]
                    command += ["--random-input-len", str(prompt), "--random-output-len", str(tokens), "--ignore-eos"]
                    command += ["--num-prompts", str(streams * each), "--max-concurrency", str(streams)]
                    command += ["--num-warmups", str(streams), "--disable-tqdm"]
                    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
                    bench_log = result.with_suffix(".log")
                    with open(bench_log, "w") as out:
                        done = subprocess.run(
                            command,
                            stdout=out,
                            stderr=subprocess.STDOUT,
                            env=os.environ | environment,
                            timeout=max(part.left(), 1),
                        )
                    if done.returncode or not result.exists():
                        raise FluteError(f"{name}: {last_error(bench_log)}")
                    told = json.loads(result.read_text())
                    kept = ("output_throughput", "total_token_throughput", "median_ttft_ms", "median_tpot_ms")
                    part.figure(variant, name, {key: told[key] for key in kept})
        except subprocess.TimeoutExpired:
            part.add(variant, missing="out of time while it ran")
        except FluteError as e:
            part.add(variant, missing=str(e))
        part.add(variant, weights_gib=weights_gib(log))


# ---- text ----


def checkpoint_digest(folder: Path) -> str:
    """Hash of a checkpoint's tensors' files, by name."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as f:
            total.update(file.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def parting(expected: list[dict], found: list[dict]) -> tuple[int, float | None]:
    """How many of the texts are the same to the token, and the widest gap at which the others part.

    The gap is between the expected run's own log-probabilities of its best token and of the one found: a tie of bf16
    logits is no error. None where it did not rank the token that was found at all.
    """
    same, widest = 0, 0.0
    for a, b in zip(expected, found, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if x != y), None)
        if at is None:
            same += 1
            continue
        top = a["top"][at]
        if str(b["tokens"][at]) not in top:
            return same, None
        widest = max(widest, max(top.values()) - top[str(b["tokens"][at])])
    return same, widest


def text(part: Part, variants: list[str], args, folder: Path) -> None:
    """Greedy answers of the embedded model, quantized here, against those of the expected file; or write that file."""
    from vllm_flute.checkpoint import quantize_checkpoint

    expected = json.loads(args.expected.read_text()) if args.expected else {}
    written = {}
    for variant in turns(part, variants):
        model = args.model
        if variant != STORED:
            how, model = Variant.parse(variant), folder / variant
            quantize_checkpoint(args.model, model, how.bits, how.group_size, lm_head=how.head)
        digest = checkpoint_digest(model)
        engine = {"dtype": "bfloat16", "max_model_len": 512, "enforce_eager": args.dry_run, "max_num_seqs": 8}
        if part.data["machine"]["gpu"]:  # beside other engines too; and not graphs of sizes that never come
            engine |= {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": FREE_SHARE}
            engine["compilation_config"] = {"cudagraph_capture_sizes": [1, 8]}
        job = {
            "model": str(model),
            "engine": engine,
            "loads": [],
            "rounds": 0,
            "prompts": PROMPTS,
            "answer_tokens": ANSWER_TOKENS,
        }
        answers = [line for line in run_worker(part, variant, job, folder / f"{variant}.log") if "tokens" in line]
        part.add(variant, digest=digest, answers=answers)
        if len(answers) < len(PROMPTS):
            continue
        written[variant] = {"digest": digest, "answers": answers}
        if not expected:
            continue
        if variant not in expected or expected[variant]["digest"] != digest:
            part.add(variant, missing=f"{args.expected} is of another checkpoint: write it again from the same --model")
            continue
        same, gap = parting(expected[variant]["answers"], answers)
        part.figure(variant, "same texts", f"{same} of {len(PROMPTS)}")
        if gap is None or gap > TIE:
            part.add(variant, missing=f"a text parts where the CPU's tokens are {gap or 'not in its top'} apart")
    if not expected:
        path = args.out / "expected.json"
        path.write_text(json.dumps(written, indent=1))
        print(f"wrote {path}", flush=True)


def streams_list(text: str) -> tuple[int, ...]:
    return () if text == "off" else tuple(int(n) for n in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "report"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5, help="time for this part")
    parser.add_argument("--variants", help="some of the part's, or others: bf16,fp8,flute-4-g64-head,gptq-4-g128,...")
    parser.add_argument("--model", type=Path, help="text: a checkpoint, bf16 or quantized")
    parser.add_argument("--expected", type=Path, help="text: expected.json of a CPU")
    parser.add_argument("--logs", type=Path, help="keep logs and checkpoints' configurations here")
    parser.add_argument("--together", action="store_true", help="start engines side by side; each measures alone")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of every load; default {ROUNDS}")
    parser.add_argument(
        "--profile",
        type=streams_list,
        help=f"streams whose decode step is taken apart, or off; default {','.join(map(str, PROFILED))}",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, few tokens, eager")
    args = parser.parse_args()
    if args.part == "report":
        print(gpu_serving_report.write(args.out))
        return 0
    variants = args.variants.split(",") if args.variants else list(PARTS[args.part])
    try:
        for variant in variants:
            Variant.parse(variant)
        if args.together and args.part in ("text", "8b-serve"):
            raise FluteError("--together is for the parts with several engines in process: 8b-4bit, ..., 70b")
        if args.part == "text":
            if not args.model or not (args.model / "config.json").is_file():
                raise FluteError("text: --model names a checkpoint, bf16 or quantized")
            if "quantization_config" in json.loads((args.model / "config.json").read_text()):
                variants = [STORED]
        part = Part(args.part, args.out, args.minutes * 60, args.dry_run)
    except (FluteError, ValueError) as e:
        sys.exit(f"gpu_serving: {e}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_serving: ended from outside"))  # and its engines with it
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.logs or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        shape = "tiny" if args.dry_run else args.part.partition("-")[0]
        if args.part == "text":
            text(part, variants, args, folder)
        elif args.part == "8b-serve":
            served(part, shape, variants, args.dry_run, folder)
        else:
            (together if args.together else offline)(part, shape, variants, args, folder)
    print(gpu_serving_report.write(args.out))
    return int(any("missing" in variant for variant in part.data["variants"].values()))


if __name__ == "__main__":
    sys.exit(main())
