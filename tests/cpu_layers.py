"""Random layers for the native CPU kernels, and the error that each kernel may make."""

import functools

import pytest
import torch

from vllm_flute import LutTensor, ops, reference
from vllm_flute.backends import cpu
from vllm_flute.layout import TERNARY16, TILE16, TRIT20, Layout
from vllm_flute.packing import pack_codes

# Every installation builds it, on any CPU: without it these tests fail, they do not skip.
assert not cpu.load(), cpu.load()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = cpu.kernels()
ROUNDS_WEIGHTS = tuple(k.name for k in KERNELS if k.arithmetic == "bf16 weights")  # and take bf16 activations only
INT16 = tuple(k.name for k in KERNELS if k.arithmetic == "int16")  # products of an input and a codebook value
INT16_PRODUCTS = tuple(k.name for k in KERNELS if k.arithmetic == "int16 products")  # of inputs and codebook values
INT8 = tuple(k.name for k in KERNELS if k.arithmetic == "int8")  # inputs and weights


def each_kernel(function):
    return pytest.mark.parametrize("kernel", [k.name for k in KERNELS])(function)


def need(kernel: str) -> None:
    item = next(k for k in KERNELS if k.name == kernel)
    if not item.available:
        pytest.skip(f"{kernel}: {item.why}")


# Which kernels take layout TRIT20; each of the others has its 2 bits.
TRITS = ("reference", "gemv-avx2", "gemv-avx512", "gemv-avx512bf16", "vlut-avx2", "vlut-avx512")


def takes(kernel: str, dtype: torch.dtype, group_size: int, k: int) -> bool:
    if kernel in (*INT16, *INT16_PRODUCTS, "gemv-avx512bf16") and group_size % 32 and group_size != k:
        return False
    if kernel == "sums-amxbf16" and group_size not in (32, 64, 128, k) and group_size % 256:
        return False
    return kernel not in ROUNDS_WEIGHTS or dtype == torch.bfloat16


def make(n, k, bits, group_size, scale_dtype=torch.bfloat16, shards=None, seed=0):
    """Random shards, a codebook each: (LutTensors, packed, header). bits=1: ternary, of 2 bits; 1.6: as TRIT20."""
    return _make(n, k, bits, group_size, scale_dtype, shards and tuple(shards), seed)


@functools.lru_cache(maxsize=64)
def _make(n, k, bits, group_size, scale_dtype, shards, seed):
    g = torch.Generator().manual_seed(seed)
    layout = {1: TERNARY16, 1.6: TRIT20}.get(bits, TILE16)
    ternary, bits = bits < 2, max(bits, 2)
    parts = [
        LutTensor(
            pack_codes(torch.randint(2**bits, (rows, k), generator=g, dtype=torch.uint8), bits),
            (torch.rand(rows, k // group_size, generator=g) + 0.5).to(scale_dtype),
            torch.randn(4, generator=g)[[0, 1, 2, 2]] if ternary else torch.randn(2**bits, generator=g),
        )
        for rows in shards or [n]
    ]
    return parts, *pack_as(layout, parts)


def pack_as(layout, parts):
    """(packed, header) of shards in this layout, whatever `pack_parts` takes on this CPU."""
    spec = Layout(
        layout,
        parts[0].bits,
        parts[0].group_size,
        parts[0].shape[1],
        parts[0].scales.dtype,
        tuple(t.shape[0] for t in parts),
    )
    tensors = [t.qweight for t in parts], [t.scales for t in parts], [t.codebook[None] for t in parts]
    header = spec.header()
    return ops.lut_pack_op(*(torch.cat(each) for each in tensors), header), header


def int16_error(x, parts, longest):
    """What 16-bit sums may add to each output (kernels/cpu/vlut.inc.h).

    In a block of B inputs (a group, or up to 128 of a longer one, 160 in layout TRIT20) each product of an input
    and a codebook value is rounded by half a unit, which is sum |x| * max |codebook| / (32766 - B/2).
    """
    group_size = parts[0].group_size
    blocks = [
        [b.shape[-1] / 2 * b.sum(-1) / (32766 - longest / 2) for b in g.split(longest, -1)]
        for g in x.double().abs().split(group_size, -1)
    ]
    halves = torch.stack([sum(group) for group in blocks], -1)
    return halves @ torch.cat([t.scales.double().abs() * t.codebook.double().abs().max() for t in parts]).T


def int16_products_error(x, parts):
    """What rounding to 16-bit integers may add to each output (kernels/cpu/dot16.inc.h).

    Inputs are multiples of one step for each block of up to 128 in a group, the larger of sum |x| / (131072 - B/2) and
    max |x| / 32639; codebook values of 1/16383 of their largest. With half steps dx and dw, |xw - x'w'| is at most
    |w| dx + |x| dw + dx dw. In fp32 a step and its reciprocal are off by 2^-20 at most.
    """
    group_size = parts[0].group_size
    blocks = [b for group in x.double().abs().split(group_size, -1) for b in group.split(128, -1)]
    steps = [torch.maximum(b.sum(-1) / (131072 - 64), b.amax(-1) / 32639)[..., None].expand_as(b) for b in blocks]
    dx = torch.cat(steps, -1) / 2 * (1 + 2**-20)
    scales = torch.cat([t.scales.double().abs() * t.codebook.double().abs().max() for t in parts])
    dw = scales.repeat_interleave(group_size, 1) / 32766 * (1 + 2**-20)
    weight = torch.cat([reference.dequantize(t) for t in parts]).double().abs()
    return dx @ weight.T + x.double().abs() @ dw.T + dx @ dw.T


def int8_error(x, parts):
    """What rounding to int8 may add to each output.

    Inputs are multiples of 1/127 of the largest magnitude of their block (a group, or up to 256 inputs of a longer
    one), weights of 1/127 of the largest that their group can hold: with half steps dx and dw, |xw - x'w'| is at
    most |w| dx + |x| dw + dx dw. In fp32 the step, its reciprocal and the quotient round by 2^-24 each, which makes a
    half step at most 1 + 2^-14 as long.
    """
    group_size = parts[0].group_size
    blocks = [b for group in x.double().abs().split(group_size, -1) for b in group.split(256, -1)]
    largest = [block.amax(-1, keepdim=True).expand_as(block) for block in blocks]
    dx = torch.cat(largest, -1) / 254 * (1 + 2**-14)
    scales = torch.cat([t.scales.double().abs() * t.codebook.double().abs().max() for t in parts])
    dw = scales.repeat_interleave(group_size, 1) / 254 * (1 + 2**-14)
    weight = torch.cat([reference.dequantize(t) for t in parts]).double().abs()
    return dx @ weight.T + x.double().abs() @ dw.T + dx @ dw.T


def check(y, x, parts, bias, kernel, trits=False):
    """y against the oracle's weights in fp64, within what the arithmetic allows.

    A sum of K products in fp32, each product and each addition rounded, is off by at most (K + 8) * 2^-24 of the sum of
    magnitudes (8: scaling, partial sums, bias). Weights in bf16 add 2^-8 of it, and the result is rounded once.
    Other arithmetics have bounds of their own, and sum what is in error too.
    """
    weight = torch.cat([reference.dequantize(t) for t in parts]).double()
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    unit, smallest = {torch.float32: (0, 0), torch.bfloat16: (2**-8, 0), torch.float16: (2**-11, 2**-24)}[y.dtype]
    sums = magnitude * ((x.shape[-1] + 8) * 2**-24 + (2**-8 if kernel in ROUNDS_WEIGHTS else 0))
    if kernel in INT16:
        sums = sums + int16_error(x, parts, 160 if trits else 128) * (1 + (x.shape[-1] + 8) * 2**-24)
    if kernel in INT16_PRODUCTS:
        sums = sums + int16_products_error(x, parts) * (1 + (x.shape[-1] + 8) * 2**-24)
    if kernel in INT8:
        sums = sums + int8_error(x, parts) * (1 + (x.shape[-1] + 8) * 2**-24)
    bound = sums + (exact.abs() + sums) * unit + smallest
    assert y.shape == exact.shape
    excess = (y.double() - exact).abs() - bound
    assert not (excess > 0).any() and not y.isnan().any(), f"{excess.max().item()} beyond the bound"


def run_and_check(kernel, n, k, bits, group_size, m, dtype, scale_dtype=torch.bfloat16, bias=False, shards=None):
    parts, packed, header = make(n, k, bits, group_size, scale_dtype, shards)
    n = sum(t.shape[0] for t in parts)
    g = torch.Generator().manual_seed(m + 1)
    x = torch.randn(m, k, generator=g).to(dtype)
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    y = ops.lut_linear_op(x, packed, header, b, n, kernel)
    assert y.dtype == dtype and y.is_contiguous()
    check(y, x, parts, b, kernel, bits == 1.6)


GROUPS = {8: (8,), 24: (8, 24), 32: (8, 16, 32), 40: (8, 40), 64: (16, 32, 64), 96: (24, 32, 48, 96)}
GROUPS |= {576: (16, 64, 192, 576), 1536: (128, 256, 1536)}
