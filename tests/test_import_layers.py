"""The architecture as a lint: who may import whom, and what lies where."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_flute"
# A module imports from its own layer and those before it.
LAYERS = (
    {"errors", "codebook", "packing", "reference", "format", "layout", "extensions"},
    {"ops", "counters", "backends", "dispatch"},
    {"quantization", "checkpoint"},
    {"vllm_plugin"},
    {"serve", "kernel_bench", "cli"},
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
FOLDERS = {"kernels", "vllm_flute", "deploy", "load_tests", "tests", "docs"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Absolute dotted names of all that a file imports, also inside functions; names of packages in full."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            found += [".".join([*base, alias.name]) for alias in node.names]
    return found


def part(parts: tuple[str, ...]) -> str:
    """The module or folder of the package that a path or a dotted name belongs to; "" for the package itself."""
    return parts[1].removesuffix(".py") if len(parts) > 1 and parts[1].removesuffix(".py") in LAYER else ""


def test_every_module_has_a_layer():
    found = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert found - {"__init__"} <= LAYER.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = part(path.relative_to(ROOT).parts)
    for name in imports(path):
        other = part(tuple(name.split("."))) if name.split(".")[0] == "vllm_flute" else ""
        if own and other:
            assert LAYER[other] <= LAYER[own], f"{own} imports {name}, of a later layer"
        if name.split(".")[0] == "vllm":
            assert own == "vllm_plugin", f"{own} imports {name}: only vllm_plugin may"


def test_the_package_and_its_command_line_load_without_vllm():
    code = "import sys, vllm_flute, vllm_flute.cli; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_kernels_torch_includes_torch():
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in (".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu") and "torch" not in path.parts[-2:-1]:
            found = re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text())
            assert not found, f"{path.relative_to(ROOT)} includes torch headers"


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files that git tracks or would (not ignored)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git work tree")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_folders_at_the_top(tracked):
    top = {path.relative_to(ROOT).parts[0] for path in tracked if path.parent != ROOT}
    assert {name for name in top if not name.startswith(".")} <= FOLDERS


def test_no_file_names_a_developers_machine(tracked):
    private = re.compile(r"(?<![\w./~-])/(?:home|root|Users|work)/\w")
    for path in tracked:
        try:
            found = private.search(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}..."
