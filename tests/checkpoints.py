"""Small checkpoints made on the spot, with the features that real ones have."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
VOCABULARY = 1024
HEADS, KV_HEADS = 8, 4


def save_sharded(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Deal the tensors out in turn, so that every layer is spread over all shards, and write the index."""
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def save_shown(checkpoint, path: Path) -> Path:
    """Write a plain checkpoint with the tensors and the configuration that a `Checkpoint` shows; returns its path."""
    path.mkdir()
    save_file({name: checkpoint.tensor(name) for name in checkpoint.headers}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(checkpoint.config))
    return path


def llama_tensors(hidden: int, intermediate: int, layers: int, dtype: torch.dtype, tied: bool = False) -> dict:
    """Random weights by name: a residual stream of about unit size, logits that spread over a few units."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, k: int, std: float) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) * std).to(dtype)

    kv = hidden * KV_HEADS // HEADS
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden)}
    shapes |= {"mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate)}
    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, hidden, 1.0)}
    for i in range(layers):
        for part, (n, k) in shapes.items():
            tensors[f"model.layers.{i}.{part}.weight"] = normal(n, k, 1.5 * k**-0.5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = 1 + normal(1, hidden, 0.1)[0]
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not tied:
        tensors["lm_head.weight"] = normal(VOCABULARY, hidden, 2.5 * hidden**-0.5)
    return tensors


def llama_config(hidden: int, intermediate: int, layers: int, dtype: torch.dtype, tied: bool = False) -> dict:
    """config.json in LLaMA-3.1's form; the rope scaling starts at 256 positions, so that short texts feel it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": hidden // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": VOCABULARY - 66,
        "eos_token_id": [VOCABULARY - 65, VOCABULARY - 62],
        "tie_word_embeddings": tied,
    }


def save_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer of exactly VOCABULARY tokens whose merges are all pairs of small letters."""
    from string import ascii_lowercase as letters

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", b) for b in letters] + [(a, b) for a in letters for b in letters]
    vocab = {token: i for i, token in enumerate(alphabet + [a + b for a, b in merges])}
    special = SPECIAL + [f"<|reserved_special_token_{i}|>" for i in range(VOCABULARY - len(vocab) - len(SPECIAL))]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    bos = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def make_llama31(path, hidden: int = 512, layers: int = 3, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random LLaMA-3.1-style checkpoint with its tokenizer and return its path.

    rope_scaling llama3, 8 query and 4 KV heads, an untied head, several end tokens, three shards with an index.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_sharded(path, llama_tensors(hidden, 2 * hidden, layers, dtype), shards=3)
    config = llama_config(hidden, 2 * hidden, layers, dtype)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (path / "generation_config.json").write_text(json.dumps(ids))
    save_tokenizer(path)
    return path


def tensors_like(
    model_type: str, hidden: int, intermediate: int, layers: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict]:
    """(random weights by name, config.json) of another model type whose decoder layers are like LLaMA's.

    Qwen2: biases at q, k and v, a tied head. Qwen3: norms of each head's q and k, heads wider than hidden / heads.
    Mistral: sliding attention that reaches 1024 tokens.
    """
    tied = model_type == "qwen2"
    tensors = llama_tensors(hidden, intermediate, layers, dtype, tied)
    config = llama_config(hidden, intermediate, layers, dtype, tied)
    if tied:  # logits of a few units, as of an untied head
        tensors["model.embed_tokens.weight"] *= 2.5 * hidden**-0.5
    del config["rope_scaling"], config["attention_bias"], config["mlp_bias"]
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(shape, generator=generator)).to(dtype)

    size = hidden // HEADS
    for i in range(layers):
        layer = f"model.layers.{i}.self_attn"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            if model_type == "qwen2":
                tensors[f"{layer}.{name}_proj.bias"] = normal(heads * size)
            elif model_type == "qwen3":
                tensors[f"{layer}.{name}_proj.weight"] = normal(heads * 2 * size, hidden, std=1.5 * hidden**-0.5)
        if model_type == "qwen3":
            tensors[f"{layer}.o_proj.weight"] = normal(hidden, 2 * hidden, std=1.5 * (2 * hidden) ** -0.5)
            for name in "qk":
                tensors[f"{layer}.{name}_norm.weight"] = 1 + normal(2 * size, std=0.3)
    if model_type == "mistral":
        config["sliding_window"] = 1024
    elif model_type == "qwen2":
        config |= {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": layers}
    elif model_type == "qwen3":
        config |= {"head_dim": 2 * size, "attention_bias": False}
    architecture = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type] + "ForCausalLM"
    return tensors, config | {"model_type": model_type, "architectures": [architecture]}


def make_like(path, model_type: str, hidden: int = 256, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random checkpoint with its tokenizer, see `tensors_like`, and return its path."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors, config = tensors_like(model_type, hidden, 2 * hidden, layers, dtype)
    if model_type == "qwen2":  # as its checkpoints: not said
        del config["head_dim"]
    save_sharded(path, tensors, shards=2)
    (path / "config.json").write_text(json.dumps(config))
    save_tokenizer(path)
    return path


def make_tiny(path, hidden: int = 64, intermediate: int = 128, layers: int = 2, tied: bool = False) -> Path:
    """The smallest checkpoint of the same form, without a tokenizer, for tests that compute nothing."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_sharded(path, llama_tensors(hidden, intermediate, layers, torch.bfloat16, tied), shards=3)
    (path / "config.json").write_text(json.dumps(llama_config(hidden, intermediate, layers, torch.bfloat16, tied)))
    return path
