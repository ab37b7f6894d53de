"""`vllm-flute quantize`: a plain checkpoint to lut-v1."""

import re
import time
from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ScaleDtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"


def _codebook(value: str):
    """A table's name, or the fp32 tensor in a JSON file that holds a list of numbers."""
    path = Path(value.removeprefix("@"))
    if not value.startswith("@") and path.suffix != ".json":
        return value
    import json

    import torch

    from ..errors import FluteError

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, list) and all(type(v) in (int, float) for v in values):
            return torch.tensor(values, dtype=torch.float32)
    except OSError as e:
        raise FluteError(f"--codebook: {path} cannot be read: {e.strerror}") from None
    except ValueError:
        pass
    raise FluteError(f"--codebook: {path} does not hold a JSON list of numbers")


def _override(value: str) -> tuple[str, tuple[int, int]]:
    from ..errors import FluteError

    found = re.fullmatch(r"(.+)=(\d+):(\d+)", value)
    if not found:
        raise FluteError(f"--override {value!r}: expected NAME=BITS:GROUP_SIZE, such as down_proj=3:128")
    return found[1], (int(found[2]), int(found[3]))


def quantize(
    source: Annotated[str, typer.Argument(help="Directory or hub id of a checkpoint in safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    bits: Annotated[int, typer.Option(help="Bits of a code: 2, 3 or 4.")] = 4,
    target_bits: Annotated[
        float,
        typer.Option(
            help="Choose 2, 3 or 4 bits for each layer by what the model loses, for so many bits a weight on average, "
            "scales included; --bits then counts for the output head."
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale: 16, 32, 64, 128, 256, or 0 for a whole row.")
    ] = 64,
    codebook: Annotated[
        str,
        typer.Option(
            help="fitted (a table for each layer; default with --calibrate), nf (default without), lloyd-max, "
            "fp4 (4 bits), int, ternary (2 bits), or a JSON file with a list of numbers.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="scale-search (default), absmax, gptq (default with --calibrate), or learned (GPTQ, then all "
            "scales trained against the plain model's predictions).",
        ),
    ] = None,
    calibrate: Annotated[
        Path, typer.Option(metavar="TEXT", help="UTF-8 text to calibrate with.", exists=True, dir_okay=False)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are used.")] = 32768,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Fold random rotations into the weights first; unties a tied head.")
    ] = False,
    prescale: Annotated[
        bool,
        typer.Option(
            "--prescale",
            help="Fold scales of the inputs into the weights first, so that inputs that matter are rounded less (AWQ); "
            "needs --calibrate.",
        ),
    ] = False,
    ignore: Annotated[
        list[str], typer.Option(help="Leave these modules as they are: part of a dotted name, or re:REGEX. Repeatable.")
    ] = (),
    override: Annotated[
        list[str], typer.Option(metavar="NAME=BITS:GROUP", help="Other settings for some modules. Repeatable.")
    ] = (),
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Quantize the output head too; unties a tied one.")
    ] = False,
    scale_dtype: Annotated[ScaleDtype, typer.Option(help="How scales are stored.")] = ScaleDtype.bfloat16,
    report_file: Annotated[
        Path, typer.Option("--report", metavar="FILE", help="Write every layer's errors here, as JSON.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result in the output.")] = False,
) -> None:
    """Quantize a checkpoint, one layer in memory; after an interruption the same command continues."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..checkpoint import quantize_checkpoint
    from ..checkpoint.output import write_json
    from ..errors import FluteError
    from .walk import peak_memory, progress_bar, size

    if report_file and not report_file.absolute().parent.is_dir():
        raise FluteError(f"--report: {report_file.parent} is no directory: make it first")
    begin = time.monotonic()
    with progress_bar("quantize") as progress:
        report = quantize_checkpoint(
            source,
            output,
            bits=bits,
            group_size=group_size,
            codebook=None if codebook is None else _codebook(codebook),
            ignore=ignore,
            overrides=dict(_override(value) for value in override),
            lm_head=lm_head,
            scale_dtype=getattr(torch, scale_dtype.value),
            method=method,
            calibrate=calibrate,
            tokens=tokens,
            rotate=rotate,
            prescale=prescale,
            target_bits=target_bits,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.monotonic() - begin
    if report_file:
        found = {"layers": [asdict(layer) for layer in report.layers], "seconds": seconds}
        write_json(report_file, found | {"peak_memory_bytes": peak_memory()})
    adjusted = [layer for layer in report.layers if layer.adjusted]
    worst = max(report.layers, key=lambda layer: layer.error)
    counts = Counter(layer.bits for layer in report.layers)
    widths = ", ".join(f"{count} of {width} bits" for width, count in sorted(counts.items()))
    table = Table(show_header=False)
    table.add_row("output", str(output))
    table.add_row(
        "layers",
        f"{widths}, group {group_size or 'a row'}, codebook {report.config.codebook}",
    )
    calibrated = f", calibrated with {report.calibration_tokens} tokens" if calibrate else ""
    table.add_row("method", report.method + calibrated + ", rotated" * rotate + ", prescaled" * prescale)
    table.add_row("bits a weight", f"{report.bits_per_weight:.3f} in quantized layers, with scales and codebooks")
    table.add_row("size", f"{size(report.source_bytes)} -> {size(report.output_bytes)}")
    table.add_row("relative error", f"mean {report.mean_error:.4f}, largest {worst.error:.4f} ({worst.name})")
    if calibrate:
        at_outputs = max(report.layers, key=lambda layer: layer.output_error)
        mean = sum(layer.output_error for layer in report.layers) / len(report.layers)
        table.add_row("at the outputs", f"mean {mean:.4f}, largest {at_outputs.output_error:.4f} ({at_outputs.name})")
    if adjusted:
        sizes = ", ".join(sorted({f"{layer.group_size} where K={layer.k}" for layer in adjusted}))
        table.add_row("adjusted", f"{len(adjusted)} layers have another group size: {sizes}")
    table.add_row("time", f"{seconds:.1f} s, {report.source_bytes / seconds / 2**20:.0f} MiB/s")
    table.add_row("peak memory", size(peak_memory()))
    Console().print(table)
    print(f"serve it: vllm serve {output} --quantization flute")
