"""The format and its oracle: codebooks, packing, LutTensor, quantize. Every expectation is computed another way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flute import FluteError, LutTensor, quantize
from vllm_flute.codebook import make_codebook, normal_float
from vllm_flute.packing import pack_codes, unpack_codes

widths = st.sampled_from([2, 3, 4])


@st.composite
def lut_tensors(draw):
    bits = draw(widths)
    group_size = draw(st.sampled_from([8, 16, 24, 32, 64, 128]))
    n, groups = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 2**bits, (n, groups * group_size), generator=generator, dtype=torch.uint8)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    scales = torch.randn(n, groups, generator=generator).to(dtype)
    book = torch.randn(2**bits, generator=generator)
    return codes, scales, book


def bits_by_definition(codes: np.ndarray, bits: int) -> bytes:
    """The format's sentence, bit by bit: code k takes bits k*bits .. k*bits+bits-1 of its row."""
    row = np.zeros(len(codes) * bits, dtype=np.uint8)
    for k, code in enumerate(codes):
        for b in range(bits):
            row[k * bits + b] = (code >> b) & 1
    return np.packbits(row, bitorder="little").tobytes()


@given(lut_tensors())
@settings(max_examples=60, deadline=None)
def test_packing_follows_the_bit_stream_and_returns(parts):
    codes, _, book = parts
    bits = book.numel().bit_length() - 1
    packed = pack_codes(codes, bits)
    assert packed.shape == (codes.shape[0], codes.shape[1] * bits // 8)
    assert packed[-1].numpy().tobytes() == bits_by_definition(codes[-1].numpy(), bits)
    assert torch.equal(unpack_codes(packed, bits), codes)


@given(lut_tensors())
@settings(max_examples=60, deadline=None)
def test_dequantize_is_table_times_scale(parts):
    codes, scales, book = parts
    t = LutTensor.from_codes(codes, scales, book)
    group = codes.shape[1] // scales.shape[1]
    assert (t.shape, t.group_size) == (tuple(codes.shape), group)
    assert torch.equal(t.codes(), codes)
    n, k = codes.shape[0] - 1, codes.shape[1] - 1
    expected = book.numpy()[codes[n, k]] * np.float32(scales[n, k // group].item())
    assert t.dequantize()[n, k].item() == expected
    assert torch.equal(t.dequantize(torch.bfloat16), t.dequantize().to(torch.bfloat16))


@given(lut_tensors())
@settings(max_examples=30, deadline=None)
def test_quantize_returns_weights_that_lie_on_the_table(parts):
    """Weights made from a table, with its extreme in every group, come back exactly."""
    codes, scales, _ = parts
    bits, group = 4, codes.shape[1] // scales.shape[1]
    book = normal_float(bits)
    codes = codes % 16
    codes.view(codes.shape[0], -1, group)[:, :, 0] = 15
    scales = scales.abs().to(torch.bfloat16) + 2.0**-8
    weight = LutTensor.from_codes(codes, scales, book, bits=bits).dequantize()
    t = quantize(weight, bits=bits, group_size=group, codebook="nf")
    assert torch.equal(t.codes(), codes)
    assert torch.equal(t.dequantize(), weight)


# The published tables: QLoRA (arXiv 2305.14314), appendix E, for 4 bits; upstream FLUTE's for 2 and 3.
PUBLISHED_NF = {
    4: [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0],
    3: [-1.0, -0.4786, -0.2171, 0.0, 0.1609, 0.3379, 0.5626, 1.0],
    2: [-1.0, 0.0, 0.3379, 1.0],
}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_is_the_published_table(bits):
    torch.testing.assert_close(normal_float(bits), torch.tensor(PUBLISHED_NF[bits]), atol=5e-5, rtol=0)


def test_named_codebooks():
    assert make_codebook("int", 3).tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert make_codebook("ternary", 2).tolist() == [-1, 0, 1, 1]
    fp4 = make_codebook("fp4", 4)
    # e2m1: bit 3 the sign, bits 2-1 the exponent (bias 1), bit 0 the mantissa.
    for code in range(8):
        exponent, mantissa = code >> 1, code & 1
        value = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert (fp4[code], fp4[code + 8]) == (value, -value)
    assert make_codebook(torch.tensor([-2.0, 0.5, 1.0]), 2).tolist() == [-2.0, 0.5, 1.0, 1.0]


# Mean squared error of absmax NF for unit-variance Gaussian weights at group 64, as the literature has it.
@pytest.mark.parametrize("bits, expected", [(4, 0.0085), (3, 0.0407), (2, 0.317)])
def test_error_of_absmax_normal_float(bits, expected):
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    t = quantize(weight, bits=bits, codebook="nf", method="absmax")
    error = (t.dequantize() - weight).square().mean().item()
    assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("codebook, bits", [("nf", 4), ("nf", 3), ("nf", 2), ("fp4", 4), ("int", 3), ("ternary", 2)])
def test_every_code_is_the_nearest(codebook, bits):
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    t = quantize(weight, bits=bits, group_size=32, codebook=codebook)
    scales = t.scales.float().repeat_interleave(32, dim=1)
    errors = (t.codebook * scales.unsqueeze(-1) - weight.unsqueeze(-1)).abs()
    torch.testing.assert_close((t.dequantize() - weight).abs(), errors.amin(-1), rtol=0, atol=1e-6)


def test_zero_groups_stay_zero():
    assert quantize(torch.zeros(2, 64)).dequantize().abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_dtypes(dtype):
    weight = torch.randn(3, 64).to(dtype)
    assert torch.equal(quantize(weight).codes(), quantize(weight.float()).codes())


def tensor_parts(**changes):
    parts = {
        "qweight": torch.zeros(4, 32, dtype=torch.uint8),
        "scales": torch.ones(4, 1, dtype=torch.bfloat16),
        "codebook": torch.zeros(16),
    }
    return parts | changes


@pytest.mark.parametrize(
    "parts, message",
    [
        (tensor_parts(codebook=torch.zeros(12)), r"w\.codebook is torch.float32 \[12\], expected"),
        (tensor_parts(codebook=torch.zeros(32)), r"w\.codebook has 32 values: unsupported bits: 5"),
        (tensor_parts(codebook=torch.zeros(16, dtype=torch.float16)), r"w\.codebook is torch.float16"),
        (tensor_parts(qweight=torch.zeros(4, 32)), r"w\.qweight is torch.float32"),
        (tensor_parts(qweight=torch.zeros(4, 32, dtype=torch.uint8), codebook=torch.zeros(8)), r"w\.qweight .* K\*3/8"),
        (tensor_parts(scales=torch.ones(3, 1, dtype=torch.bfloat16)), r"w\.scales .* \[4, K/group_size\]"),
        (tensor_parts(scales=torch.ones(4, 1)), r"w\.scales is torch.float32"),
        (tensor_parts(scales=torch.ones(4, 3, dtype=torch.bfloat16)), r"3 groups a row, which does not divide K=64"),
        (tensor_parts(scales=torch.ones(4, 16, dtype=torch.bfloat16)), r"group size 4 does not fit K=64"),
    ],
)
def test_parts_that_do_not_agree(parts, message):
    with pytest.raises(FluteError, match=message):
        LutTensor(**parts, name="w")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quantize(torch.ones(2, 64), bits=5), "unsupported bits: 5"),
        (lambda: quantize(torch.ones(2, 64), group_size=48, name="q_proj"), "q_proj: group size 48 does not fit K=64"),
        (lambda: quantize(torch.ones(2, 64), codebook="nf5"), "unknown codebook 'nf5'"),
        (lambda: quantize(torch.ones(2, 64), bits=3, codebook="fp4"), "'fp4' exists only at 4 bits"),
        (lambda: quantize(torch.full((2, 64), torch.nan), name="q_proj"), "q_proj has values that are not finite"),
        (lambda: quantize(torch.ones(64)), r"expected a float matrix \[N, K\]"),
        (lambda: quantize(torch.ones(2, 64), scale_dtype=torch.float32), "scale dtype torch.float32"),
        (lambda: pack_codes(torch.full((1, 8), 8, dtype=torch.uint8), 3), "code 8 is beyond the codebook"),
        (lambda: pack_codes(torch.zeros(1, 9, dtype=torch.uint8), 3), "K a multiple of 8"),
        (
            lambda: LutTensor.from_codes(
                torch.full((1, 8), 3, dtype=torch.uint8), torch.ones(1, 1).bfloat16(), torch.ones(3)
            ),
            "code 3 is beyond the codebook of 3 values",
        ),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(FluteError, match=message):
        call()
