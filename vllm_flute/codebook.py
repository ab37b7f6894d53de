"""Codebooks: the lookup tables of the LUT format, by name or given.

A codebook is an fp32 vector of ``2**bits`` values; a weight is ``codebook[code] * scale``.
"""

from functools import cache
from itertools import pairwise
from math import inf
from statistics import NormalDist

import torch

from .errors import FluteError

BITS = (2, 3, 4)
NAMES = ("nf", "fp4", "int", "ternary", "lloyd-max")
# Without calibration. The inputs of largest second moments have small weights: a table must have a zero and be fine
# around it. Lloyd-Max's has a smaller error of Gaussian weights and no zero, and without calibration ruins a model.
DEFAULT_CODEBOOK = "nf"

# QLoRA (arXiv 2305.14314) takes the outermost quantile between 1 - 1/30 and 1 - 1/32;
# bitsandbytes and FLUTE both use this value of it.
_NF_OFFSET = 0.9677083


def check_bits(bits: int) -> int:
    """Return ``bits``; raise FluteError when no kernel of this project has that width."""
    if bits not in BITS:
        raise FluteError(f"unsupported bits: {bits} (supported: 2, 3, 4)")
    return bits


def normal_float(bits: int) -> torch.Tensor:
    """NormalFloat table of ``2**bits`` ascending values in [-1, 1], with an exact zero.

    Quantiles of the standard normal distribution, one more on the positive side
    (QLoRA, arXiv 2305.14314, section 3, and FLUTE, arXiv 2407.10960, for 2 and 3 bits).
    """
    half = 2 ** (bits - 1)

    def quantiles(n: int) -> list[float]:
        step = (_NF_OFFSET - 0.5) / n
        return [NormalDist().inv_cdf(_NF_OFFSET - i * step) for i in range(n)]

    values = sorted([-q for q in quantiles(half - 1)] + [0.0] + quantiles(half))
    return torch.tensor(values, dtype=torch.float32) / max(map(abs, values))


@cache
def _lloyd_max_levels(bits: int) -> tuple[float, ...]:
    normal = NormalDist()
    levels = [normal.inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)]
    moved = inf
    while moved > 1e-9:  # far below fp32's resolution; 16 levels take under a thousand rounds
        edges = [-inf, *((a + b) / 2 for a, b in pairwise(levels)), inf]
        # The mean of a standard normal variable between two edges.
        means = [-(normal.pdf(b) - normal.pdf(a)) / (normal.cdf(b) - normal.cdf(a)) for a, b in pairwise(edges)]
        moved = max(abs(a - b) for a, b in zip(levels, means, strict=True))
        levels = means
    return tuple(levels)


def lloyd_max(bits: int) -> torch.Tensor:
    """The ``2**bits`` levels that quantize a standard normal variable with the least mean squared error.

    Computed by Lloyd's iteration (S. P. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28(2),
    1982, method I; J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6(1), 1960): symmetric, no zero.
    """
    levels = torch.tensor(_lloyd_max_levels(bits), dtype=torch.float64)
    return ((levels - levels.flip(0)) / 2).to(torch.float32)


def _fp4() -> torch.Tensor:
    """e2m1 in the order of its bit patterns (sign, exponent, mantissa), as MXFP4 and NVFP4 use it."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat([magnitudes, -magnitudes])


def pad_codebook(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return fp32 ``[2**bits]``; a shorter table repeats its last value."""
    values = values.detach().to(torch.float32).reshape(-1)
    size = 2**bits
    if not 2 <= values.numel() <= size:
        raise FluteError(
            f"codebook has {values.numel()} values, {bits} bits take 2 to {size}: shorten the table or raise bits"
        )
    if not torch.isfinite(values).all():
        raise FluteError("codebook has values that are not finite")
    return torch.cat([values, values[-1:].expand(size - values.numel())])


def make_codebook(codebook: str | torch.Tensor, bits: int) -> torch.Tensor:
    """Return the fp32 table ``[2**bits]`` for a name (see NAMES) or for given values.

    Raises:
        FluteError: unknown name, or a name that does not exist at this width.
    """
    check_bits(bits)
    if isinstance(codebook, torch.Tensor):
        return pad_codebook(codebook, bits)
    match codebook:
        case "nf":
            return normal_float(bits)
        case "lloyd-max":
            return lloyd_max(bits)
        case "int":
            half = 2 ** (bits - 1)
            return torch.arange(-half, half, dtype=torch.float32)
        case "fp4" if bits == 4:
            return _fp4()
        case "ternary" if bits == 2:
            return pad_codebook(torch.tensor([-1.0, 0.0, 1.0]), bits)
        case "fp4" | "ternary":
            raise FluteError(f"codebook {codebook!r} exists only at {4 if codebook == 'fp4' else 2} bits, not {bits}")
    raise FluteError(f"unknown codebook {codebook!r} (known: {', '.join(NAMES)})")
