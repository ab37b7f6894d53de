"""Time every applicable CPU kernel and torch's bf16 linear beside each other, on weights that come from memory.

All candidates of a row take turns in one process, and every call takes the next of many copies of the weights, so that
none is in a cache because another call just read it; the table has medians. GB/s counts the packed bytes (torch: the
bf16 weight), `ratio` is torch's time over the kernel's, `*` marks the dispatcher's choice.

    python kernels/benchmarks/cpu_linear.py --bits 4 --tokens 1 8 --shapes 4096x4096 14336x4096
"""

import argparse
import functools
import itertools
import statistics
import time
from pathlib import Path

import torch

from vllm_flute import dispatch, ops
from vllm_flute.backends import cpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


TORCH = "torch bf16 linear"


def torch_linear(x, copies):
    return torch.nn.functional.linear(x, next(copies))


def lut_linear(x, copies, header, n, name):
    return ops.lut_linear_op(x, next(copies), header, None, n, name)


def weights(n: int, k: int, bits: int, group_size: int):
    """Random packed weights: (packed, header)."""
    qweight = torch.randint(256, (n, k * bits // 8), dtype=torch.uint8)
    scales = torch.rand(n, k // group_size).to(torch.bfloat16)
    return dispatch.pack_parts(qweight, scales, torch.randn(1, 2**bits), group_size, [n])


def read_bandwidth(nbytes: int = 512 << 20) -> float:
    """GB/s of a plain read of memory with torch's threads."""
    buffer = torch.ones(nbytes // 4)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return nbytes / min(times) / 1e9


def measure(candidates: dict, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each callable, which take turns for at most ``rounds`` or ``seconds``."""
    times = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for i in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if i >= 4 and time.perf_counter() > end:
            break
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=[2, 3, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128, 512], metavar="M")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], metavar="NxK")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kernels", nargs="+", help="only these (default: all but the reference)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=4, help="for each row of the table")
    parser.add_argument("--copies-mb", type=int, default=256, help="memory over which copies of the weights rotate")
    parser.add_argument("--library", type=Path, help="a build of the library other than the installed one")
    args = parser.parse_args()
    if args.library:
        cpu._PATH = args.library.resolve()
    if why := cpu.load():
        parser.exit(1, f"{why}\n")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    names = args.kernels or [k.name for k in cpu.kernels() if k.available and k.name != "reference"]
    print(f"isa {cpu.describe()['isa']}, {args.threads} threads, reads {read_bandwidth():.1f} GB/s, x {args.dtype}")
    print(f"{'shape':>12} {'bits':>4} {'M':>5} {'kernel':>18} {'us':>10} {'GB/s':>7} {'ratio':>6}")
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        dense_copies = max(2, (args.copies_mb << 20) // (n * k * 2))
        dense = itertools.cycle([torch.randn(n, k, dtype=torch.bfloat16) for _ in range(dense_copies)])
        for bits in args.bits:
            packed, header = weights(n, k, bits, args.group_size)
            copies = itertools.cycle([packed.clone() for _ in range(max(2, (args.copies_mb << 20) // packed.numel()))])
            for m in args.tokens:
                x, x_dense = torch.randn(m, k).to(dtype), torch.randn(m, k, dtype=torch.bfloat16)
                candidates = {TORCH: functools.partial(torch_linear, x_dense, dense)}
                for name in names:
                    run = functools.partial(lut_linear, x, copies, header, n, name)
                    try:
                        run()
                    except RuntimeError:  # a dtype or a group size that this kernel does not take
                        continue
                    candidates[name] = run
                chosen = cpu.choose(header, m, dtype)
                medians = measure(candidates, args.rounds, args.seconds)
                base = medians[TORCH]
                for name, seconds in medians.items():
                    nbytes = n * k * 2 if name == TORCH else packed.numel()
                    label = name + ("*" if name == chosen else "")
                    speed = f"{seconds * 1e6:10.0f} {nbytes / seconds / 1e9:7.2f} {base / seconds:6.2f}"
                    print(f"{shape:>12} {bits:>4} {m:>5} {label:>18} {speed}", flush=True)


if __name__ == "__main__":
    main()
