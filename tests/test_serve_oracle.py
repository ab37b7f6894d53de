"""Served checkpoints beside transformers' own greedy decoding of the dequantized one, both in float32: the same tokens.

A mixture of experts, and online quantization on two ranks.
"""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, llama_tensors, make_llama31, save_sharded, save_tokenizer

from vllm_flute.checkpoint import dequantize_checkpoint, quantize_checkpoint
from vllm_flute.serve import Client, Server

pytestmark = pytest.mark.e2e

HIDDEN, INNER, LAYERS, EXPERTS, TOP_K = 256, 320, 2, 4, 2
TOKENS = 24
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
ARGS = ["--dtype", "float32", "--quantization", "flute", "--max-model-len", "256", "--max-num-seqs", "8"]
# Of different lengths, with tokens of the alphabet and of its pairs.
PROMPTS = [[(7 * i * i + 11 * p) % 900 for i in range(length)] for p, length in enumerate((5, 12, 1, 33, 20, 8))]


def make_mixtral(path: Path) -> Path:
    """Write a random checkpoint with Mixtral's architecture and names."""
    path.mkdir()
    plain = {n: t for n, t in llama_tensors(HIDDEN, INNER, LAYERS, torch.bfloat16).items() if ".mlp." not in n}
    generator = torch.Generator().manual_seed(1)
    shapes = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.block_sparse_moe"
        # A router that is decided: its two best experts and their shares are no ties.
        plain[f"{block}.gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16() * 0.2
        for expert in range(EXPERTS):
            for name, (n, k) in shapes.items():
                weight = torch.randn(n, k, generator=generator) * 1.5 * k**-0.5
                plain[f"{block}.experts.{expert}.{name}.weight"] = weight.bfloat16()
    save_sharded(path, plain, shards=2)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": VOCABULARY - 66,
        "eos_token_id": VOCABULARY - 65,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    save_tokenizer(path)
    return path


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


def test_a_mixture_of_experts(tmp_path):
    """Traced as in production: experts on their own kernels, every one of them chosen by some token."""
    plain = make_mixtral(tmp_path / "mixtral")
    quantize_checkpoint(plain, tmp_path / "flute", bits=4, group_size=64)
    dequantize_checkpoint(tmp_path / "flute", tmp_path / "float32", dtype="float32")
    got = served(tmp_path / "flute", tmp_path / "log", VLLM_CPU_CI_ENV="1", VLLM_CPU_OMP_THREADS_BIND="0-1")
    assert got == greedy(tmp_path / "float32")
    assert len({token for tokens in got for token in tokens}) > TOKENS  # no model that says one thing


def test_online_quantization_on_two_ranks(tmp_path):
    """Each rank keeps its share of what is quantized whole: the tokens are those of the offline checkpoint."""
    plain = make_llama31(tmp_path / "llama")
    quantize_checkpoint(plain, tmp_path / "flute")
    dequantize_checkpoint(tmp_path / "flute", tmp_path / "float32", dtype="float32")
    two = ("--tensor-parallel-size", "2", "--enforce-eager")
    got = served(plain, tmp_path / "log", *two, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert got == greedy(tmp_path / "float32")
    assert "online quantization while loading: 4 bits, group 64" in (tmp_path / "log").read_text()
