"""What the optional parts of a layer add around the kernels: permuted inputs, and offsets of groups."""

import torch


def permuted(x: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """The inputs ``[..., K]`` in the order of the codes' columns."""
    return x if perm is None else x.index_select(-1, perm)


def add_offsets(y: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """``y[..., N]`` plus ``offsets[N, G]`` times the sum of each group of inputs ``x[..., K]``.

    In fp32, rounded to y's dtype: with offsets for every 128 inputs the product is 1/128 of the layer's.
    """
    if offsets is None:
        return y
    sums = x.unflatten(-1, (offsets.shape[1], -1)).sum(-1, dtype=torch.float32)
    return (y + torch.nn.functional.linear(sums, offsets.to(torch.float32))).to(y.dtype)
