"""Speed and memory of `vllm-flute import` beside copying the same files, on a random checkpoint of about 4 GB.

    python load_tests/import_speed.py gptq awq [--layers 32] [--folder DIR] [--rounds 2] [--output result.json]

Layers have LLaMA-3-8B's shapes, 4 bits in groups of 128. Copies are made durable file by file (fsync), as the import's
files are; both read a source that is in the page cache. Rounds alternate, seconds are medians and include the process's
start. The peak resident set is the process's own, above that of one that only imports the same modules.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from quantize_memory import peak_rss
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KV, VOCABULARY, GROUP, BITS = 4096, 14336, 1024, 32000, 128, 4
BLOCK = {f"self_attn.{p}_proj": (n, HIDDEN) for p, n in {"q": HIDDEN, "k": KV, "v": KV, "o": HIDDEN}.items()}
BLOCK |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
BLOCK |= {"mlp.down_proj": (HIDDEN, INTERMEDIATE)}


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def layer(kind: str, n: int, k: int) -> dict[str, torch.Tensor]:
    """A random quantized linear; "gptq-act-order" has its inputs sorted by a random order, one for each K."""
    parts = {"qzeros": words(k // GROUP, n * BITS // 32), "scales": torch.rand(k // GROUP, n).half()}
    if kind == "awq":
        return parts | {"qweight": words(k, n * BITS // 32)}
    g_idx = torch.arange(k, dtype=torch.int32) // GROUP
    if kind == "gptq-act-order":
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
    return parts | {"qweight": words(k * BITS // 32, n), "g_idx": g_idx}


def make_checkpoint(path: Path, kind: str, layers: int) -> int:
    """Write one shard for each decoder layer; returns a layer's bytes."""
    path.mkdir()
    weight_map = {}

    def shard(tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(tensors, path / file)
        weight_map.update(dict.fromkeys(tensors, file))

    for name in ("model.embed_tokens", "lm_head"):
        shard({f"{name}.weight": torch.rand(VOCABULARY, HIDDEN).half()})
    for i in range(layers):
        made = {name: layer(kind, *shape) for name, shape in BLOCK.items()}
        shard({f"model.layers.{i}.{name}.{part}": t for name, parts in made.items() for part, t in parts.items()})
    nbytes = sum(t.nbytes for parts in made.values() for t in parts.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = {"quant_method": kind.partition("-")[0], "bits": BITS, "group_size": GROUP, "checkpoint_format": "gptq_v2"}
    config = {"model_type": "llama", "torch_dtype": "float16", "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
    return nbytes


def copy(source: Path, out: Path) -> float:
    """Seconds of a durable copy."""
    begin = time.monotonic()
    out.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, out / file.name)
        with open(out / file.name, "rb") as f:
            os.fsync(f.fileno())
    return time.monotonic() - begin


def measure(kind: str, folder: Path, layers: int, rounds: int) -> dict:
    source, out = folder / "source", folder / "out"
    nbytes = make_checkpoint(source, kind, layers)
    total = sum(file.stat().st_size for file in source.iterdir())
    baseline, _ = peak_rss("import vllm_flute.cli")
    copies, imports, peaks = [], [], []
    for _ in range(rounds):
        copies.append(copy(source, out))
        shutil.rmtree(out)
        peak, seconds = peak_rss("import vllm_flute.cli; vllm_flute.cli.main()", "import", str(source), "-o", str(out))
        shutil.rmtree(out)
        imports.append(seconds)
        peaks.append(peak - baseline)
    shutil.rmtree(source)
    return {
        "kind": kind,
        "source_mb": round(total / 1e6),
        "layer_mb": round(nbytes / 1e6, 1),
        "copy_seconds": round(median(copies), 2),
        "import_seconds": round(median(imports), 2),
        "ratio": round(median(imports) / median(copies), 2),
        "import_mb_per_second": round(total / median(imports) / 1e6),
        "peak_above_imports_mb": round(max(peaks) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="+", choices=["gptq", "gptq-act-order", "awq"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write: three times the checkpoint's size must be free")
    parser.add_argument("--output", type=Path, help="also write the results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results.append(measure(kind, Path(folder), args.layers, args.rounds))
        print(json.dumps(results[-1]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
