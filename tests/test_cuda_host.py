"""The GPU backend without a GPU: its build, the emulated C++ tests, its library beside any torch, who runs when."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_native import KERNELS, PATH
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_flute import FluteError, dispatch, lut_linear, quantize
from vllm_flute.backends import cuda, portable, table, triton
from vllm_flute.layout import MMA64, Layout
from vllm_flute.ops import lut_linear_op

EMULATED = ("test_cuda_pack", "test_cuda_registry", "test_cuda_mma", "test_cuda_wgmma")
H200 = cuda.Gpu(0, "NVIDIA H200", 90, 132)


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": PATH} | env
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return run("cmake", "-S", KERNELS, "-B", folder, "-G", "Ninja", *options)


# ---- the same sources on a CPU ----


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    """The folder of the test programs in EMULATED."""
    folder = tmp_path_factory.mktemp("emulated")
    configured = configure(folder, "-DFLUTE_TORCH=OFF", "-DFLUTE_CUDA=off", "-DFLUTE_EMULATE_SIMT=ON")
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", folder, "--parallel", "2", "--target", *EMULATED)
    assert built.returncode == 0, built.stdout[-4000:]
    return folder


@pytest.mark.parametrize("program", EMULATED)
def test_emulated(emulated, program):
    done = run(emulated / program)
    verdict = (done.stdout.splitlines() or [""])[-1]
    passed = re.fullmatch(r"all passed .*|[1-9]\d* calls of K[12] agree with the oracle", verdict)
    assert done.returncode == 0 and passed, done.stdout[-4000:] + done.stderr


# ---- the build ----


def status(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if "GPU kernels" in line)


@pytest.fixture
def cuda_torch(tmp_path) -> str:
    """-DFLUTE_TORCH_DIR of what looks like a CUDA build: this torch and a file of the right name."""
    real, folder = Path(torch.__file__).parent, tmp_path / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(real / "include")
    (folder / "lib" / "libtorch_cpu.so").symlink_to(real / "lib" / "libtorch_cpu.so")
    (folder / "lib" / "libtorch_cuda.so").touch()
    return f"-DFLUTE_TORCH_DIR={folder}"


def test_auto_follows_torch_and_nvcc(tmp_path, cuda_torch):
    if not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        assert "this torch is not a CUDA build" in status(configure(tmp_path / "a"))
    assert "there is no torch" in status(configure(tmp_path / "b", "-DFLUTE_TORCH=OFF"))
    assert "FLUTE_CUDA=off" in status(configure(tmp_path / "c", cuda_torch, "-DFLUTE_CUDA=off"))
    without = status(configure(tmp_path / "d", cuda_torch, "-DFLUTE_NVCC=/nonexistent/nvcc"))
    assert "not built" in without and "/nonexistent/nvcc" in without and "Triton" in without


def test_on_without_nvcc_is_one_line(tmp_path):
    done = configure(tmp_path, "-DFLUTE_CUDA=on", "-DFLUTE_NVCC=/nonexistent/nvcc")
    assert done.returncode != 0 and "FLUTE_CUDA=on, but /nonexistent/nvcc" in " ".join(done.stderr.split())
    done = configure(tmp_path, "-DFLUTE_CUDA=yes")
    assert done.returncode != 0 and "expected auto, on or off" in done.stderr


needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="nvcc is not installed"
)


@needs_nvcc
def test_auto_is_on_with_nvcc_and_a_cuda_torch(tmp_path, cuda_torch):
    line = status(configure(tmp_path, cuda_torch))
    assert re.search(r"nvcc [\d.]+, compute capabilities 80;89;90a", line)


# ---- the library, beside this torch ----


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """libvllm_flute_cuda.so with code for one kind of GPU: some minutes of nvcc."""
    folder = tmp_path_factory.mktemp("cuda")
    torch_dir = f"-DFLUTE_TORCH_DIR={Path(torch.__file__).parent}"
    configured = configure(folder, "-DFLUTE_CUDA=on", "-DFLUTE_CUDA_ARCHS=90a", torch_dir)
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", folder, "--parallel", "2", "--target", "vllm_flute_cuda")
    assert built.returncode == 0, built.stdout[-4000:]
    return folder / "libvllm_flute_cuda.so"


@needs_nvcc
def test_library_needs_no_cuda_library(library):
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library).stdout)
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "cuda" in name or "cudart" in name]


LOADED = """
import sys, torch
from pathlib import Path
from vllm_flute import ops
from vllm_flute.backends import cuda, table
from vllm_flute.layout import MMA64, ROWS, Layout

cuda._PATH = Path(sys.argv[1])
print(cuda.built())
found = {arch: cuda.describe(arch) for arch in (80, 90)}
assert found[90]["error"] == "" and "no code for sm_80 (it has 90a)" in found[80]["error"], found
kernels = {k["name"]: k for k in found[90]["kernels"]}
assert {name: k["slot"] for name, k in kernels.items()} == {"mma": 20, "wgmma": 21, "dequantize-cublas": 22}, kernels
assert all(k["available"] and k["isa"] == "sm_90" for k in kernels.values()), kernels
assert not any(k["available"] for k in found[80]["kernels"])

def chosen(m, layout=MMA64, dtype=torch.bfloat16, arch=90):
    return cuda.choose_for(Layout(layout, 4, 128, 4096, torch.bfloat16, (4096, 1024)).header(), m, dtype, arch)

assert [chosen(m) for m in (1, 32, 33, 2048, 2049)] == ["mma", "mma", "wgmma", "wgmma", "dequantize-cublas"]
assert chosen(1, dtype=torch.float32) == "dequantize-cublas"
assert chosen(1, layout=ROWS) == "" and chosen(1, arch=80) == ""

cuda.gpu = lambda: cuda.Gpu(0, "NVIDIA H200", 90, 132)
if not torch.cuda.is_available():
    assert "cannot use the GPU: " in cuda.load(), cuda.load()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("vllm_flute::lut_linear_v1", "CUDA")

lines = [table.Line("4", "bfloat16", 8, None, "dequantize-cublas")]
path = table.default_path(cuda.machine())
assert path.name.startswith("gpu-nvidia-h200-sm_90-132sm-"), path
table.write(path, cuda.machine(), lines)
cuda.use_table()
assert cuda.table_path() == path
header = Layout(MMA64, 4, 128, 4096, torch.bfloat16, (4096,)).header()
assert cuda.choose(header, 8, torch.bfloat16) == "dequantize-cublas" and cuda.choose(header, 9, torch.bfloat16) == "mma"
assert cuda.default_choice(header, 8, torch.bfloat16) == "mma" and cuda.choose(header, 8, torch.bfloat16) != "mma"

cuda._load()[0].flute_cuda_register()
cuda._load()[0].flute_cuda_register()
names = ("linear", "linear_silu", "linear_add_norm", "linear_normed", "linear_normed_silu", "pack", "unpack")
for name in (f"lut_{name}_v1" for name in names):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_flute::{name}", "CUDA"), name

# The implementation for CUDA called with tensors of a CPU: what it refuses before it looks for a GPU.
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x, packed = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.uint8)
rows = Layout(ROWS, 4, 128, 4096, torch.bfloat16, (4096,)).header()
for wrong, why in (
    (rows, "layout 0, the GPU kernels read layout 4 (mma64)"),
    (header[:-1], "not one"),
    (header.int(), "header must be a contiguous int64 CPU tensor"),
    (header, "packed must be a CUDA tensor"),
):
    calls = (ops.lut_linear_op, (x, packed, wrong, None, 4096, "")), (ops.lut_unpack_op, (packed, wrong))
    for op, arguments in calls:
        try:
            op.default.redispatch(key, *arguments)
        except RuntimeError as e:
            assert f"vllm_flute: {why}" in str(e).replace("packed-weight header: ", ""), (why, str(e))
        else:
            raise AssertionError(why)
weights = packed, header, None, 4096, ""
for op, arguments, why in (
    (ops.lut_linear_add_norm_op, (x, x[:, :8], x[0], 1e-5, *weights), "residual is [1, 8], expected"),
    (ops.lut_linear_add_norm_op, (x, x, x[0, :8], 1e-5, *weights), "the norm's weight is [8], expected [4096]"),
    (ops.lut_linear_normed_op, (x, torch.zeros(32, 256), 1e-5, *weights), "squares must be the contiguous fp32 tensor"),
):
    try:
        op.default.redispatch(key, *arguments)
    except RuntimeError as e:
        assert f"vllm_flute: {why}" in str(e), (why, str(e))
    else:
        raise AssertionError(why)
print("done")
"""


@needs_nvcc
def test_library_beside_this_torch(library, tmp_path):
    """It loads without CUDA, describes itself, chooses, follows a table, registers; says why it cannot run."""
    done = run(sys.executable, "-c", LOADED, library, XDG_CACHE_HOME=str(tmp_path), VLLM_FLUTE_TABLE="")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "done", done.stdout + done.stderr
    assert re.fullmatch(r"nvcc [\d.]+, compute capabilities 90a", done.stdout.splitlines()[0])


def test_a_library_that_is_missing_or_broken_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "_PATH", tmp_path / "libvllm_flute_cuda.so")
    monkeypatch.setattr(cuda, "_load", cuda._load.__wrapped__)
    for content, why in ((None, "was not built: "), (b"no library", "does not load: ")):
        if content:
            cuda._PATH.write_bytes(content)
        assert why in cuda.load.__wrapped__() and "\n" not in cuda.load.__wrapped__()
        assert why in cuda.built() and cuda.kernels() == []


def test_w_by_parts_is_torch_linear(tmp_path):
    """How dequantize-cublas multiplies, with torch's CPU: W a part of its rows at a time, into parts of y."""
    torch_dir = f"-DFLUTE_TORCH_DIR={Path(torch.__file__).parent}"
    configured = configure(tmp_path, torch_dir, "-DFLUTE_TESTS=ON", "-DFLUTE_CUDA=off")
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", tmp_path, "--target", "test_torch_dense")
    assert built.returncode == 0, built.stdout[-4000:]
    torch.ops.load_library(str(tmp_path / "libtest_torch_dense.so"))
    for dtype, m in ((torch.float32, 1), (torch.bfloat16, 5), (torch.float16, 33)):
        # Sums of small integers, exact in any order.
        x = torch.randint(-3, 4, (m, 24)).to(dtype).requires_grad_()
        weight, bias = torch.randint(-3, 4, (72, 24)).to(dtype), torch.randint(-3, 4, (72,)).to(dtype).requires_grad_()
        for step in (8, 64, 72, 1000):
            for added in (None, bias):
                y = torch.ops.vllm_flute_test.multiply(x, weight, added, step)
                assert torch.equal(y, torch.nn.functional.linear(x, weight, added)), (dtype, m, step)


# ---- who runs on a GPU ----


@pytest.fixture
def registered(monkeypatch):
    """The backends written in Python that `dispatch.backend` registers, instead of their registration."""
    calls = []
    for module in (triton, portable):
        monkeypatch.setattr(module, "register", lambda key, module=module: calls.append((module, key)))
    return calls


@pytest.fixture
def warned(monkeypatch):
    """Warnings of the dispatcher and of tables, as text, however this process has set up logging."""
    lines = []
    for module in (dispatch, table):
        monkeypatch.setattr(module.logger, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_the_native_library_first(monkeypatch, registered, warned):
    monkeypatch.setattr(cuda, "load", lambda: "")
    monkeypatch.setattr(cuda, "gpu", lambda: H200)
    assert dispatch.backend.__wrapped__("cuda") == (cuda, "native CUDA library, isa sm_90")
    assert not registered and not warned


@pytest.mark.parametrize("without_triton", ["", "triton is not importable"])
def test_without_it_triton_then_torch_and_it_is_said(monkeypatch, registered, warned, without_triton):
    monkeypatch.setattr(cuda, "load", lambda: "the library has no code for sm_103")
    monkeypatch.setattr(triton, "available", lambda: without_triton)
    module, why = dispatch.backend.__wrapped__("cuda")
    assert module is (portable if without_triton else triton)
    assert registered == [(module, "CUDA")]
    assert why.startswith("slow") and "no code for sm_103" in why and without_triton in why
    assert len(warned) == 1 and why in warned[0]


def test_kernel_triton_on_a_cpu_needs_the_interpreter():
    t = quantize(torch.randn(8, 64), bits=4, group_size=32)
    if os.environ.get("TRITON_INTERPRET") != "1" and not triton.available():
        with pytest.raises(FluteError, match="TRITON_INTERPRET=1"):
            lut_linear(torch.randn(1, 64), t, kernel="triton")
    with pytest.raises(FluteError, match=r"unknown kernel 'mma' on cpu .known: reference, .*, triton"):
        lut_linear(torch.randn(1, 64), t, kernel="mma")


def test_a_gpu_has_a_table_of_its_own(tmp_path, monkeypatch, warned):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(table.ENV, raising=False)
    names = ["mma", "wgmma"]
    on = table.gpu_machine("NVIDIA H200", "sm_90", 132, names)
    given = []
    in_use = table.InUse(lambda: {"mma": 20, "wgmma": 21}, lambda address, lines: given.append(lines))
    in_use.look_for(on)
    assert in_use.path is None and given == [0]
    table.write(table.default_path(on), on, [table.Line("4", "float16", None, None, "wgmma")])
    in_use.look_for(on)
    assert in_use.path == table.default_path(on) and given == [0, 1]
    with in_use.without():
        assert given == [0, 1, 0]
    assert given == [0, 1, 0, 1]
    for other in (
        table.gpu_machine("NVIDIA H100", "sm_90", 132, names),
        table.gpu_machine("NVIDIA H200", "sm_90", 114, names),
        table.gpu_machine("NVIDIA H200", "sm_90", 132, ["mma"]),
    ):
        assert table.default_path(other) != table.default_path(on)
        monkeypatch.setenv(table.ENV, str(table.default_path(on)))
        in_use.look_for(other)
        assert in_use.path is None and "measure it again" in warned.pop()


# ---- in a graph ----


def test_the_operator_reads_nothing_of_the_device_while_tracing():
    """On fake CUDA tensors, which have no data: one call in the graph, and a result of the right shape and device."""
    header = Layout(MMA64, 4, 128, 256, torch.bfloat16, (64, 8)).header()

    def layer(x, packed, header, bias):
        return lut_linear_op(x, packed, header, bias, 72, "").relu()

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, packed = torch.empty(2, 3, 256, dtype=torch.bfloat16, device="cuda"), torch.empty(999, device="cuda")
        bias = torch.empty(72, dtype=torch.bfloat16, device="cuda")
        y = layer(x, packed.byte(), header, bias)
        assert y.shape == (2, 3, 72) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
        graph = make_fx(layer)(x, packed.byte(), header, bias).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["vllm_flute.lut_linear_v1.default", "aten.relu.default"]
