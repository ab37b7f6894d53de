"""Round to nearest: one scale a group, then for each weight the nearest table entry."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ..codebook import DEFAULT_CODEBOOK, check_bits
from ..errors import FluteError
from ..format import SCALE_DTYPES, LutTensor, check_group_size
from ..packing import pack_codes
from .fitted import resolve_codebook
from .scale_search import search_scales

_METHODS = ("scale-search", "absmax")
DATA_FREE = "scale-search"  # the default, of the command and of online quantization too

# Weights worked on at once. They stay in a core's cache, and torch runs operations of fewer than 32768 elements on
# the calling thread: dozens of small parallel sections would crawl on a machine whose cores are busy.
_CHUNK_WEIGHTS = (1 << 15) - 1
# A GPU runs about a hundred small kernels for a chunk: so many weights keep it busy; scale search at 4 bits then takes
# 2 GB for them.
_CHUNK_WEIGHTS_GPU = 1 << 22


def distinct_entries(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's values in ascending order, and the code uint8 of each; of equal entries the first has the code."""
    levels, position = torch.unique(codebook, return_inverse=True)
    codes = torch.full((levels.numel(),), codebook.numel(), dtype=torch.int64)
    codes.scatter_reduce_(0, position.cpu(), torch.arange(codebook.numel()), "amin")
    return levels, codes.to(torch.uint8).to(codebook.device)


def nearest_codes(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Code uint8 of the nearest codebook entry for each value; a tie takes the entry that is smaller."""
    levels, codes = distinct_entries(codebook)
    # At most 15 comparisons in cache: half the time of torch.bucketize.
    index = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for midpoint in ((levels[1:] + levels[:-1]) / 2).tolist():
        index += values > midpoint
    return codes.index_select(0, index.view(-1).to(torch.int32)).view(values.shape)


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
    codebook: str | torch.Tensor = DEFAULT_CODEBOOK,
    scale_dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
    method: str = DATA_FREE,
    importance: torch.Tensor | None = None,
) -> LutTensor:
    """Quantize a weight ``[N, K]`` of any float dtype to a LutTensor on the same device.

    Args:
        bits: 2, 3 or 4.
        group_size: inputs that share a scale: a multiple of 8 that divides K.
        codebook: "nf", "lloyd-max", "fp4" (4 bits), "int", "ternary" (2 bits), "fitted" (a table of this weight's own,
            see `fit_codebook`) or a tensor of at most ``2**bits`` values.
        scale_dtype: bf16 or fp16; codes are chosen against the rounded scale.
        name: what errors call this weight.
        method: "scale-search" takes the scales of least squared error (see `search_scales`), "absmax" those whose
            largest table entry meets the group's largest weight, which takes a third of the time.
        importance: fp32 ``[K]``, the second moment of each input, which weights the error of "scale-search".

    Raises:
        FluteError: unsupported width, group size, codebook or method, or weights that are not finite.
    """
    check_bits(bits)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FluteError(f"{name} is {weight.dtype} {list(weight.shape)}, expected a float matrix [N, K]")
    if scale_dtype not in SCALE_DTYPES:
        raise FluteError(f"scale dtype {scale_dtype} is not supported (supported: bfloat16, float16)")
    if method not in _METHODS:
        raise FluteError(f"unknown method {method!r} (known: {', '.join(_METHODS)})")
    if importance is not None and method == "absmax":
        raise FluteError("method absmax weights no errors: importance is for scale-search")
    n, k = weight.shape
    try:
        check_group_size(group_size, k)
    except FluteError as e:
        raise FluteError(f"{name}: {e}") from None
    if importance is not None:
        importance = importance.to(weight.device, torch.float32)
    table = resolve_codebook(codebook, weight, bits, group_size, importance)

    qweight = torch.empty(n, k * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // group_size, dtype=scale_dtype, device=weight.device)
    if importance is not None:
        importance = importance.view(k // group_size, group_size)
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
        codes = nearest_codes(groups / torch.where(s32 != 0, s32, 1.0), table)
        qweight[i : i + rows] = pack_codes(codes.view(-1, k), bits)
        scales[i : i + rows] = s

    # A GPU's work stays on the caller's stream, which another thread would not know.
    with ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1) as pool:
        for _ in (pool.map if on_cpu else map)(convert, range(0, n, rows)):
            pass
    return LutTensor(qweight, scales, table, name=name)
