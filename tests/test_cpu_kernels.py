"""What the native CPU kernels compute, against the oracle, and the packed layouts."""

import functools

import pytest
import torch
from cpu_layers import (
    DTYPES,
    GROUPS,
    INT8,
    KERNELS,
    TRITS,
    check,
    each_kernel,
    make,
    need,
    pack_as,
    run_and_check,
    takes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flute import LutTensor, ops
from vllm_flute.dispatch import pack_parts
from vllm_flute.layout import TERNARY16, TILE16, TRIT20

pytestmark = pytest.mark.usefixtures("one_thread")


@each_kernel
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_input_size_and_group_size(kernel, bits):
    need(kernel)
    for k, sizes in GROUPS.items():
        for i, group_size in enumerate(sizes):
            for j, dtype in enumerate(DTYPES):
                if takes(kernel, dtype, group_size, k):
                    m = (1, 3, 9)[(i + j) % 3]
                    run_and_check(kernel, 17, k, bits, group_size, m, dtype, DTYPES[1 + (i + j) % 2], bias=m == 3)


@each_kernel
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_output_size(kernel, bits):
    need(kernel)
    for n in (1, 8, 16, 17, 48, 100):
        for dtype in DTYPES:
            if takes(kernel, dtype, 32, 96):
                run_and_check(kernel, n, 96, bits, 32, 5, dtype, bias=True)


@each_kernel
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64, 130, 530])
def test_every_number_of_tokens(kernel, m):
    need(kernel)
    for dtype in DTYPES:
        if takes(kernel, dtype, 64, 192):
            run_and_check(kernel, 40, 192, 4, 64, m, dtype, bias=m % 2 == 0)
        if takes(kernel, dtype, 96, 192):
            run_and_check(kernel, 40, 192, 3, 96, m, dtype)


@each_kernel
def test_shards_have_their_own_codebooks(kernel):
    need(kernel)
    for shards in ([16, 16], [1, 1, 1], [33, 5, 48], [100, 17]):
        run_and_check(kernel, None, 64, 4, 32, 7, torch.bfloat16, shards=shards, bias=True)


@each_kernel
def test_long_sums(kernel):
    need(kernel)
    run_and_check(kernel, 20, 14336, 2, 128, 2, torch.bfloat16)


@each_kernel
@pytest.mark.parametrize("k", [8, 16, 24, 40, 120, 264, 480, 576, 4104])
def test_trits_of_every_size(kernel, k):
    need(kernel)
    if kernel not in TRITS:
        _, packed, header = make(17, k, 1.6, k)
        with pytest.raises(RuntimeError, match=f"{kernel}.*does not take layout trit20"):
            ops.lut_linear_op(torch.zeros(1, k).bfloat16(), packed, header, None, 17, kernel)
        return
    for i, (n, m) in enumerate(((17, 1), (1, 2), (40, 3), (100, 4), (17, 8), (33, 13), (48, 33), (20, 70))):
        for j, dtype in enumerate(DTYPES):
            if takes(kernel, dtype, k, k):
                run_and_check(kernel, n, k, 1.6, k, m, dtype, DTYPES[1 + (i + j) % 2], bias=m % 2 == 0)
    for shards in ([16, 16], [1, 1, 1], [33, 5, 48]):
        run_and_check(kernel, None, k, 1.6, k, 7, torch.bfloat16, shards=shards)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_trits_there_and_back(data):
    k = 8 * data.draw(st.integers(1, 80))
    shards = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    scale_dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    parts, packed, header = make(None, k, 1.6, k, scale_dtype, shards, data.draw(st.integers(0, 1000)))
    qweight, scales, codebooks = ops.lut_unpack_op(packed, header)
    expected = torch.cat([t.qweight for t in parts])
    assert torch.equal(qweight, expected & ~(expected >> 1 & 0x55))  # code 3 became 2
    assert torch.equal(scales, torch.cat([t.scales for t in parts])) and scales.dtype == scale_dtype
    assert torch.equal(codebooks, torch.stack([t.codebook for t in parts]))


def test_trits_of_one_code_at_a_time():
    codes = torch.randint(3, (16, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = torch.cat([codes, codes[:, :4]], 1)
    t = LutTensor.from_codes(codes, torch.ones(16, 1, dtype=torch.bfloat16), torch.tensor([0.0, 1, 2, 2]))
    packed, header = pack_as(TRIT20, [t])
    for kernel in KERNELS:
        if kernel.available and kernel.name in TRITS:
            y = ops.lut_linear_op(torch.eye(64, dtype=torch.bfloat16), packed, header, None, 16, kernel.name)
            assert torch.equal(y, codes.T.to(torch.bfloat16)), kernel.name


def test_trits_take_little_memory():
    _, packed, _ = make(1536, 4096, 1.6, 4096)
    assert packed.numel() <= 1.05 * 1.6 / 8 * 1536 * 4096


@each_kernel
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("k, group_size", [(320, 64), (544, 544)])
def test_many_rows(kernel, bits, k, group_size):
    """Enough rows for every way of the vector LUT, shards of one codebook and of another."""
    need(kernel)
    parts, _, _ = make(2100, k, bits, group_size)
    other, _, _ = make(40, k, bits, group_size, seed=1)
    parts = [*parts, *other, *(LutTensor(t.qweight.clone(), t.scales, t.codebook) for t in other)]
    for layout in (TERNARY16, TRIT20) if bits == 1 else (TILE16,):
        if layout == TRIT20 and (kernel not in TRITS or group_size != k):
            continue
        packed, header = pack_as(layout, parts)
        for m in (7, 13, 40):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
            y = ops.lut_linear_op(x, packed, header, None, 2180, kernel)
            check(y, x, parts, None, kernel, layout == TRIT20)


@each_kernel
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [32, 64, 256, 1024])
def test_sums_do_not_wrap(kernel, bits, k):
    """Every product of a group at its largest and of one sign, beside a token with one input far above the others."""
    need(kernel)
    if not takes(kernel, torch.bfloat16, k, k):
        pytest.skip("group size")
    book = torch.linspace(-1, 1, 3)[[0, 1, 2, 2]] if bits == 1 else torch.linspace(-1, 1, 2**bits)
    codes = torch.full((32, k), len(book) - 1, dtype=torch.uint8)
    codes[::2] = 0
    t = LutTensor.from_codes(codes, torch.ones(32, 1, dtype=torch.bfloat16), book)
    x = torch.ones(33, k)
    x[1], x[2], x[3, 5] = -6e4 / k, 1e-3, 1e4
    x[4] = 0
    for layout in (TERNARY16, TRIT20) if bits == 1 else (TILE16,):
        if layout == TRIT20 and kernel not in TRITS:
            continue
        packed, header = pack_as(layout, [t])
        for dtype in DTYPES:
            if not takes(kernel, dtype, k, k):
                continue
            for some in (x, x[:1], x[3:4], x[1:4]):  # few tokens and many may take different paths
                y = ops.lut_linear_op(some.to(dtype), packed, header, None, 32, kernel)
                check(y, some.to(dtype), [t], None, kernel, layout == TRIT20)


# Evenly spaced values, which some kernels count instead of looking them up: about zero, beside it, all the same.
EVEN = {
    "ternary": [(-1, 0, 1, 1), (-0.5, 0, 0.5, 0.5), (0.0625, 0.3125, 0.5625, 0.5625), (1, 1, 1, 1), (3, 1, -1, -1)],
    "2 bits": [(-2, -1, 0, 1), (-1.5, -0.5, 0.5, 1.5), (0.0625, 0.3125, 0.5625, 0.8125), (1, 0, -1, -2)],
    "one of them uneven": [(-2, -1, 0, 1), (-1, -0.25, 0.25, 1)],
}


@each_kernel
@pytest.mark.parametrize("group_size", [32, 96, 512])
@pytest.mark.parametrize("books", EVEN.values(), ids=EVEN)
def test_evenly_spaced_codebooks(kernel, books, group_size):
    need(kernel)
    g = torch.Generator().manual_seed(group_size)
    k = 96 if group_size == 96 else 512
    ternary = all(book[2] == book[3] for book in books)
    parts = [
        LutTensor.from_codes(
            torch.randint(4, (20, k), generator=g, dtype=torch.uint8),
            (torch.rand(20, k // group_size, generator=g) + 0.5).bfloat16(),
            torch.tensor(book, dtype=torch.float32),
        )
        for book in books
    ]
    packed, header = pack_as(TERNARY16 if ternary else TILE16, parts)
    n = 20 * len(books)
    for dtype in DTYPES:
        if not takes(kernel, dtype, group_size, k):
            continue
        for m in (1, 2, 3, 4, 5, 9):
            x = torch.randn(m, k, generator=g).to(dtype)
            check(ops.lut_linear_op(x, packed, header, None, n, kernel), x, parts, None, kernel)


@pytest.mark.parametrize("kernel", [k.name for k in KERNELS if k.arithmetic.startswith("int")])
def test_what_is_not_a_number_stays_so(kernel):
    """Inputs that become integers: NaN and infinity must not turn into plausible values, nor reach other tokens."""
    need(kernel)
    _, packed, header = make(24, 128, 4, 64)
    for m in (2, 9, 40):
        x = torch.randn(m, 128)
        clean = ops.lut_linear_op(x, packed, header, None, 24, kernel)
        x[0, 3], x[1, 77] = float("nan"), float("inf")
        y = ops.lut_linear_op(x, packed, header, None, 24, kernel)
        assert not y[:2].isfinite().any() and torch.equal(y[2:], clean[2:])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_pack_and_linear_properties(data):
    bits = data.draw(st.integers(2, 4))
    group_size = 8 * data.draw(st.integers(1, 12))
    k = group_size * data.draw(st.integers(1, 5))
    shards = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    scale_dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    dtype = data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 1000))
    parts, packed, header = make(None, k, bits, group_size, scale_dtype, shards, seed)
    qweight, scales, codebooks = ops.lut_unpack_op(packed, header)
    assert torch.equal(qweight, torch.cat([t.qweight for t in parts]))
    assert torch.equal(scales, torch.cat([t.scales for t in parts])) and scales.dtype == scale_dtype
    assert torch.equal(codebooks, torch.stack([t.codebook for t in parts]))
    m = data.draw(st.integers(1, 20))
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for kernel in KERNELS:
        if kernel.available and takes(kernel.name, dtype, group_size, k):
            y = ops.lut_linear_op(x, packed, header, None, sum(shards), kernel.name)
            check(y, x, parts, None, kernel.name)


def test_packed_size():
    """At most 5% beyond the codes and scales themselves for a layer of a real size."""
    for bits in (2, 3, 4):
        _, packed, _ = make(1536, 4096, bits, 64)
        assert packed.numel() <= 1.05 * (1536 * 4096 * bits / 8 + 1536 * 64 * 2)


def test_one_code_at_a_time():
    """Every position of a code within a tile, by the weights that a unit input reads back."""
    k = 64
    for bits in (2, 3, 4):
        codes = torch.randint(2**bits, (16, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        book = torch.arange(2**bits, dtype=torch.float32)
        t = LutTensor.from_codes(codes, torch.ones(16, 1, dtype=torch.bfloat16), book)
        packed, header = pack_parts(t.qweight, t.scales, book[None], k, [16])
        for kernel in KERNELS:
            if kernel.available:
                x = torch.eye(k, dtype=torch.bfloat16)
                y = ops.lut_linear_op(x, packed, header, None, 16, kernel.name)
                if kernel.name in INT8:  # within half a step of the codebook, which is less than half a code
                    check(y, x, [t], None, kernel.name)
                else:
                    assert torch.equal(y, codes.T.to(torch.bfloat16)), kernel.name


@each_kernel
def test_shapes_of_x(kernel):
    need(kernel)
    parts, packed, header = make(24, 64, 4, 32)
    linear = functools.partial(ops.lut_linear_op, packed=packed, header=header, bias=None, N=24, kernel=kernel)
    x = torch.randn(2, 3, 5, 64, dtype=torch.bfloat16)
    y = linear(x)
    assert y.shape == (2, 3, 5, 24)
    assert torch.equal(linear(x[0, 0, 0]), linear(x[:1, 0, 0])[0])
    strided = torch.randn(64, 7, dtype=torch.bfloat16).T
    assert torch.equal(linear(strided), linear(strided.contiguous()))
    wide = torch.randn(7, 100, dtype=torch.bfloat16)[:, 3:67]
    assert torch.equal(linear(wide), linear(wide.contiguous()))
    offset = torch.randn(7 * 64 + 1, dtype=torch.bfloat16)[1:].view(7, 64)
    assert torch.equal(linear(offset), linear(offset.clone()))
    assert linear(x[:0]).shape == (0, 3, 5, 24)


@each_kernel
def test_result_does_not_depend_on_threads(kernel):
    need(kernel)
    _, packed, header = make(150, 576, 3, 64)
    for m in (1, 6, 100):
        x = torch.randn(m, 576, dtype=torch.bfloat16)
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.lut_linear_op(x, packed, header, None, 150, kernel))
        assert all(torch.equal(results[0], y) for y in results[1:])


def test_special_values_reach_the_result():
    """Infinities and NaNs of x come out where they must, in every dtype, and padding adds none."""
    for dtype in DTYPES:
        parts, packed, header = make(20, 40, 4, 8)
        x = torch.zeros(3, 40, dtype=dtype)
        x[0, 39], x[1, 0] = float("inf"), float("nan")
        for kernel in KERNELS:
            if kernel.available and takes(kernel.name, dtype, 8, 40):
                y = ops.lut_linear_op(x, packed, header, None, 20, kernel.name)
                assert not y[0].isfinite().any() and y[1].isnan().all() and (y[2] == 0).all(), kernel.name
