"""Checkpoints without weights for load_tests/gpu_serving.py: LLaMA-3 shapes, a quantization, a tokenizer.

vLLM fills them with `--load-format dummy`: speed does not depend on what the weights say.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

# config.json of meta-llama/Meta-Llama-3-8B and -70B on the Hugging Face hub; "tiny" is for dry runs.
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


class Variant(NamedTuple):
    """How linear layers are stored: ``bf16``, ``fp8``, METHOD-BITS-gGROUP, ``-head`` for the output head too."""

    method: str
    bits: int = 16
    group_size: int = 0
    head: bool = False

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """Raises ValueError for a name that is none."""
        if name in ("bf16", "fp8"):
            return cls(name, {"bf16": 16, "fp8": 8}[name])
        found = re.fullmatch(r"(flute|gptq|awq)-(\d)-g(\d+)(-head)?", name)
        if not found:
            raise ValueError(f"{name!r}: expected bf16, fp8 or (flute|gptq|awq)-BITS-gGROUP[-head]")
        return cls(found[1], int(found[2]), int(found[3]), bool(found[4]))

    def quantization_config(self) -> dict | None:
        """The object of config.json, None for bf16; vLLM itself takes Marlin for gptq and awq where it can."""
        bits = {"bits": self.bits, "group_size": self.group_size}
        match self.method:
            case "flute":
                ignore = [] if self.head else ["lm_head"]
                return {"quant_method": "flute", "format": "lut-v1", **bits, "codebook": "nf", "ignore": ignore}
            case "gptq":
                # vLLM looks in the checkpoint's files for quantized layers unless they are named: there are no files.
                layers = [*LINEARS, *(["lm_head"] if self.head else [])]
                gptq = {"quant_method": "gptq", **bits, "desc_act": False, "sym": True, "lm_head": self.head}
                return gptq | {"modules_in_block_to_quantize": layers}
            case "awq":
                return {"quant_method": "awq", **bits, "zero_point": True, "version": "gemm"}
            case "fp8":
                return {"quant_method": "fp8", "activation_scheme": "dynamic"}
        return None

    def weight_bytes(self, shape: str) -> int:
        """Bytes of a checkpoint: packed weights, 16-bit scales, a bf16 embedding and, unless quantized, head."""
        s = SHAPES[shape]
        hidden, inner = s["hidden_size"], s["intermediate_size"]
        kv = hidden * s["num_key_value_heads"] // s["num_attention_heads"]
        linear = s["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
        head = s["vocab_size"] * hidden
        per_weight = (self.bits + (16 / self.group_size if self.group_size else 0)) / 8
        return int(linear * per_weight + head * 2 + head * (per_weight if self.head else 2))


def kv_bytes(shape: str) -> int:
    """Bytes of one token's keys and values in 16 bits."""
    s = SHAPES[shape]
    return 2 * 2 * s["num_hidden_layers"] * s["num_key_value_heads"] * s["hidden_size"] // s["num_attention_heads"]


def write_tokenizer(folder: Path, size: int) -> None:
    """One word for each token id, so that text and ids say the same for every id that random weights choose."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w2", "bos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_dummy(folder: Path, shape: str, variant: Variant) -> Path:
    """Write config.json and a tokenizer for ``--load-format dummy``; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPES[shape],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if quantization := variant.quantization_config():
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, SHAPES[shape]["vocab_size"])
    return folder
