"""Served checkpoints beside transformers' own greedy decoding of the dequantized one, both in float32: the same tokens.

A mixture of experts, other model types, online quantization on two ranks, LoRA.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, llama_tensors, make_like, make_llama31, save_sharded, save_tokenizer
from greedy_oracle import ARGS, ENVIRONMENT, PROMPTS, TOKENS, greedy, served
from safetensors.torch import load_file, save_file

from vllm_flute.checkpoint import dequantize_checkpoint, quantize_checkpoint
from vllm_flute.serve import Client, Server

pytestmark = pytest.mark.e2e

HIDDEN, INNER, LAYERS, EXPERTS, TOP_K = 256, 320, 2, 4, 2


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


def test_a_mixture_of_experts(tmp_path):
    """Traced as in production: experts on their own kernels, every one of them chosen by some token."""
    plain = make_mixtral(tmp_path / "mixtral")
    quantize_checkpoint(plain, tmp_path / "flute", bits=4, group_size=64)
    dequantize_checkpoint(tmp_path / "flute", tmp_path / "float32", dtype="float32")
    got = served(tmp_path / "flute", tmp_path / "log", VLLM_CPU_CI_ENV="1", VLLM_CPU_OMP_THREADS_BIND="0-1")
    assert got == greedy(tmp_path / "float32")
    assert len({token for tokens in got for token in tokens}) > TOKENS  # no model that says one thing


@pytest.mark.parametrize(("kind", "cores"), [("qwen2", "0|1"), ("qwen3", "0-1")], ids=["qwen2 on two ranks", "qwen3"])
def test_other_models(tmp_path, kind, cores):
    """With biases at what vLLM fuses, with norms of heads between quantized layers, with a head that was tied."""
    plain = make_like(tmp_path / "plain", kind)
    quantize_checkpoint(plain, tmp_path / "flute", bits=4, group_size=64, lm_head=True)
    dequantize_checkpoint(tmp_path / "flute", tmp_path / "float32", dtype="float32")
    ranks = str(1 + cores.count("|"))
    args = ("--enforce-eager", "--tensor-parallel-size", ranks)
    got = served(tmp_path / "flute", tmp_path / "log", *args, VLLM_CPU_OMP_THREADS_BIND=cores)
    assert got == greedy(tmp_path / "float32")
    assert len({token for tokens in got for token in tokens}) > TOKENS


def test_online_quantization_on_two_ranks(tmp_path):
    """Each rank keeps its share of what is quantized whole: the tokens are those of the offline checkpoint."""
    plain = make_llama31(tmp_path / "llama")
    quantize_checkpoint(plain, tmp_path / "flute")
    dequantize_checkpoint(tmp_path / "flute", tmp_path / "float32", dtype="float32")
    two = ("--tensor-parallel-size", "2", "--enforce-eager")
    got = served(plain, tmp_path / "log", *two, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert got == greedy(tmp_path / "float32")
    assert "online quantization while loading: 4 bits, group 64" in (tmp_path / "log").read_text()


def make_adapter(path: Path, base: Path, merged: Path) -> None:
    """Write a random LoRA adapter of all of a checkpoint's layers, and the checkpoint with it added to the weights.

    The adapter's share of a layer's result is about a fifth of it.
    """
    rank, scale = 8, 2.0
    generator = torch.Generator().manual_seed(5)
    adapter, index = {}, json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    shutil.copytree(base, merged)
    for file in sorted(set(index.values())):
        tensors = load_file(merged / file)
        for name, weight in tensors.items():
            if "_proj." not in name:
                continue
            n, k = weight.shape
            a = torch.randn(rank, k, generator=generator) * k**-0.5
            b = torch.randn(n, rank, generator=generator) * 0.15 * rank**-0.5
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            tensors[name] = weight + scale * b @ a
        save_file(tensors, merged / file, metadata={"format": "pt"})
    path.mkdir()
    save_file(adapter, path / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.split(".")[-3] for name in adapter})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": scale * rank, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": modules}))


def test_lora_on_quantized_layers(tmp_path):
    """One server answers with the adapter and without, as two dense models do."""
    plain = make_llama31(tmp_path / "llama")
    quantize_checkpoint(plain, tmp_path / "flute")
    dequantize_checkpoint(tmp_path / "flute", tmp_path / "float32", dtype="float32")
    make_adapter(tmp_path / "adapter", tmp_path / "float32", tmp_path / "merged")
    args = [*ARGS, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"added={tmp_path / 'adapter'}"]
    environment = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    with Server(tmp_path / "flute", tmp_path / "log", args, environment, start_seconds=300) as server:
        client = Client(server.url)
        options = {"ignore_eos": True, "return_token_ids": True}
        found = {
            name: [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]
            for name in (client.model(), "added")
            for choices in [client.complete(PROMPTS, TOKENS, model=name, **options)]
        }
    base, adapted = found.values()
    assert base == greedy(tmp_path / "float32")
    assert adapted == greedy(tmp_path / "merged")
    assert base != adapted


def test_an_fp8_kv_cache(tmp_path):
    """With keys and values in 8 bits too, a quantized checkpoint answers as the dense one that it stands for."""
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM 0.32: FP8 KV cache on CPU requires x86 with AVX-512 or AMX")
    plain = make_llama31(tmp_path / "llama")
    quantize_checkpoint(plain, tmp_path / "flute")
    dequantize_checkpoint(tmp_path / "flute", tmp_path / "float32", dtype="float32")
    args = ("--kv-cache-dtype", "fp8", "--enforce-eager")
    got = served(tmp_path / "flute", tmp_path / "log", *args, VLLM_CPU_OMP_THREADS_BIND="0-1")
    dense = [arg for arg in ARGS if arg not in ("--quantization", "flute")]
    environment = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    with Server(tmp_path / "float32", tmp_path / "dense", [*dense, *args], environment, start_seconds=300) as server:
        choices = Client(server.url).complete(PROMPTS, TOKENS, ignore_eos=True, return_token_ids=True)
    assert got == [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]
    assert got != greedy(tmp_path / "float32")  # the cache was rounded
