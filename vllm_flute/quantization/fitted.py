"""A codebook fitted to one weight matrix, in turns with its scales."""

import torch

from ..codebook import lloyd_max, make_codebook
from .cluster import cluster
from .scale_search import search_scales

FITTED = "fitted"  # the name that asks for it
# Weights that a table is fitted to, in whole rows spread over the matrix: 16 levels of 4096 weights each.
_SAMPLE = 1 << 16
_ROUNDS = 3  # the error falls by less than 0.1% in a fourth


def resolve_codebook(
    codebook: str | torch.Tensor, weight: torch.Tensor, bits: int, group_size: int, importance: torch.Tensor | None
) -> torch.Tensor:
    """The fp32 table ``[2**bits]`` on the weight's device: `make_codebook`'s, or `fit_codebook`'s for "fitted"."""
    if isinstance(codebook, str) and codebook == FITTED:
        return fit_codebook(weight, bits, group_size, importance)
    return make_codebook(codebook, bits).to(weight.device)


def fit_codebook(
    weight: torch.Tensor, bits: int, group_size: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The table for a weight ``[N, K]`` with scales of its own: exact clusters and exact scales in turns.

    Each half lowers ``sum(importance * (w - scale * entry)**2)``: for given scales a table entry is the centre of a
    cluster of ``w / scale``, weighted by ``importance * scale**2`` (the sensitivity-weighted clusters of SqueezeLLM,
    arXiv 2306.07629, section 4.1, with a scale for each group and the inputs' second moments for sensitivity).

    Args:
        importance: fp32 ``[K]`` or None.

    Returns fp32 ``[2**bits]``, ascending.
    """
    n, k = weight.shape
    table = lloyd_max(bits).to(weight.device)
    rows = torch.linspace(0, n - 1, max(1, min(n, _SAMPLE // k))).long()
    groups = weight[rows.to(weight.device)].to(torch.float32).view(-1, k // group_size, group_size)
    share = None if importance is None else importance.to(weight.device).view(k // group_size, group_size)
    for _ in range(_ROUNDS):
        scales = search_scales(groups, table, share).unsqueeze(-1)
        mass = (scales.square() if share is None else scales.square() * share).expand(groups.shape)
        used = mass > 0
        if not used.any():
            break
        values = (groups / scales)[used]
        centres = cluster(values.double().cpu().numpy(), mass[used].double().cpu().numpy(), 2**bits)
        table = torch.from_numpy(centres).to(weight.device, torch.float32)
    return table
