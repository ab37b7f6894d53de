"""Make a virtual environment from an offline bundle (deploy/bundle.py), on top of what this Python has installed.

    python3 install.py TARGET

Standard library and pip only, no network. Parts may come one by one: those beside this file are taken in, and what
is missing is said, until all were here once. The Python that runs this is never changed.
"""

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent


class InstallError(Exception):
    """One line for the user."""


def check_host(manifest: dict) -> None:
    """Raise InstallError where this Python is not the one that the bundle was made for."""
    python = "{}.{}".format(*sys.version_info)
    if python != manifest["python"]:
        raise InstallError(f"this is Python {python}, the bundle is for {manifest['python']}")
    for name, version in manifest["host"].items():
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != version.partition("+")[0]:
            raise InstallError(
                f"{name} is {found} here, the bundle relies on {version}: make it again with this host's package list"
            )


def make_environment(target: Path) -> Path:
    """The python of a virtual environment that also sees this Python's packages, after its own.

    A .pth file and not --system-site-packages: that would show the base installation's packages, which are not
    this Python's where it is a virtual environment itself.
    """
    python = target / "bin" / "python"
    if not python.exists():
        venv.EnvBuilder(with_pip=False, symlinks=True).create(target)
    site = target / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "host.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in packages))
    return python


def collect_parts(manifest: dict, stash: Path) -> list[str]:
    """Move what is new beside this file into the stash, checked; the names of parts that are still missing."""
    missing = []
    for part in manifest["parts"]:
        source, kept = HERE / part["name"], stash / part["name"]
        if kept.exists():
            continue
        if not source.exists():
            missing.append(part["name"])
            continue
        with open(source, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != part["sha256"]:
            raise InstallError(f"{source} is damaged: its sha256 is {found}, expected {part['sha256']}; copy it again")
        shutil.copyfile(source, kept.with_suffix(".partial"))
        os.replace(kept.with_suffix(".partial"), kept)
    return missing


def unpack(manifest: dict, unit: dict, stash: Path, out: Path) -> bool:
    """Write a unit's plain content to ``out``; False where a part of it is missing."""
    digest, plain, start = hashlib.sha256(), lzma.LZMADecompressor(), 0
    with open(out, "wb") as f:
        for part in manifest["parts"]:
            begin = max(unit["offset"] - start, 0)
            end = min(unit["offset"] + unit["bytes"] - start, part["bytes"])
            start += part["bytes"]
            if begin >= end:
                continue
            if not (stash / part["name"]).exists():
                return False
            with open(stash / part["name"], "rb") as source:
                source.seek(begin)
                while begin < end and (block := source.read(min(end - begin, 1 << 20))):
                    digest.update(block)
                    f.write(plain.decompress(block))
                    begin += len(block)
    if digest.hexdigest() != unit["sha256"]:
        raise InstallError(f"{unit['file']} is damaged in {stash}: remove that folder and install again")
    return True


def install(target: Path) -> None:
    manifest = json.loads((HERE / "manifest.json").read_text())
    check_host(manifest)
    bundle = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    state_file, stash = target / "bundle.json", target / ".bundle"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"bundle": bundle, "installed": []}
    if state["bundle"] != bundle:
        raise InstallError(f"{target} was made from another bundle: remove it or choose another folder")
    if target.exists() and not state_file.exists() and any(target.iterdir()):
        raise InstallError(f"{target} is not empty: choose another folder")
    installed = state["installed"]

    def record() -> None:
        state_file.with_suffix(".partial").write_text(json.dumps(state))
        os.replace(state_file.with_suffix(".partial"), state_file)

    if len(installed) < len(manifest["units"]):
        python = make_environment(target)
        record()
        stash.mkdir(exist_ok=True)
        missing = collect_parts(manifest, stash)
        ready = {}
        for unit in manifest["units"]:
            # pip reads a wheel's name.
            plain = stash / (unit["file"] if unit["kind"] == "wheel" else f"{unit['file']}.tar")
            if unit["file"] not in installed and unpack(manifest, unit, stash, plain):
                ready[unit["file"]] = plain
        if wheels := [str(path) for path in ready.values() if path.suffix == ".whl"]:
            command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
            command += ["--no-compile", "--quiet", "--disable-pip-version-check", "--ignore-installed", *wheels]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise InstallError(f"pip did not install the wheels: {done.stderr.strip()[-500:]}")
        for path in ready.values():
            if path.suffix == ".tar":
                with tarfile.open(path) as tar:
                    tar.extractall(target, filter="data")
            path.unlink()
        installed += ready
        record()
        print(f"{len(installed)} of {len(manifest['units'])} packages and folders are installed", flush=True)
        if missing:
            raise InstallError(f"not complete yet: copy {', '.join(missing)} beside this file and run it again")
        shutil.rmtree(stash)
    check = f"import importlib; [importlib.import_module(name) for name in {manifest['modules']!r}]"
    done = subprocess.run([target / "bin" / "python", "-c", check], capture_output=True, text=True)
    if done.returncode:
        raise InstallError(f"installed, but an import fails: {done.stderr.strip().splitlines()[-1]}")
    print(f"complete, and everything that serving a LLaMA imports is there: {target}/bin/vllm serve MODEL")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        install(Path(sys.argv[1]).absolute())
    except InstallError as e:
        sys.exit(f"install: {e}")
