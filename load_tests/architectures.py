"""Models of other architectures than LLaMA: quantized without calibration, served on the CPU, beside their own code.

    python load_tests/architectures.py [phi3 qwen3_moe ...]

Each is a small model with random weights, served in float32 by `vllm serve`, whose greedy tokens have to be those of
transformers on the dequantized weights. A model takes a minute or two; the first that differs ends with status 1.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoints import VOCABULARY, save_tokenizer
from greedy_oracle import greedy, served

from vllm_flute.checkpoint import dequantize_checkpoint, quantize_checkpoint

_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": VOCABULARY - 66,
    "eos_token_id": VOCABULARY - 65,
    "pad_token_id": VOCABULARY - 64,
    "tie_word_embeddings": False,
}
# By transformers' model_type, what it needs besides.
_KINDS = {
    "gemma3_text": {"head_dim": 32, "sliding_window": 512, "query_pre_attn_scalar": 32},
    "glm4": {"head_dim": 32},
    "granite": {},
    "mistral": {},
    "olmo2": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "starcoder2": {},
}


def make(kind: str, path: Path) -> None:
    """Write a random checkpoint whose layers add about as much to the residual stream as is in it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_SIZES | _KINDS[kind]), dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            looked_up = "embed" in name or "lm_head" in name
            weight.data.normal_(0, 0.15 if looked_up else 1.5 * weight.shape[-1] ** -0.5)
    model.save_pretrained(path)
    save_tokenizer(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(_KINDS)} (default: all)")
    for kind in parser.parse_args().kinds or _KINDS:
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            make(kind, work / "plain")
            report = quantize_checkpoint(work / "plain", work / "flute", bits=4, group_size=64)
            dequantize_checkpoint(work / "flute", work / "float32", dtype="float32")
            found = served(work / "flute", work / "log", "--enforce-eager", VLLM_CPU_OMP_THREADS_BIND="0-1")
            same = found == greedy(work / "float32")
        tokens = len({token for answer in found for token in answer})
        print(
            f"{kind}: {len(report.layers)} layers, {'same' if same else 'OTHER'} tokens ({tokens} of them)", flush=True
        )
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    main()
