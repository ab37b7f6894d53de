"""Every kernel against the oracle, on fresh random inputs with poisoned outputs; and what a server relies on besides.

The oracle is float64 on the same device, the bound that of tests/tolerance.py, element by element. The bound of a long
sum forgives one wrong weight, so `decode` also multiplies by unit vectors: their results are single weights, each of
which must be within its roundings.
"""

import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from fused import GATES, NORMS, SMALL_GATE, SMALL_NORM, gated, normed
from timing import reason
from tolerance import allowed_error
from weights import LLAMA, TRITON, Layer, Matrix, Packed, kernels, pack, random_layer

from vllm_flute import dispatch, ops

BITS, GROUPS, DTYPES = (4, 3, 2), (128, 64, 32), (torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 7, 8, 16, 17, 32, 33, 64, 128, 1024)
# Shards that end inside a tile of 64 rows, inputs that end inside a tile of 64, one row tile and many.
RAGGED = (
    Matrix("ragged.a", (8,), 128),
    Matrix("ragged.b", (72, 136), 384),
    Matrix("ragged.c", (200, 8, 1000), 640),
    Matrix("ragged.d", (4104,), 1152),
)
ODD_INPUTS = (Matrix("odd.a", (136, 64), 72), Matrix("odd.b", (320,), 584))  # one group of all inputs
UNIT, REPEAT = Matrix("unit", (192, 72), 384), Matrix("repeat", (1160, 120), 1152)
SMALL = Matrix("small", (24, 8), 128)  # in the place of all of them in a dry run, where kernels are interpreted
SCALED = "scaled 16-bit weights"  # the arithmetic of kernels that round a weight before and after scaling it
MAX_FAILURES = 50  # described one by one; all are counted


class Oracle(NamedTuple):
    """A layer's exact result ``[M, N]`` in float64, its bound, and the bound of kernels that scale 16-bit weights."""

    y: torch.Tensor
    bound: torch.Tensor
    scaled_bound: torch.Tensor

    def rows(self, at: slice) -> "Oracle":
        return Oracle(*(part[at] for part in self))


def oracle(layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> Oracle:
    """Compute the oracle for x ``[M, K]`` and bias ``[N]`` or None.

    To allowed_error comes what rounding to fp16 loses below its normal numbers, half of their spacing: of each weight
    and of the result. A kernel that scales in 16 bits rounds twice where allowed_error reckons with one rounding of a
    weight: the value of the codebook and the product; and the scale too where that is stored in the other type.
    """
    y, bound = [], []
    parts = layer.shards()
    biases = [None] * len(parts) if bias is None else bias.split(layer.matrix.shards)
    for shard, b in zip(parts, biases, strict=True):
        exact = x.double() @ shard.dequantize().double().T
        y.append(exact if b is None else exact + b.double())
        bound.append(allowed_error(x, shard, b))
    bounds, finfo = torch.cat(bound, 1), torch.finfo(x.dtype)
    unit = 2 * layer.matrix.k * 2.0**-24 + finfo.eps  # of allowed_error
    more = finfo.eps / 2 * (1 if layer.scales.dtype == x.dtype else 2)
    lost = (x.float().abs().sum(1, keepdim=True) + 1) * (finfo.smallest_normal * finfo.eps / 2)
    return Oracle(torch.cat(y, 1), bounds + lost, bounds * (1 + more / unit) + lost)


class Results:
    """What was compared, and what failed."""

    def __init__(self, arithmetic: dict[str, str]):
        self.arithmetic = arithmetic
        self.calls: Counter = Counter()
        self.by_kind: Counter = Counter()
        self.worst = dict.fromkeys(arithmetic, 0.0)  # error / bound
        self.relative = dict.fromkeys(arithmetic, 0.0)  # ||y - exact|| / ||exact||, of results of 1024 elements or more
        self.poisoned = self.failed = 0
        self.failures: list[dict] = []

    def fail(self, kernel: str, what: str, why: str) -> None:
        self.failed += 1
        if len(self.failures) < MAX_FAILURES:
            self.failures.append({"kernel": kernel, "case": what, "why": why})

    def compare(self, kernel: str, what: str, y: torch.Tensor, exact: Oracle) -> None:
        self.calls[kernel] += 1
        bound = exact.scaled_bound if self.arithmetic.get(kernel) == SCALED else exact.bound
        error = (y.double() - exact.y).abs()
        if not bool((error <= bound).all()):
            wrong = ~(error <= bound)
            at = wrong.nonzero()[0].tolist()
            value, expected, limit = (part[tuple(at)].item() for part in (y, exact.y, bound))
            why = f"{value:.6g} at {at}, expected {expected:.6g} within {limit:.3g}"
            self.fail(kernel, what, f"{int(wrong.sum())} of {wrong.numel()} elements out of bounds, the first: {why}")
        elif y.numel():
            self.worst[kernel] = max(self.worst[kernel], (error / bound.clamp_min(1e-30)).max().item())
            if y.numel() >= 1024:
                self.relative[kernel] = max(self.relative[kernel], (error.norm() / exact.y.norm()).item())

    def same(self, kernel: str, what: str, y: torch.Tensor, expected: torch.Tensor) -> None:
        self.calls[kernel] += 1
        if not torch.equal(bits_of(y), bits_of(expected)):
            self.fail(kernel, what, f"{int((bits_of(y) != bits_of(expected)).sum())} of {y.numel()} elements differ")

    def summary(self) -> dict:
        return {
            "calls": dict(self.calls),
            "by_kind": dict(self.by_kind),
            "poisoned_outputs": self.poisoned,
            "worst_error_to_bound": self.worst,
            "worst_relative_error": self.relative,
            "failed": self.failed,
            "failures": self.failures,
        }


def bits_of(t: torch.Tensor) -> torch.Tensor:
    """A float tensor's bit patterns: NaN equals itself, -0 does not equal 0."""
    return t.view({2: torch.int16, 4: torch.int32, 1: torch.uint8}[t.element_size()])


class Checker:
    """Runs cases of one device; ``generator`` seeds all inputs."""

    def __init__(self, device: str, arithmetic: dict[str, str], tokens: Iterable[int], seed: int):
        self.device, self.tokens = device, tuple(tokens)
        self.kernels = list(arithmetic)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.results = Results(arithmetic)

    def activations(self, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(m, k, generator=self.generator, device=self.device).to(dtype)

    def layer(self, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype) -> tuple[Layer, dict[str, Packed]]:
        """A random layer with scales of a dtype, and it packed for every kernel: once for all that read one layout."""
        layer = random_layer(matrix, bits, group_size, dtype, self.generator)
        native = [name for name in self.kernels if name != TRITON]
        packed = {}
        if native:
            first = pack(layer, native[0])
            packed = {name: first._replace(kernel=name) for name in native}
        if TRITON in self.kernels:
            packed[TRITON] = pack(layer, TRITON)
        return layer, packed

    def poisoned(self, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The call's result, in memory that held NaN: the allocator gives the block that was freed last."""
        poison = torch.full((x.shape[0], packed.n), math.nan, dtype=x.dtype, device=x.device)
        at = poison.data_ptr()
        del poison
        y = packed.call(x, bias)
        self.results.poisoned += y.data_ptr() == at
        return y

    def guarded(self, kernel: str, what: str, case: Callable[[], None]) -> None:
        """Run a case; an exception is its failure. After an error of the device nothing more can run: it is raised."""
        try:
            case()
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception as e:
            self.results.fail(kernel, what, reason(e))
            if isinstance(e, torch.AcceleratorError):
                raise

    def products(
        self,
        kind: str,
        matrix: Matrix,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        scales_in: torch.dtype | None = None,
    ) -> None:
        """Every kernel and M on one layer; tokens are other rows of x for each M. The scales' dtype may be another."""
        layer, packed = self.layer(matrix, bits, group_size, scales_in or dtype)
        x = self.activations(max(self.tokens), matrix.k, dtype)
        bias = self.activations(1, matrix.n, dtype)[0]
        exact = {True: oracle(layer, x, bias), False: oracle(layer, x, None)}
        for i, m in enumerate(self.tokens):
            first = (x.shape[0] - m) * (i + 1) // (len(self.tokens) + 1)
            at = slice(first, first + m)
            with_bias = i % 2 == 0
            for name in self.kernels:
                what = f"{matrix.name} {matrix.shards}x{matrix.k} {bits} bits g{group_size} {dtype} M={m}"

                def case(name=name, what=what, at=at, with_bias=with_bias):
                    y = self.poisoned(packed[name], x[at], bias if with_bias else None)
                    self.results.compare(name, what, y, exact[with_bias].rows(at))

                self.guarded(name, what, case)
        self.results.by_kind[kind] += 1

    def decode(self, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype) -> None:
        """Every single weight of a layer, through every kernel and several tiles of tokens."""
        layer, packed = self.layer(matrix, bits, group_size, dtype)
        x = torch.eye(matrix.k, device=self.device, dtype=dtype)
        exact = oracle(layer, x, None)
        for name in self.kernels:
            for m in (8, 24, 64, matrix.k):
                if m > max(self.tokens):
                    continue
                what = f"unit vectors {bits} bits g{group_size} {dtype} M={m}"

                def case(name=name, what=what, m=m):
                    y = torch.cat([self.poisoned(packed[name], part) for part in x.split(m)])
                    self.results.compare(name, what, y, exact)

                self.guarded(name, what, case)
        self.results.by_kind["decode"] += 1

    def round_trip(self, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype) -> None:
        """Packing loses nothing."""
        what = f"{matrix.name} {bits} bits g{group_size} {dtype}"
        layer = random_layer(matrix, bits, group_size, dtype, self.generator)

        def case():
            parts = layer.qweight, layer.scales, layer.codebooks
            back = ops.lut_unpack_op(*dispatch.pack_parts(*parts, group_size, matrix.shards))
            for part, expected in zip(back, parts, strict=True):
                self.results.same("unpack", what, part, expected)

        self.guarded("unpack", what, case)
        self.results.by_kind["round trip"] += 1

    def repeats(self, matrix: Matrix, bits: int, group_size: int, dtype: torch.dtype) -> None:
        """Bitwise equal again and beside other tokens' infinities; on a GPU, in a graph and on two streams at once."""
        layer, packed = self.layer(matrix, bits, group_size, dtype)
        for m in (1, 17, 64, 200):
            if m > max(self.tokens):
                continue
            x, other = self.activations(m, matrix.k, dtype), self.activations(m, matrix.k, dtype)
            for name in self.kernels:
                what = f"{bits} bits g{group_size} {dtype} M={m}"

                def case(name=name, what=what, m=m, x=x, other=other):
                    call = packed[name].call
                    first = call(x)
                    self.results.same(name, f"again {what}", self.poisoned(packed[name], x), first)
                    spoilt = x.clone()
                    spoilt[m - 1, 5] = math.inf
                    spoilt[m - 1, 70] = math.nan
                    y = call(spoilt)
                    self.results.same(name, f"beside an infinity {what}", y[: m - 1], first[: m - 1])
                    if not bool(y[m - 1].isnan().all()):
                        self.results.fail(name, f"NaN {what}", "a row of y whose x has a NaN has finite elements")
                    if self.device == "cuda":
                        self.results.same(name, f"graph {what}", in_graph(call, x, other), call(other))
                        self.two_streams(name, what, packed[name], x, other)

                self.guarded(name, what, case)
        self.results.by_kind["repeats"] += 1

    def two_streams(self, name: str, what: str, packed: Packed, x: torch.Tensor, other: torch.Tensor) -> None:
        """Two streams that run the same kernel at once do not touch each other's workspace."""
        inputs = (x, other)
        expected = [packed.call(each) for each in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        found: list[list[torch.Tensor]] = [[], []]
        for _ in range(8):
            for stream, each, results in zip(streams, inputs, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(packed.call(each))
        torch.cuda.synchronize()
        for results, y in zip(found, expected, strict=True):
            for each in results:
                self.results.same(name, f"two streams {what}", each, y)


def in_graph(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The result for ``other`` of a graph that was captured with ``x``, replayed twice, its output poisoned between."""
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(static)
    graph.replay()
    static.copy_(other)
    y.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return y.clone()


def plan(seed: int) -> list[tuple[Matrix, int, int, torch.dtype]]:
    """All LLaMA layers, whole and split, in every format, in a random order that begins with a whole one of each."""
    matrices = [matrix.split(ways) if ways > 1 else matrix for matrix in LLAMA for ways in (1, 2, 4, 8)]
    formats = [(b, g, d) for b in BITS for g in GROUPS for d in DTYPES]
    cases = [(matrix, *each) for matrix in matrices for each in formats]
    random.Random(seed).shuffle(cases)
    whole = [case for case in cases if case[0].name in ("8b.qkv", "70b.o") and case[1:] == (4, 128, torch.bfloat16)]
    return whole + [case for case in cases if case not in whole]


def fixed_cases(checker: Checker, small: bool) -> list[tuple]:
    """The cases that every run has, each a function and its arguments; ``small``: one tiny layer for all of them."""
    cases: list[tuple] = []
    if small:
        for case in ((SMALL, 4, 128, torch.bfloat16), (SMALL, 3, 64, torch.float16), (SMALL, 2, 32, torch.bfloat16)):
            cases += [(checker.round_trip, *case), (checker.products, "ragged", *case)]
        cases += [(checker.products, "other scales", SMALL, 4, 64, torch.bfloat16, torch.float16)]
        cases += [
            (gated, checker, SMALL_GATE, 4, 64, torch.bfloat16),
            (normed, checker, SMALL_NORM, 4, 64, torch.bfloat16),
        ]
        return [*cases, (checker.decode, SMALL, 4, 128, torch.bfloat16), (checker.repeats, SMALL, 3, 64, torch.float16)]
    for i, case in enumerate((b, g, d) for d in DTYPES for g in GROUPS for b in BITS):
        ragged = [RAGGED[j % len(RAGGED)] for j in (i, i + 1)]
        other = DTYPES[1 - DTYPES.index(case[2])]
        cases += [(checker.round_trip, ragged[0], *case), (checker.decode, UNIT, *case)]
        cases += [(checker.repeats, REPEAT, *case)]
        cases += [(checker.products, "ragged", ragged[0], *case)]
        cases += [(checker.products, "other scales", ragged[1], *case, other)]
        cases += [(gated, checker, GATES[i % len(GATES)], *case), (normed, checker, NORMS[i % len(NORMS)], *case)]
    odd = [(each, b, each.k, d) for each in ODD_INPUTS for b in BITS for d in DTYPES]
    return cases + [(checker.products, "one group", *case) for case in odd]


def run(checker: Checker, seconds: float, seed: int, small: bool, part: int = 0, parts: int = 1) -> dict:
    """All checks that fit into ``seconds``: the fixed ones, then layers of the models, sampled, until the time is over.

    Of several ``parts`` each has its share of the fixed ones, and no models; ``small`` has none either. Returns what
    Results.summary has, ``complete`` (whether all fixed ones ran), how many of the models' cases were ``sampled`` and
    ``of`` how many.
    """
    begin = time.monotonic()
    done = {"complete": False, "sampled": 0, "of": 0, "seed": seed}
    models = [] if small or parts > 1 else plan(seed)
    try:
        for function, *arguments in fixed_cases(checker, small)[part::parts]:
            if time.monotonic() - begin > seconds:
                return done | checker.results.summary()
            function(*arguments)
        done |= {"complete": True, "of": len(models)}
        for case in models:
            if time.monotonic() - begin > seconds:
                break
            checker.products("models", *case)
            done["sampled"] += 1
    except torch.AcceleratorError as e:
        done["ended_by"] = reason(e)
    return done | checker.results.summary()


def merged(results: list[dict]) -> dict:
    """Several results of run as one."""
    whole = results[0]
    for other in results[1:]:
        for key in ("calls", "by_kind"):
            whole[key] = dict(Counter(whole[key]) + Counter(other[key]))
        for key in ("worst_error_to_bound", "worst_relative_error"):
            for name, value in other[key].items():
                whole[key][name] = max(value, whole[key].get(name, 0.0))
        for key in ("failed", "poisoned_outputs"):
            whole[key] += other[key]
        whole["failures"] += other["failures"]
        whole["complete"] &= other["complete"]
        whole |= {"ended_by": other["ended_by"]} if "ended_by" in other else {}
    return whole


def main(arguments: list[str]) -> None:
    """Print a line of JSON: ``sanitize KERNELS`` (a few small layers), ``part KERNEL SECONDS SEED PART PARTS``."""
    what, names, *rest = arguments
    found, _ = kernels("cuda")
    arithmetic = {name: found[name] for name in names.split(",")}
    if what == "part":
        seconds, seed, part, parts = map(int, rest)
        result = run(Checker("cuda", arithmetic, TOKENS, seed + part), seconds, seed, False, part, parts)
    else:
        checker = Checker("cuda", arithmetic, (1, 17, 40), seed=1)
        for case in ((4, 128, torch.bfloat16), (3, 64, torch.float16), (2, 32, torch.bfloat16)):
            checker.products("sanitized", RAGGED[1], *case)
            checker.round_trip(RAGGED[1], *case)
        result = checker.results.summary()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
