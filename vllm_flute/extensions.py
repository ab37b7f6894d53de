"""What the optional parts of a layer add around the kernels: permuted inputs, and offsets of groups."""

from collections.abc import Sequence

import torch


def permuted(x: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """The inputs ``[..., K]`` in the order of the codes' columns."""
    return x if perm is None else x.index_select(-1, perm)


def centred(
    codebooks: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, shards: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same weights from tables around 0: (codebooks fp32 ``[S, 2**bits]``, offsets fp32 ``[N, G]``).

    A kernel's share of a sum is rounded before the offsets' share is added. With a table of 0 to 15, say, both are many
    times the sum, and in bf16 the rounding would be too.

    Args:
        scales, offsets: ``[N, G]``.
        shards: rows of each table's matrix; they sum to N.
    """
    middle = (codebooks.amin(1, keepdim=True) + codebooks.amax(1, keepdim=True)) / 2
    rows = middle.repeat_interleave(torch.tensor(shards, device=middle.device), dim=0)
    return codebooks - middle, offsets.to(torch.float32) + scales.to(torch.float32) * rows


def add_offsets(y: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """``y[..., N]`` plus ``offsets[N, G]`` times the sum of each group of inputs ``x[..., K]``.

    In fp32, rounded to y's dtype: with offsets for every 128 inputs the product is 1/128 of the layer's.
    """
    if offsets is None:
        return y
    sums = x.unflatten(-1, (offsets.shape[1], -1)).sum(-1, dtype=torch.float32)
    return (y + torch.nn.functional.linear(sums, offsets.to(torch.float32))).to(y.dtype)
