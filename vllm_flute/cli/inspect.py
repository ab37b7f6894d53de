"""`vllm-flute inspect`: what is in a checkpoint, of lut-v1 or of a format to import; is it sound."""

from typing import Annotated

import typer


def inspect(
    path: Annotated[str, typer.Argument(help="Directory, hub id or file: lut-v1, or what 'import' reads.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the quantized layers by settings, with their tables and the kernels that would run here.

    A lut-v1 checkpoint is checked by its headers; of one in another format it tells what 'import' would write.
    """
    import json

    from ..checkpoint import summarize
    from ..format import FORMAT
    from .walk import report_console, size

    found = summarize(path)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.table import Table

    rows = found["groups"]
    sound = "sound" if found["format"] == FORMAT else "the figures are those of lut-v1 after 'vllm-flute import'"
    table = Table("", "bits", "group size", "codebook", "scales", "besides", "layers", "weights", "size")
    for i, row in enumerate(rows, 1):
        besides = ", ".join(row["extensions"]) or "-"
        cells = [i, row["bits"], row["group_size"], row["codebook"], row["scales"], besides, row["layers"]]
        table.add_row(*map(str, cells), f"{row['weights'] / 1e6:.1f} M", size(row["bytes"]))
    console = report_console()
    layers = sum(row["layers"] for row in rows)
    console.print(f"{found['path']}: {found['format']}, {layers} quantized layers in {found['files']} files; {sound}")
    console.print(table)
    for i, row in enumerate(rows, 1):
        values = ", ".join(f"{value:.4g}" for value in row["tables"][0])
        many = f"{len(row['tables'])} tables, the first " if len(row["tables"]) > 1 else ""
        kernels = ", ".join(f"M = {m}: {name}" for m, name in row["kernels"].items())
        lines = {"table": f"{many}[{values}]", f"kernels ({row['device']}, bf16)": kernels}
        if "exact" in row:
            lines["exact"] = ("yes" if row["exact"] else "no") + (f": {row['note']}" if row["note"] else "")
        for what, line in lines.items():
            console.print(f"{i}: {what}: {line}", markup=False, highlight=False)
    for note in found.get("notes", ()):
        console.print(f"note: {note}", markup=False)
    sizes = f"{found['bits_per_weight']:.3f} bits a quantized weight; {size(found['quantized_bytes'])} quantized"
    if "other_bytes" in found:
        plain = ", ".join(found["ignore"]) or "embeddings, norms"
        sizes += f", {size(found['other_bytes'])} other; not quantized: {plain}"
    else:
        sizes += f"; the source has {size(found['bytes'])} in all"
    console.print(sizes)
