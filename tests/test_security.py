"""What a hostile checkpoint, config or caller must not be able to do; docs/security.md says against whom."""

import ast
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import make_llama31
from safetensors.torch import save_file

from vllm_flute.checkpoint import check_checkpoint, quantize_checkpoint
from vllm_flute.checkpoint.reader import Checkpoint, read_json
from vllm_flute.errors import FluteError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("vllm_flute", "deploy") for path in sorted((ROOT / folder).rglob("*.py"))]
INDEX = "model.safetensors.index.json"

# Modules that turn bytes of a file into objects or code, and calls that do.
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "numpy.load",
    "np.load",
}


def dotted(node: ast.AST) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_turns_data_into_code(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            found += [name for name in [dotted(node.func)] if name in FORBIDDEN_CALLS]
            found += [k.arg for k in node.keywords if k.arg in ("shell", "trust_remote_code") and not is_false(k.value)]
    assert not found


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("security")
    quantize_checkpoint(make_llama31(directory / "plain"), directory / "lut")
    return directory / "lut"


@pytest.fixture
def lut(quantized, tmp_path) -> Path:
    return shutil.copytree(quantized, tmp_path / "lut")


class Marker:
    """Unpickled, it makes the directory ``path``."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_a_pickle_is_refused_and_never_opened_as_one(tmp_path, name):
    source, marker = tmp_path / "source", tmp_path / "executed"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (source / name).write_bytes(pickle.dumps(Marker(marker)))
    for read in (Checkpoint, check_checkpoint, lambda path: quantize_checkpoint(path, tmp_path / "out")):
        with pytest.raises(FluteError):
            read(source)
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "", 7, None, ["a.safetensors"]]
)
def test_an_index_names_files_beside_it_only(lut, file):
    index = json.loads((lut / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = file
    (lut / INDEX).write_text(json.dumps(index))
    with pytest.raises(FluteError, match=re.escape(f"lists {name} in {file!r}")):
        check_checkpoint(lut)


def test_a_link_out_of_the_model_is_not_copied_into_the_result(tmp_path):
    plain, secret = make_llama31(tmp_path / "plain"), tmp_path / "secret.txt"
    secret.write_text("private")
    (plain / "notes.txt").symlink_to(secret)
    with pytest.raises(FluteError, match=r"notes\.txt is a link to .*secret\.txt, outside its model"):
        quantize_checkpoint(plain, tmp_path / "out")
    assert "private" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_hub_cache_is_links_to_its_own_blobs(tmp_path):
    plain = make_llama31(tmp_path / "plain")
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(plain.iterdir())):
        path.rename(cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    quantize_checkpoint(snapshot, tmp_path / "out")
    check_checkpoint(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / "tokenizer.json").is_symlink()


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", (1 << 63) - 1) + b"{}",
        header({"w": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}),
        header({"w": {"dtype": "U8", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 0]}}),
        header({"w": {"dtype": "BF16", "shape": [-1, 8], "data_offsets": [0, 8]}}) + bytes(8),
        header({"w": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}}) + bytes(8),
    ],
    ids=["length", "longest", "beyond the file", "overflow", "negative", "backwards"],
)
def test_sizes_are_checked_before_anything_is_allocated(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    before = peak_kib()
    with pytest.raises(FluteError, match="truncated or not a safetensors file"):
        Checkpoint(tmp_path)
    assert peak_kib() - before < 64 << 10


def peak_kib() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
@pytest.mark.parametrize("value", [10**12, -1, "many"])
def test_a_config_of_other_sizes_than_the_tensors_never_reaches_a_server(lut, key, value):
    config = json.loads((lut / "config.json").read_text())
    (lut / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(FluteError, match=rf"config\.json says {key} {value!r}, but the tensors have \d+"):
        check_checkpoint(lut)


def test_json_is_bounded(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(FluteError, match="not valid JSON"):
        read_json(path)
    with open(path, "wb") as f:
        f.truncate(1 << 40)  # sparse: a terabyte that takes no disk
    with pytest.raises(FluteError, match="1048576 MiB, expected JSON of at most 64 MiB"):
        read_json(path)


def test_code_named_by_a_config_is_not_run(tmp_path):
    plain, marker = make_llama31(tmp_path / "plain"), tmp_path / "executed"
    (plain / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    config = json.loads((plain / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (plain / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("some words to calibrate with, again and again. " * 200)
    quantize_checkpoint(plain, tmp_path / "out", calibrate=text, tokens=1024)
    check_checkpoint(tmp_path / "out")
    assert not marker.exists()


def test_names_of_tensors_are_not_paths(tmp_path):
    plain = make_llama31(tmp_path / "plain")
    save_file({"../../escaped": torch.zeros(1)}, plain / "extra.safetensors")
    index = json.loads((plain / INDEX).read_text())
    index["weight_map"]["../../escaped"] = "extra.safetensors"
    (plain / INDEX).write_text(json.dumps(index))
    quantize_checkpoint(plain, tmp_path / "deep" / "out")
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"plain", "deep"}
