"""Serve a model with LUT-quantized weights: get it, quantize it, start vLLM. `make serve` runs this in .venv.

Each stage is skipped where its result is there; vLLM takes this process's place, so Ctrl-C reaches it directly.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DEMO = Path("models/SmolLM2-135M-Instruct")


def config_of(model: str) -> dict:
    """The config.json of a directory or of a model on the hub; {} where there is none."""
    path = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except Exception as e:
            reason = str(e).strip().splitlines()[0]
            sys.exit(f"serve: {model} is neither a directory nor a model to be had from the hub: {reason}")
    return json.loads(path.read_text()) if path.exists() else {}


def quantization(config: dict) -> dict:
    found = config.get("quantization_config") or {}
    return found if found.get("quant_method") == "flute" else {}


def run(*command: str) -> None:
    """A stage of its own; its own message tells what failed."""
    code = subprocess.run([BIN / "vllm-flute", *command]).returncode
    if code:
        sys.exit(code)


def prepare(args) -> str:
    """The quantized model to serve: a directory, or a hub id that is quantized already."""
    if args.out and (there := quantization(config_of(args.out) if Path(args.out).is_dir() else {})):
        asked = {"bits": args.bits, "group_size": args.group_size, "codebook": args.codebook}
        other = [f"{key} {there[key]}" for key, value in asked.items() if there.get(key, value) != value]
        if other:
            sys.exit(f"serve: {args.out} holds a model of {', '.join(other)}: choose another OUT, or remove it")
        return args.out
    model = args.model or str(DEMO)
    if not args.model:
        run("demo-model", model)
    name = f"{Path(model).name}-flute-{args.bits}bit-g{args.group_size}"
    out = args.out or f"models/{name}" + (f"-{args.codebook}" if args.codebook != "nf" else "")
    if (Path(out) / "config.json").exists():
        return out
    if quantization(config_of(model)):
        return model
    sizes = ("--bits", str(args.bits), "--group-size", str(args.group_size), "--codebook", args.codebook)
    run("quantize", model, "--output", out, *sizes)
    return out


def cpu_settings(environment) -> list[str]:
    """What vLLM's defaults leave to the user on a CPU; returns options, adds to the environment."""
    # By default vLLM takes most of the memory for the KV cache. GiB a rank.
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    cores = sorted(os.sched_getaffinity(0))
    # vLLM keeps one core back for its front end: of a few cores that is too much to give away.
    if len(cores) <= 4:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    # As long as fits into that cache.
    return ["--max-model-len", "auto"]


def announce(server: int, port: int, name: str) -> None:
    """Wait in a process of its own until the server answers, then say how to ask it."""
    message = {"role": "user", "content": "What is the capital of France?"}
    request = json.dumps({"model": name, "messages": [message], "max_tokens": 32})
    url = f"http://127.0.0.1:{port}"
    while os.getppid() == server:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                break
        except OSError:
            time.sleep(0.5)
    else:
        return
    print(
        f"\n{name} answers (metrics: {url}/metrics). Ctrl-C ends it. Try:\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize a model where needed and serve it.")
    parser.add_argument("--model", default="", help="directory or hub id; default: the demo model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--codebook", default="nf")
    parser.add_argument("--out", default="", help="where the quantized model goes")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--vllm-args", default="", help="further options of `vllm serve`")
    args = parser.parse_args()
    os.chdir(ROOT)
    out = prepare(args)
    name = Path(args.model or DEMO).name

    # install.json says which device the environment was made for.
    device = json.loads((Path(sys.prefix) / "install.json").read_text())["device"]
    options = cpu_settings(os.environ) if device == "cpu" else []
    command = [str(BIN / "vllm"), "serve", out, "--quantization", "flute", "--served-model-name", name]
    command += ["--port", str(args.port), *options, *shlex.split(args.vllm_args)]
    print(f"{shlex.join(command)}\nthe first start compiles the model: a minute or two", flush=True)
    server = os.getpid()
    if os.fork() == 0:
        announce(server, args.port, name)
        os._exit(0)
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
