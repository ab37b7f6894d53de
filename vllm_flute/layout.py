"""The header that travels with packed weights and says how to read them.

After load a layer's weights are one uint8 tensor, ``packed``, in the layout that a backend wants, and one
int64 CPU tensor, ``header``. An operator refuses a header it does not know and a ``packed`` whose size the
header does not explain, so a wrong pair is an error and never garbage. The header is data, not a graph
constant: a compiled graph does not depend on bits, group size or codebook. kernels/include/flute.h mirrors
these numbers.
"""

from typing import NamedTuple

import torch

from .errors import FluteError

MAGIC = 0x464C555445  # "FLUTE"
ABI = 1  # also in the operators' names

# Layout ids. ROWS is the on-disk order, rows padded (backends/rows.py), for the backends written in Python. The CPU
# library's are TILE16, TERNARY16, which is TILE16 for 2-bit weights of three values, and TRIT20, which has those in 1.6
# bits where a row has one scale. MMA64 is the CUDA library's (kernels/cuda/layout.h).
ROWS, TILE16, TERNARY16, TRIT20, MMA64 = 0, 1, 2, 3, 4
LAYOUTS = {ROWS: "rows", TILE16: "tile16", TERNARY16: "ternary16", TRIT20: "trit20", MMA64: "mma64"}

_SCALE_CODE = {torch.bfloat16: 0, torch.float16: 1}
_SCALE_DTYPE = {v: k for k, v in _SCALE_CODE.items()}
_FIXED = 8  # fields before the shards


class Layout(NamedTuple):
    """What a header says: shards are the output rows of each fused matrix, one codebook each."""

    layout: int
    bits: int
    group_size: int
    k: int
    scale_dtype: torch.dtype
    shards: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.shards)

    @property
    def groups(self) -> int:
        return self.k // self.group_size

    def header(self) -> torch.Tensor:
        """int64 ``[8 + S]`` on the CPU: magic, abi, layout, bits, group_size, K, scale dtype, S, rows of each shard."""
        fixed = [MAGIC, ABI, self.layout, self.bits, self.group_size, self.k]
        fixed += [_SCALE_CODE[self.scale_dtype], len(self.shards)]
        return torch.tensor(fixed + list(self.shards), dtype=torch.int64, device="cpu")

    @classmethod
    def read(cls, header: torch.Tensor) -> "Layout":
        h = header.tolist()
        if len(h) < _FIXED + 1 or h[0] != MAGIC:
            raise FluteError("not a packed-weight header: pack the weights with vllm_flute.pack")
        if h[1] != ABI or h[2] not in LAYOUTS or len(h) != _FIXED + h[7]:
            raise FluteError(f"packed-weight header {h} is not of ABI {ABI}: pack the weights again with this version")
        return cls(h[2], h[3], h[4], h[5], _SCALE_DTYPE[h[6]], tuple(h[_FIXED:]))
