"""Products of bf16 values by the units that the CPU has for them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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


class WideProducts(TorchFunctionMode):
    """While it is on, bf16 linear layers and attention multiply their values in fp32, and round their sums to bf16.

    That is what bf16 units do. torch's own loop for a CPU that has none is slower: a linear layer nine times on a Zen 3
    (docs/speed.md), attention's backward pass too.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        if func not in _WIDE or not args or args[0].dtype != torch.bfloat16 or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        return _WIDE[func](*args, **kwargs).to(torch.bfloat16)


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
    return out if bias is None else out + bias


def _attention(*args, **kwargs) -> torch.Tensor:
    def wide(value):
        return value.to(torch.float32) if getattr(value, "dtype", None) == torch.bfloat16 else value

    return F.scaled_dot_product_attention(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})


_WIDE = {F.linear: _linear, F.scaled_dot_product_attention: _attention}


@contextmanager
def fast_products() -> Iterator[None]:
    """While it is on, bf16 linear layers and attention take the faster way that the CPU has to the same sums."""
    with nullcontext() if has_bf16_products() else WideProducts():
        yield
