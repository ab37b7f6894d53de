"""`vllm-flute import`: a quantized checkpoint of another format to lut-v1."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[str, typer.Argument(help="Directory, hub id or file of a quantized checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    ignore: Annotated[
        list[str], typer.Option(help="Write these modules as plain weights: part of a dotted name, or re:REGEX.")
    ] = (),
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Quantize again, with an error, what no lookup table fits.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result in the output.")] = False,
) -> None:
    """Turn an existing quantized checkpoint into lut-v1 without quantizing again; an interrupted run continues."""
    from rich.table import Table

    from ..checkpoint import import_checkpoint
    from .walk import peak_memory, progress_bar, report_console, size

    begin = time.monotonic()
    with progress_bar("import") as progress:
        report = import_checkpoint(source, output, ignore, allow_lossy, overwrite, progress)
    seconds = time.monotonic() - begin
    specs = Counter((layer.bits, layer.group_size) for layer in report.layers if layer.bits)
    weights = sum(layer.n * layer.k for layer in report.layers if layer.bits)
    stored = sum(layer.nbytes for layer in report.layers if layer.bits)
    exact = sum(layer.exact for layer in report.layers)
    table = Table(show_header=False)
    table.add_row("source", f"{source}: {report.kind}")
    table.add_row("output", str(output))
    table.add_row("layers", ", ".join(f"{n} of {b} bits in groups of {g}" for (b, g), n in sorted(specs.items())))
    table.add_row("exact", f"{exact} of {len(report.layers)} layers equal the source bit by bit")
    for note, count in Counter(layer.note for layer in report.layers if layer.note).items():
        table.add_row("", f"{count} layers: {note}")
    for note in report.notes:
        table.add_row("note", note)
    table.add_row("bits a weight", f"{stored * 8 / weights:.3f} in quantized layers, with scales and codebooks")
    table.add_row("size", f"{size(report.source_bytes)} -> {size(report.output_bytes)}")
    table.add_row("time", f"{seconds:.1f} s, {report.source_bytes / seconds / 2**20:.0f} MiB/s")
    table.add_row("peak memory", size(peak_memory()))
    report_console().print(table)
    print(f"serve it: vllm serve {output} --quantization flute")
