"""Products of bf16 values by the units that the CPU has for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, reduce
from operator import add

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Weights that are in memory as fp32 at once: few enough for a cache, and for pages that the allocator keeps.
_AT_ONCE = 1 << 20


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products of values that are bf16, by the CPU's bf16 units where it has some: exact, with fp32 sums.

    2.4 times as fast at K = 1536 with AMX, on one core. torch has no bf16 product with an fp32 result on a CPU.
    """
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@cache
def has_bf16_products() -> bool:
    """Whether torch multiplies bf16 matrices by more than a plain loop on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, of bf16 tensors on a CPU without bf16 units in fp32 with sums that are rounded to bf16.

    That is what bf16 units do. torch's own loop for a CPU that has none is slower: nine times on a Zen 3
    (docs/speed.md).
    """
    return (_linear if _are_wide(x) else F.linear)(x, weight, bias)


def attention(*args, **kwargs) -> torch.Tensor:
    """`F.scaled_dot_product_attention`, as `linear`; its backward pass gains as much."""
    return (_attention if _are_wide(args[0]) else F.scaled_dot_product_attention)(*args, **kwargs)


def _are_wide(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bf16_products()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    x = x.to(torch.float32)
    # Weights are converted in parts, by rows as they lie in memory: across them it is ten times as slow. Those of a
    # transposed matrix are parts of the sums.
    if weight.stride(1) == 1:
        parts = weight.split(max(1, _AT_ONCE // weight.shape[1]))
        outs = [F.linear(x, part.to(torch.float32)) for part in parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    else:
        parts = weight.T.split(max(1, _AT_ONCE // weight.shape[0]))
        inputs = x.split([len(part) for part in parts], dim=-1)
        out = reduce(add, (one @ part.to(torch.float32) for one, part in zip(inputs, parts, strict=True)))
    return (out if bias is None else out + bias).to(torch.bfloat16)


def _attention(*args, **kwargs) -> torch.Tensor:
    def wide(value):
        return value.to(torch.float32) if getattr(value, "dtype", None) == torch.bfloat16 else value

    args, kwargs = map(wide, args), {key: wide(value) for key, value in kwargs.items()}
    return F.scaled_dot_product_attention(*args, **kwargs).to(torch.bfloat16)


class FastProducts(TorchFunctionMode):
    """While it is on, torch's linear layers and attention are `linear` and `attention`: for other packages' models."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch for each of its functions."""
        return _OURS.get(func, func)(*args, **kwargs or {})


_OURS = {F.linear: linear, F.scaled_dot_product_attention: attention}
