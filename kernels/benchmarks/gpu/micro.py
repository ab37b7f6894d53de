"""The microbenchmarks' results beside what the kernels' design assumes.

An assumption is a rate that the design was reckoned with before anything was measured. They are those of compute
capability 9.0 in the CUDA C++ Programming Guide, "Throughput of native arithmetic instructions", and 128 bytes of
shared memory a cycle; of mma.sync it says nothing, and the figure is the dense bf16 peak of an H100's data sheet.
"""

import json
import re
import subprocess
from pathlib import Path

# Lanes' operations an SM and cycle (mma: lanes of m16n8k16, so 32 is one a cycle: 2048 multiply-adds).
_GUIDE = "programming guide"
_BANKS = "32 banks of 4 bytes"
_CONFLICTS = "wavefronts of random lookups, simulated"  # 3.2, 2.9, 2.0: one, eight and sixteen copies of 256 words
ASSUMED = {
    "prmt": (64, _GUIDE),
    "lop3": (64, _GUIDE),
    "shf": (64, _GUIDE),
    "shfl": (32, _GUIDE),
    "hmul2": (128, _GUIDE + " (256 values)"),
    "mma_m16n8k16_bf16": (32, "989 TFLOP/s of 132 SMs at 1.83 GHz"),
    "lds32_x32": (32, _BANKS),
    "lds32_x16": (32 / 2.0, _CONFLICTS),
    "lds32_x8": (32 / 2.9, _CONFLICTS),
    "lds32_x1": (32 / 3.2, _CONFLICTS),
    "lds64_x16": (16, _BANKS),
    "lds128_x8": (8, _BANKS),
    "ldmatrix_x4": (8, _BANKS),
}


def decode_assumed(bits: int, tokens: int, row: int) -> tuple[float, str]:
    """Weights an SM and cycle of the inner loop by the assumptions above, and the pipe that limits it.

    A step is 64 x 64 weights of one warp (micro.cu, Decode): loads of the codes (``bits`` times 16 bytes a lane), of
    the activations (ldmatrix.x4, two for 8 tokens), 64 lookups of pairs, or at 2 bits 32 of quads, which take 8 bytes;
    for the address of a lookup a prmt, or in a table with rows of 128 bytes a shift and a lop3; at 3 bits 20 shifts and
    32 lop3 for all indices; 16 mma for 8 tokens.
    """
    lookups = 32 if bits == 2 else 64
    cycles = {
        "shared memory": 4 * bits + 2 * (tokens // 8) * 4 + lookups * (2 if bits == 2 else 1),
        "integer": (lookups * (2 if row == 128 else 1) + (52 if bits == 3 else 0)) / 2,
        "tensor cores": 16 * (tokens // 8),
    }
    pipe = max(cycles, key=lambda name: cycles[name])
    return 64 * 64 / cycles[pipe], pipe


def rows(output: str) -> list[dict]:
    """What the program printed, each with ``assumed``, where it is from, and ``ratio`` measured to assumed."""
    found = []
    for line in output.splitlines():
        row = json.loads(line)
        name = row["name"]
        if match := re.fullmatch(r"decode_(\d)bit_(\d+)tokens_row(\d+)", name):
            rate, pipe = decode_assumed(*map(int, match.groups()))
            row |= {"assumed": rate, "assumed_from": f"limited by {pipe}"}
        elif name in ASSUMED:
            row |= dict(zip(("assumed", "assumed_from"), ASSUMED[name], strict=True))
        if "assumed" in row:
            row["ratio"] = row["per_cycle"] / row["assumed"]
        found.append(row)
    return found


def run(program: Path, timeout: float) -> list[dict]:
    """Run the compiled micro.cu; raises RuntimeError with its own words where it fails."""
    done = subprocess.run([program], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        )
    return rows(done.stdout)
