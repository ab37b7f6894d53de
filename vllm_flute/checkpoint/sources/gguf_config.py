"""Names and configuration in GGUF of LLaMA and models like it, and what they are in Hugging Face's checkpoints."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ...errors import FluteError
from .gguf_file import GgufFile


class _Architecture(NamedTuple):
    """What sets a model of an architecture apart; read from llama.cpp (conversion/*.py, src/llama-model.cpp).

    ``more``: tensors of a block besides LLaMA's. ``pairs``: whether pairs of q's and k's rows that are rotated lie side
    by side.
    """

    model: str
    settings: dict
    more: tuple[str, ...] = ()
    pairs: bool = False


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}, pairs=True),
    "qwen2": _Architecture(
        "Qwen2ForCausalLM", {"use_sliding_window": False}, ("attn_q.bias", "attn_k.bias", "attn_v.bias")
    ),
    "qwen3": _Architecture(
        "Qwen3ForCausalLM",
        {"attention_bias": False, "use_sliding_window": False},
        ("attn_q_norm.weight", "attn_k_norm.weight"),
    ),
}

# GGUF's names in a block and Hugging Face's.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
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
ROPE_FREQS = "rope_freqs.weight"
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)")


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a tensor, or None."""
    if (found := _BLOCK_NAME.fullmatch(name)) and found[2] in _BLOCK:
        return f"model.layers.{found[1]}.{_BLOCK[found[2]]}.{found[3]}"
    stem = name.removesuffix(".weight")
    return f"{_TOP[stem]}.weight" if stem in _TOP and stem != name else None


def has_rotary_pairs(config: dict) -> bool:
    """Whether rows of q and k are stored in another order than Hugging Face's: see `rotary_rows`."""
    return _ARCHITECTURES[config["model_type"]].pairs


def rotary_rows(n: int, heads: int) -> torch.Tensor:
    """Which stored row of q or k ``[heads*D, K]`` is each row of Hugging Face's, int64 ``[n]``.

    GGUF holds LLaMA's rotated pairs side by side, Hugging Face their first parts in the first half of a head.
    """
    return torch.arange(n).view(heads, n // heads // 2, 2).transpose(1, 2).reshape(n)


class _Metadata:
    """Typed access to metadata, by the end of a key behind the architecture; errors name the file and the key."""

    def __init__(self, file: GgufFile):
        self.file, self.prefix = file, file.metadata["general.architecture"]

    def _refuse(self, key: str, found, expected: str):
        raise FluteError(f"{self.file.path}: metadata {self.prefix}.{key} is {str(found)[:60]!r}, expected {expected}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) is not int or not 1 <= value < 1 << 31:
            self._refuse(key, value, "a whole number above 0, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self._refuse(key, value, "a number above 0")
        # Stored as fp32: the shortest decimal that gives the same fp32 is the value that was meant.
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        return value if isinstance(value, str) else self._refuse(key, value, "text")


def llama3_factors(base: float, dim: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """What LLaMA 3.1's rope scaling divides each of ``dim / 2`` frequencies by, fp64.

    Formula of transformers' `_compute_llama3_parameters` (modeling_rope_utils.py).
    """
    turns = context / (2 * math.pi) * base ** -(np.arange(0, dim, 2) / dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_scaling(found: np.ndarray, base: float, dim: int, path) -> dict | None:
    """The rope_scaling of LLaMA 3.1 that gives these factors; GGUF holds only them, fp32 ``[dim / 2]``."""
    if (found == 1).all():
        return None
    factor, low, high = float(found.max()), 1.0, 4.0
    for context in (8192, *(1 << i for i in range(5, 24))):  # 8192 in all of Meta's models
        if np.allclose(found, llama3_factors(base, dim, factor, low, high, context), rtol=1e-4, atol=0):
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return scaling | {"original_max_position_embeddings": context}
    raise FluteError(
        f"{path}: {ROPE_FREQS} are not LLaMA 3.1's factors (low 1, high 4, a power of two as context): "
        "no Hugging Face configuration says the same"
    )


def _rope_scaling(file: GgufFile, meta: _Metadata, base: float, dim: int) -> dict | None:
    kind = meta.text("rope.scaling.type", "none")
    if ROPE_FREQS in file.tensors:
        tensor = file.tensors[ROPE_FREQS]
        if tensor.type != "F32" or tensor.shape != (dim // 2,):
            raise FluteError(
                f"{file.path}: {ROPE_FREQS} is {tensor.type} {list(tensor.shape)}, expected F32 [{dim // 2}]"
            )
        if kind != "none":
            raise FluteError(f"{file.path} has both {ROPE_FREQS} and rope scaling {kind!r}: this reads one of them")
        return _llama3_scaling(file.rows(ROPE_FREQS).view("<f4")[0], base, dim, file.path)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise FluteError(f"{file.path} has rope scaling {kind!r}, this reads none, linear, yarn and LLaMA 3.1's")
    scaling = {"rope_type": kind, "factor": meta.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = meta.count("rope.scaling.original_context_length")
    return scaling


def token_ids(metadata: Mapping) -> dict:
    """bos_token_id, eos_token_id (a list where a turn has an end of its own) and pad_token_id, where they are given."""

    def find(*names: str) -> list[int]:
        found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        return list(dict.fromkeys(i for i in found if type(i) is int))

    ends = find("eos", "eot", "eom")
    ids = {"bos_token_id": find("bos"), "pad_token_id": find("padding")}
    return {key: value[0] for key, value in ids.items() if value} | (
        {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    )


def model_config(file: GgufFile) -> dict:
    """config.json of the model.

    Raises FluteError for another architecture, and for metadata that is missing or that such a model does not have.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise FluteError(
            f"{file.path} is a model of architecture {str(name)[:40]!r}: import reads GGUF files of 'llama' (LLaMA, "
            "Mistral, SmolLM and others that llama.cpp converts to it), 'qwen2' and 'qwen3'"
        )
    architecture = _ARCHITECTURES[name]
    experts = file.metadata.get(f"{name}.expert_count", 0)
    if type(experts) is not int or experts:
        raise FluteError(f"{file.path} is a mixture of experts: import reads dense GGUF models")
    meta = _Metadata(file)
    hidden, heads = meta.count("embedding_length"), meta.count("attention.head_count")
    kv_heads = meta.count("attention.head_count_kv", heads)
    dim = meta.count("attention.key_length", hidden // heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.count(key, dim) != dim:
            raise FluteError(f"{file.path}: {name}.{key} is {meta.count(key)}, expected {dim} as the size of a key")
    if dim % 2 or heads % kv_heads:
        raise FluteError(f"{file.path} has {heads} heads of {dim} values and {kv_heads} key heads: no model has these")
    layers, base = meta.count("block_count"), meta.number("rope.freq_base", 10000.0)
    if layers > len(file.tensors):
        raise FluteError(f"{file.path} says that it has {layers} layers, but has {len(file.tensors)} tensors")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise FluteError(f"{file.path} lacks the tensor token_embd.weight: it is no whole model")
    scaling = _rope_scaling(file, meta, base, dim)
    config = {
        "architectures": [architecture.model],
        "model_type": name,
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": meta.count("context_length"),
        "rope_theta": base,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    } | architecture.settings
    return config | ({"rope_scaling": scaling} if scaling else {}) | token_ids(file.metadata)


def expected_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the model by GGUF's names."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    block = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_output.weight": (hidden, q),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    more = {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    more |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (dim,))
    block |= {part: more[part] for part in _ARCHITECTURES[config["model_type"]].more}
    vocabulary = (config["vocab_size"], hidden)
    shapes = {"token_embd.weight": vocabulary, "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = vocabulary
    layers = range(config["num_hidden_layers"])
    return shapes | {f"blk.{i}.{part}": shape for i in layers for part, shape in block.items()}
