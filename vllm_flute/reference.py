"""The oracle: what every kernel must compute, in plain fp32 torch."""

import torch


def dequantize(t, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weight ``[N, K]`` of a LutTensor: ``codebook[code] * scale`` in fp32, rounded once to ``dtype``.

    An offset is added in fp32 before that; a permutation puts the columns where their inputs are.
    """
    n, k = t.shape
    values = t.codebook.index_select(0, t.codes().view(-1).to(torch.int32))
    weight = values.view(n, -1, t.group_size) * t.scales.to(torch.float32).unsqueeze(-1)
    if t.offsets is not None:
        weight += t.offsets.to(torch.float32).unsqueeze(-1)
    weight = weight.view(n, k).to(dtype)
    if t.perm is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, t.perm.long(), weight)


def linear(x: torch.Tensor, t, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x[..., K] @ W^T + bias`` with the matrix product in fp32, returned in ``x.dtype`` as ``[..., N]``."""
    y = x.to(torch.float32) @ dequantize(t).T
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)
