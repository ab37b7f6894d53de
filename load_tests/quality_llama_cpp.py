"""llama.cpp's quantization types of a Hugging Face checkpoint, made and run by its own code in another environment."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from vllm_flute.checkpoint import Checkpoint

WORKER = Path(__file__).with_name("quality_llama_cpp_worker.py")
TYPES = ("Q4_0", "Q4_K_M", "IQ4_NL", "Q3_K_M", "Q2_K")


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k ``[heads*D, K]`` from Hugging Face's rotary order (two halves) to GGUF's (pairs side by side)."""
    n, k = weight.shape
    return weight.view(heads, 2, n // heads // 2, k).transpose(1, 2).reshape(n, k)


def write_gguf(source: Checkpoint, path: Path) -> None:
    """A LLaMA checkpoint in bf16 as GGUF, norms in fp32, without a tokenizer: windows are given as tokens."""
    import gguf
    from gguf.quants import quantize

    config = source.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in source.headers:
        tensor = source.tensor(name)
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj"):
            tensor = _permuted(tensor, heads if part == "q_proj" else kv_heads)
        values, stored = tensor.float().numpy(), names.get_name(name, try_suffixes=(".weight",))
        if tensor.dim() == 1:
            writer.add_tensor(stored, values)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(stored, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(path)


def linear_bits(path: Path) -> tuple[float, str]:
    """(bits a weight of the decoder layers' matrices, their types) of a GGUF."""
    from gguf import GGUFReader

    linear = [t for t in GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    counts: dict[str, int] = {}
    for t in linear:
        counts[t.tensor_type.name] = counts.get(t.tensor_type.name, 0) + int(t.n_elements)
    total = sum(counts.values())
    shares = ", ".join(f"{n / total:.0%} {kind}" for kind, n in sorted(counts.items(), key=lambda item: -item[1]))
    return sum(int(t.n_bytes) for t in linear) * 8 / total, shares


def _command(python: str, task: dict) -> list[str]:
    # -P: the folder of the script has a file called llama_cpp.py too.
    return [python, "-P", str(WORKER), json.dumps(task)]


def quantize_gguf(python: str, source: Path, out: Path, kind: str) -> dict:
    """Make a type by llama.cpp's own recipe, embedding and head kept in bf16; returns seconds and peak bytes."""
    from gguf import GGMLQuantizationType

    task = {"quantize": str(source), "out": str(out), "type": kind, "threads": torch.get_num_threads()}
    task["keep"] = GGMLQuantizationType.BF16.value
    return json.loads(subprocess.run(_command(python, task), check=True, stdout=subprocess.PIPE).stdout)


def gguf_logits(python: str, model: Path, windows, vocabulary: int, directory: Path) -> Iterator[torch.Tensor]:
    """For each window the logits fp32 ``[new, vocabulary]`` that llama.cpp computes."""
    file = directory / "windows.json"
    file.write_text(json.dumps(windows))
    task = {"logits": str(model), "windows": str(file), "threads": torch.get_num_threads()}
    with subprocess.Popen(_command(python, task), stdout=subprocess.PIPE) as worker:
        for _, new in windows:
            found = torch.empty(new, vocabulary)
            if worker.stdout.readinto(memoryview(found.numpy()).cast("B")) != found.nbytes:
                raise RuntimeError(f"llama.cpp gave no logits of {model}")
            yield found
