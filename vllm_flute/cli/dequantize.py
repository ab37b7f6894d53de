"""`vllm-flute dequantize`: a lut-v1 checkpoint back to a plain one."""

from pathlib import Path
from typing import Annotated

import typer


def dequantize(
    source: Annotated[str, typer.Argument(help="Directory or hub id of a lut-v1 checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of all weights.")] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result in the output.")] = False,
) -> None:
    """Write the plain checkpoint that a quantized one stands for, to compare both in stock vLLM."""
    from ..checkpoint import dequantize_checkpoint
    from .walk import progress_bar

    with progress_bar("dequantize") as progress:
        dequantize_checkpoint(source, output, dtype, overwrite, progress)
    print(f"wrote {output} ({dtype})")
