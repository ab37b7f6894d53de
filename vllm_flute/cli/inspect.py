"""`vllm-flute inspect`: is this a sound lut-v1 checkpoint, and what is in it."""

from collections import defaultdict
from typing import Annotated

import typer


def inspect(
    path: Annotated[str, typer.Argument(help="Directory or hub id of a lut-v1 checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a lut-v1 checkpoint by its headers and list its layers by settings; a broken one is an error."""
    import json

    from ..checkpoint import Checkpoint, LutConfig
    from ..checkpoint.validate import check_layers
    from ..format import FORMAT
    from .walk import size

    source = Checkpoint(path)
    layers = check_layers(source)
    config = LutConfig.from_dict(source.config["quantization_config"])
    groups = defaultdict(list)
    for layer in layers:
        groups[layer.bits, layer.group_size, layer.scale_dtype].append(layer)
    rows = [
        {
            "bits": bits,
            "group_size": group_size,
            "codebook": config.codebook,
            "scales": scale_dtype,
            "layers": len(members),
            "weights": sum(layer.n * layer.k for layer in members),
            "bytes": sum(layer.nbytes for layer in members),
        }
        for (bits, group_size, scale_dtype), members in sorted(groups.items())
    ]
    quantized, weights = sum(row["bytes"] for row in rows), sum(row["weights"] for row in rows)
    summary = {
        "path": str(source.path),
        "format": FORMAT,
        "groups": rows,
        "ignore": list(config.ignore),
        "quantized_bytes": quantized,
        "other_bytes": source.nbytes - quantized,
        "bits_per_weight": quantized * 8 / weights,
        "files": len(source.files),
    }
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("bits", "group size", "codebook", "scales", "layers", "weights", "size")
    for row in rows:
        cells = [row["bits"], row["group_size"], row["codebook"], row["scales"], row["layers"]]
        table.add_row(*map(str, cells), f"{row['weights'] / 1e6:.1f} M", size(row["bytes"]))
    console = Console()
    console.print(f"{source.path}: {FORMAT}, {len(layers)} quantized layers in {len(source.files)} files, sound")
    console.print(table)
    console.print(
        f"{summary['bits_per_weight']:.3f} bits a quantized weight; {size(quantized)} quantized, "
        f"{size(summary['other_bytes'])} other; not quantized: {', '.join(config.ignore) or 'embeddings, norms'}"
    )
