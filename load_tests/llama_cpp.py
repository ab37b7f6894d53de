"""llama.cpp's own batched decoding and prefill, as a peer of `vllm-flute bench serving`: tokens per second.

    python load_tests/llama_cpp.py BIN MODEL.gguf ... --streams 1 8 32 --rounds 5 [--server]

BIN is a build's folder with llama-batched-bench and llama-server (kernels/benchmarks/ggml_peer/build.py --llama makes
one). Each round runs every model once, each figure is the median of the rounds; prefill is of one prompt, in batches of
512 tokens. --server asks llama-server over HTTP, with the requests that `vllm-flute bench serving` sends to vLLM.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import requests

from vllm_flute.serve.benchmark import decode_rate, prefill_rate
from vllm_flute.serve.process import free_port


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


def ask_server(program: Path, model: Path, threads: int, prompt: int, tokens: int, streams: list[int]) -> list[dict]:
    """What llama-server answers, in the form of `run`: one slot a stream, prompts are not kept."""
    slots, port = max(streams), free_port()
    context = slots * (max(prompt, 16) + tokens + 16)
    command = [program, "-m", model, "-t", threads, "-c", context, "-np", slots, "-b", 2048, "-ub", 512, "-fa", "on"]
    command += ["--port", port, "--no-webui", "--cache-ram", 0, "--log-disable"]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(f"{program.name} on {model} ended with {server.returncode}")
            try:
                if requests.get(f"{url}/health", timeout=1).ok:
                    break
            except requests.RequestException:
                pass
            time.sleep(0.2)
        decode_rate(url, 1, 8)
        lines = [{"speed_pp": prefill_rate(url, prompt)}]
        return lines + [{"speed_tg": decode_rate(url, n, tokens)} for n in streams]
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--server", action="store_true", help="llama-server in place of llama-batched-bench")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    program, ask = args.bin / "llama-batched-bench", run
    if args.server:
        program, ask = args.bin / "llama-server", ask_server
    samples = {model.name: {} for model in args.models}
    for _ in range(args.rounds):
        for model in args.models:
            prefill, *decode = ask(program, model, args.threads, args.prefill_tokens, args.decode_tokens, args.streams)
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
