"""The operators and the functional front, on the CPU's backend and on the portable one."""

import subprocess
import sys

import pytest
import torch
from tolerance import assert_within_bound

from vllm_flute import FluteError, LutTensor, counters, lut_linear, ops, quantize
from vllm_flute.backends import portable
from vllm_flute.dispatch import pack_parts
from vllm_flute.layout import ABI, MAGIC, ROWS, Layout
from vllm_flute.ops import lut_linear_op


def make(bits=4, n=48, k=128, group=32):
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(bits)), bits=bits, group_size=group)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lut_linear_is_the_oracle(bits, dtype):
    t, x = make(bits), torch.randn(2, 3, 128).to(dtype)
    bias = torch.randn(48).to(dtype)
    expected = lut_linear(x, t, bias, kernel="reference")
    assert expected.shape == (2, 3, 48) and expected.dtype == dtype
    assert_within_bound(expected, x, t, bias)
    actual = lut_linear(x, t, bias)
    assert actual.shape == expected.shape and actual.dtype == dtype
    assert_within_bound(actual, x, t, bias)


def test_unknown_kernel_and_shape():
    with pytest.raises(FluteError, match="unknown kernel 'warp' on cpu .known: reference, "):
        lut_linear(torch.randn(1, 128), make(), kernel="warp")
    with pytest.raises(FluteError, match="x has K=64, weight has K=128"):
        lut_linear(torch.randn(1, 64), make())


def fused(bits=3):
    shards = [make(bits, n) for n in (40, 8, 24)]
    books = torch.stack([t.codebook * (i + 1) for i, t in enumerate(shards)])
    parts = torch.cat([t.qweight for t in shards]), torch.cat([t.scales for t in shards]), books
    return [LutTensor(t.qweight, t.scales, b) for t, b in zip(shards, books, strict=True)], parts


def test_fused_shards_keep_their_codebooks():
    shards, parts = fused()
    packed, header = pack_parts(*parts, 32, [40, 8, 24])
    x = torch.randn(5, 128)
    outputs = lut_linear_op(x, packed, header, None, 72, "").split([40, 8, 24], dim=-1)
    for actual, t in zip(outputs, shards, strict=True):
        assert_within_bound(actual, x, t)


@pytest.mark.parametrize("bias", [None, torch.randn(72)])
def test_opcheck(bias):
    _, parts = fused()
    packed, header = pack_parts(*parts, 32, [40, 8, 24])
    torch.library.opcheck(lut_linear_op, (torch.randn(2, 3, 128), packed, header, bias, 72, ""))


def test_opcheck_of_norms():
    _, parts = fused()
    packed, header = pack_parts(*parts, 32, [40, 8, 24])
    weights = packed, header, None, 72, ""
    x, residual, squares = torch.randn(2, 3, 128), torch.randn(2, 3, 72), torch.rand(ops.NORM_TOKENS, 8)
    torch.library.opcheck(ops.lut_linear_add_norm_op, (x, residual, torch.randn(72), 1e-5, *weights))
    torch.library.opcheck(ops.lut_linear_normed_op, (x, squares, 1e-5, *weights))
    torch.library.opcheck(ops.lut_linear_normed_silu_op, (x, squares, 1e-5, *weights))


def test_a_residual_of_another_shape_is_refused():
    _, parts = fused()
    packed, header = pack_parts(*parts, 32, [40, 8, 24])
    x, weight = torch.randn(5, 128), torch.randn(72)
    for residual, of in ((torch.randn(1, 72), weight), (torch.randn(5, 72), weight[:1])):
        with pytest.raises(RuntimeError, match=r"expected \[5, 72\] and \[72\]"):
            ops.lut_linear_add_norm_op(x, residual, of, 1e-5, packed, header, None, 72, "")


def test_compiled_graph_does_not_depend_on_the_format():
    """One compiled function serves 2, 3 and 4 bits and any M: the header is data."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, packed, header: lut_linear_op(x, packed, header, None, 48, "") + 1, fullgraph=True, backend="eager"
    )
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(compiled, backend=counted, dynamic=True, fullgraph=True)
    for bits in (2, 3, 4):
        t = make(bits)
        packed, header = pack_parts(t.qweight, t.scales, t.codebook[None], 32, [48])
        for m in (3, 40):
            x = torch.randn(m, 128)
            assert_within_bound(compiled(x, packed, header), x, t, torch.ones(48))
    assert counted.frame_count == 1


def test_a_wrong_pair_is_an_error():
    a, b = make(4), make(3)
    packed, header = pack_parts(a.qweight, a.scales, a.codebook[None], 32, [48])
    _, other = pack_parts(b.qweight, b.scales, b.codebook[None], 32, [48])
    x = torch.randn(1, 128)
    for arguments in (
        (x, packed, other, None, 48, ""),
        (x, packed[:-64], header, None, 48, ""),
        (x, packed, header[1:], None, 48, ""),
        (x, packed, header, None, 40, ""),
        (x[:, :64], packed, header, None, 48, ""),
    ):
        with pytest.raises((RuntimeError, FluteError)):
            lut_linear_op(*arguments)


def test_header_round_trip():
    spec = Layout(ROWS, 3, 32, 128, torch.float16, (40, 8))
    header = spec.header()
    assert header.tolist() == [MAGIC, ABI, 0, 3, 32, 128, 1, 2, 40, 8]
    assert Layout.read(header) == spec
    for broken in (header[:3], header[:-1], header + 1):
        with pytest.raises(FluteError):
            Layout.read(broken)


def test_counters_count_calls_tokens_and_bytes(tmp_path):
    t = make()
    lut_linear(torch.randn(7, 128), t)
    packed = t.packed["packed"][0]
    before = counters.page.sum(axis=0)
    counters.attach(tmp_path / "page")
    lut_linear(torch.randn(7, 128), t)
    lut_linear(torch.randn(1, 128), t)
    new = counters.read(tmp_path / "page").sum(axis=0) - before
    assert new[counters.bucket(7)].tolist() == [1, 7, packed.numel()]
    assert new[counters.bucket(1)].tolist() == [1, 1, packed.numel()]
    assert new.sum() == 2 + 8 + 2 * packed.numel()


def test_buckets():
    labels = [counters.M_BUCKETS[counters.bucket(m)] for m in (1, 2, 4, 5, 16, 17, 33, 128, 129, 513, 9999)]
    assert labels == ["1", "2-4", "2-4", "5-8", "9-16", "17-32", "33-128", "33-128", "129-512", "513+", "513+"]


def test_portable_backend_serves_where_no_library_is(tmp_path):
    """Without the native library the same operator runs on torch, is right, and says so."""
    script = f"""
import logging, torch
logging.basicConfig()
from vllm_flute.backends import cpu
cpu._PATH = cpu.Path({str(tmp_path / "absent.so")!r})
from vllm_flute import quantize, lut_linear, dispatch
for bits in (2, 3, 4):
    t = quantize(torch.randn(24, 64), bits=bits, group_size=32)
    x = torch.randn(3, 64)
    assert torch.allclose(lut_linear(x, t), lut_linear(x, t, kernel="reference"), atol=1e-5)
print([k.name for k in dispatch.kernels("cpu")], dispatch.isa("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == f"['{portable.NAME}'] torch", done.stderr
    assert "slow path" in done.stderr and "was not built" in done.stderr
