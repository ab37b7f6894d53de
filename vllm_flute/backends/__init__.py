"""One file a backend: each registers its implementation of the operators in ops.py and names its kernels."""

from typing import NamedTuple


class Kernel(NamedTuple):
    """A kernel as `vllm-flute doctor` lists it; ``why`` says what it lacks when it is not available."""

    name: str
    isa: str
    arithmetic: str  # what is multiplied, which sets the error: kernels/include/flute.h, enum Arithmetic
    slot: int
    available: bool
    why: str
