"""What takes turns: one way to multiply with one weight, and the copies of that weight which it reads in rotation."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn.functional import linear

from .. import dispatch, ops
from ..dispatch import pack_parts
from ..errors import FluteError
from ..format import LutTensor

TORCH = "torch bf16"
TURN_SECONDS = 0.004  # about as long as a turn is to last: a few calls of a small layer, one of a large
MAX_CALLS = 16
OPENMP = "openmp"  # torch's threads, which our kernels and vLLM's share


def calls_for(seconds: float) -> int:
    """Timed calls of a turn, for calls of so many seconds."""
    return max(1, min(MAX_CALLS, math.ceil(TURN_SECONDS / max(seconds, 1e-9))))


class Candidate:
    """A matrix multiplication that reads one of several copies of its weights, the next in each call.

    Attributes:
        name: as in the table; ours are the kernels' names.
        nbytes: of packed weights that a call has to read.
        source: "flute", "torch", "vllm" or the name of a --peer.
        pool: whose threads it runs on; threads spin after a call, so turns of two pools are kept apart.
        detail: what a reader of the figures should know about it.
    """

    pool = OPENMP

    def __init__(
        self,
        name: str,
        source: str,
        nbytes: int,
        call: Callable[[torch.Tensor, object], torch.Tensor],
        copies: Iterator,
        dtype: torch.dtype,
        detail: str = "",
    ):
        self.name, self.source, self.nbytes, self.detail = name, source, nbytes, detail
        self._call, self._copies, self._dtype = call, copies, dtype
        self._calls = 1

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Take the activations, fp32 ``[M, K]``, in its own dtype; returns one product ``[M, N]``, to check it.

        Raises RuntimeError where it does not take this call.
        """
        self._x = x.to(self._dtype)
        self._call(self._x, next(self._copies))  # allocates, compiles
        begin = time.perf_counter()
        y = self._call(self._x, next(self._copies))
        self._calls = calls_for(time.perf_counter() - begin)
        return y

    def turn(self) -> list[float]:
        """Seconds of each of some calls, after one that wakes the threads."""
        self._call(self._x, next(self._copies))
        times = []
        for _ in range(self._calls):
            begin = time.perf_counter()
            self._call(self._x, next(self._copies))
            times.append(time.perf_counter() - begin)
        return times


class Rotation:
    """How many copies of a weight there are: cold ones fill ``nbytes`` of memory, warm ones are one.

    Rotating over much more than the last-level cache keeps every call from finding weights that another left there,
    which is how a model's layers meet them.
    """

    def __init__(self, nbytes: int | None):
        self.nbytes = nbytes  # None: warm

    def count(self, size: int) -> int:
        return 1 if self.nbytes is None else max(2, self.nbytes // size)

    def of(self, make: Callable[[], object], size: int) -> Iterator:
        return itertools.cycle([make() for _ in range(self.count(size))])


# ---- weights ----


def random_weight(kind: str, n: int, k: int, group_size: int, device: str = "cpu") -> LutTensor:
    """``[n, k]`` with a random codebook; ternary: -1, 0, 1 and one scale a row, as all peers can hold."""
    ternary = kind == "ternary"
    group_size = k if ternary else group_size
    bits = 2 if ternary else int(kind)
    if k % group_size or group_size % 8:
        raise FluteError(f"--group-size {group_size} must be a multiple of 8 that divides K={k}")
    codes = torch.randint(3 if ternary else 2**bits, (n, k), dtype=torch.uint8)
    if ternary:
        scales, codebook = torch.ones(n, k // group_size), torch.tensor([-1.0, 0.0, 1.0, 1.0])
    else:
        scales, codebook = torch.rand(n, k // group_size) * 0.1 + 0.05, torch.randn(2**bits).sort().values
    return LutTensor.from_codes(codes.to(device), scales.to(device, torch.bfloat16), codebook.to(device))


# ---- ours and torch's ----


def ours(names: Iterable[str], t: LutTensor, dtype: torch.dtype, rotation: Rotation, make: type[Candidate] = Candidate):
    """The kernels of these names on one weight, on its device: (header, candidates). They read the same copies."""
    parts = t.qweight, t.scales, t.codebook[None], t.group_size, [t.shape[0]]
    packed, header = pack_parts(*parts)
    # Packed one by one, as layers are: only packing asks for memory in huge pages.
    copies = rotation.of(lambda: pack_parts(*parts)[0], packed.numel())

    def candidate(name: str) -> Candidate:
        def call(x, copy):
            return ops.lut_linear_op(x, copy, header, None, t.shape[0], name)

        kernels = dispatch.kernels(t.qweight.device.type)
        arithmetic = next(kernel.arithmetic for kernel in kernels if kernel.name == name)
        return make(name, "flute", packed.numel(), call, copies, dtype, arithmetic)

    return header, [candidate(name) for name in names]


def torch_bf16(weight: torch.Tensor, rotation: Rotation, make: type[Candidate] = Candidate) -> Candidate:
    """``torch.nn.functional.linear`` in bfloat16; weight fp32 ``[N, K]``."""
    dense = weight.bfloat16()
    size = dense.numel() * 2
    return make(TORCH, "torch", size, linear, rotation.of(dense.clone, size), torch.bfloat16)
