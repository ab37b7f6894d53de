"""Write a random bf16 checkpoint of LLaMA-3.2-1B's shapes, to measure speed where no such model is at hand.

    python load_tests/random_llama.py OUT --tokenizer models/SmolLM2-135M-Instruct

Layers, widths and heads are LLaMA-3.2-1B's (its config.json on the Hugging Face hub); the vocabulary is the given
tokenizer's, and the output head is tied. What it writes is noise: tokens per second are all that it is good for.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2048, 8192, 16, 32, 8, 64
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint whose tokenizer is copied")
    args = parser.parse_args()
    source = json.loads((args.tokenizer / "config.json").read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    block = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    shapes = {"model.embed_tokens.weight": (source["vocab_size"], HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(LAYERS) for n in ("input", "post_attention")]
    tensors |= {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in (*norms, "model.norm.weight")}
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **{key: source[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER:
        if (args.tokenizer / name).exists():
            shutil.copy(args.tokenizer / name, args.out / name)


if __name__ == "__main__":
    main()
