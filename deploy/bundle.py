"""Pack vLLM for CUDA, what it needs and this project for a GPU host without a network.

    python3 -m pip list --format json > host.json      # on the host
    python deploy/bundle.py --host host.json --out BUNDLE [--vllm 0.25.1] [--add models/SmolLM2-135M-Instruct]
    python3 BUNDLE/install.py TARGET                   # on the host: makes the virtual environment TARGET

BUNDLE holds manifest.json, install.py (deploy/bundle_install.py) and parts of at most 60 MiB. What the host has is
used from there. All parts together are one stream of xz files, cut where a part is full: parts may arrive one by one.
"""

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import BinaryIO, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
INSTALLER = Path(__file__).with_name("bundle_install.py")
# manylinux tags run from glibc 2.5 (PEP 513) to the host's.
OLDEST_GLIBC = 5
MIB = 2**20

# Files of vLLM's wheel that serving a dense LLaMA on a GPU of compute capability 9.0 never loads, with the size in
# MiB, as vLLM 0.25.1's wheel compresses them. Each is loaded lazily or inside `except ImportError`.
LEFT_OUT_FILES = {
    "vllm/vllm_flash_attn/_vllm_fa2_C*": "78: FlashAttention 2, for capabilities other than 9.0 (--keep it there)",
    "vllm/_moe_C*": "38: mixtures of experts",
    "vllm/vllm-rs": "13: front end in Rust, only with VLLM_RUST_FRONTEND_PATH",
    "vllm/third_party/deep_gemm/*": "3: fp8 with block scales, mixtures of experts",
    "vllm/third_party/fmha_sm100/*": "3: attention for capability 10",
    "vllm/_flashmla*": "1: multi-head latent attention",
    "vllm/_qutlass_C*": "1: MXFP4 weights",
    "vllm/_rust_tool_parser*": "0.4: tool calls parsed in Rust",
    "vllm/cumem_allocator*": "0.1: sleep mode",
}

# Distributions that vLLM requires and a dense LLaMA never imports, with the wheel's size in MiB where it is large.
LEFT_OUT = {
    "flashinfer-python": "attention and sampling kernels; set VLLM_USE_FLASHINFER_SAMPLER=0",
    "flashinfer-cubin": "hundreds: flashinfer's kernels",
    "nvidia-cutlass-dsl": "kernels for capability 10",
    "nvidia-cudnn-frontend": "flashinfer's",
    "tilelang": "kernels of DeepSeek and Qwen-Next models",
    "quack-kernels": "kernels for capability 10",
    "tokenspeed-mla": "multi-head latent attention",
    "humming-kernels": "a quantization method of its own",
    "fastsafetensors": "another loader of checkpoints",
    "nvtx": "ranges for profilers",
    "torchaudio": "audio input",
    "torchvision": "image input",
    "torchcodec": "video and audio input",
    "pynvvideocodec": "video input",
    "opencv-python-headless": "58: video input",
    "numba": "4, and llvmlite's 57: speculative decoding by n-grams",
    "mistral-common": "6: Mistral's tokenizers",
    "outlines-core": "2: structured output, another backend",
    "lm-format-enforcer": "structured output, another backend",
    "opentelemetry-sdk": "tracing",
    "opentelemetry-api": "tracing",
    "opentelemetry-exporter-otlp": "tracing",
    "opentelemetry-semantic-conventions-ai": "tracing",
    "mcp": "tools by the model context protocol",
    "anthropic": "another server protocol",
    "fastapi-cli": "fastapi's command line",
    "fastar": "fastapi's command line",
}

# vLLM pins these for kernels that are left out; xgrammar, which travels, needs a newer one than that.
UNPINNED = {"apache-tvm-ffi"}

# Distributions that others are compiled against: a second copy beside the host's own would break it.
HOST_ONLY = re.compile(r"torch|torchvision|triton|numpy|nvidia-.*|cuda-.*")

# What `vllm serve` of a LLaMA imports: the API server, the engine, a GPU worker, the model, its layers and this plugin.
MODULES = [
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader.dummy_loader",
    "vllm.model_executor.layers.quantization.fp8",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.compilation.backends",
    "vllm.platforms.cuda",
    "vllm_flute.vllm_plugin.config",
    "vllm_flute.vllm_plugin.linear",
]


class BundleError(Exception):
    """One line for the user."""


# ---- which wheels ----


class Target(NamedTuple):
    """The host: what its interpreter is and what is installed there."""

    python: str
    glibc: int  # minor version of glibc 2
    have: dict[str, str]  # canonical name to version

    def environment(self) -> dict[str, str]:
        """PEP 508 markers' values on a Linux x86-64 host."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
        }

    def pip_options(self) -> list[str]:
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(OLDEST_GLIBC, self.glibc + 1)]
        platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"]
        return [
            "--no-deps",
            "--only-binary=:all:",
            f"--python-version={self.python}",
            *(f"--platform={platform}" for platform in platforms),
        ]


def read_host(path: Path) -> dict[str, str]:
    """Canonical name to version, from `pip list --format json`."""
    try:
        return {canonicalize_name(entry["name"]): entry["version"] for entry in json.loads(path.read_text())}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BundleError(f"{path} is not the output of `python3 -m pip list --format json`: {e!r}") from None


def requirements(wheel: Path, extras: Iterable[str], environment: dict[str, str]) -> Iterator[Requirement]:
    """A wheel's requirements on the target, with those of the given extras."""
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
        metadata = HeaderParser().parsestr(z.read(name).decode())
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate(environment | {"extra": extra}) for extra in ("", *extras)
        )
        if wanted:
            yield requirement


class Wheels:
    """Downloads of wheels for a target, kept in a folder; what is there already is not fetched again."""

    def __init__(self, folder: Path, target: Target, offline: bool):
        self.folder, self.target, self.offline = folder, target, offline
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, requirement: str) -> Path:
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", *self.target.pip_options(), "-d", scratch]
            command += ["--find-links", str(self.folder), *(["--no-index"] if self.offline else []), requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            found = list(Path(scratch).glob("*.whl"))
            if done.returncode or len(found) != 1:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                raise BundleError(f"no wheel of {requirement} for the host: {errors[-1] if errors else done.stderr}")
            return Path(shutil.move(found[0], self.folder / found[0].name))


def resolve(roots: list[Path], wheels: Wheels, progress=print) -> tuple[dict[str, Path], dict[str, str]]:
    """What must travel, and what the host is relied on for.

    Args:
        roots: wheels that travel whatever they are named.

    Returns (name to wheel, name to the host's version).

    Raises:
        BundleError: a requirement that nothing satisfies, or that only another copy of a HOST_ONLY would.
    """
    target = wheels.target
    chosen = {canonicalize_name(parse_wheel_filename(root.name)[0]): root for root in roots}
    fixed, relied = set(chosen), {}
    ranges: dict[str, SpecifierSet] = {}
    todo: list[tuple[str, Path, frozenset]] = [(name, path, frozenset()) for name, path in chosen.items()]
    walked = set()
    while todo:
        by, wheel, extras = todo.pop()
        if (by, wheel, extras) in walked:
            continue
        walked.add((by, wheel, extras))
        for requirement in requirements(wheel, extras, target.environment()):
            name = canonicalize_name(requirement.name)
            here = target.have.get(name)
            if name in LEFT_OUT and not (here and requirement.specifier.contains(here, prereleases=True)):
                continue
            specifier = SpecifierSet() if by == "vllm" and name in UNPINNED else requirement.specifier
            ranges[name] = ranges.get(name, SpecifierSet()) & specifier
            if name not in fixed and here and ranges[name].contains(here, prereleases=True):
                relied[name] = here
                continue
            if HOST_ONLY.fullmatch(name):
                raise BundleError(
                    f"{by} requires {requirement}, the host has {here or 'none'}: choose another --vllm, or install it"
                )
            relied.pop(name, None)
            path = chosen.get(name)
            if path is None or not ranges[name].contains(parse_wheel_filename(path.name)[1], prereleases=True):
                if name in fixed:
                    raise BundleError(f"{by} requires {requirement}, but {path.name} was given")
                progress(f"{name}{ranges[name]}, for {by}")
                path = chosen[name] = wheels.get(f"{name}{ranges[name]}")
            todo.append((name, path, frozenset(requirement.extras)))
    return chosen, relied


# ---- packing ----


def left_out(name: str, keep: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT_FILES) and not any(
        fnmatch.fnmatch(name, pattern) for pattern in keep
    )


def store(wheel: Path, out: Path, keep: list[str]) -> dict[str, int]:
    """Write a wheel without its LEFT_OUT_FILES and uncompressed, for xz to do better. Returns what was left out."""
    dropped = {}
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(out, "w") as copy:
        for info in source.infolist():
            if left_out(info.filename, keep):
                dropped[info.filename] = info.compress_size
                continue
            data = source.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                rows = [row for row in csv.reader(io.StringIO(data.decode())) if row and not left_out(row[0], keep)]
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(rows)
                data = text.getvalue().encode()
            info.compress_type = zipfile.ZIP_STORED
            copy.writestr(info, data)
    return dropped


def compress(source: Path, stream: BinaryIO) -> dict:
    """Append a file's xz to the stream; where it is and its hash."""
    offset = stream.tell()
    # The highest preset has the largest window, 64 MiB: it makes FlashAttention 3 of 146 MiB one of 8.
    with open(source, "rb") as plain, lzma.open(stream, "wb", preset=9) as packed:
        shutil.copyfileobj(plain, packed, MIB)
    end = stream.seek(0, 1)
    stream.seek(offset)
    return {"offset": offset, "bytes": end - offset, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def cut(stream: BinaryIO, out: Path, part_bytes: int) -> list[dict]:
    """Write a stream as files of at most ``part_bytes``."""
    parts = []
    while content := stream.read(part_bytes):
        name = f"part-{len(parts) + 1}"
        (out / name).write_bytes(content)
        parts.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return parts


def pack(
    chosen: dict[str, Path],
    relied: dict[str, str],
    python: str,
    additions: list[Path],
    out: Path,
    part_bytes: int,
    keep: list[str],
    progress=print,
) -> dict:
    """Write parts, installer and manifest to ``out``, which must not exist or be empty. Returns the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise BundleError(f"{out} is not empty: choose another folder")
    units, dropped = [], {}
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=out) as scratch:
        plain = Path(scratch) / "plain"
        with open(Path(scratch) / "stream", "w+b") as stream:
            for kind, path in [*(("wheel", p) for p in chosen.values()), *(("tar", p) for p in additions)]:
                if kind == "wheel":
                    dropped |= store(path, plain, keep)
                else:
                    with tarfile.open(plain, "w") as tar:
                        tar.add(path, path.name, filter=lambda info: None if "__pycache__" in info.name else info)
                units.append({"file": path.name, "kind": kind} | compress(plain, stream))
                progress(f"{path.name}: {units[-1]['bytes'] / MIB:.1f} MiB")
            stream.seek(0)
            parts = cut(stream, out, part_bytes)
    manifest = {
        "python": python,
        "host": relied,
        "modules": MODULES,
        "parts": parts,
        "units": units,
        "left_out_files": dropped,
    }
    shutil.copy(INSTALLER, out / "install.py")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


# ---- doing it ----


def build_project(folder: Path, archs: str) -> Path:
    """The project's wheel, with GPU kernels for ``archs`` (empty: all) where there is nvcc."""
    cuda = shutil.which("nvcc") is not None
    if not cuda:
        print("no nvcc on the PATH: the project's wheel is built without GPU kernels", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", scratch, str(ROOT)]
        if cuda:
            command += ["-Ccmake.define.FLUTE_CUDA=on", f"-Ccmake.define.FLUTE_CUDA_ARCHS={archs}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BundleError(f"building the project's wheel failed:\n{(done.stdout + done.stderr)[-2000:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        return Path(shutil.move(wheel, folder / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, required=True, help="the host's `python3 -m pip list --format json`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vllm", default="0.25.1")
    parser.add_argument("--python", default="3.12", help="the host's")
    parser.add_argument("--glibc", type=int, default=35, help="minor version of the host's glibc 2")
    parser.add_argument("--wheels", type=Path, help="folder for downloads, kept; with --offline the only source")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--project", type=Path, help="a built wheel of vllm-flute; default: build it")
    parser.add_argument("--archs", default="", help="compute capabilities of its GPU kernels; default: all")
    parser.add_argument("--add", type=Path, action="append", default=[], help="also a file or folder, into TARGET")
    parser.add_argument("--keep", action="append", default=[], help="a file of vLLM's wheel that is else left out")
    parser.add_argument("--part-mib", type=float, default=60)
    args = parser.parse_args()
    for path in args.add:
        if not path.exists():
            raise BundleError(f"--add {path}: there is no such file or folder")
    target = Target(args.python, args.glibc, read_host(args.host))
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Wheels(args.wheels or Path(scratch), target, args.offline)
        vllm = wheels.get(f"vllm=={args.vllm}")
        project = args.project or build_project(wheels.folder, args.archs)
        chosen, relied = resolve([vllm, project], wheels)
        limit = int(args.part_mib * MIB)
        manifest = pack(chosen, relied, args.python, args.add, args.out, limit, args.keep)
    total = sum(part["bytes"] for part in manifest["parts"]) / MIB
    away = sum(manifest["left_out_files"].values()) / MIB
    print(f"{args.out}: {len(manifest['parts'])} parts, {total:.1f} MiB; {away:.0f} MiB of vLLM's wheel left out")


if __name__ == "__main__":
    try:
        main()
    except BundleError as e:
        sys.exit(f"bundle: {e}")
