#!/usr/bin/env python3
"""Build, check and time the GPU kernels on this machine, in one process and a few minutes.

    python kernels/benchmarks/gpu/measure.py --out DIR [--minutes 8] [--only checks,timing] [--seed N]

Needs a GPU, nvcc, cmake, ninja, torch, numpy and nothing else: no network, no vLLM, no installation of this project.
matplotlib (plots), compute-sanitizer and the peers of peers.py are used where they are. Writes to DIR: results.json
(its schema is in report.py), table.txt, plots, build.log, sanitizer.log. The sections run in the order of SECTIONS;
each has a share of the time that is left, and what is measured is written after every point, so that a run
that is cut off has all until then. Exits with 1 where a check failed or a section could not run.

--dry-run goes through all of it on a CPU, with tiny shapes and the kernels that a CPU has. Its figures mean nothing,
and its JSON, table and plots say so.
"""

import argparse
import concurrent.futures
import datetime
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# The package and the tests' bound come from this checkout, wherever it is called from.
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tests")]

SECTIONS = ("facts", "micro", "checks", "timing", "repack", "sanitizer")
# Of the time that is left when a section begins.
SHARES = {"micro": 0.2, "checks": 0.35, "timing": 0.7, "repack": 0.3, "sanitizer": 0.9}
REPORT_SECONDS = 10  # kept for the table and the plots

# N x K, the most telling first; LLaMA-3 8B's and 70B's matrices and two squares.
SHAPES = ((8192, 8192), (28672, 4096), (57344, 8192), (4096, 4096))
SHAPES += ((8192, 28672), (4096, 14336), (10240, 8192), (6144, 4096))
TOKENS = ((1, 16, 32, 64, 1024), (2, 4, 8, 128, 256, 512, 4096))  # in two passes over the shapes
GROUP_64 = ((8192, 8192), (1, 16, 64, 1024))  # with groups of 64 too
# The fewest and most tokens that each kernel is timed for; the dispatcher's choice is timed wherever it is.
TIMED = {"mma": (1, 64), "wgmma": (9, 4096), "dequantize-cublas": (64, 4096), "triton": (1, 1024), "portable": (1, 1)}
PEER_SECONDS = 40  # that preparing one peer (its own compiler or tuning) may take in all

DRY_SHAPES, DRY_TOKENS = ((32, 128), (40, 128)), ((1, 8), (3,))
MAX_LOG = 1 << 20  # characters of a sanitizer's report that are kept
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


class Run:
    """One measurement: its result, its clock, its folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out
        self.device = "cpu" if options.dry_run else "cuda"
        self.begin = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        self.failed = False
        self.result: dict = {
            "schema": 1,
            "dry_run": options.dry_run,
            "complete": False,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "minutes": options.minutes,
            "seed": options.seed,
            "only": list(options.only),
            "commit": commit(),
            "sections": {},
        }

    def left(self) -> float:
        return self.options.minutes * 60 - REPORT_SECONDS - (time.monotonic() - self.begin)

    def save(self) -> None:
        partial = self.out / ".results.json"
        partial.write_text(json.dumps(self.result, indent=1))
        partial.replace(self.out / "results.json")

    def section(self, name: str, function: Callable[["Run", float], str]) -> None:
        """Run one section and write down how it ended: the line that it returns, or its exception."""
        if name not in self.options.only:
            return
        seconds = max(0.0, self.left() * SHARES.get(name, 1.0))
        begin = time.monotonic()
        print(f"[{begin - self.begin:6.1f} s] {name}, up to {seconds:.0f} s", flush=True)
        try:
            status = function(self, seconds) if seconds else "skipped: no time was left"
        except Exception as e:  # the other sections are worth having
            lines = str(e).strip().splitlines()
            status = f"failed: {type(e).__name__}: {lines[0] if lines else ''}"
            self.failed = True
        self.result["sections"][name] = {"status": status, "seconds": time.monotonic() - begin}
        print(f"{'':10} {status}", flush=True)
        self.save()


def commit() -> str | None:
    """The checkout's commit, where git knows it."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


# ---- sections: each returns how it ended ----


def facts(run: Run, seconds: float) -> str:
    """The machine, and its two ceilings."""
    import timing
    import torch

    found: dict = {"python": platform.python_version(), "cpu_cores": len(os.sched_getaffinity(0))}
    for name in ("torch", "triton", "numpy", "vllm", "bitsandbytes", "gemlite", "humming"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if run.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "capability": [properties.major, properties.minor]}
        found |= {"sms": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        found |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["before"] = clocks()
    big, size = (4 << 30, 8192) if run.device == "cuda" else (32 << 20, 512)
    found["copy_gb_s"] = timing.copy_gb_s(big, run.device)
    found["matmul_tflop_s"] = timing.matmul_tflop_s(size, run.device)
    if run.device == "cuda":
        found["after"] = clocks()
    run.result["facts"] = found
    return "done"


def clocks() -> dict:
    """Driver, clocks, power and temperature as nvidia-smi has them now; empty where it is not."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.partition("\n")[0].split(",")
    return {field: value.strip() for field, value in zip(fields, values, strict=False)}


def micro(run: Run, seconds: float, compiled: Callable[[], Path] | None = None) -> str:
    """Instruction rates beside what the design assumes; ``compiled`` waits for the program."""
    import micro as microbenchmarks

    if compiled is None:
        return "skipped: there is no GPU"
    run.result["micro"] = microbenchmarks.run(compiled(), seconds)
    return "done"


def checks(run: Run, seconds: float) -> str:
    """Every kernel against the oracle."""
    import checks as checking
    import weights

    dry, seed = run.options.dry_run, run.options.seed
    arithmetic, missing = weights.kernels(run.device)
    here = dict(arithmetic)
    compiling = []
    if not dry and len(arithmetic) > 1 and here.pop(weights.TRITON, None):
        # Triton compiles for seconds where a dtype, a width or an alignment is new: beside all else, on all cores.
        parts = min(18, os.cpu_count() or 1)
        for part in range(parts):
            rest = (str(each) for each in (int(seconds * 0.8), seed, part, parts))
            compiling.append(program("part", weights.TRITON, *rest))
    tokens = (1, 3, 8) if dry else checking.TOKENS
    checker = checking.Checker(run.device, here, tokens, seed)
    begin = time.monotonic()
    results, lost = [checking.run(checker, seconds, seed, dry)], []
    for process in compiling:
        try:
            output, _ = process.communicate(timeout=max(1.0, seconds - (time.monotonic() - begin)))
            results.append(json.loads(output.strip().splitlines()[-1]))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            lost.append("it took too long")
        except (ValueError, IndexError):
            lost.append(output[-300:])
    found = checking.merged(results)
    found |= {"kernels": list(arithmetic), "missing": missing, "lost_parts": lost}
    run.result["checks"] = found
    run.failed |= bool(found["failed"])
    ended = "done" if found["complete"] and not lost else "cut off: not every fixed check ran"
    if "ended_by" in found:
        ended = f"failed: {found['ended_by']}"
    calls = sum(found["calls"].values())
    return f"{ended}: {calls} results, {found['failed']} wrong, {found['sampled']} of {found['of']} models' layers"


def program(*arguments: str, under: Iterable[str | Path] = ()) -> subprocess.Popen:
    """Start checks.py as a program of its own, which ends with a line of JSON."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE), str(ROOT), str(ROOT / "tests")))}
    command = [*under, sys.executable, HERE / "checks.py", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def timing_section(run: Run, seconds: float) -> str:
    """Microseconds of every kernel, of cuBLAS and of the peers."""
    import peers
    import timing
    import torch
    import weights

    begin = time.monotonic()
    dry = run.options.dry_run
    cache = 0 if dry else torch.cuda.get_device_properties(0).L2_cache_size
    generator = torch.Generator(run.device).manual_seed(run.options.seed)
    names, _ = weights.kernels(run.device)
    missing = peers.absent()
    section = run.result["timing"] = {"peers_missing": missing, "rows": []}
    shapes, passes = (DRY_SHAPES, DRY_TOKENS) if dry else (SHAPES, TOKENS)
    work = [(shape, tokens, 128) for tokens in passes for shape in shapes]
    work.append((shapes[0], passes[0][:1], 64) if dry else (GROUP_64[0], GROUP_64[1], 64))
    spent: dict[str, float] = {}
    done, total = 0, sum(len(tokens) for _, tokens, _ in work)
    for (n, k), tokens, group in work:
        if time.monotonic() - begin > seconds:
            break
        candidates = [timing.cublas(n, k, generator, cache)]
        for bits in (4, 3, 2):
            candidates += ours(run, names, n, k, bits, group, generator, cache)
        if group == 128 and not dry:
            candidates += peers.candidates(n, k, group, generator, cache, missing)
        for m in tokens:
            if time.monotonic() - begin > seconds:
                break
            x = torch.randn(m, k, generator=generator, device=run.device).bfloat16()
            taken = [c for c in candidates if c.takes(m) and c.source not in missing]
            rows = timing.time_point(taken, x, n, 1 if dry else timing.ROUNDS)
            section["rows"] += rows
            for row in rows:
                if row["source"] not in ("flute", "torch"):
                    spent[row["source"]] = spent.get(row["source"], 0.0) + row["prepare_s"]
                    if spent[row["source"]] > PEER_SECONDS:
                        missing[row["source"]] = f"preparing it took more than {PEER_SECONDS} s: not timed further"
            done += 1
            run.save()
        del candidates
        if run.device == "cuda":
            torch.cuda.empty_cache()
    errors = [row for row in section["rows"] if "error" in row]
    run.failed |= any(row["source"] == "flute" for row in errors)
    ended = "done" if done == total else f"cut off after {done} of {total} points"
    return f"{ended}: {len(section['rows'])} rows, {len(errors)} of them errors"


def ours(run: Run, names: dict[str, str], n: int, k: int, bits: int, group: int, generator, cache: int) -> list:
    """Candidates of our kernels on one random layer; those that read one layout share the copies."""
    import timing
    import torch
    import weights

    from vllm_flute import dispatch

    matrix = weights.Matrix(f"{n}x{k}", (n,), k)
    layer = weights.random_layer(matrix, bits, group, torch.bfloat16, generator)
    found, shared = [], {}
    for name in names:
        layout = name == weights.TRITON
        if layout not in shared:
            first = weights.pack(layer, name)
            more = timing.copies_for(first.packed.numel(), cache) - 1
            shared[layout] = [first, *(first.copy() for _ in range(more))]
        copies = [copy._replace(kernel=name) for copy in shared[layout]]
        header = copies[0].header
        low, high = TIMED.get(name, (1, 1 << 30))

        def chosen(m: int, name=name, header=header) -> bool:
            return dispatch.choose(header, m, torch.bfloat16, run.device) == name

        def takes(m: int, low=low, high=high, chosen=chosen) -> bool:
            return low <= m <= high or chosen(m)

        nbytes = copies[0].packed.numel()
        call = weights.call
        found.append(timing.Candidate(name, "flute", bits, group, nbytes, call, copies, chosen, takes))
    return found


def repack(run: Run, seconds: float) -> str:
    """Microseconds and memory of packing a layer on the device."""
    import timing
    import torch
    import weights

    from vllm_flute import dispatch

    generator = torch.Generator(run.device).manual_seed(run.options.seed)
    rows = run.result["repack"] = []
    matrices = [weights.Matrix("dry", (64, 64), 128)] if run.options.dry_run else weights.LLAMA
    begin = time.monotonic()
    for matrix in matrices:
        for bits in (4, 3, 2):
            if time.monotonic() - begin > seconds:
                return f"cut off after {len(rows)} of {3 * len(matrices)}"
            layer = weights.random_layer(matrix, bits, 128, torch.bfloat16, generator)
            parts = layer.qweight, layer.scales, layer.codebooks, 128, matrix.shards
            packed = dispatch.pack_parts(*parts)[0]
            nbytes, extra = packed.numel(), None
            del packed
            if run.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                packed = dispatch.pack_parts(*parts)[0]
                torch.cuda.synchronize()
                extra = torch.cuda.max_memory_allocated() - before - nbytes
                del packed
            again = functools.partial(dispatch.pack_parts, *parts)
            seconds_each = statistics.median(timing.elapsed(again, run.device) for _ in range(5))
            moved = sum(part.nbytes for part in parts[:3]) + nbytes
            row = {"name": matrix.name, "n": matrix.n, "k": matrix.k, "bits": bits, "group_size": 128}
            row |= {"us": seconds_each * 1e6, "gb_s": moved / seconds_each / 1e9}
            rows.append(row | {"packed_bytes": nbytes, "extra_bytes": extra})
    return "done"


def sanitizer(run: Run, seconds: float) -> str:
    """compute-sanitizer's four tools on small shapes, side by side."""
    import weights

    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if run.options.dry_run or not tool:
        return "skipped: there is no GPU" if run.options.dry_run else "skipped: compute-sanitizer was not found"
    names = [name for name in weights.kernels(run.device)[0] if name in ("mma", "wgmma", "dequantize-cublas")]
    if not names:
        return "skipped: there are no native kernels"
    begin = time.monotonic()
    found = run.result["sanitizer"] = {}
    started = {}
    for name in SANITIZERS:
        log = run.options.build / f"sanitizer-{name}.log"
        log.unlink(missing_ok=True)
        under = (tool, "--tool", name, "--log-file", log)
        started[name] = log, program("sanitize", ",".join(names), under=under)
    bad = []
    with (run.out / "sanitizer.log").open("w") as together:
        for name, (log, process) in started.items():
            try:
                output, _ = process.communicate(timeout=max(1.0, seconds - (time.monotonic() - begin)))
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
            report = log.read_text(errors="replace") if log.exists() else ""
            print(f"---- {name}\n{report[:MAX_LOG]}\n{output[-2000:]}", file=together)
            found[name] = sanitizer_result(report, output)
            if found[name]["our_kernels_named"] or found[name]["wrong"]:
                bad.append(name)
    run.failed |= bool(bad)
    unfinished = [name for name in SANITIZERS if not found[name]["finished"]]
    words = [f"{', '.join(bad)} found errors in our kernels"] if bad else ["no error in our kernels"]
    words += [f"{', '.join(unfinished)} did not finish"] if unfinished else []
    return ("cut off: " if unfinished else "done: ") + "; ".join(words)


def sanitizer_result(report: str, output: str) -> dict:
    """What a tool reported and what the program that it watched printed, as results.json has it."""
    try:
        compared = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):  # it did not come to its last line
        compared = None
    lines = report.splitlines()
    return {
        "finished": compared is not None,
        "summary": next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), ""),
        # Only what is said of our kernels counts: initcheck also names torch's and cuBLAS's.
        "our_kernels_named": sum("flute::" in line and "Host Frame" not in line for line in lines),
        "wrong": compared["failed"] if compared else None,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8, help="the time that all of it may take")
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help=f"sections, separated by commas: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="folder to build in (build/gpu)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all random inputs (default: the time)")
    parser.add_argument(
        "--dry-run", action="store_true", help="go through all of it on a CPU; the figures mean nothing"
    )
    options = parser.parse_args(arguments)
    options.only = tuple(options.only.split(","))
    for name in options.only:
        if name not in SECTIONS:
            parser.error(f"--only {name!r}: expected some of {', '.join(SECTIONS)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.dry_run:
        # Read when triton is imported, and when the CPU's library is loaded: the two kernels that every CPU has.
        os.environ |= {"TRITON_INTERPRET": "1", "VLLM_FLUTE_ISA": "scalar"}
    os.environ.setdefault("VLLM_FLUTE_TABLE", "off")  # the choices of the source, not of a table measured before
    import report
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false; --dry-run goes through all of it on a CPU", file=sys.stderr)
        return 2
    run = Run(options)
    run.save()
    if options.dry_run or options.only == ("facts",):
        run.section("facts", facts)
        run.section("micro", micro)
    else:
        measure_while_building(run)
    run.section("checks", checks)
    run.section("timing", timing_section)
    run.section("repack", repack)
    run.section("sanitizer", sanitizer)
    ends = [section["status"] for section in run.result["sections"].values()]
    run.result["complete"] = not any(status.startswith(("failed", "cut off")) for status in ends)
    run.result["seconds"] = time.monotonic() - run.begin
    run.save()
    print(report.write(run.result, run.out))
    return 1 if run.failed else 0


def measure_while_building(run: Run) -> None:
    """The library compiles on the CPU while facts and instruction rates are measured on the GPU."""
    import torch

    import build

    folder, log = run.options.build, run.out / "build.log"
    folder.mkdir(parents=True, exist_ok=True)
    target = build.arch(torch.cuda.get_device_capability())
    limit = run.left() / 2
    with concurrent.futures.ThreadPoolExecutor() as pool:
        rates = pool.submit(build.micro, folder, target, log, limit)
        library = pool.submit(build.library, folder, target, log, limit)
        run.section("facts", facts)
        run.section("micro", lambda r, seconds: micro(r, seconds, rates.result))
        begin = time.monotonic()
        try:
            library.result()
            status = f"done for sm_{target}"
        except build.BuildError as e:  # Triton's kernel needs none of it
            status, run.failed = f"failed: {e}", True
    run.result["sections"]["build"] = {"status": status, "seconds": time.monotonic() - begin}
    print(f"[{time.monotonic() - run.begin:6.1f} s] build {status}", flush=True)
    run.save()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
