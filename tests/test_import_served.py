"""Imported checkpoints, served: real `vllm serve` processes answer as the source's own weights do in transformers.

In float32, where there are no ties: the same greedy tokens, and log-probabilities up to the order of sums.
"""

from functools import partial

import pytest
import torch
from checkpoints import llama_config
from gguf_checkpoints import make_gguf
from source_checkpoints import HIDDEN, INTERMEDIATE, LAYERS, make_awq, make_gptq, make_upstream_flute
from table_checkpoints import make_bitnet, make_bitsandbytes, make_mxfp4, make_nvfp4

from vllm_flute.checkpoint import import_checkpoint
from vllm_flute.serve import Client, Server

pytestmark = pytest.mark.e2e

# Tokens of a chat, a long prompt that feels the rope scaling, one token.
PROMPTS = [[958, 72, 101, 108, 300], [958, *range(300, 620)], [77]]
TOKENS = 12
LOGPROB = 1e-4
ARGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}

SOURCES = {
    "upstream": make_upstream_flute,
    "upstream as it is": partial(make_upstream_flute, older=True),
    "gptq, 3 bits, act-order": partial(make_gptq, bits=3, act_order=True),
    "awq": make_awq,
    "bitsandbytes, NF4": make_bitsandbytes,
    "mxfp4": make_mxfp4,
    "nvfp4": make_nvfp4,
    "bitnet": make_bitnet,
    "bitnet b1.58 2B4T": partial(make_bitnet, mode="unpacked", sub_norms=True),
    "gguf, Q4_0": make_gguf,
}


def expected(made) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens and their log-probabilities by transformers, from the source's weights in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = llama_config(HIDDEN, INTERMEDIATE, LAYERS, torch.float32) | made.architecture
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(made.weights)
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = list(prompt)
        chosen = []
        with torch.inference_mode():
            for _ in range(TOKENS):
                scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(scores.argmax()))
                chosen.append(float(scores.max()))
        tokens.append(ids[len(prompt) :])
        logprobs.append(chosen)
    return tokens, logprobs


def ask(url: str) -> tuple[list[list[int]], list[list[float]]]:
    options = {"logprobs": 1, "ignore_eos": True, "return_tokens_as_token_ids": True}
    choices = sorted(Client(url).complete(PROMPTS, TOKENS, **options), key=lambda choice: choice["index"])
    found = [choice["logprobs"] for choice in choices]
    tokens = [[int(token.removeprefix("token_id:")) for token in f["tokens"]] for f in found]
    return tokens, [f["token_logprobs"] for f in found]


@pytest.mark.parametrize("kind", SOURCES)
def test_answers_are_those_of_the_sources_weights(tmp_path, kind):
    made = SOURCES[kind](tmp_path / "source")
    model = made.path
    if "as it is" not in kind:
        model = tmp_path / "out"
        import_checkpoint(made.path, model)
    with Server(model, tmp_path / "log", [*ARGS, "--quantization", "flute"], ENVIRONMENT, start_seconds=300) as server:
        tokens, logprobs = ask(server.url)
    right, scores = expected(made)
    assert tokens == right
    worst = (torch.tensor(logprobs) - torch.tensor(scores)).abs().max().item()
    print(f"{kind}: largest difference of a log-probability: {worst:.2e}")
    assert worst < LOGPROB
