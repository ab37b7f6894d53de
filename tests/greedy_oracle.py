"""Greedy tokens of a served checkpoint, and transformers' own of the dequantized one, both in float32."""

from pathlib import Path

import torch

from vllm_flute.serve import Client, Server

TOKENS = 24
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
ARGS = ["--dtype", "float32", "--quantization", "flute", "--max-model-len", "256", "--max-num-seqs", "8"]
# Of different lengths, with tokens of the alphabet and of its pairs.
PROMPTS = [[(7 * i * i + 11 * p) % 900 for i in range(length)] for p, length in enumerate((5, 12, 1, 33, 20, 8))]


def greedy(model: Path) -> list[list[int]]:
    """transformers' continuation of every prompt, alone, in float32."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(TOKENS):
                ids = torch.cat([ids, plain(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def served(model: Path, log: Path, *args: str, **env: str) -> list[list[int]]:
    """Tokens of one request with all prompts."""
    with Server(model, log, [*ARGS, *args], ENVIRONMENT | env, start_seconds=300) as server:
        options = {"ignore_eos": True, "return_token_ids": True}
        choices = Client(server.url).complete(PROMPTS, TOKENS, **options)
    return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]
