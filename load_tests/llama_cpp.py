"""llama.cpp's own batched decoding and prefill, as a peer of `vllm-flute bench serving`: tokens per second.

    python load_tests/llama_cpp.py BIN MODEL.gguf ... --streams 1 8 32 --rounds 5

BIN is a build's folder with llama-batched-bench (kernels/benchmarks/ggml_peer/build.py --llama makes one). Each round
runs every model once, each figure is the median of the rounds; prefill is of one prompt, in batches of 512 tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path


def run(program: Path, model: Path, threads: int, prompt: int, tokens: int, streams: list[int]) -> list[dict]:
    """The lines that llama-batched-bench prints for one model."""
    context = max(prompt + tokens, max(streams) * (16 + tokens))
    command = [program, "-m", model, "-t", threads, "-c", context, "-b", 2048, "-ub", 512, "-fa", "on"]
    command += ["--output-format", "jsonl"]
    lines = []
    for npp, npl in ((prompt, [1]), (16, streams)):
        more = ["-npp", npp, "-ntg", tokens, "-npl", ",".join(map(str, npl))]
        done = subprocess.run(list(map(str, command + more)), capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(found) != len(npl):
            raise SystemExit(f"{program.name} on {model} failed:\n{done.stderr[-2000:]}")
        lines += found
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    program = args.bin / "llama-batched-bench"
    samples = {model.name: {} for model in args.models}
    for _ in range(args.rounds):
        for model in args.models:
            prefill, *decode = run(program, model, args.threads, args.prefill_tokens, args.decode_tokens, args.streams)
            samples[model.name].setdefault("prefill", []).append(prefill["speed_pp"])
            for n, line in zip(args.streams, decode, strict=True):
                samples[model.name].setdefault(f"decode x{n}", []).append(line["speed_tg"])
    for name, rates in samples.items():
        print(name, *(f"{key} {statistics.median(values):.1f}" for key, values in rates.items()), sep="  ")
    if args.output:
        args.output.write_text(
            json.dumps({"threads": args.threads, "rounds": args.rounds, "models": samples}, indent=2)
        )


if __name__ == "__main__":
    main()
