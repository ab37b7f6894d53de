"""Where a decode step's time goes: the quantized linear layers, measured alone, beside the step that vLLM serves.

    python load_tests/step_time.py CHECKPOINT ... --streams 1 8 32

For each lut-v1 checkpoint: `vllm serve` decodes for so many streams at once (a step's time is streams / tokens per
second); then the server is ended, and every quantized layer of the model, fused and packed as vLLM's are, is called one
after the other with so many tokens, as a step calls them. What is left is vLLM's: attention, norms, sampling, the
scheduler and its processes, and an output head that is not quantized, whose size is printed.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vllm_flute.checkpoint.reader import Checkpoint
from vllm_flute.checkpoint.validate import check_layers
from vllm_flute.dispatch import pack_parts
from vllm_flute.format import PARTS
from vllm_flute.ops import lut_linear_op
from vllm_flute.serve.benchmark import decode_rate
from vllm_flute.serve.process import Server, cpu_environment

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def packed_layers(source: Checkpoint) -> list[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """(packed, header, N, K) of every layer, shards fused as vLLM fuses them, block after block."""
    names = {info.name for info in check_layers(source)}
    layers = []
    for name in sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]):
        block, _, last = name.rpartition(".")
        shards = next((group for group in FUSED if last in group), (last,))
        if last != shards[0]:  # taken with the first
            continue
        parts = [[source.tensor(f"{block}.{shard}.{part}".lstrip(".")) for shard in shards] for part in PARTS]
        qweight, scales, books = torch.cat(parts[0]), torch.cat(parts[1]), torch.stack(parts[2])
        k = qweight.shape[1] * 8 // (books.shape[1].bit_length() - 1)
        rows = [shard.shape[0] for shard in parts[0]]
        layers.append((*pack_parts(qweight, scales, books, k // scales.shape[1], rows), sum(rows), k))
    return layers


def linear_seconds(layers, m: int, rounds: int) -> float:
    """Median seconds of one pass over all layers with m tokens each."""
    inputs = {k: torch.randn(m, k, dtype=torch.bfloat16) for _, _, _, k in layers}
    times = []
    for _ in range(rounds + 2):  # the first passes allocate
        begin = time.perf_counter()
        for packed, header, n, k in layers:
            lut_linear_op(inputs[k], packed, header, None, n, "")
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def dense_head_bytes(source: Checkpoint) -> int:
    """Bytes of an output head that is not quantized; 0 where it is."""
    name = "model.embed_tokens.weight" if source.tied_head else "lm_head.weight"
    return source.headers[name].nbytes if name in source.headers else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    result = {}
    for checkpoint in args.checkpoints:
        source = Checkpoint(checkpoint)
        layers = packed_layers(source)
        head = dense_head_bytes(source)
        with tempfile.TemporaryDirectory() as logs:
            options = ["--no-enable-prefix-caching", "--max-model-len", "2048"]
            with Server(checkpoint, Path(logs) / "serve.log", options, cpu_environment()) as server:
                for n in args.streams:
                    decode_rate(server.url, n, 8)
                rates = {n: [] for n in args.streams}
                for _ in range(args.rounds):
                    for n in args.streams:
                        rates[n].append(decode_rate(server.url, n, args.decode_tokens))
        figures = {}
        for n in args.streams:
            step = n / statistics.median(rates[n])
            linear = linear_seconds(layers, n, 10)
            figures[n] = {"step_ms": 1e3 * step, "linear_ms": 1e3 * linear, "rest_ms": 1e3 * (step - linear)}
            print(
                f"{Path(checkpoint).name}: {n} streams: a step {1e3 * step:.1f} ms, {len(layers)} quantized layers "
                f"{1e3 * linear:.1f} ms, the rest {1e3 * (step - linear):.1f} ms (dense head: {head / 2**20:.0f} MiB)"
            )
        result[checkpoint] = {"layers": len(layers), "head_bytes": head, "streams": figures}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
