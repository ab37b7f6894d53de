"""The AMX kernels without AMX: the torch-free test program (kernels/tests) with their tile operations in plain C++."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_flute.backends import cpu

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# cmake and ninja may be this environment's only.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: str | Path, **env: str) -> str:
    ours = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_FLUTE_")}
    done = subprocess.run(command, env=ours | {"PATH": PATH} | env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The AMX kernels and the reference, compiled."""
    # The kernels' other instructions are real. A library without the list of them was not built: that is no skip.
    bf16 = next(k for k in cpu.kernels() if k.name == "tile-avx512bf16")
    if bf16.why.startswith("this CPU has no"):
        pytest.skip(bf16.why)
    folder = tmp_path_factory.mktemp("amx")
    run("cmake", "-S", KERNELS, "-B", folder, "-G", "Ninja", "-DFLUTE_TORCH=OFF", "-DFLUTE_EMULATE_AMX=ON")
    run("cmake", "--build", folder)
    return folder / "test_kernels"


def test_amx_kernels_emulated(program):
    lines = run(program).splitlines()
    described = json.loads(lines[0])
    assert described["isa"] == "amx" and lines[-1] == "all passed"
    assert {k["name"] for k in described["kernels"] if k["available"]} == {
        "tile-amxbf16",
        "sums-amxbf16",
        "tile-amxint8",
        "reference",
    }
    calls = {name: int(count.split()[0]) for name, count in (line.split(": ") for line in lines[1:-1])}
    # int8 refuses only layout trit20, which the reference takes too; bf16 takes one of the three dtypes; sums of groups
    # only some group sizes.
    assert 1000 < calls["tile-amxint8"] < calls["reference"] and calls["tile-amxbf16"] * 3 == calls["tile-amxint8"]
    assert 300 < calls["sums-amxbf16"] < calls["tile-amxbf16"]


def test_lower_isa_excludes_them(program):
    described = json.loads(run(program, VLLM_FLUTE_ISA="avx512bf16").splitlines()[0])
    assert {k["name"] for k in described["kernels"] if k["available"]} == {"reference"}
