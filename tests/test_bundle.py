"""The offline bundle: what travels is chosen right, arrives in parts, and is installed beside the host's packages."""

import importlib.metadata
import importlib.util
import json
import lzma
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "{}.{}".format(*sys.version_info)


@pytest.fixture(scope="module")
def bundle():
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "deploy/bundle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(folder: Path, name: str, version: str, requires=(), files=None) -> Path:
    info = f"{name}-{version}.dist-info"
    content = {f"{name}/__init__.py": f"VERSION = {version!r}\n".encode(), **(files or {})}
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    content[f"{info}/METADATA"] = (metadata + "".join(f"Requires-Dist: {r}\n" for r in requires)).encode()
    content[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name}-version = {name}:__str__\n".encode()
    content[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"]).encode()
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for file, data in content.items():
            z.writestr(file, data)
    return path


@pytest.fixture
def wheels(bundle, tmp_path):
    """A resolver on a folder of wheels and a host that has one package."""

    def make(have: dict[str, str]):
        return bundle.Wheels(tmp_path / "wheels", bundle.Target(PYTHON, 35, have), offline=True)

    (tmp_path / "wheels").mkdir()
    return make


def test_a_host_list_is_read_or_named(bundle, tmp_path):
    host = tmp_path / "host.json"
    host.write_text('[{"name": "Huggingface_Hub", "version": "1.33.0"}]')
    assert bundle.read_host(host) == {"huggingface-hub": "1.33.0"}
    host.write_text("torch 2.11.0")
    with pytest.raises(bundle.BundleError, match=r"host\.json is not the output of"):
        bundle.read_host(host)


def test_what_the_host_has_stays_there_and_the_rest_travels(bundle, wheels, tmp_path):
    folder = tmp_path / "wheels"
    requires = [
        "torch==2.11.0",
        "on_host>=1",
        "old_on_host>=2",
        "numba",
        "torchvision==0.26.0",
        'windows; sys_platform == "win32"',
        "a[more]",
    ]
    root = make_wheel(folder, "root", "1", [*requires, 'never; extra == "bench"'])
    make_wheel(folder, "old_on_host", "2")
    make_wheel(folder, "a", "1", ["b", 'c; extra == "more"', 'd; extra == "other"'])
    make_wheel(folder, "b", "1", ["c<2"])
    for version in ("1", "2"):
        make_wheel(folder, "c", version)
    chosen, relied = bundle.resolve([root], wheels({"torch": "2.11.0+cu130", "on-host": "1.5", "old-on-host": "1"}))
    assert {name: path.name.split("-")[1] for name, path in chosen.items()} == {
        "root": "1",
        "old-on-host": "2",
        "a": "1",
        "b": "1",
        "c": "1",
    }
    assert relied == {"torch": "2.11.0+cu130", "on-host": "1.5"}


def test_a_pin_for_what_is_left_out_does_not_bind(bundle, wheels, tmp_path):
    folder = tmp_path / "wheels"
    root = make_wheel(folder, "vllm", "1", ["apache-tvm-ffi==0.1.9", "xgrammar", "flashinfer-python"])
    make_wheel(folder, "xgrammar", "1", ["apache-tvm-ffi>=0.1.11"])
    for version in ("0.1.9", "0.1.15"):
        make_wheel(folder, "apache_tvm_ffi", version)
    chosen, _ = bundle.resolve([root], wheels({}))
    assert sorted(path.name for path in chosen.values()) == [
        "apache_tvm_ffi-0.1.15-py3-none-any.whl",
        "vllm-1-py3-none-any.whl",
        "xgrammar-1-py3-none-any.whl",
    ]


@pytest.mark.parametrize(("version", "relied"), [("0.68.0", {}), ("0.65.0", {"numba": "0.65.0"})])
def test_what_is_left_out_does_not_travel_for_its_version_on_the_host(bundle, wheels, tmp_path, version, relied):
    root = make_wheel(tmp_path / "wheels", "vllm", "1", ["numba==0.65.0"])
    chosen, found = bundle.resolve([root], wheels({"numba": version}))
    assert (list(chosen), found) == (["vllm"], relied)


def test_a_second_torch_never_travels(bundle, wheels, tmp_path):
    root = make_wheel(tmp_path / "wheels", "root", "1", ["torch==2.11.0"])
    make_wheel(tmp_path / "wheels", "torch", "2.11.0")
    with pytest.raises(bundle.BundleError, match=r"requires torch==2.11.0, the host has 2.10.0"):
        bundle.resolve([root], wheels({"torch": "2.10.0"}))


def test_a_requirement_without_a_wheel_is_named(bundle, wheels, tmp_path):
    root = make_wheel(tmp_path / "wheels", "root", "1", ["nowhere>=3"])
    with pytest.raises(bundle.BundleError, match="no wheel of nowhere>=3 for the host"):
        bundle.resolve([root], wheels({}))


def test_left_out_files_leave_no_trace_unless_kept(bundle, tmp_path):
    files = {"vllm/_moe_C.abi3.so": b"moe", "vllm/_C_stable_libtorch.abi3.so": b"dense"}
    wheel = make_wheel(tmp_path, "vllm", "1", files=files)
    dropped = bundle.store(wheel, tmp_path / "plain", keep=[])
    assert list(dropped) == ["vllm/_moe_C.abi3.so"]
    with zipfile.ZipFile(tmp_path / "plain") as z:
        assert "vllm/_C_stable_libtorch.abi3.so" in z.namelist() and "vllm/_moe_C.abi3.so" not in z.namelist()
        assert b"_moe_C" not in z.read("vllm-1.dist-info/RECORD")
    assert bundle.store(wheel, tmp_path / "plain", keep=["vllm/_moe_C*"]) == {}


# ---- parts, and installing them ----


@pytest.fixture(scope="module")
def bundled(bundle, tmp_path_factory):
    """Two wheels and a folder in parts of 16 KiB, for a host that is this Python."""
    folder, noise = tmp_path_factory.mktemp("bundled"), random.Random(0)
    roots = [
        make_wheel(folder, "small", "1"),
        make_wheel(folder, "big", "1", files={"big/data.bin": noise.randbytes(40_000)}),
    ]
    extra = folder / "models"
    (extra / "__pycache__").mkdir(parents=True)
    (extra / "__pycache__" / "x.pyc").write_bytes(b"no")
    (extra / "weights").write_bytes(noise.randbytes(20_000))
    relied, chosen = {"pip": importlib.metadata.version("pip")}, {p.name: p for p in roots}
    bundle.pack(chosen, relied, PYTHON, [extra], folder / "bundle", 16 << 10, keep=[], progress=lambda _: None)
    edit_manifest(folder / "bundle", modules=["small", "big", "pip"])
    return folder


@pytest.fixture
def packed(bundled, tmp_path):
    out = shutil.copytree(bundled / "bundle", tmp_path / "bundle")
    return out, json.loads((out / "manifest.json").read_text())


def edit_manifest(out: Path, **values) -> None:
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def install(folder: Path, target: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, folder / "install.py", target], capture_output=True, text=True)


def test_parts_are_within_the_limit_and_hold_everything(packed):
    out, manifest = packed
    sizes = [(out / part["name"]).stat().st_size for part in manifest["parts"]]
    assert len(sizes) == 4 and max(sizes) == 16 << 10
    stream = b"".join((out / part["name"]).read_bytes() for part in manifest["parts"])
    assert sum(unit["bytes"] for unit in manifest["units"]) == len(stream)
    for unit in manifest["units"]:
        assert lzma.decompress(stream[unit["offset"] : unit["offset"] + unit["bytes"]])


def test_parts_may_come_one_by_one(packed, bundled, tmp_path):
    out, manifest = packed
    target, arriving = tmp_path / "env", tmp_path / "arriving"
    arriving.mkdir()
    names = [part["name"] for part in manifest["parts"]]
    for number, name in enumerate(reversed(names), 1):
        for file in ("install.py", "manifest.json", name):
            (arriving / file).write_bytes((out / file).read_bytes())
        done = install(arriving, target)
        (arriving / name).unlink()
        if number < len(names):
            assert done.returncode == 1
            missing = ", ".join(names[: len(names) - number])
            assert done.stderr == f"install: not complete yet: copy {missing} beside this file and run it again\n"
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout
    assert (target / "models/weights").read_bytes() == (bundled / "models/weights").read_bytes()
    assert not (target / "models/__pycache__").exists() and not (target / ".bundle").exists()
    assert (target / "bin/big-version").exists()
    # The environment's own packages, and this Python's under them.
    code = "import big, pip, small; print(big.__file__, pip.__file__)"
    big, pip = subprocess.run([target / "bin/python", "-c", code], capture_output=True, text=True).stdout.split()
    assert big.startswith(str(target)) and not pip.startswith(str(target))
    # Again: nothing to do.
    assert install(arriving, target).returncode == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"python": "3.9"}, "this is Python .*, the bundle is for 3.9"),
        ({"host": {"torch": "0.1"}}, "torch is .* here, the bundle relies on 0.1: make it again"),
        ({"host": {"nowhere": "1"}}, "nowhere is missing here"),
        ({"modules": ["small.absent"]}, "an import fails: ModuleNotFoundError: No module named 'small.absent'"),
    ],
)
def test_a_host_that_does_not_fit_is_one_line(packed, tmp_path, change, says):
    out, _ = packed
    edit_manifest(out, **change)
    done = install(out, tmp_path / "env")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(says, done.stderr), done.stderr


def test_a_damaged_part_is_named_and_nothing_is_installed_from_it(packed, tmp_path):
    out, manifest = packed
    part = out / manifest["parts"][0]["name"]
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    done = install(out, tmp_path / "env")
    assert done.returncode == 1
    assert done.stderr.startswith(f"install: {part} is damaged") and "copy it again" in done.stderr
    assert json.loads((tmp_path / "env/bundle.json").read_text())["installed"] == []


def test_a_folder_with_something_else_is_left_alone(packed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    done = install(packed[0], tmp_path / "mine")
    assert done.returncode == 1 and "mine is not empty: choose another folder" in done.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]
