"""One engine of load_tests/gpu_serving.py, in a process of its own: start, measure, write a line after every figure.

    python load_tests/gpu_serving_worker.py JOB.json

The job: ``model``, ``engine`` (arguments of vllm.LLM), ``loads``, ``rounds``, ``prompts`` (texts, may be empty),
``out`` (JSON lines are appended), ``traces`` (the engine's torch_profiler_dir, for decode loads with ``profile``), and
perhaps ``go``: a file that an engine waits for once it has started. A figure is {"load": name, "rates": tokens per
second of each round} or {"load": name, "profile": what gpu_serving_profile.decode_step returns}; an answer is
{"prompt", "tokens", "top": [{token id: log-probability}]}; the last line is {"done": true}.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

from gpu_serving_profile import decode_step, read_trace

# A prompt of a decode load: short, so that the step is the weights' and not the cache's.
PROMPT_TOKENS = 16
WARM_TOKENS = 8
TOP = 5
PROFILED_STEPS = 16
TRIES = 5


def seconds(llm, prompts: list[list[int]], tokens: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    end = time.perf_counter()
    if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
        raise RuntimeError("an answer is shorter than asked for")
    return end - begin


def draw(streams: int, length: int, vocabulary: int) -> list[list[int]]:
    return [[random.randrange(3, vocabulary) for _ in range(length)] for _ in range(streams)]


def measure(llm, load: dict, vocabulary: int) -> float:
    """Tokens per second of one round of a load.

    Decoding is the difference of a long and a short generation of the same prompts: prefill and everything else
    that happens once cancels. A difference below zero measured other work on the machine, and is taken again.

    Raises RuntimeError where that does not help.
    """
    if load["kind"] == "prefill":
        prompts = draw(load["streams"], load["tokens"], vocabulary)
        return load["streams"] * load["tokens"] / seconds(llm, prompts, 1)
    short = draw(load["streams"], PROMPT_TOKENS, vocabulary)
    for _ in range(TRIES):
        once = seconds(llm, short, WARM_TOKENS)
        taken = seconds(llm, short, WARM_TOKENS + load["tokens"]) - once
        if taken > 0:
            return load["streams"] * load["tokens"] / taken
    raise RuntimeError(
        f"{load['name']}: {TRIES} times the longer generation was the faster one: the machine is too busy"
    )


def profile(llm, load: dict, vocabulary: int, rate: float, traces: Path) -> dict:
    """A decode step of this load by groups of kernels; ``rate`` is the load's tokens per second without a profiler."""
    prompts = draw(load["streams"], PROMPT_TOKENS, vocabulary)
    found = []
    for tokens in (WARM_TOKENS, WARM_TOKENS + PROFILED_STEPS):
        before = set(traces.rglob("*.json*"))
        llm.start_profile()
        seconds(llm, prompts, tokens)
        llm.stop_profile()
        (trace,) = set(traces.rglob("*.json*")) - before
        found.append(read_trace(trace))
    return decode_step(*found, PROFILED_STEPS, 1e6 * load["streams"] / rate)


def answer(llm, prompts: list[str], tokens: int):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=TOP)
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        best = output.outputs[0]
        top = [{str(token): entry.logprob for token, entry in step.items()} for step in best.logprobs]
        yield {"prompt": prompt, "text": best.text, "tokens": list(best.token_ids), "top": top}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])

    def write(line: dict) -> None:
        with open(out, "a") as f:
            print(json.dumps(line), file=f)

    from vllm import LLM

    begin = time.perf_counter()
    llm = LLM(model=job["model"], seed=0, **job["engine"])
    write({"start_seconds": time.perf_counter() - begin})
    while "go" in job and not Path(job["go"]).exists():
        time.sleep(0.05)
    random.seed(0)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    for line in answer(llm, job["prompts"], job["answer_tokens"]) if job["prompts"] else ():
        write(line)
    measured = {}
    for load in job["loads"]:
        # Compiles and allocates.
        measure(llm, load | ({"tokens": WARM_TOKENS} if load["kind"] == "decode" else {}), vocabulary)
        rates = measured[load["name"]] = [measure(llm, load, vocabulary) for _ in range(job["rounds"])]
        write({"load": load["name"], "rates": rates})
    for load in job["loads"]:
        if load.get("profile"):
            rate = statistics.median(measured[load["name"]])
            write({"load": load["name"], "profile": profile(llm, load, vocabulary, rate, Path(job["traces"]))})
    write({"done": True})


if __name__ == "__main__":
    main()
