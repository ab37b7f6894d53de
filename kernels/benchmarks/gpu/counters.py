#!/usr/bin/env python3
"""Calls of our kernels for a profiler to watch, each layer cold as Nsight Compute makes it.

    ncu --clock-control none --kernel-name regex:lut_ --section SpeedOfLight --section WarpStateStats \\
        python kernels/benchmarks/gpu/counters.py [KERNEL:BITS:TOKENS ...]

Prints a line before every call, so that the profiler's results can be told apart. Every call is of one layer of N x K
weights in groups of 128; it needs the library that measure.py has built.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2]), str(HERE.parents[2] / "tests")]

N, K, GROUP = 28672, 4096, 128
CALLS = ("mma:4:1", "mma:3:1", "mma:2:1", "mma:4:16", "mma:4:32", "mma:3:32", "wgmma:4:64", "wgmma:3:64", "wgmma:4:256")


def main(calls: list[str]) -> None:
    import torch
    import weights

    generator = torch.Generator("cuda").manual_seed(1)
    packed = {}
    for each in calls or CALLS:
        name, bits, tokens = each.split(":")
        if bits not in packed:
            layer = weights.random_layer(
                weights.Matrix("counted", (N,), K), int(bits), GROUP, torch.bfloat16, generator
            )
            packed[bits] = weights.pack(layer, name)
        x = torch.randn(int(tokens), K, generator=generator, device="cuda").bfloat16()
        print(f"---- {each}, {packed[bits].packed.numel()} bytes", flush=True)
        packed[bits]._replace(kernel=name).call(x)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
