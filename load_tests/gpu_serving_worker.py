"""One engine of load_tests/gpu_serving.py, in a process of its own: start, measure, write a line after every figure.

    python load_tests/gpu_serving_worker.py JOB.json

The job: ``model``, ``engine`` (arguments of vllm.LLM), ``loads``, ``rounds``, ``prompts`` (texts, may be empty),
``out`` (JSON lines are appended). A figure is {"load": name, "rates": tokens per second of each round}; an answer is
{"prompt", "tokens", "top": [{token id: log-probability}]}.
"""

import json
import random
import sys
import time
from pathlib import Path

# A prompt of a decode load: short, so that the step is the weights' and not the cache's.
PROMPT_TOKENS = 16
WARM_TOKENS = 8
TOP = 5


def seconds(llm, prompts: list[list[int]], tokens: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    end = time.perf_counter()
    if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
        raise RuntimeError("an answer is shorter than asked for")
    return end - begin


def measure(llm, load: dict, vocabulary: int) -> float:
    """Tokens per second of one round of a load.

    Decoding is the difference of a long and a short generation of the same prompts: prefill and everything else
    that happens once cancels.
    """

    def prompts(length: int) -> list[list[int]]:
        return [[random.randrange(3, vocabulary) for _ in range(length)] for _ in range(load["streams"])]

    if load["kind"] == "prefill":
        return load["streams"] * load["tokens"] / seconds(llm, prompts(load["tokens"]), 1)
    short = prompts(PROMPT_TOKENS)
    once = seconds(llm, short, WARM_TOKENS)
    return load["streams"] * load["tokens"] / (seconds(llm, short, WARM_TOKENS + load["tokens"]) - once)


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
    random.seed(0)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    for line in answer(llm, job["prompts"], job["answer_tokens"]) if job["prompts"] else ():
        write(line)
    for load in job["loads"]:
        measure(llm, load, vocabulary)  # compiles and allocates
        rates = [measure(llm, load, vocabulary) for _ in range(job["rounds"])]
        write({"load": load["name"], "rates": rates})


if __name__ == "__main__":
    main()
