"""The Triton backend: its numbers in Triton's interpreter, what its kernels compile to, and what it answers.

Nothing here needs a GPU: Triton compiles for one that is not there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import assert_within_bound

from vllm_flute import FluteError, LutTensor, quantize
from vllm_flute.backends import portable, rows, triton
from vllm_flute.layout import ROWS, Layout

TESTS = Path(__file__).resolve().parent
INTERPRET = "TRITON_INTERPRET"
H200, H100_SLICE, A100 = 132, 16, 108  # multiprocessors


def test_interpreted():
    """interpreted_triton.py, in a process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "interpreted_triton.py"]
    done = subprocess.run(command, cwd=TESTS, env=os.environ | {INTERPRET: "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"^(\d+) passed(?:, \d+ warnings?)? in", done.stdout, re.MULTILINE)  # and none skipped
    assert int(passed) > 90


# ---- layout ROWS ----


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("shards", "k", "group"), [([8], 24, 24), ([3, 4], 40, 8), ([16, 8], 128, 32), ([8], 200, 40)])
def test_rows(bits, shards, k, group):
    """Parts come back as they were, rows start at whole words, and the portable backend multiplies with them."""
    parts = [quantize(torch.randn(n, k), bits=bits, group_size=group) for n in shards]
    header = Layout(ROWS, bits, group, k, parts[0].scales.dtype, tuple(shards)).header()
    qweight, scales = torch.cat([t.qweight for t in parts]), torch.cat([t.scales for t in parts])
    codebooks = torch.stack([t.codebook * (i + 1) for i, t in enumerate(parts)])
    packed = rows.pack(qweight, scales, codebooks, header)
    for found, expected in zip(rows.unpack(packed, header), (qweight, scales, codebooks), strict=True):
        assert torch.equal(found, expected)
    row = rows.read(packed, header).qweight
    assert row.storage_offset() % 16 == 0 and row.stride() == (-(-k // 32) * 4 * bits, 1)
    x = torch.randn(3, k)
    y = portable._linear(x, packed, header, None, sum(shards), "").split(shards, -1)
    for i, (actual, t) in enumerate(zip(y, parts, strict=True)):
        assert_within_bound(actual, x, LutTensor(t.qweight, t.scales, codebooks[i]))


# ---- what the kernels compile to ----


class Compiled:
    """A kernel for one GPU architecture, with the tile that `plan` gives to M tokens: PTX, and ptxas's resources."""

    def __init__(self, m: int, capability: int, bits: int, dtype: str, scales: str = "bf16"):
        from triton import compile, knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from vllm_flute.backends import triton_kernels

        kernel = triton_kernels.gemv if m == 1 else triton_kernels.gemm
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        spec = Layout(ROWS, bits, 64, 8192, dtypes[scales], (8192,))
        chosen = triton.plan(m, spec.shards, spec.k, dtypes[dtype], H200)
        constants = triton._constants(spec, chosen)
        options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        if m > 1:
            constants["BLOCK_M"] = chosen.block_m
        pointers = {
            "x": dtype, "qweight": "i32", "scales": scales, "codebooks": "fp32", "bias": dtype, "y": dtype,
        }  # fmt: skip
        signature = {
            name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"
            for name in kernel.arg_names
        }
        # As Triton specializes a call by itself, of a model whose sizes are multiples of 16.
        aligned = [*pointers, "N", "K", "row_words"]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        self.ptx, self.shared = compiled.asm["ptx"], compiled.metadata.shared
        self._cubin, self._cuobjdump = compiled.asm["cubin"], knobs.nvidia.cuobjdump.path

    def resources(self, folder: Path) -> dict[str, int]:
        (folder / "kernel.cubin").write_bytes(self._cubin)
        command = [self._cuobjdump, "-res-usage", folder / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Compile anew, and into no folder of the user's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def needs_compiler():
    pytest.importorskip("triton")
    from triton import knobs

    if knobs.runtime.interpret:
        pytest.skip(f"{INTERPRET} is set: kernels are not compiled")
    try:
        knobs.nvidia.ptxas.path, knobs.nvidia.cuobjdump.path  # noqa: B018
    except RuntimeError as e:
        pytest.skip(f"this Triton has no ptxas: {e}")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("m", "dtype"), [(1, "bf16"), (16, "bf16"), (64, "fp16"), (1024, "bf16")])
def test_compiled(capability, bits, m, dtype, tmp_path):
    """Asynchronous copies of the packed words, matrix instructions, no spills, and shared memory that every GPU has."""
    needs_compiler()
    compiled = Compiled(m, capability, bits, dtype)
    # 16 bytes at a time, but for 3 bits, whose words are three apart, 4.
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", compiled.ptx) or bits == 3
    assert "cp.async" in compiled.ptx
    kind = {"bf16": "bf16", "fp16": "f16"}[dtype]
    wgmma = re.findall(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.{kind}", compiled.ptx)
    mma = re.findall(rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{kind}", compiled.ptx)
    assert bool(wgmma) == (m > 1 and capability == 90) and bool(mma) == (m > 1 and capability == 80)
    found = compiled.resources(tmp_path)
    assert found["STACK"] == found["LOCAL"] == 0 and found["REG"] < 255, found
    assert compiled.shared <= 99 * 1024  # of a block on capability 8.6 and 8.9, the least of all from 8.0 on


def test_what_is_compiled_in():
    """No M, N, K or number of groups; and a change of M, or of the shards, compiles nothing anew."""
    needs_compiler()
    from vllm_flute.backends import triton_kernels

    for kernel in (triton_kernels.gemv, triton_kernels.gemm, triton_kernels.add_slices):
        compiled_in = {p.name for p in kernel.params if p.is_constexpr}
        assert compiled_in <= {"BITS", "UNIT", "WHOLE", "BLOCK_N", "BLOCK_K", "STAGES", "BLOCK_M", "BLOCK"}
        free = {p.name for p in kernel.params if p.do_not_specialize}
        varying = {"M", "groups", "group_size", "end0", "end1", "end2", "end3", "slices"}
        assert free == {p.name for p in kernel.params} & varying


# ---- the plan ----

LAYERS = [(4096, 4096), (1024, 8192), (28672, 8192), (8192, 28672), (576, 576), (8, 24)]


@pytest.mark.parametrize(("n", "k"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("multiprocessors", [H100_SLICE, A100, H200])
def test_slices_are_whole_and_none_is_empty(n, k, dtype, multiprocessors):
    for m in (1, 2, 16, 17, 64, 65, 4096):
        plan = triton.plan(m, [n], k, dtype, multiprocessors)
        blocks = -(-k // plan.block_k)
        each = -(-blocks // plan.slices)
        assert (plan.slices - 1) * each < blocks <= plan.slices * each
        assert plan.slices == 1 or each >= 4
        tiles = -(-m // plan.block_m) * -(-n // plan.block_n)
        assert plan.slices == 1 or tiles * plan.slices <= 2 * multiprocessors


def test_k_is_cut_where_the_grid_is_small():
    assert triton.plan(1, [1024], 8192, torch.bfloat16, H200).slices == 4
    assert triton.plan(16, [4096], 4096, torch.bfloat16, H200).slices == 4
    assert triton.plan(1, [28672], 8192, torch.bfloat16, H200).slices == 1
    assert triton.plan(4096, [4096], 4096, torch.bfloat16, H200).slices == 1


def test_a_shard_has_tiles_of_its_own():
    """Three shards of 24 rows take three times two tiles of 16, not five."""
    assert triton._tiles(1, [24, 24, 24], triton.plan(1, [24] * 3, 64, torch.bfloat16, 1)) == 6


# ---- what it answers ----


def test_a_cpu_without_the_interpreter_is_told_of_it(monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get(INTERPRET):
        pytest.skip(f"{INTERPRET} is set")
    t = quantize(torch.randn(8, 32), bits=4, group_size=32)
    header = Layout(ROWS, 4, 32, 32, t.scales.dtype, (8,)).header()
    packed = rows.pack(t.qweight, t.scales, t.codebook[None], header)
    with pytest.raises(FluteError, match=r"kernel 'triton' runs on cpu only interpreted: set TRITON_INTERPRET=1"):
        triton.linear(torch.randn(1, 32), packed, header)


def test_available():
    installed = pytest.importorskip("triton")
    assert triton.available() == "" and tuple(map(int, installed.__version__.split(".")[:2])) >= (3, 6)
    (kernel,) = triton.kernels()
    assert (kernel.name, kernel.slot, kernel.available, kernel.why) == ("triton", 30, True, "")


def test_not_available(monkeypatch):
    installed = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton.available() == "Tesla T4 is of compute capability 7.5, these kernels need 8.0 or later"
    monkeypatch.setattr(installed, "__version__", "3.5.1")
    assert triton.available() == "triton 3.5.1 is older than 3.6: install the one that your torch requires"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not importable" in triton.available()
    (kernel,) = triton.kernels()
    assert not kernel.available and "not importable" in kernel.why
