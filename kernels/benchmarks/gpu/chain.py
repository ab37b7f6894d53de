#!/usr/bin/env python3
"""A decode step's linear layers one after the other, as a model runs them.

    python kernels/benchmarks/gpu/chain.py --out FILE [--bits 4,3,2] [--tokens 1,8,16,32]

LLaMA-3-8B's layers with random weights of their own (more than the L2 cache holds) in one CUDA graph, SwiGLU joined
to the gate and up projections. In between are torch's RMS norms and the slice that stands for attention; or that slice
alone, norms and residuals being joined to the layers; or nothing. Beside it bf16 by cuBLAS with the same in between,
or with torch's norms where ours are joined. Times are microseconds a layer, medians of alternating rounds. The
JSON has a list of rows {bits, m, between, us, rounds}, bits 16 for cuBLAS, and the GPU's name.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import torch  # noqa: E402
import weights  # noqa: E402
from torch.nn.functional import linear, rms_norm  # noqa: E402

from vllm_flute import ops  # noqa: E402

ROUNDS, REPLAYS = 9, 3
MODEL = weights.LLAMA[:4]  # qkv, o, gate_up, down
HIDDEN, INTERMEDIATE = MODEL[0].k, MODEL[3].k
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Layer:
    """One of the matrices. Calls: x ``[M, K]`` -> ``[M, N]``, of gate_up ``[M, N/2]``."""

    kind: int  # of MODEL
    of: weights.Packed

    def arguments(self) -> tuple:
        return self.of.packed, self.of.header, None, self.of.n, ""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        op = ops.lut_linear_silu_op if self.kind == 2 else ops.lut_linear_op
        return op(x, *self.arguments())

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> tuple:
        return ops.lut_linear_add_norm_op(x, residual, norm, EPSILON, *self.arguments())

    def normed(self, x: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        op = ops.lut_linear_normed_silu_op if self.kind == 2 else ops.lut_linear_normed_op
        return op(x, squares, EPSILON, *self.arguments())


def packed(bits: int, group_size: int, layers: int) -> list[Layer]:
    """The calls of all layers in order."""
    generator = torch.Generator("cuda").manual_seed(bits)
    drawn = [weights.random_layer(m, bits, group_size, torch.bfloat16, generator) for m in MODEL]
    kinds = [weights.pack(layer, "") for layer in drawn]
    return [Layer(i, kind.copy()) for _ in range(layers) for i, kind in enumerate(kinds)]


def plain(layers: int) -> list:
    """The same of random bf16 weights, by cuBLAS."""

    def call(matrix: weights.Matrix, gated: bool):
        weight = torch.randn(matrix.n, matrix.k, device="cuda", dtype=torch.bfloat16) * 0.02
        return (lambda x: ops.silu_and_mul(linear(x, weight))) if gated else lambda x: linear(x, weight)

    return [call(matrix, i == 2) for _ in range(layers) for i, matrix in enumerate(MODEL)]


def step(calls: list, x: torch.Tensor, wide: torch.Tensor, norm: torch.Tensor, between: str) -> None:
    """One pass over the layers; with nothing in between each call has an input of its own, x or wide."""
    if between == "joined" and isinstance(calls[0], Layer):
        residual, hidden, squares = x, calls[0](x)[:, :HIDDEN].contiguous(), None
        for layer in calls[1:]:
            if layer.kind in (1, 3):
                hidden, residual, squares = layer.add_norm(hidden, residual, norm)
            else:
                hidden = layer.normed(hidden, squares)
            if layer.kind == 0:
                hidden = hidden[:, :HIDDEN].contiguous()
        return
    hidden = x
    for i, call in enumerate(calls):
        kind = i % len(MODEL)
        if between == "nothing":
            call(wide if kind == 3 else x)
            continue
        if kind in (0, 2):
            hidden = rms_norm(hidden, (HIDDEN,), norm)
        y = call(hidden)
        hidden = y[:, :HIDDEN].contiguous() if kind == 0 else y


def graph(calls: list, m: int, between: str) -> torch.cuda.CUDAGraph:
    x, wide = (torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for k in (HIDDEN, INTERMEDIATE))
    norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(calls, x, wide, norm, between)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step(calls, x, wide, norm, between)
    captured.replay()
    return captured


def microseconds(captured: torch.cuda.CUDAGraph, layers: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    captured.replay()  # L2 has the chain's end, as in a run of steps
    begin.record()
    for _ in range(REPLAYS):
        captured.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / REPLAYS / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--tokens", default="1,8,16,32")
    parser.add_argument("--between", default="joined,norms,nothing")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    chains = {bits: packed(bits, options.group_size, options.layers) for bits in map(int, options.bits.split(","))}
    chains[16] = plain(options.layers)
    rows = []
    for m in map(int, options.tokens.split(",")):
        for between in options.between.split(","):
            graphs = {bits: graph(calls, m, between) for bits, calls in chains.items()}
            rounds = [{bits: microseconds(g, options.layers) for bits, g in graphs.items()} for _ in range(ROUNDS)]
            for bits in graphs:
                times = [each[bits] for each in rounds]
                rows.append({"bits": bits, "m": m, "between": between, "us": statistics.median(times), "rounds": times})
            found = ", ".join(f"{row['bits']} bits {row['us']:.1f}" for row in rows[-len(graphs) :])
            print(f"M={m}, in between {between}, us a layer: {found}", flush=True)
    gpu = torch.cuda.get_device_name()
    facts = {"gpu": gpu, "group_size": options.group_size, "layers": options.layers}
    options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
