"""The Triton kernels in Triton's interpreter; test_triton.py runs this file in a process with TRITON_INTERPRET=1."""

import math

import pytest
import torch
from tolerance import assert_within_bound

from vllm_flute import FluteError, LutTensor, counters, lut_linear, quantize
from vllm_flute.backends import rows, triton, triton_kernels
from vllm_flute.layout import ROWS, Layout
from vllm_flute.ops import lut_linear_op, lut_pack_op, lut_unpack_op
from vllm_flute.packing import pack_codes

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [1, 2, 3, 7, 8, 16, 17, 33]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs and workspaces are NaN before a call, so that what is not written shows, and so are 64 values around."""
    original, margin, buffers = torch.Tensor.new_empty, 64, []

    def new_empty(self, size, dtype=None, **options):
        dtype = dtype or self.dtype
        if options or not dtype.is_floating_point:  # the interpreter's own, and parts of weights
            return original(self, size, dtype=dtype, **options)
        buffers.append(torch.full((math.prod(size) + 2 * margin,), math.nan, dtype=dtype))
        return buffers[-1][margin:-margin].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all(), "written out of bounds"


def random_codes(values: int, n: int, k: int) -> torch.Tensor:
    return torch.randint(values, (n, k), dtype=torch.uint8)


def parts(shards: list[LutTensor]):
    """(qweight, scales, codebooks, header) of fused shards."""
    t = shards[0]
    header = Layout(ROWS, t.bits, t.group_size, t.shape[1], t.scales.dtype, tuple(s.shape[0] for s in shards)).header()
    qweight, scales = (torch.cat([getattr(s, name) for s in shards]) for name in ("qweight", "scales"))
    return qweight, scales, torch.stack([s.codebook for s in shards]), header


def pack(*shards: LutTensor):
    header = parts(list(shards))[-1]
    return rows.pack(*parts(list(shards))), header


def check(x: torch.Tensor, shards: list[LutTensor], bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply with fused shards; every shard's outputs are within the bound. Returns them all."""
    y = triton.linear(x, *pack(*shards), bias)
    sizes = [t.shape[0] for t in shards]
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], sum(sizes))
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    for actual, t, b in zip(y.split(sizes, -1), shards, biases, strict=True):
        assert_within_bound(actual, x, t, b)
    return y


def slices_of(monkeypatch, multiprocessors: int) -> None:
    monkeypatch.setattr(triton, "_multiprocessors", lambda device: multiprocessors)


# ---- numbers ----


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_every_width_dtype_group_and_m(bits, dtype, group):
    """The largest group is K. 40 rows leave a rest in every tile."""
    t = quantize(torch.randn(40, 128), bits=bits, group_size=group)
    bias = torch.randn(40).to(dtype)
    for m in TOKENS:
        check(torch.randn(m, 128).to(dtype), [t], bias if m % 2 else None)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(8, 24, 24), (8, 40, 8), (24, 48, 16), (16, 200, 40), (7, 72, 24), (16, 384, 128), (8, 512, 512)],
)
def test_ragged_shapes(bits, n, k, group):
    """K that leaves a rest in a word and in a block, groups of no power of two, N that no tile divides."""
    t = quantize(torch.randn(n, k), bits=bits, group_size=group)
    for m in (1, 5, 70):
        check(torch.randn(m, k).bfloat16(), [t], torch.randn(n).bfloat16())


def test_many_tokens():
    """The largest tile, twice in M."""
    check(torch.randn(130, 200).bfloat16(), [quantize(torch.randn(136, 200), bits=4, group_size=40)])


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_dtypes(dtype, scale_dtype):
    t = LutTensor.from_codes(random_codes(16, 24, 64), torch.rand(24, 2).to(scale_dtype), torch.randn(16))
    for m in (1, 4):
        check(torch.randn(m, 64).to(dtype), [t])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_once(dtype):
    """Multiplying with the identity gives the weights themselves."""
    t = LutTensor.from_codes(random_codes(16, 24, 64), torch.rand(24, 2).to(torch.float16) + 0.1, torch.randn(16))
    packed, header = pack(t)
    eye = torch.eye(64, dtype=dtype)
    expected = t.dequantize(dtype).T
    assert torch.equal(triton.linear(eye, packed, header), expected)
    for k in (0, 1, 37, 63):
        assert torch.equal(triton.linear(eye[k], packed, header), expected[k])


# ---- shards and codebooks ----


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sizes", [[40, 8], [64, 16, 72], [8, 16, 24, 8], [16, 72, 8, 8, 24, 40]])
def test_every_shard_has_its_codebook(bits, sizes, monkeypatch):
    """Up to four shards are one launch, more are several; the codebooks are as unlike as can be."""
    shards = [
        LutTensor.from_codes(random_codes(2**bits, n, 128), torch.rand(n, 4).bfloat16(), torch.randn(2**bits) * 4**i)
        for i, n in enumerate(sizes)
    ]
    bias = torch.randn(sum(sizes)).bfloat16()
    for multiprocessors in (1, 64):
        slices_of(monkeypatch, multiprocessors)
        for m in (1, 3, 20):
            check(torch.randn(m, 128).bfloat16(), shards, bias)


@pytest.mark.parametrize("codebook", [[-1, 0, 1], [-1, 0], [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("m", [1, 6])
def test_exact_codebooks(codebook, m):
    """Small integers have no rounding anywhere: the result is the oracle's, bit by bit."""
    book = torch.tensor(codebook, dtype=torch.float32)
    t = LutTensor.from_codes(random_codes(len(codebook), 40, 96), torch.ones(40, 2).bfloat16(), book)
    x = torch.randint(-3, 4, (m, 96)).half()
    assert torch.equal(check(x, [t]), (x.float() @ t.dequantize().T).half())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_lies_past_k_adds_nothing(bits, value):
    """Code 0, which is what a masked load reads, stands for no number; K fills no tile."""
    book = torch.arange(2**bits, dtype=torch.float32)
    book[0] = value
    t = LutTensor(pack_codes(random_codes(2**bits - 1, 24, 40) + 1, bits), torch.rand(24, 5).bfloat16(), book)
    for m in (1, 3, 20):
        x = torch.randn(m, 40).bfloat16()
        assert check(x, [t]).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inf_and_nan_stay_in_their_token(dtype):
    t = quantize(torch.randn(24, 96), bits=4, group_size=32)
    x = torch.randn(20, 96).to(dtype)
    clean = check(x, [t])
    x[3, 5], x[17, 95] = float("inf"), float("nan")
    y = triton.linear(x, *pack(t))
    assert not y[3].isfinite().any() and y[17].isnan().all()
    others = [m for m in range(20) if m not in (3, 17)]
    assert torch.equal(y[others], clean[others])
    assert not triton.linear(x[3], *pack(t)).isfinite().any() and triton.linear(x[17], *pack(t)).isnan().all()


# ---- slices of K ----


@pytest.mark.parametrize(("m", "k", "slices"), [(1, 4096 + 16, 2), (5, 2048 + 16, 4)])
def test_slices_are_added_in_order(m, k, slices, monkeypatch):
    """The last slice is the shortest, and ends within a block."""
    t = quantize(torch.randn(24, k), bits=3, group_size=16)
    x, bias = torch.randn(m, k).bfloat16(), 1000 * torch.randn(24).bfloat16()  # more than the bound at this K
    slices_of(monkeypatch, 4)
    assert triton.plan(m, [24], k, x.dtype, 4).slices == slices
    first = check(x, [t], bias)
    assert torch.equal(first, check(x, [t], bias))


# ---- calls ----


def test_leading_dimensions_and_strides():
    t = quantize(torch.randn(24, 64), bits=4, group_size=32)
    check(torch.randn(2, 3, 64).half(), [t])
    check(torch.randn(64).half(), [t])
    check(torch.randn(64, 5).half().T, [t], torch.randn(48).half()[::2])


def test_no_tokens():
    packed, header = pack(quantize(torch.randn(24, 64), bits=4, group_size=32))
    for shape in ((0, 64), (2, 0, 64)):
        assert triton.linear(torch.randn(shape), packed, header).shape == (*shape[:-1], 24)


def test_refused_calls():
    packed, header = pack(quantize(torch.randn(24, 64), bits=4, group_size=32))
    x = torch.randn(2, 64)
    for arguments, message in (
        ((x[:, :32], packed, header), r"x is torch.float32 \[2, 32\], the weights need .* \[..., 64\]"),
        ((x.double(), packed, header), "x is torch.float64"),
        ((x, packed, header, torch.randn(8)), r"bias is \[8\], the weights need \[24\]"),
        ((x, packed[:-16], header), "packed weights of .* do not match their header"),
        ((x, packed, header[1:]), "not a packed-weight header"),
    ):
        with pytest.raises(FluteError, match=message):
            triton.linear(*arguments)


def test_counters():
    packed, header = pack(quantize(torch.randn(24, 64), bits=4, group_size=32))
    before = counters.page[triton.SLOT].copy()
    triton.linear(torch.randn(7, 64), packed, header)
    triton.linear(torch.randn(0, 64), packed, header)
    new = counters.page[triton.SLOT] - before
    assert new[counters.bucket(7)].tolist() == [1, 7, packed.numel()] and new.sum() == 8 + packed.numel()


def test_the_functional_front():
    t, x = quantize(torch.randn(24, 72), bits=3, group_size=24), torch.randn(2, 3, 72).half()
    bias = torch.randn(24).half()
    before = counters.page[triton.SLOT].sum()
    assert_within_bound(lut_linear(x, t, bias, kernel="triton"), x, t, bias)
    assert counters.page[triton.SLOT].sum() > before


def test_the_operators():
    triton.register("CPU")
    t = quantize(torch.randn(24, 72), bits=3, group_size=24)
    qweight, scales, codebooks, header = parts([t])
    packed = lut_pack_op(qweight, scales, codebooks, header)
    for unpacked, expected in zip(lut_unpack_op(packed, header), (qweight, scales, codebooks), strict=True):
        assert torch.equal(unpacked, expected) and unpacked.data_ptr() != expected.data_ptr()
    x = torch.randn(3, 72)
    for kernel in ("", triton.NAME):
        assert_within_bound(lut_linear_op(x, packed, header, None, 24, kernel), x, t)
    with pytest.raises(FluteError, match="kernel 'gemv' does not run on cpu: this backend has only 'triton'"):
        lut_linear_op(x, packed, header, None, 24, "gemv")
    with pytest.raises(FluteError, match="the weights have N=24, the caller said N=16"):
        lut_linear_op(x, packed, header, None, 16, "")


@pytest.mark.parametrize(
    ("m", "n", "k", "launches"),
    [
        (1, 64, 256, ["gemv"]),
        (8, 64, 256, ["gemm"]),
        (40, 64, 256, ["gemm"]),
        (1, 8, 4096, ["gemv", "add_slices"]),
        (8, 8, 2048, ["gemm", "add_slices"]),
    ],
)
def test_launches_of_a_call_with_bias(monkeypatch, m, n, k, launches):
    """One, and one more where K is cut: the bias is in them, nothing is cleared, nothing is cast."""
    found = []

    class Counted:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid):
            found.append(self.name)
            return self.kernel[grid]

    for name in ("gemv", "gemm", "add_slices"):
        monkeypatch.setattr(triton_kernels, name, Counted(name))
    t, x, bias = (
        quantize(torch.randn(n, k), bits=4, group_size=64),
        torch.randn(m, k).bfloat16(),
        torch.randn(n).bfloat16(),
    )
    assert_within_bound(lut_linear(x, t, bias, kernel="triton"), x, t, bias)
    assert found == launches
