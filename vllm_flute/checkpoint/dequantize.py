"""Turn a lut-v1 checkpoint back into a plain one, to compare with or to start from."""

from pathlib import Path

import torch

from .. import __version__
from ..errors import FluteError
from ..format import EXTENSIONS, PARTS, LutTensor
from .output import Output, copy_files
from .reader import Checkpoint
from .rewrite import Progress, fingerprint, require_elsewhere, rewrite
from .validate import check_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CARD = """\
# Dequantized checkpoint

Plain {dtype} weights with the values of a lut-v1 checkpoint, written by `vllm-flute dequantize`: the reference for
what the quantized model computes.
"""


def dequantize_checkpoint(
    src: str | Path, out: str | Path, dtype: str = "bfloat16", overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Write a plain copy of a lut-v1 checkpoint in one dtype, streamed and restartable like the quantizer.

    Args:
        src: a directory or hub id in lut-v1.
        out: the directory to write; returned.
        dtype: "float32", "bfloat16" or "float16", of every float tensor; weights are computed in fp32 and rounded once.

    Raises:
        FluteError: a source that `check_checkpoint` refuses, another dtype, an ``out`` that holds something else.
    """
    if dtype not in DTYPES:
        raise FluteError(f"unsupported dtype {dtype!r} (supported: {', '.join(DTYPES)})")
    source = Checkpoint(src)
    require_elsewhere(source, out)
    layers = {info.name for info in check_layers(source)}

    def convert(name: str) -> tuple[dict[str, torch.Tensor], dict | None]:
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in (*PARTS, *EXTENSIONS):
            tensor = source.tensor(name)
            return {name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor}, None
        if part != "qweight":  # taken with its qweight
            return {}, None
        stored = [p for p in (*PARTS, *EXTENSIONS) if f"{layer}.{p}" in source.headers]
        t = LutTensor.from_parts({p: source.tensor(f"{layer}.{p}") for p in stored}, layer)
        return {f"{layer}.weight": t.dequantize(DTYPES[dtype])}, None

    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, dtype)
    options = {"version": __version__, "dequantize": dtype}
    with Output(out, fingerprint(source, options), overwrite) as output:
        rewrite(source.headers, convert, output, progress)
        copy_files(source.path, output.path)
        output.finish(config, _CARD.format(dtype=dtype))
    return Path(out)
