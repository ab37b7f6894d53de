"""The native CPU kernels against the oracle, the packed layout, the dispatcher, the counters and the refusals."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flute import LutTensor, counters, ops, reference
from vllm_flute.backends import cpu
from vllm_flute.dispatch import pack_parts
from vllm_flute.layout import TERNARY16, TILE16, TRIT20, Layout
from vllm_flute.packing import pack_codes

# Every installation builds it, on any CPU: without it these tests fail, they do not skip.
assert not cpu.load(), cpu.load()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = cpu.kernels()
ROUNDS_WEIGHTS = tuple(k.name for k in KERNELS if k.arithmetic == "bf16 weights")  # and take bf16 activations only
INT16 = tuple(k.name for k in KERNELS if k.arithmetic == "int16")  # products of an input and a codebook value
INT8 = tuple(k.name for k in KERNELS if k.arithmetic == "int8")  # inputs and weights


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny layers on one thread, so that a busy machine does not wait at barriers; a test of its own takes more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def each_kernel(function):
    return pytest.mark.parametrize("kernel", [k.name for k in KERNELS])(function)


def need(kernel: str) -> None:
    item = next(k for k in KERNELS if k.name == kernel)
    if not item.available:
        pytest.skip(f"{kernel}: {item.why}")


# Which kernels take layout TRIT20; each of the others has its 2 bits.
TRITS = ("reference", "gemv-avx2", "gemv-avx512", "gemv-avx512bf16", "vlut-avx2", "vlut-avx512")


def takes(kernel: str, dtype: torch.dtype, group_size: int, k: int) -> bool:
    if kernel in (*INT16, "gemv-avx512bf16") and group_size % 32 and group_size != k:
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


# ---- layout TRIT20 ----


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


def test_which_ternary_weights_are_trits():
    book = torch.tensor([[-1.0, 0, 1, 1]])
    assert cpu.layout(book) == TERNARY16 and cpu.layout(torch.zeros(1, 16), True) == TILE16
    assert cpu.layout(torch.tensor([[-1.0, 0, 1, 2]]), True) == TILE16
    for isa, activations, layout in (("scalar", "", TERNARY16), ("", "int8", TERNARY16), ("avx512bf16", "", TRIT20)):
        if isa != "avx512bf16" or any(k.isa == isa and k.available for k in KERNELS):
            assert ternary_in_a_process(isa, activations)[0] == layout


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_trits_on_every_isa(isa):
    if isa != "scalar" and not any(k.isa == isa and k.available for k in KERNELS):
        pytest.skip(f"this CPU has no {isa}")
    _, result, names = ternary_in_a_process(isa, "")
    assert set(names) <= set(TRITS) and (names == ["reference"] * 3) == (isa == "scalar")
    _, oracle, _ = ternary_in_a_process("scalar", "")
    torch.testing.assert_close(torch.tensor(result), torch.tensor(oracle), rtol=1e-5, atol=1e-4)


TERNARY_IN_A_PROCESS = """
import json, torch
from vllm_flute import ops
from vllm_flute.backends import cpu
from vllm_flute.dispatch import pack_parts
from vllm_flute.layout import TRIT20, Layout
torch.manual_seed(0)
q, s, c = torch.randint(256, (24, 66), dtype=torch.uint8), torch.rand(24, 1).to(torch.bfloat16), torch.randn(1, 3)
parts = q, s, torch.cat([c, c[:, 2:]], 1)
_, chosen = pack_parts(*parts, 264, [24])
header = Layout(TRIT20, 2, 264, 264, torch.bfloat16, (24,)).header()
packed, result, names = ops.lut_pack_op(*parts, header), [], []
for m in (1, 7, 70):
    result += ops.lut_linear_op(torch.randn(m, 264), packed, header, None, 24, "").flatten().tolist()
    names.append(cpu.choose(header, m, torch.float32))
print(json.dumps([Layout.read(chosen).layout, result, names]))
"""


@functools.cache
def ternary_in_a_process(isa: str, activations: str):
    env = os.environ | {"VLLM_FLUTE_ISA": isa, "VLLM_FLUTE_ACTIVATIONS": activations}
    script = [sys.executable, "-c", TERNARY_IN_A_PROCESS]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- choices, and what holds for every layout ----


def test_default_kernel_on_every_layer():
    for bits in (2, 3, 4):
        for k, sizes in GROUPS.items():
            for group_size in sizes:
                for m in (1, 20, 70):
                    _, packed, header = make(24, k, bits, group_size)
                    name = cpu.choose(header, m, torch.bfloat16)
                    assert name in [k.name for k in KERNELS if k.available]
                    x = torch.randn(m, k, dtype=torch.bfloat16)
                    y = ops.lut_linear_op(x, packed, header, None, 24, "")
                    assert torch.equal(y, ops.lut_linear_op(x, packed, header, None, 24, name))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_fp32_takes_exact_arithmetic(bits):
    _, _, header = make(16, 64, bits, 64)
    for m in (1, 8, 64, 1000):
        assert cpu.choose(header, m, torch.float32) not in ROUNDS_WEIGHTS + INT16
        assert cpu.choose(header, m, torch.float16) not in ROUNDS_WEIGHTS


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
            if takes(kernel, dtype, k, k):
                y = ops.lut_linear_op(x.to(dtype), packed, header, None, 32, kernel)
                check(y, x.to(dtype), [t], None, kernel, layout == TRIT20)


@pytest.mark.parametrize("kernel", [k.name for k in KERNELS if k.arithmetic in ("int16", "int8")])
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


@pytest.mark.parametrize("activations", ["", "16", "int8"])
def test_int8_only_where_it_is_asked_for(activations):
    described, _, _, chosen = with_isa("", activations)
    assert (described["activations"], described["error"]) == (activations or "16", "")
    asked = activations == "int8" and any(k.name in INT8 and k.available for k in KERNELS)
    assert [name in INT8 for name in chosen] == [asked] * 2


def test_table_never_brings_int8_unasked():
    """A measured table with a line for an int8 kernel is read without it, and one of others without them if asked."""
    script = """
import ctypes, json, torch
from vllm_flute.backends import cpu
from vllm_flute.layout import TILE16, Layout
assert not cpu.load(), cpu.load()
header = Layout(TILE16, 4, 32, 64, torch.bfloat16, (16,)).header()
chosen = []
for arithmetic in ("int8", "fp32"):
    slots = [k.slot for k in cpu.kernels() if k.available and k.arithmetic == arithmetic]
    lines = (ctypes.c_int64 * 5)(4, 1, 2**62, 2**62, slots[-1])
    cpu._load()[0].flute_cpu_set_table(ctypes.addressof(lines), 1)
    chosen.append(cpu.choose(header, 4, torch.bfloat16))
print(json.dumps(chosen))
"""
    if not any(k.name in INT8 and k.available for k in KERNELS):
        pytest.skip("this CPU has no int8 kernel")
    for activations, int8 in (("", [False, False]), ("int8", [True, True])):
        env = os.environ | {"VLLM_FLUTE_ACTIVATIONS": activations}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert [name in INT8 for name in json.loads(done.stdout)] == int8


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


def test_opcheck():
    _, packed, header = make(24, 64, 4, 32)
    for dtype in DTYPES:
        for bias in (None, torch.randn(24).to(dtype)):
            args = (torch.randn(2, 3, 64).to(dtype), packed, header, bias, 24, "")
            torch.library.opcheck(ops.lut_linear_op, args)


def test_compiled_call():
    _, packed, header = make(24, 64, 4, 32)
    f = torch.compile(
        lambda x: ops.lut_linear_op(x, packed, header, None, 24, "") * 2, backend="aot_eager", dynamic=True
    )
    for m in (3, 9):
        x = torch.randn(m, 64)
        assert torch.equal(f(x), ops.lut_linear_op(x, packed, header, None, 24, "") * 2)


def changed(header, field, value):
    header = header.clone()
    header[field] = value
    return header


def test_refusals():
    """Each bad argument is one clear line, and nothing is read out of bounds to find it."""
    parts, packed, header = make(24, 64, 4, 32)
    x = torch.randn(3, 64)
    good = dict(x=x, packed=packed, header=header, bias=None, N=24, kernel="")
    bad = [
        (dict(x=x[:, :32]), "K=64"),
        (dict(x=x.double()), "float32, bfloat16 or float16"),
        (dict(x=torch.tensor(1.0)), "K=64"),
        (dict(N=25), "N=24"),
        (dict(bias=torch.zeros(23)), "bias"),
        (dict(bias=torch.zeros(24, dtype=torch.bfloat16)), "bias"),
        (dict(packed=packed[:-1]), "bytes"),
        (dict(packed=torch.cat([packed, packed])), "bytes"),
        (dict(packed=packed.view(torch.int8)), "uint8"),
        (dict(packed=torch.cat([packed, packed])[::2]), "contiguous"),
        (dict(header=header[:8]), "header"),
        (dict(header=header[:0]), "header"),
        (dict(header=header.int()), "int64"),
        (dict(header=changed(header, 0, 1)), "header"),
        (dict(header=changed(header, 1, 2)), "ABI 2"),
        (dict(header=changed(header, 2, 0)), "layout 0"),
        (dict(header=changed(header, 3, 5)), "5 bits"),
        (dict(header=changed(header, 3, 3)), "bytes"),
        (dict(header=changed(header, 4, 24)), "group size 24"),
        (dict(header=changed(header, 4, 0)), "group size 0"),
        (dict(header=changed(header, 5, -64)), "K=-64"),
        (dict(header=changed(header, 5, 2**62)), "K="),
        (dict(header=changed(header, 6, 7)), "dtype"),
        (dict(header=changed(header, 7, 2**40)), "shards"),
        (dict(header=changed(header, 8, 2**62)), "rows"),
        (dict(header=changed(header, 8, 0)), "rows"),
        (dict(kernel="gemv-avx9"), "no such kernel.*available: .*reference"),
    ]
    for change, message in bad:
        with pytest.raises(RuntimeError, match=message) as error:
            ops.lut_linear_op(**(good | change))
        assert str(error.value).splitlines()[0].startswith("vllm_flute: ")
    _, packed, header = make(24, 192, 1.6, 192)
    for change, message in (
        (dict(header=changed(header, 3, 3)), "3 bits, expected 2"),
        (dict(header=changed(header, 4, 96)), "2 scales a row, expected 1"),
        (dict(header=changed(header, 2, 2)), "bytes"),
        (dict(header=changed(header, 2, 4)), "layout 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.lut_linear_op(**(good | dict(packed=packed, header=header) | change))
    for name in ROUNDS_WEIGHTS:
        if not next(k for k in KERNELS if k.name == name).available:
            continue
        with pytest.raises(RuntimeError, match=f"{name}.*bfloat16.*available: .*reference"):
            ops.lut_linear_op(**(good | dict(kernel=name)))


def test_pack_refusals():
    t = make(24, 64, 4, 32)[0][0]
    header = Layout(TILE16, 4, 32, 64, torch.bfloat16, (24,)).header()
    good = [t.qweight, t.scales, t.codebook[None], header]
    for i, part in (
        (0, t.qweight[:23]),
        (0, t.qweight.to(torch.int8)),
        (1, t.scales[:, :1]),
        (1, t.scales.half()),
        (2, t.codebook[None, :8]),
        (2, t.codebook[None].double()),
        (3, changed(header, 8, 23)),
        (3, changed(header, 2, 0)),
    ):
        with pytest.raises(RuntimeError, match="vllm_flute"):
            ops.lut_pack_op(*(good[:i] + [part] + good[i + 1 :]))


def test_kernel_names_and_slots():
    assert len({k.name for k in KERNELS}) == len({k.slot for k in KERNELS}) == len(KERNELS)
    assert all(0 <= k.slot < counters.SLOTS - 1 for k in KERNELS)
    assert all(k.available or k.why for k in KERNELS)
    assert next(k for k in KERNELS if k.name == "reference").available


@each_kernel
def test_counters(kernel):
    need(kernel)
    slot = next(k.slot for k in KERNELS if k.name == kernel)
    _, packed, header = make(24, 64, 4, 32)
    for m, bucket in ((1, 0), (4, 1), (5, 2), (16, 3), (17, 4), (128, 5), (512, 6), (513, 7)):
        before = counters.page.copy()
        ops.lut_linear_op(torch.randn(m, 64, dtype=torch.bfloat16), packed, header, None, 24, kernel)
        change = counters.page - before
        calls, tokens, nbytes = change[slot, bucket]
        assert (calls, tokens) == (1, m) and nbytes >= packed.numel() and nbytes % packed.numel() == 0
        change[slot, bucket] = 0
        assert not change.any()
        assert m > 16 or nbytes == packed.numel()
    before = counters.page.copy()
    ops.lut_linear_op(torch.randn(0, 64, dtype=torch.bfloat16), packed, header, None, 24, kernel)
    assert (counters.page == before).all()


IN_A_PROCESS = """
import json, torch
from vllm_flute import ops
from vllm_flute.backends import cpu
from vllm_flute.dispatch import pack_parts
torch.manual_seed(0)
described = cpu.describe()
q, s, c = torch.randint(256, (24, 32), dtype=torch.uint8), torch.rand(24, 2).to(torch.bfloat16), torch.randn(1, 16)
packed, header = pack_parts(q, s, c, 32, [24])
result = []
for m in (1, 40):
    result += ops.lut_linear_op(torch.randn(m, 64), packed, header, None, 24, "").flatten().tolist()
chosen = [cpu.choose(header, m, torch.bfloat16) for m in (1, 40)]
print(json.dumps([described, packed.sum().item(), result, chosen]))
"""


@functools.cache
def with_isa(isa: str, activations: str = ""):
    env = os.environ | {"VLLM_FLUTE_ISA": isa, "VLLM_FLUTE_ACTIVATIONS": activations}
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_forced_isa(isa):
    """One packed layout and, in fp32, one result on every instruction set."""
    if isa != "scalar" and not any(k.isa == isa and k.available for k in KERNELS):
        pytest.skip(f"this CPU has no {isa}")
    described, packed, result, chosen = with_isa(isa)
    assert (described["isa"], described["forced"], described["error"]) == (isa, isa, "")
    isa_of = {k["name"]: k["isa"] for k in described["kernels"]}
    assert {isa_of[name] for name in chosen} == {isa}
    _, same_packed, oracle, _ = with_isa("scalar")
    assert packed == same_packed
    torch.testing.assert_close(torch.tensor(result), torch.tensor(oracle), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "variable, value, available",
    [("VLLM_FLUTE_ISA", "avx1024", "scalar"), ("VLLM_FLUTE_ACTIVATIONS", "int4", "16, int8")],
)
def test_unknown_choice_is_an_error(variable, value, available):
    """The backend refuses it before any weight is packed, and the library refuses every call."""
    script = """
import json, torch
from vllm_flute import FluteError, dispatch, ops
from vllm_flute.backends import cpu
from vllm_flute.layout import TILE16, Layout
header = Layout(TILE16, 4, 32, 64, torch.bfloat16, (16,)).header()
described, errors = cpu.describe(), []
for call in (
    lambda: dispatch.backend("cpu"),
    lambda: ops.lut_linear_op(torch.zeros(1, 64), torch.zeros(640, dtype=torch.uint8), header, None, 16, ""),
):
    try:
        call()
    except (FluteError, RuntimeError) as e:
        errors.append(str(e))
print(json.dumps([described, errors, cpu.choose(header, 1, torch.bfloat16)]))
"""
    env = os.environ | {variable: value}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    described, errors, chosen = json.loads(done.stdout)
    assert f"{variable}={value}" in described["error"] and f"available: {available}" in described["error"]
    assert len(errors) == 2 and all(described["error"] in e for e in errors) and chosen == ""
    assert not any(k["available"] for k in described["kernels"])


def test_library_is_of_no_machine():
    """Nothing in the library names where torch was when it was built."""
    readelf = subprocess.run(["readelf", "-d", str(cpu._PATH)], capture_output=True, text=True)
    assert "RPATH" not in readelf.stdout and "RUNPATH" not in readelf.stdout
