"""Memory of `vllm-flute quantize`: the peak beside the largest decoder layer, on a random checkpoint of about 1 GB.

    python load_tests/quantize_memory.py [--layers 10] [--output result.json]

The peak resident set is the process's own, above that of a process that only imports the same modules. It includes
the pages of the one source tensor that is mapped at a time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 2048, 8192, 512, 32000
# Each child prints its own peak last: getrusage would count what it inherits from this process.
PROBE = """
import atexit
from vllm_flute.cli.walk import peak_memory
import huggingface_hub, rich.progress, rich.table, vllm_flute.checkpoint
atexit.register(lambda: print(peak_memory()))
"""
QUANTIZE = "import vllm_flute.cli; vllm_flute.cli.main()"


def make_checkpoint(path: Path, layers: int) -> int:
    """Write LLaMA-shaped random bf16 weights, one shard for two layers; returns the bytes of one decoder layer."""
    block = {f"self_attn.{p}_proj": (n, HIDDEN) for p, n in {"q": HIDDEN, "k": KV, "v": KV, "o": HIDDEN}.items()}
    block |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
    block |= {"mlp.down_proj": (HIDDEN, INTERMEDIATE)}
    weight_map = {}

    def shard(shapes: dict[str, tuple[int, ...]]) -> int:
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()}
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(tensors, path / file)
        weight_map.update(dict.fromkeys(tensors, file))
        return sum(t.nbytes for t in tensors.values())

    shard({"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for first in range(0, layers, 2):
        pair = range(first, min(first + 2, layers))
        nbytes = shard({f"model.layers.{i}.{name}.weight": shape for i in pair for name, shape in block.items()})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    return nbytes // len(pair)


def peak_rss(code: str, *args: str) -> tuple[int, float]:
    """(peak resident bytes, seconds) of a Python process that runs the probe and ``code``."""
    begin = time.monotonic()
    command = [sys.executable, "-c", PROBE + code, *args]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(out.splitlines()[-1]), time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        source.mkdir()
        layer = make_checkpoint(source, args.layers)
        total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        baseline, _ = peak_rss("import vllm_flute.cli")
        peak, seconds = peak_rss(QUANTIZE, "quantize", str(source), "-o", f"{directory}/out")
    result = {
        "source_bytes": total,
        "layer_bytes": layer,
        "largest_tensor_bytes": VOCABULARY * HIDDEN * 2,
        "baseline_rss": baseline,
        "peak_rss": peak,
        "above_baseline": peak - baseline,
        "seconds": round(seconds, 2),
        "mb_per_second": round(total / seconds / 1e6, 1),
    }
    for name, value in result.items():
        unit = f"{value / 2**20:10.1f} MiB" if "bytes" in name or "rss" in name or "base" in name else f"{value:10.1f}"
        print(f"{name:22} {unit}")
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
