"""`vllm-flute eval`: perplexity of a model on a text file, through a real server."""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Directories or hub ids; each is served in turn.")] = None,
    text: Annotated[Path, typer.Option(help="UTF-8 text file to score.", exists=True, dir_okay=False)] = ...,
    url: Annotated[str, typer.Option(help="A running server to score instead of serving MODELS.")] = None,
    half: Annotated[str, typer.Option(help="Score only the 'first' or 'second' half of the file's lines.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    stride: Annotated[int, typer.Option(help="New tokens scored by each window (default: half a window).")] = None,
    max_tokens: Annotated[int, typer.Option(help="Score only so many tokens of the text.")] = None,
    dtype: Annotated[str, typer.Option(help="Activation dtype of the server.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity on a text file with strided windows, from the served model's own log-probabilities."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from ..errors import FluteError
    from ..serve import Client, Server, cpu_environment
    from ..serve.perplexity import perplexity

    if bool(models) == bool(url):
        raise FluteError("give either MODELS to serve or --url of a running server")
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    match half:
        case "first":
            lines = lines[: len(lines) // 2]
        case "second":
            lines = lines[len(lines) // 2 :]
        case None:
            pass
        case _:
            raise FluteError(f"--half {half!r}: expected 'first' or 'second'")
    body = "".join(lines)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar:

        def score(name: str, address: str) -> None:
            task = bar.add_task(name, total=None)
            begin = time.monotonic()
            result = perplexity(
                Client(address),
                body,
                window,
                stride,
                max_tokens,
                lambda done, of: bar.update(task, completed=done, total=of),
            )
            results.append({"model": name, **result._asdict(), "seconds": time.monotonic() - begin})

        if url:
            score(url, url)
        for model in models or []:
            options = ["--dtype", dtype, "--max-model-len", str(window + 1)]
            with (
                tempfile.TemporaryDirectory() as directory,
                Server(model, Path(directory) / "server.log", options, cpu_environment()) as server,
            ):
                score(model, server.url)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    table = Table("model", "perplexity", "nats a token", "tokens", "seconds")
    for r in results:
        cells = f"{r['perplexity']:.3f}", f"{r['nats'] / r['tokens']:.4f}", str(r["tokens"]), f"{r['seconds']:.0f}"
        table.add_row(r["model"], *cells)
    Console().print(table)
