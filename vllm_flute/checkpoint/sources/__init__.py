"""Quantized checkpoints of other tools, one file a format.

Each module has ``NAME``, what the format is called; ``detect(path, config) -> bool``, which never raises, for a
directory and its config.json or a file and {}; ``open_(path) -> Source``, which raises FluteError.
"""

from pathlib import Path

from ...errors import FluteError
from ...format import QUANT_METHOD
from ..reader import CONFIG, read_json, resolve
from . import awq, bitnet, bitsandbytes, compressed_tensors, gguf, gptq, higgs, modelopt, mxfp4, upstream_flute
from .base import Converted, Source

# The first that recognises a checkpoint opens it.
MODULES = (upstream_flute, gptq, awq, bitsandbytes, compressed_tensors, modelopt, mxfp4, bitnet, higgs, gguf)


def open_source(source: str | Path) -> Source:
    """Open a directory, a hub id or a single file in any format that `vllm-flute import` reads.

    Raises:
        FluteError: no format recognises it, or the one that does finds it broken.
    """
    path = Path(source)
    if path.is_file():
        config = {}
    else:
        path = resolve(source)
        config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    for module in MODULES:
        if module.detect(path, config):
            return module.open_(path)
    if path.is_dir():
        read_json(path / CONFIG)  # says that it is missing
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method == QUANT_METHOD:
        raise FluteError(f"{path} is in lut-v1 already: serve it, or look at it with 'vllm-flute inspect'")
    what = f"quant_method {method!r}" if method else "no quantization that is known here"
    kinds = ", ".join(module.NAME for module in MODULES)
    raise FluteError(f"{path} has {what} (import reads: {kinds}); a plain checkpoint is for 'vllm-flute quantize'")


__all__ = ["Converted", "Source", "open_source"]
