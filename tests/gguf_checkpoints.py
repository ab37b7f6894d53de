"""Small whole GGUF models, written by the gguf package, with what their weights are by the same package's reading."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from checkpoints import (
    CHAT_TEMPLATE,
    HEADS,
    KV_HEADS,
    SPECIAL,
    VOCABULARY,
    llama_config,
    llama_tensors,
    save_tokenizer,
    tensors_like,
)
from source_checkpoints import HIDDEN, INTERMEDIATE, LAYERS, Made

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where a block has fp16 numbers, in types that the package reads but does not write.
_HALVES = {"IQ4_NL": (0,), "IQ4_XS": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q6_K": (208,)}
SPECIAL_IDS = {token: VOCABULARY - 66 + i for i, token in enumerate(SPECIAL)}


def gguf_name(name: str) -> str:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    return (
        f"blk.{found[1]}.{_NAMES[found[2]]}.{found[3]}" if found else f"{_NAMES[name.removesuffix('.weight')]}.weight"
    )


def encode(weight: np.ndarray, kind: str) -> np.ndarray:
    """Rows uint8 ``[N, bytes]`` of a type; random ones of about the same size where the package only reads it."""
    if kind not in _HALVES:
        return gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    n, k = weight.shape
    block, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(n + k)
    blocks = rng.integers(0, 256, (n, k // block, stored), dtype=np.uint8)
    for at in _HALVES[kind]:
        halves = rng.uniform(0.5, 1, (n, k // block, 1)).astype(np.float16)
        blocks[..., at : at + 2] = halves.view(np.uint8)
    rows = blocks.reshape(n, -1)
    factor = np.float16(weight.std() / decode(rows, kind).std())
    for at in _HALVES[kind]:
        blocks[..., at : at + 2] = (blocks[..., at : at + 2].copy().view(np.float16) * factor).view(np.uint8)
    return rows


def decode(rows: np.ndarray, kind: str) -> np.ndarray:
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])


def rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order that llama.cpp's converter (conversion/llama.py) gives them."""
    n = len(rows)
    return rows.reshape(heads, 2, n // heads // 2, -1).swapaxes(1, 2).reshape(n, -1)


def rope_factors(config: dict) -> np.ndarray:
    """What LLaMA 3.1's scaling divides the frequencies by, from transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](made, device="cpu")
    dim = config["head_dim"]
    plain = 1.0 / config["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    return (plain / scaled).numpy()


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    """The byte-level BPE that `save_tokenizer` makes."""
    save_tokenizer(directory)
    saved = json.loads((directory / "tokenizer.json").read_text())
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    added = [token["content"] for token in sorted(saved["added_tokens"], key=lambda t: t["id"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + added)
    writer.add_token_types([1] * len(tokens) + [3] * len(added))
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(SPECIAL_IDS["<|begin_of_text|>"])
    writer.add_eos_token_id(SPECIAL_IDS["<|eot_id|>"])
    writer.add_eom_token_id(SPECIAL_IDS["<|end_of_text|>"])
    writer.add_chat_template(CHAT_TEMPLATE)


def make_gguf(
    path: Path,
    kind: str = "Q4_0",
    types: dict[str, str] | None = None,
    tied: bool = False,
    metadata: dict[str, int] | None = None,
    tokenizer: bool = True,
    architecture: str = "llama",
) -> Made:
    """Write ``path`` / "model.gguf".

    Args:
        kind: the type of linear layers.
        types: other types by a regular expression found in the Hugging Face name; the embedding and the head have F16.
        metadata: further whole numbers by key.
        tokenizer: whether it has one; its original is beside it, in "tokenizer".
        architecture: see `tensors_like` for others.
    """
    path.mkdir(parents=True, exist_ok=True)
    llama = architecture == "llama"
    if llama:
        config = llama_config(HIDDEN, INTERMEDIATE, LAYERS, torch.float16, tied)
        tensors = llama_tensors(HIDDEN, INTERMEDIATE, LAYERS, torch.float32, tied)
    else:
        tensors, config = tensors_like(architecture, HIDDEN, INTERMEDIATE, LAYERS, torch.float32)
    writer = gguf.GGUFWriter(path / "model.gguf", architecture)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    if llama:
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    elif architecture == "qwen3":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(VOCABULARY)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    if tokenizer:
        add_tokenizer(writer, path / "tokenizer")

    weights = {}
    for name, tensor in tensors.items():
        default = "F32" if tensor.dim() == 1 else kind if "_proj" in name else "F16"
        stored = next((t for pattern, t in (types or {}).items() if re.search(pattern, name)), default)
        if stored == "F32":
            writer.add_tensor(gguf_name(name), tensor.numpy())
            weights[name] = tensor
            continue
        rows = encode(tensor.numpy(), stored)
        weights[name] = torch.from_numpy(decode(rows, stored).astype(np.float32))
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2]) if llama else None
        rows = rotary(rows, heads) if heads else rows
        writer.add_tensor(gguf_name(name), rows, raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Made(path / "model.gguf", weights)
