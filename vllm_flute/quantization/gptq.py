"""GPTQ with any codebook as its grid: what rounding one input loses is made up for by the inputs still to come."""

import torch

from ..errors import FluteError
from ..format import LutTensor
from ..packing import pack_codes
from .fitted import resolve_codebook
from .round_to_nearest import distinct_entries
from .scale_search import search_scales

_BLOCK = 128  # columns whose updates of the columns beyond are made at once (section 3.3, step 2)
# Rows of W worked on at once: a block of them is 32768 weights, up to which torch runs an operation on the calling
# thread. Thousands of small parallel sections would crawl on a machine whose cores are busy.
_ROWS = 255
DAMPING = 0.01  # of the Hessian's mean diagonal, added to the diagonal (section 3.3, step 3)


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    bits: int,
    group_size: int,
    codebook: str | torch.Tensor,
    scale_dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
) -> LutTensor:
    """Quantize a weight ``[N, K]`` so that ``(W - W_q) H (W - W_q)^T`` is small, H the inputs' second moments.

    GPTQ (arXiv 2210.17323, section 3.3 and algorithm 1): columns one after another, the error of each spread over
    those that follow by the Cholesky factor of the inverse of H. Groups are taken in the order of their inputs'
    second moments, largest first, and so are the columns in a group; a group's scales are searched when it is
    reached, against what the weights are by then, with H's diagonal as importance.

    Args:
        moments: fp32 ``[K, K]``, the mean of ``x x^T``.
        bits, group_size, codebook, scale_dtype, name: as of `quantize`.

    Raises:
        FluteError: weights or inputs that are not finite.
    """
    n, k = weight.shape
    diagonal = moments.diagonal().clone()
    if not torch.isfinite(diagonal).all() or not torch.isfinite(weight).all():
        raise FluteError(f"{name} or its calibration inputs have values that are not finite")

    table = resolve_codebook(codebook, weight, bits, group_size, diagonal)
    levels, codes_of = distinct_entries(table)
    middle = (levels[1:] + levels[:-1]) / 2
    importance = diagonal.view(-1, group_size)
    group_order = importance.mean(-1).argsort(dim=-1, descending=True, stable=True)
    within = importance.argsort(dim=-1, descending=True, stable=True)
    order = (within + torch.arange(0, k, group_size).unsqueeze(1))[group_order].flatten()
    inverse = _inverse_factor(moments[order][:, order], name)

    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, k // group_size, dtype=scale_dtype)
    for first in range(0, n, _ROWS):
        rows = slice(first, min(first + _ROWS, n))
        # Columns of W are rows here, contiguous.
        w = weight[rows].to(torch.float32).T[order].contiguous()
        chosen = torch.empty(w.shape, dtype=torch.uint8)
        for start in range(0, k, group_size):
            group = slice(start, start + group_size)
            found = search_scales(w[group].T.contiguous(), table, diagonal[order[group]]).to(scale_dtype)
            scales[rows, group_order[start // group_size]] = found
            scale = found.to(torch.float32)
            divisor = torch.where(scale != 0, scale, 1.0)
            for begin in range(start, start + group_size, _BLOCK):
                end = min(begin + _BLOCK, start + group_size)
                lost = torch.empty(end - begin, w.shape[1])
                for j in range(begin, end):
                    index = torch.bucketize(w[j] / divisor, middle)
                    chosen[j] = codes_of[index]
                    lost[j - begin] = (w[j] - levels[index] * scale) / inverse[j, j]
                    w[j + 1 : end].addr_(inverse[j, j + 1 : end], lost[j - begin], alpha=-1)
                w[end:].addmm_(inverse[begin:end, end:].T, lost, alpha=-1)
        codes[rows, order] = chosen.T
    return LutTensor(pack_codes(codes, bits), scales, table, name=name)


def _inverse_factor(moments: torch.Tensor, name: str) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments ``[K, K]``."""
    damped = moments.clone()
    damped.diagonal().add_(DAMPING * moments.diagonal().mean())
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    except torch.linalg.LinAlgError:
        raise FluteError(
            f"{name}: the second moments of its {len(moments)} inputs cannot be inverted: calibrate with more tokens"
        ) from None
