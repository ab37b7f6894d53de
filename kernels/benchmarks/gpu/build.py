"""What is compiled before a measurement: the package's CUDA library and the microbenchmarks, for one GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LIBRARY = "libvllm_flute_cuda.so"


class BuildError(Exception):
    """A compiler that is missing or failed; the message is one line, the whole output is in the log it names."""


def nvcc() -> str:
    """The path of nvcc; raises BuildError where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if not found:
        raise BuildError(f"nvcc is neither on the PATH nor in {home}/bin: install the CUDA toolkit or set CUDA_HOME")
    return found


def arch(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability; from 9.0 on the variant with the instructions of that GPU alone."""
    number = capability[0] * 10 + capability[1]
    return f"{number}a" if number in (90, 100) else str(number)


def run(command: list, log: Path, timeout: float) -> None:
    """Run a command with its output in ``log``; raises BuildError where it fails or takes too long."""
    with log.open("a") as out:
        print("+", *command, file=out, flush=True)
        try:
            code = subprocess.run([str(c) for c in command], stdout=out, stderr=out, timeout=timeout).returncode
        except FileNotFoundError:
            raise BuildError(f"{command[0]} was not found: install it, or put it on the PATH") from None
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]} took more than {timeout:.0f} s: see {log}") from None
    if code:
        raise BuildError(f"{Path(str(command[0])).name} failed with exit code {code}: see {log}")


def library(folder: Path, target: str, log: Path, timeout: float) -> Path:
    """Compile the CUDA library for one arch (``90a``) in ``folder`` and put it into the package of this checkout."""
    configure = ["cmake", "-S", ROOT / "kernels", "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DFLUTE_CUDA=on", f"-DFLUTE_CUDA_ARCHS={target}", f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
    configure += [f"-DFLUTE_TORCH_DIR={Path(torch.__file__).parent}"]
    run(configure, log, timeout)
    run(["cmake", "--build", folder, "--target", "vllm_flute_cuda", "--parallel", os.cpu_count()], log, timeout)
    built = folder / LIBRARY
    if not built.exists():
        raise BuildError(f"{built} was not built: see {log}")
    package = ROOT / "vllm_flute" / LIBRARY
    partial = package.with_suffix(".partial")  # a library that a process has mapped must not be written into
    shutil.copyfile(built, partial)
    partial.replace(package)
    return package


def micro(folder: Path, target: str, log: Path, timeout: float) -> Path:
    """Compile micro.cu for one arch; returns the program."""
    program = folder / "micro"
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{target},code=sm_{target}"]
    run([nvcc(), *flags, "-o", program, HERE / "micro.cu"], log, timeout)
    return program
