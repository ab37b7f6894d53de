"""The command line: one file a command, one line here for each; heavy imports stay inside the commands."""

import os
import sys

import typer

from ..errors import FluteError
from . import bench, demo_model, dequantize, doctor, eval, import_, inspect, quantize, serve_admin

app = typer.Typer(
    name="vllm-flute",
    help="Lookup-table (LUT) quantized LLMs for vLLM: make checkpoints, check them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize.quantize)
app.command("import")(import_.import_)
app.command("dequantize")(dequantize.dequantize)
app.command("inspect")(inspect.inspect)
app.command("demo-model")(demo_model.demo_model)
app.command("doctor")(doctor.doctor)
app.command("eval")(eval.evaluate)
app.command("serve-admin")(serve_admin.serve_admin)
app.add_typer(bench.app, name="bench")


def _fail(message: object, code: int = 1) -> None:
    print("vllm-flute: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """The console script: bad input ends with one line on stderr; FLUTE_DEBUG=1 keeps the traceback."""
    try:
        code = app(prog_name="vllm-flute", standalone_mode=False)
    except (FluteError, OSError) as e:
        if os.environ.get("FLUTE_DEBUG"):
            raise
        _fail(e)
    except Exception as e:
        if not hasattr(e, "format_message"):  # typer's usage errors have it
            raise
        if not e.format_message():  # called without arguments: the help is printed already
            raise SystemExit(e.exit_code) from None
        command = e.ctx.command_path if e.ctx else app.info.name
        _fail(f"{e.format_message()} (see '{command} --help')", e.exit_code)
    except KeyboardInterrupt:
        code = 130
    if code == 130:  # typer's own answer to Ctrl-C
        _fail("interrupted; run the same command again to continue", 130)
    raise SystemExit(code or 0)
