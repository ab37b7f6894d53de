"""Quality of every quantization method: perplexity, KL divergence and agreement to the plain model, size, time, memory.

    python load_tests/quality.py MODEL --text wikitext2_valid.txt --work DIR [--llama-cpp PYTHON] [--minutes 4]
    python load_tests/quality.py MODEL --work DIR --report docs/quality.md
    python load_tests/quality.py --gaussian
    python load_tests/quality.py MODEL --text wikitext2_valid.txt --work DIR --layer llama-3-8b

The first half of the text's lines calibrates, windows from the beginning of the second half are scored. Every row is
made twice: from the model, and from the same model with its residual stream rotated by a random orthogonal matrix,
each compared with its own bf16 weights. Rows that DIR/results.json holds are not made again: run the command as often
as `--minutes` needs (a copy of load_tests/results/quality.json, the rows of docs/quality.md, is a beginning).
llama.cpp's rows are made by its own code in another environment (`pip install llama-cpp-python`, PYTHON of it), from
the same bf16 weights with embedding and head kept in bf16 as ours are, on the same windows of tokens, and scored by the
same code. Peak memory and time are of a process of its own that does nothing but quantize; give `--alone` where
nothing else runs on the machine, else no seconds are kept.
"""

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from quality_child import quantize_in_child
from quality_gaussian import gaussian_table
from quality_layer import MODELS, measure_layer
from quality_llama_cpp import TYPES, gguf_logits, linear_bits, quantize_gguf, write_gguf
from quality_report import HEADER, TWINS, line, page

from vllm_flute.checkpoint import Checkpoint
from vllm_flute.checkpoint.rotate import rotate_checkpoint
from vllm_flute.serve.offline import OfflineModel, keep_logits, score
from vllm_flute.serve.perplexity import strided_windows

# Options of `quantize_checkpoint` by the name in the table; whether calibration text is given.
METHODS = {
    "nf, absmax": ({"codebook": "nf", "method": "absmax"}, False),
    "nf, scale search": ({"codebook": "nf", "method": "scale-search"}, False),
    "nf, scale search, --rotate": ({"codebook": "nf", "method": "scale-search", "rotate": True}, False),
    "nf, weighted scale search": ({"codebook": "nf", "method": "scale-search"}, True),
    "nf, weighted scale search, --prescale": ({"codebook": "nf", "method": "scale-search", "prescale": True}, True),
    "lloyd-max, scale search": ({"codebook": "lloyd-max", "method": "scale-search"}, False),
    "lloyd-max, weighted scale search": ({"codebook": "lloyd-max", "method": "scale-search"}, True),
    "fitted, weighted scale search": ({"codebook": "fitted", "method": "scale-search"}, True),
    "nf, gptq": ({"codebook": "nf", "method": "gptq"}, True),
    "nf, gptq, --rotate": ({"codebook": "nf", "method": "gptq", "rotate": True}, True),
    "lloyd-max, gptq": ({"codebook": "lloyd-max", "method": "gptq"}, True),
    "fitted, gptq": ({"codebook": "fitted", "method": "gptq"}, True),
    "fitted, gptq, --prescale": ({"codebook": "fitted", "method": "gptq", "prescale": True}, True),
    "fitted, learned": ({"codebook": "fitted", "method": "learned"}, True),
    "fitted, learned, --prescale": ({"codebook": "fitted", "method": "learned", "prescale": True}, True),
}


class Twin:
    """A plain checkpoint, its logits on the windows, and what is made from it, all in one directory."""

    def __init__(self, name: str, path: Path, args, text: str, directory: Path):
        self.name, self.path, self.directory, self.args = name, path, directory, args
        directory.mkdir(parents=True, exist_ok=True)
        model = OfflineModel(path)
        tokens, bos = model.tokens(text)
        # Disjoint windows, each with one token of context at its beginning.
        self.windows = strided_windows(tokens, bos, args.window, args.window - 1)[: args.windows]
        self.vocabulary = model.vocabulary
        self.logits = keep_logits(model, self.windows, directory / "logits")

    def score(self, logits) -> dict:
        found = score(logits, self.windows, self.logits)
        return {key: getattr(found, key) for key in ("perplexity", "kl", "top1", "tokens")}

    def bf16(self) -> dict:
        return {"bytes": Checkpoint(self.path).nbytes, "bits_per_weight": 16.0, **self.score(self.logits)}

    def quantized(self, options: dict, calibration: Path | None) -> dict:
        out = self.directory / "out"
        options = options | {"src": str(self.path), "out": str(out), "overwrite": True}
        if calibration:
            options |= {"calibrate": str(calibration), "tokens": self.args.tokens}
        made = quantize_in_child(options)
        del made["marks"]
        return made | self.score(OfflineModel(out).logits(self.windows))

    def llama_cpp(self, kind: str) -> dict:
        plain, out = self.directory / "bf16.gguf", self.directory / "out.gguf"
        if not plain.exists():
            write_gguf(Checkpoint(self.path), plain)
        made = {}
        if kind == "bf16":
            out = plain
        else:
            made = quantize_gguf(self.args.llama_cpp, plain, out, kind)
        bits, types = linear_bits(out)
        made |= {"bytes": out.stat().st_size, "bits_per_weight": bits, "types": types}
        logits = gguf_logits(self.args.llama_cpp, out, self.windows, self.vocabulary, self.directory)
        return made | self.score(logits)


def chosen(args) -> list[str]:
    return args.methods.split(";") if args.methods else list(METHODS)


def rows(args, calibration: Path) -> Iterator[tuple[dict, callable]]:
    """(what identifies a row, what makes it of a twin), cheap and important ones first."""
    yield {"method": "bf16", "kind": "bf16"}, lambda twin: twin.bf16()
    if args.llama_cpp:
        for kind in ("bf16", *TYPES):
            key = {"method": f"llama.cpp {kind}", "kind": "llama.cpp"}
            yield key, lambda twin, kind=kind: twin.llama_cpp(kind)
    for name in chosen(args):
        options, calibrated = METHODS[name]
        text = calibration if calibrated else None
        widths = [{"bits": int(b)} for b in args.bits.split(",") if b]
        widths += [{"target_bits": float(b)} for b in args.targets.split(",") if b]
        for width in widths:
            for group_size in map(int, args.groups.split(",")):
                key = {"method": name, "kind": "lut", "group_size": group_size} | width
                if calibrated:
                    key["calibration_tokens"] = args.tokens
                made = options | width | {"group_size": group_size}
                yield key, lambda twin, made=made, text=text: twin.quantized(made, text)


def split(args) -> tuple[Path, str]:
    """The file of the text's first half, which calibrates, and the second half, which is scored."""
    args.work.mkdir(parents=True, exist_ok=True)
    lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
    calibration = args.work / "calibration.txt"
    calibration.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    return calibration, "".join(lines[len(lines) // 2 :])


def measure(args) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    calibration, scored = split(args)
    results = load(args.work)
    twins: dict[str, Twin] = {}
    print(HEADER, flush=True)
    for key, make in rows(args, calibration):
        for name in args.twins.split(","):
            full = {"twin": name, **key}
            if any(full.items() <= r.items() for r in results):
                continue
            if time.monotonic() > deadline:
                print("out of time: run again for the other rows", file=sys.stderr)
                return
            if name not in twins:
                path = Path(args.model)
                if name == "rotated":
                    path = args.work / "model-rotated"
                    if not (path / "config.json").exists():
                        rotate_checkpoint(args.model, path, kind="orthogonal")
                twins[name] = Twin(name, path, args, scored, args.work / name)
            row = full | {"model": args.name or Path(args.model).name} | make(twins[name])
            if args.alone:
                row["machine"] = machine()
            else:
                row.pop("seconds", None)
            results.append(row)
            temporary = args.work / "results.tmp"
            temporary.write_text(json.dumps(results, indent=1) + "\n")
            temporary.rename(args.work / "results.json")
            print(name, line(results[-1]), flush=True)


def machine() -> str:
    """What the seconds belong to: the CPU, and how many threads of it were used."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{torch.get_num_threads()} thread(s) of {found[1] if found else platform.machine()}"


def load(work: Path) -> list[dict]:
    file = work / "results.json"
    return json.loads(file.read_text()) if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a plain LLaMA checkpoint: directory or hub id")
    parser.add_argument("--text", type=Path, help="UTF-8 text")
    parser.add_argument("--work", type=Path, help="directory of results and of what is kept between runs")
    parser.add_argument("--twins", default=",".join(TWINS))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--targets", default="3.25", help="mixed precision: bits a weight, scales included")
    parser.add_argument("--groups", default="64,32")
    parser.add_argument("--methods", help=f"some of: {'; '.join(METHODS)} (separated by ';')")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=8, help="how many windows are scored")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--name", help="what the model is called in the table (default: its directory's name)")
    parser.add_argument("--alone", action="store_true", help="nothing else runs on this machine: keep the seconds")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further row after so many")
    parser.add_argument("--report", type=Path, help="write the page of all results, measure nothing")
    parser.add_argument("--layer", choices=MODELS, help="time and memory of quantizing this model, from its layers")
    parser.add_argument("--gaussian", action="store_true", help=gaussian_table.__doc__)
    args = parser.parse_args()
    if args.gaussian:
        gaussian_table()
    elif not args.work or not args.model:
        parser.error("give MODEL and --work, or --gaussian")
    elif args.report:
        args.report.write_text(page(load(args.work)), encoding="utf-8")
    elif not args.text:
        parser.error("give --text")
    elif args.layer:
        methods = {name: METHODS[name] for name in chosen(args)}
        found = measure_layer(args.layer, Path(args.model), args.work, methods, args.tokens, split(args)[0])
        file = args.work / "layer.json"
        known = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps([*known, found], indent=1) + "\n")
        print(json.dumps(found, indent=1))
    else:
        measure(args)


if __name__ == "__main__":
    main()
