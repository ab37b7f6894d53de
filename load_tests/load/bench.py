"""Requests at a rate, or so many at once: `vllm bench serve` sends them; its raw record of each is what counts here."""

import json
import random
import subprocess
import sys
from pathlib import Path

from vllm_flute.errors import FluteError

from .records import Request
from .target import Target


def run(target: Target, options: list[str], count: int, tokens: int, out: Path) -> tuple[list[Request], int]:
    """Send ``count`` requests that ask for exactly ``tokens`` each; returns (requests, sent).

    Args:
        options: the dataset's and the arrivals' options of `vllm bench serve`.
        out: folder for its result and log, `bench.json` and `bench.log`.

    Raises:
        FluteError: it ended without a result; names the log.
    """
    out.mkdir(parents=True, exist_ok=True)
    result, log = out / "bench.json", out / "bench.log"
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai"]
    command += ["--base-url", target.url, "--endpoint", "/v1/completions", "--model", target.name]
    command += ["--tokenizer", target.tokenizer, "--num-prompts", str(count), "--ignore-eos", "--temperature", "0"]
    command += ["--disable-tqdm", "--save-result", "--save-detailed", "--result-dir", str(out)]
    command += ["--result-filename", result.name, *options]
    # Prompts of their own, or the prefix cache would answer for those of an earlier run.
    command += ["--seed", str(random.randrange(2**31))]
    result.unlink(missing_ok=True)
    with open(log, "w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=target.environment()).returncode
    if code or not result.exists():
        raise FluteError(f"vllm bench serve ended with {code} and no result: see {log}")
    return requests_of(json.loads(result.read_text()), tokens), count


def requests_of(result: dict, tokens: int) -> list[Request]:
    """Requests of a detailed result. A stream that ended early counts there as a success; here it failed."""
    requests = []
    for i, start in enumerate(result["start_times"]):
        error, got = result["errors"][i], result["output_lens"][i]
        if not error and got != tokens:
            error = f"the stream ended after {got} of {tokens} tokens"
        request = Request(start, "failed" if error else "answered", error=error)
        if got:
            request.ttft, request.itls = result["ttfts"][i], result["itls"][i]
        request.tokens, request.prompt_tokens = got, result["input_lens"][i]
        requests.append(request)
    return requests
