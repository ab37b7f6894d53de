"""GPTQ with any codebook as its grid: what rounding one input loses is made up for by the inputs still to come."""

import torch

from ..errors import FluteError
from ..format import LutTensor
from ..packing import pack_codes
from .fitted import resolve_codebook
from .round_to_nearest import distinct_entries
from .scale_search import search_scales

_BLOCK = 128  # columns whose updates of the columns beyond are made at once (section 3.3, step 2)
# Weights of a block that are worked on at once: up to so many torch runs an operation on the calling thread. Thousands
# of small parallel sections would crawl on a machine whose cores are busy.
_BLOCK_WEIGHTS = (1 << 15) - 1
# Of the second moments' mean diagonal, added to the diagonal (section 3.3, step 3). On held-out text .03 to .1 are
# within .5% at every width, the paper's .01 loses 1.2% to 1.6% more (load_tests/gptq_constants.py: SmolLM2-135M, 32768
# tokens).
DAMPING = 0.06
# Passes of coordinate descent after it: without them 5% to 7% more is lost, with one 1.3% to 1.7%, with four 1% less.
_SWEEPS = 2


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
    those that follow by the Cholesky factor U of the inverse of H. Groups are taken in the order of their inputs'
    second moments, largest first, and so are the columns in a group; a group's scales are searched when it is
    reached, against what the weights are by then. A column's error costs ``1 / U[j, j]**2``, what is left of its
    input's second moment when the inputs to come are known: that is its importance in the search, and in the fit of a
    table. Then coordinate descent (CDQuant, arXiv 2406.17542, section 3) takes each code again, all others given.

    Args:
        moments: fp32 ``[K, K]``, the mean of ``x x^T``.
        bits, group_size, codebook, scale_dtype, name: as of `quantize`.

    Raises:
        FluteError: weights or inputs that are not finite.
    """
    n, k = weight.shape
    diagonal = moments.diagonal()
    if not torch.isfinite(diagonal).all() or not torch.isfinite(weight).all():
        raise FluteError(f"{name} or its calibration inputs have values that are not finite")
    by_group = diagonal.view(-1, group_size)
    group_order = by_group.mean(-1).argsort(descending=True, stable=True)
    within = by_group.argsort(dim=-1, descending=True, stable=True)
    order = (within + torch.arange(0, k, group_size).unsqueeze(1))[group_order].flatten()
    damped = moments[order][:, order]
    damped.diagonal().add_(DAMPING * diagonal.mean())
    factor = _inverse_factor(damped, name)
    importance = torch.empty(k)
    importance[order] = factor.diagonal().square().reciprocal()

    table = resolve_codebook(codebook, weight, bits, group_size, importance)
    levels, codes_of = distinct_entries(table)
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, k // group_size, dtype=scale_dtype)
    rows = max(1, _BLOCK_WEIGHTS // min(group_size, _BLOCK))
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        # Columns of W are rows here, contiguous.
        target = weight[part].to(torch.float32).T[order].contiguous()
        index, found = _compensate(target.clone(), factor, importance[order], table, levels, group_size, scale_dtype)
        spread = found.to(torch.float32).repeat_interleave(group_size, 0)
        _descend(target, index, spread, damped, levels)
        codes[part, order] = codes_of[index].T
        scales[part, group_order] = found.T
    return LutTensor(pack_codes(codes, bits), scales, table, name=name)


def _compensate(
    w: torch.Tensor,
    factor: torch.Tensor,
    importance: torch.Tensor,
    table: torch.Tensor,
    levels: torch.Tensor,
    group_size: int,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of levels int64 ``[K, R]`` and scales ``[K/group_size, R]`` for R rows of W as ``w [K, R]``, consumed."""
    k, rows = w.shape
    middle = (levels[1:] + levels[:-1]) / 2
    index = torch.empty(k, rows, dtype=torch.int64)
    scales = torch.empty(k // group_size, rows, dtype=scale_dtype)
    for group, start in enumerate(range(0, k, group_size)):
        members = slice(start, start + group_size)
        scales[group] = search_scales(w[members].T.contiguous(), table, importance[members])
        scale = scales[group].to(torch.float32)
        divisor = torch.where(scale != 0, scale, 1.0)
        for begin in range(start, start + group_size, _BLOCK):
            end = min(begin + _BLOCK, start + group_size)
            lost = torch.empty(end - begin, rows)
            for j in range(begin, end):
                torch.bucketize(w[j] / divisor, middle, out=index[j])
                lost[j - begin] = (w[j] - levels[index[j]] * scale) / factor[j, j]
                w[j + 1 : end].addr_(factor[j, j + 1 : end], lost[j - begin], alpha=-1)
            w[end:].addmm_(factor[begin:end, end:].T, lost, alpha=-1)
    return index, scales


def _descend(
    target: torch.Tensor, index: torch.Tensor, scale: torch.Tensor, moments: torch.Tensor, levels: torch.Tensor
) -> None:
    """Passes over the columns of ``index [K, R]``: each takes the entry that is best with all others as they are.

    Args:
        target, scale: fp32 ``[K, R]``, the weights and the scale of each.
    """
    middle = (levels[1:] + levels[:-1]) / 2
    divisor = torch.where(scale != 0, scale, 1.0)
    quantized = levels[index] * scale
    gradient = moments @ (quantized - target)  # half of the loss's, by each weight
    for sweep in range(_SWEEPS):
        for begin in range(0, len(target), _BLOCK):
            end = min(begin + _BLOCK, len(target))
            block, before = slice(begin, end), quantized[begin:end].clone()
            slope = gradient[block].clone()
            for i, j in enumerate(range(begin, end)):
                wanted = quantized[j] - slope[i] / moments[j, j]
                torch.bucketize(wanted / divisor[j], middle, out=index[j])
                chosen = levels[index[j]] * scale[j]
                slope[i + 1 :].addr_(moments[j + 1 : end, j], chosen - quantized[j])
                quantized[j] = chosen
            # In the last pass what lies behind is not looked at again.
            ahead = slice(end if sweep == _SWEEPS - 1 else 0, None)
            gradient[ahead].addmm_(moments[ahead, block], quantized[block] - before)


def _inverse_factor(moments: torch.Tensor, name: str) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of moments ``[K, K]``.

    With ``V`` upper triangular and ``V V^T`` the moments it is the inverse of V, and V comes from the Cholesky factor
    of the moments in reverse order: half the work of inverting first, and no inverse that has to be definite again.
    """
    try:
        factor = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)
    except torch.linalg.LinAlgError:
        raise FluteError(
            f"{name}: the second moments of its {len(moments)} inputs cannot be inverted: calibrate with more tokens"
        ) from None
    _invert_upper(factor)
    return factor


def _invert_upper(matrix: torch.Tensor) -> None:
    """Inverts an upper triangular matrix in its place, nearly all by matrix products."""
    half = len(matrix) // 2
    if half < 64:
        matrix.copy_(torch.linalg.solve_triangular(matrix, torch.eye(len(matrix), dtype=matrix.dtype), upper=True))
        return
    first, second, beside = matrix[:half, :half], matrix[half:, half:], matrix[:half, half:]
    _invert_upper(first)
    _invert_upper(second)
    beside.copy_(first @ beside @ second).neg_()
