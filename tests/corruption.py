"""Broken checkpoints for fuzz tests: a good one of a few tensors, one thing in it changed."""

import copy
import json
import shutil
import struct
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_flute.checkpoint.sources import open_source
from vllm_flute.errors import FluteError

DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)
# What a number, a name or an object of config.json may wrongly be.
JUNK = (None, -1, 0, 1, 7, 10**30, 0.5, float("nan"), True, "", "x", [], [1], {}, {"a": {}}, "int8", [None])


def write_small(path: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    """One file, without a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def _bits(draw, t: torch.Tensor) -> torch.Tensor:
    """The same tensor with some bytes of any value: NaNs and infinities too."""
    flat = t.contiguous().view(-1).view(torch.uint8).clone() if t.numel() else t
    for _ in range(draw(st.integers(1, 4)) if t.numel() else 0):
        flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from((0, 1, 127, 128, 255)))
    return flat.view(t.dtype).view(t.shape) if t.numel() else t


def _reshape(draw, t: torch.Tensor) -> torch.Tensor:
    kind = draw(st.sampled_from(("flat", "extra", "cut", "empty", "scalar", "transposed")))
    if kind == "flat":
        return t.reshape(-1)
    if kind == "extra":
        return t[None]
    if kind == "transposed":
        return t.t() if t.dim() == 2 else t[None, None]
    if kind == "scalar":
        return t.reshape(-1)[0] if t.numel() else t
    return t[:0] if kind == "empty" and t.dim() else t[: len(t) // 2] if t.dim() else t


def _paths(value, prefix=()) -> list[tuple]:
    """Where in a JSON value each inner value is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in items for p in [(*prefix, key), *_paths(inner, (*prefix, key))]]


@st.composite
def corrupted(draw, path: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    """Write to ``path`` a checkpoint in which one to three things are wrong, and return the path."""
    shutil.rmtree(path, ignore_errors=True)
    tensors, config = dict(tensors), copy.deepcopy(config)
    kinds = ("missing", "dtype", "shape", "bytes", "config", "config key", "file", "header")
    kinds = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    for kind in kinds:
        name = draw(st.sampled_from(sorted(tensors))) if tensors else None
        if kind == "missing" and name:
            del tensors[name]
        elif kind == "dtype" and name:
            tensors[name] = tensors[name].float().to(draw(st.sampled_from(DTYPES)))
        elif kind == "shape" and name:
            tensors[name] = _reshape(draw, tensors[name]).clone()
        elif kind == "bytes" and name:
            tensors[name] = _bits(draw, tensors[name])
        elif kind.startswith("config"):
            places = [p for p in _paths(config) if p[0] == "quantization_config"]
            if not places:
                continue
            *place, last = draw(st.sampled_from(places))
            inner = config
            for key in place:
                inner = inner[key]
            if kind == "config":
                inner[last] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            elif isinstance(inner, dict):
                del inner[last]
    write_small(path, tensors, config)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if "file" in kinds:
        data = data[: draw(st.integers(0, len(data)))]
    if "header" in kinds and len(data) > 8:
        size = draw(st.sampled_from((0, 2, len(data), 100_000_000, 2**40, 2**63)))
        if draw(st.booleans()):
            data[:8] = struct.pack("<Q", size)
        else:
            data[draw(st.integers(8, len(data) - 1))] = draw(st.integers(0, 255))
    file.write_bytes(data)
    return path


def assert_converted_or_refused(path: Path) -> None:
    """Every layer becomes what the headers foretold, or one line says what is wrong; no other exception escapes."""
    try:
        source = open_source(path)
        for layer, spec in source.quantized().items():
            lut = source.convert(layer).lut
            assert (lut.bits, lut.group_size) == spec
    except FluteError as e:
        assert "\n" not in str(e)
