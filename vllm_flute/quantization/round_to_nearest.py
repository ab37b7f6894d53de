"""Round to nearest: one scale a group, then for each weight the nearest table entry."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ..codebook import default_codebook, make_codebook
from ..errors import FluteError
from ..format import SCALE_DTYPES, LutTensor, check_group_size
from ..packing import pack_codes
from .scale_search import search_scales

METHODS = ("scale-search", "absmax")

# Weights worked on at once. They stay in a core's cache, and torch runs operations of fewer than 32768 elements on
# the calling thread: dozens of small parallel sections would crawl on a machine whose cores are busy.
_CHUNK_WEIGHTS = (1 << 15) - 1
# A GPU runs about a hundred small kernels for a chunk: so many weights keep it busy; scale search at 4 bits then takes
# 2 GB for them.
_CHUNK_WEIGHTS_GPU = 1 << 22


def nearest_codes(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Code uint8 of the nearest codebook entry for each value; a tie takes the entry that is smaller."""
    ascending, order = torch.unique(codebook, return_inverse=True)
    # Of equal entries (a padded short table) the first keeps the code.
    first = torch.full((ascending.numel(),), codebook.numel(), dtype=torch.int64)
    first.scatter_reduce_(0, order.cpu(), torch.arange(codebook.numel()), "amin")
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    # At most 15 comparisons in cache: half the time of torch.bucketize.
    index = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for midpoint in midpoints.tolist():
        index += values > midpoint
    codes = first.to(torch.uint8).to(values.device).index_select(0, index.view(-1).to(torch.int32))
    return codes.view(values.shape)


def absmax_scales(groups: torch.Tensor, codebook: torch.Tensor, name: str | None) -> torch.Tensor:
    """One fp32 scale for each group ``[..., group_size]``.

    The largest magnitude of a group meets the largest of the table; for ternary tables the scale is the mean
    magnitude (BitNet b1.58, arXiv 2402.17764, equation 1 per group): absmax would round nearly all to zero.
    """
    if name == "ternary":
        return groups.abs().mean(-1)
    # A group whose extreme is positive is limited by the positive end of the table: int tables are lopsided.
    top = min(codebook.max().item(), -codebook.min().item())
    if top <= 0:  # a one-sided table given by the user
        top = codebook.abs().max().item()
    return groups.abs().amax(-1) / top


def quantize(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int = 64,
    codebook: str | torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
    method: str = "scale-search",
    importance: torch.Tensor | None = None,
) -> LutTensor:
    """Quantize a weight ``[N, K]`` of any float dtype to a LutTensor on the same device.

    Args:
        bits: 2, 3 or 4.
        group_size: inputs that share a scale: a multiple of 8 that divides K.
        codebook: "lloyd-max" (the default), "nf", "fp4" (4 bits), "int", "ternary" (2 bits) or a tensor of at most
            ``2**bits`` values.
        scale_dtype: bf16 or fp16; codes are chosen against the rounded scale.
        name: what errors call this weight.
        method: "scale-search" takes the scales of least squared error, "absmax" those whose largest table entry
            meets the group's largest weight: ten times as fast.
        importance: fp32 ``[K]``, the second moment of each input, which weights the error of "scale-search".

    Raises:
        FluteError: unsupported width, group size, codebook or method, or weights that are not finite.
    """
    codebook = default_codebook(bits) if codebook is None else codebook
    table = make_codebook(codebook, bits).to(weight.device)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FluteError(f"{name} is {weight.dtype} {list(weight.shape)}, expected a float matrix [N, K]")
    if scale_dtype not in SCALE_DTYPES:
        raise FluteError(f"scale dtype {scale_dtype} is not supported (supported: bfloat16, float16)")
    if method not in METHODS:
        raise FluteError(f"unknown method {method!r} (known: {', '.join(METHODS)})")
    n, k = weight.shape
    try:
        check_group_size(group_size, k)
    except FluteError as e:
        raise FluteError(f"{name}: {e}") from None

    qweight = torch.empty(n, k * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // group_size, dtype=scale_dtype, device=weight.device)
    if importance is not None:
        importance = importance.to(weight.device, torch.float32).view(k // group_size, group_size)
    on_cpu = weight.device.type == "cpu"
    rows = max(1, (_CHUNK_WEIGHTS if on_cpu else _CHUNK_WEIGHTS_GPU) // k)

    def convert(i: int) -> None:
        groups = weight[i : i + rows].to(torch.float32).view(-1, k // group_size, group_size)
        if method == "absmax":
            s = absmax_scales(groups, table, codebook if isinstance(codebook, str) else None)
        else:
            s = search_scales(groups, table, importance)
        s = s.to(scale_dtype)
        if not torch.isfinite(s).all() or not torch.isfinite(groups).all():
            raise FluteError(f"{name} has values that are not finite, or too large for {scale_dtype} scales")
        s32 = s.to(torch.float32).unsqueeze(-1)
        # A group of zeros has scale 0: divide by 1 instead, its weights are 0 whatever the code.
        codes = nearest_codes(groups / torch.where(s32 > 0, s32, 1.0), table)
        qweight[i : i + rows] = pack_codes(codes.view(-1, k), bits)
        scales[i : i + rows] = s

    # A GPU's work stays on the caller's stream, which another thread would not know.
    with ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1) as pool:
        for _ in (pool.map if on_cpu else map)(convert, range(0, n, rows)):
            pass
    return LutTensor(qweight, scales, table, name=name)
