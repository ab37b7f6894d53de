"""`vllm-flute eval`: perplexity of a model on a text file, through a real server or offline."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def _body(text: Path, half: str | None) -> str:
    """The text, or one half of its lines."""
    from ..errors import FluteError

    try:
        lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as e:
        raise FluteError(f"{text} is not UTF-8 text ({e}): convert it") from None
    halves = {None: lines, "first": lines[: len(lines) // 2], "second": lines[len(lines) // 2 :]}
    if half not in halves:
        raise FluteError(f"--half {half!r}: expected 'first' or 'second'")
    return "".join(halves[half])


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Directories or hub ids; each is served in turn.")] = None,
    text: Annotated[Path, typer.Option(help="UTF-8 text file to score.", exists=True, dir_okay=False)] = ...,
    url: Annotated[str, typer.Option(help="A running server to score instead of serving MODELS.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="No server: transformers on dequantized weights, on the CPU.")
    ] = False,
    reference: Annotated[
        str, typer.Option(help="The plain model, to compare with (offline): KL divergence and top-1 agreement.")
    ] = None,
    half: Annotated[str, typer.Option(help="Score only the 'first' or 'second' half of the file's lines.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    stride: Annotated[int, typer.Option(help="New tokens scored by each window (default: half a window).")] = None,
    max_tokens: Annotated[int, typer.Option(help="Score only so many tokens of the text.")] = None,
    dtype: Annotated[str, typer.Option(help="Activation dtype.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity on a text file with strided windows, from the served model's own log-probabilities."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from ..errors import FluteError
    from ..serve.perplexity import Score

    if bool(models) == bool(url):
        raise FluteError("give either MODELS to serve or --url of a running server")
    if offline and url:
        raise FluteError("--offline scores MODELS without a server: leave --url out")
    if reference and not offline:
        raise FluteError("--reference needs --offline: a server gives no whole distributions")
    body = _body(text, half)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar, tempfile.TemporaryDirectory() as directory:

        def run(name: str, score: Callable[..., Score]) -> None:
            task = bar.add_task(name, total=None)
            begin = time.monotonic()
            found = score(lambda done, of: bar.update(task, completed=done, total=of))._asdict()
            found = {key: value for key, value in found.items() if value is not None}
            results.append({"model": name, **found, "seconds": time.monotonic() - begin})

        if offline:
            _offline(models, reference, body, (window, stride, max_tokens), dtype, Path(directory), run)
        else:
            _served(models or [], url, body, (window, stride, max_tokens), dtype, Path(directory), run)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    table = Table("model", "perplexity", "nats a token", *(("KL", "top-1") if reference else ()), "tokens", "seconds")
    for r in results:
        compared = (f"{r['kl']:.4f}", f"{r['top1']:.1%}") if reference else ()
        cells = f"{r['perplexity']:.3f}", f"{r['nats'] / r['tokens']:.4f}", *compared, str(r["tokens"])
        table.add_row(r["model"], *cells, f"{r['seconds']:.0f}")
    Console().print(table)


def _served(models: list[str], url: str | None, body: str, sizes: tuple, dtype: str, directory: Path, run) -> None:
    from ..serve import Client, Server, cpu_environment
    from ..serve.perplexity import perplexity

    if url:
        run(url, lambda progress: perplexity(Client(url), body, *sizes, progress))
    options = ["--dtype", dtype, "--max-model-len", str(sizes[0] + 1)]
    for model in models:
        with Server(model, directory / "server.log", options, cpu_environment()) as server:
            run(model, lambda progress, url=server.url: perplexity(Client(url), body, *sizes, progress))


def _offline(
    models: list[str], reference: str | None, body: str, sizes: tuple, dtype: str, directory: Path, run
) -> None:
    import torch

    from ..errors import FluteError
    from ..serve.offline import OfflineModel, keep_logits, score
    from ..serve.perplexity import text_windows

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if dtype not in dtypes:
        raise FluteError(f"--dtype {dtype!r}: expected {', '.join(dtypes)}")
    window, stride, max_tokens = sizes

    def open_model(name: str) -> tuple[OfflineModel, list]:
        model = OfflineModel(name, dtypes[dtype])
        tokens, bos = model.tokens(body)
        return model, text_windows(tokens[:max_tokens], bos, window, stride, model.context)

    kept = windows = None
    if reference:
        model, windows = open_model(reference)
        kept = keep_logits(model, windows, directory / "reference")
    for name in models:
        model, own = open_model(name)
        if windows is not None and own != windows:
            raise FluteError(f"{name} makes other tokens of the text than {reference}: give the model it was made from")
        run(name, lambda progress, m=model, w=own: score(m.logits(w), w, kept, progress))
