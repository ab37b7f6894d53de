"""The torch-free test program (kernels/tests): on 64-bit Arm, emulated, and under sanitizers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# cmake and ninja may be this environment's only.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ARM_TOOLS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}  # and Debian's packages


def build(folder: Path, *options: str) -> Path:
    """Compiles the test program in `folder` and returns its path."""
    configure = ["cmake", "-S", KERNELS, "-B", folder, "-G", "Ninja", "-DFLUTE_TORCH=OFF", *options]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return folder / "test_kernels"


class Run:
    """What a run of the test program printed: the library's description, calls by kernel, and the verdict."""

    def __init__(self, *command: str | Path, isa: str = ""):
        # vLLM sets LD_PRELOAD in a process that configures it, and the sanitizers want to be first.
        inherited = {k: v for k, v in os.environ.items() if k not in ("VLLM_FLUTE_ACTIVATIONS", "LD_PRELOAD")}
        env = inherited | {"VLLM_FLUTE_ISA": isa}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        self.code, self.output = done.returncode, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert lines, self.output
        self.described, self.verdict = json.loads(lines[0]), lines[-1]
        self.calls = {m[1]: int(m[2]) for line in lines if (m := re.fullmatch(r"(\S+): (\d+) calls", line))}
        self.available = {k["name"] for k in self.described["kernels"] if k["available"]}

    def passed(self) -> bool:
        """Every available kernel was compared, and none was wrong."""
        return (self.code, self.verdict) == (0, "all passed") and set(self.calls) == self.available


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    """The test program for 64-bit Arm."""
    missing = [package for tool, package in ARM_TOOLS.items() if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}, which `make test` installs where it is root and finds apt-get")
    toolchain = KERNELS / "cmake" / "aarch64-linux-gnu.cmake"
    return build(tmp_path_factory.mktemp("arm"), f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")


def test_neon_kernels_emulated(arm):
    run = Run("qemu-aarch64", arm)
    assert run.passed(), run.output
    assert run.described["isa"] == "neon" and {"gemv-neon", "tile-neon", "vlut-neon", "reference"} <= run.available
    # Two take every width, group size, shape and dtype, one every group of whole chunks; the oracle every layout too.
    assert run.calls["reference"] >= run.calls["gemv-neon"] == run.calls["tile-neon"] > run.calls["vlut-neon"] > 1000


def test_arm_without_neon_has_the_reference_kernel(arm):
    run = Run("qemu-aarch64", arm, isa="scalar")
    assert run.passed(), run.output
    assert run.available == {"reference"} and run.described["isa"] == "scalar"


def test_arm_refuses_an_isa_of_another_architecture(arm):
    run = Run("qemu-aarch64", arm, isa="avx2")
    assert run.code != 0 and not run.available and not run.calls
    assert re.search("VLLM_FLUTE_ISA=avx2 .*available: scalar, neon", run.described["error"])


def test_arm_object_shares_no_symbols(arm):
    done = subprocess.run(
        ["ctest", "--test-dir", arm.parent, "-R", "no_shared_symbols", "--no-tests=error"],
        env=os.environ | {"PATH": PATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_sanitizers(tmp_path):
    """Every kernel that this CPU runs, under the address and undefined-behaviour sanitizers."""
    program = build(tmp_path, "-DFLUTE_SANITIZE=ON")
    binary = program.read_bytes()
    assert b"__asan_report_load" in binary and b"__ubsan_handle_out_of_bounds" in binary
    run = Run(program)
    assert run.passed(), run.output
