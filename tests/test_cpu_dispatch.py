"""Which CPU kernel a call takes, on which instruction set, what is counted, and what is refused."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from cpu_layers import (
    DTYPES,
    GROUPS,
    INT8,
    INT16,
    INT16_PRODUCTS,
    KERNELS,
    ROUNDS_WEIGHTS,
    TRITS,
    each_kernel,
    make,
    need,
)

from vllm_flute import counters, ops
from vllm_flute.backends import cpu
from vllm_flute.layout import TERNARY16, TILE16, TRIT20, Layout

pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert cpu.choose(header, m, torch.float32) not in ROUNDS_WEIGHTS + INT16 + INT16_PRODUCTS
        assert cpu.choose(header, m, torch.float16) not in ROUNDS_WEIGHTS


def test_tiles_scale_weights_or_sums():
    """Sums of a group are scaled for each token, so the larger the group the more tokens that pays for."""
    if not any(k.name == "sums-amxbf16" and k.available for k in KERNELS):
        pytest.skip("this CPU has no AMX")
    for group_size, last in ((32, 47), (64, 95), (256, 383), (512, 383)):
        _, _, header = make(16, 512, 4, group_size)
        chosen = [cpu.default_choice(header, m, torch.bfloat16) for m in (1, 2, last, last + 1)]
        assert chosen == ["gemv-avx512", "sums-amxbf16", "sums-amxbf16", "tile-amxbf16"], group_size
    for group_size in (16, 96):
        _, _, header = make(16, 288, 4, group_size)
        chosen = [cpu.default_choice(header, m, torch.bfloat16) for m in (7, 8)]
        assert chosen == ["gemv-avx512", "tile-amxbf16"], group_size


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
