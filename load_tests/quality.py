"""Quality of every quantization method: perplexity, KL divergence and agreement to the plain model, size, time, memory.

    python load_tests/quality.py MODEL --text wikitext2_valid.txt [--bits 4,3,2] [--groups 64] [--windows 20]
    python load_tests/quality.py --gaussian

The first half of the text's lines calibrates, windows from the beginning of the second half are scored, through
transformers in bf16 on the dequantized weights. KL divergence (nats a token) and top-1 agreement are to the plain
model's next-token distributions at the scored positions. Time and peak memory are of a process of its own that does
nothing but quantize; its threads are torch's (OMP_NUM_THREADS). `--gaussian` prints the mean squared error on
unit-variance Gaussian weights instead, which needs no model.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vllm_flute import LutTensor, quantize
from vllm_flute.checkpoint import Checkpoint, check_checkpoint
from vllm_flute.serve.perplexity import strided_windows

# Options of `quantize_checkpoint` by the name in the table; whether calibration text is given.
METHODS = {
    "nf, absmax": ({"codebook": "nf", "method": "absmax"}, False),
    "nf, scale search": ({"codebook": "nf"}, False),
    "lloyd-max, scale search": ({"codebook": "lloyd-max"}, False),
    "lloyd-max, weighted scale search": ({"codebook": "lloyd-max"}, True),
    "fitted, scale search": ({"codebook": "fitted"}, False),
    "fitted, weighted scale search": ({"codebook": "fitted"}, True),
    "lloyd-max, gptq": ({"codebook": "lloyd-max", "method": "gptq"}, True),
    "fitted, gptq": ({"codebook": "fitted", "method": "gptq"}, True),
}
# What the child process runs: the time and the peak are those of a user's run.
QUANTIZE = """
import json, sys, time
from vllm_flute.checkpoint import quantize_checkpoint
from vllm_flute.cli.walk import peak_memory
begin = time.monotonic()
report = quantize_checkpoint(**json.loads(sys.argv[1]))
print(json.dumps({"seconds": time.monotonic() - begin, "peak_bytes": peak_memory(), "bytes": report.output_bytes,
                  "bits_per_weight": report.bits_per_weight, "error": report.mean_error}))
"""


def gaussian_table() -> None:
    print("| bits | codebook, method | group 64 | group 128 |\n|---|---|---|---|")
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    for bits in (4, 3, 2):
        for codebook, method in (("nf", "absmax"), ("nf", "scale-search"), ("lloyd-max", "scale-search")):
            errors = [
                (quantize(weight, bits, group, codebook, method=method).dequantize() - weight).square().mean().item()
                for group in (64, 128)
            ]
            print(f"| {bits} | {codebook}, {method} | {errors[0]:.5f} | {errors[1]:.5f} |", flush=True)


class Evaluation:
    """A model and the windows that it scores; the plain model's logits lie in a file of ``directory``."""

    def __init__(self, model: str, text: str, window: int, windows: int, directory: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = tokenizer("")["input_ids"]
        self.windows = strided_windows(tokens, bos, window, window // 2)[:windows]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        scored = sum(new for _, new in self.windows)
        shape = (scored, self.model.config.vocab_size)
        self.reference = torch.from_file(
            str(directory / "logits"), shared=True, size=math.prod(shape), dtype=torch.bfloat16
        ).view(shape)

    def load(self, path: Path) -> None:
        """Replace the model's weights by those of a lut-v1 checkpoint, dequantized and rounded to bf16."""
        source = Checkpoint(path)
        weights = {name: source.tensor(name) for name in source.headers if name in self.model.state_dict()}
        for info in check_checkpoint(path):
            parts = (source.tensor(f"{info.name}.{part}") for part in ("qweight", "scales", "codebook"))
            weights[f"{info.name}.weight"] = LutTensor(*parts).dequantize(torch.bfloat16)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)

    @torch.inference_mode()
    def score(self, keep: bool = False) -> dict:
        """Perplexity, and KL divergence and agreement to the reference; ``keep`` makes this model the reference."""
        nats = divergence = agreed = 0.0
        row = 0
        for ids, new in self.windows:
            # A token is scored by the logits of the position before it.
            logits = self.model(torch.tensor([ids]), logits_to_keep=new + 1).logits[0, :-1]
            if keep:
                self.reference[row : row + new] = logits
            # A few rows at a time: fp32 copies of a window's logits would be gigabytes with a large vocabulary.
            for i in range(0, new, 64):
                own = logits[i : i + 64].float().log_softmax(-1)
                plain = self.reference[row + i : row + i + len(own)].float().log_softmax(-1)
                targets = torch.tensor(ids[-new:][i : i + 64])
                nats -= own.gather(1, targets.unsqueeze(1)).sum().item()
                divergence += (plain.exp() * (plain - own)).sum().item()
                agreed += (plain.argmax(-1) == own.argmax(-1)).sum().item()
            row += new
        return {"perplexity": math.exp(nats / row), "kl": divergence / row, "top1": agreed / row, "tokens": row}


def llama_cpp(binary: str, files: list[str], text: Path, window: int, windows: int) -> list[dict]:
    """Perplexity by llama.cpp's own tool, which scores the second half of each of ``windows`` disjoint windows."""
    results = []
    for file in files:
        command = [binary, "-m", file, "-f", str(text), "-c", str(window), "--chunks", str(windows)]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        final = next(line for line in (out.stdout + out.stderr).splitlines() if "Final estimate" in line)
        value = float(final.split("PPL =")[1].split()[0])
        results.append(
            {"method": f"llama.cpp {Path(file).name}", "perplexity": value, "bytes": Path(file).stat().st_size}
        )
    return results


def line(r: dict) -> str:
    def cell(key: str, form: str, factor: float = 1) -> str:
        return format(r[key] * factor, form) if key in r else "-"

    cells = [r["method"], str(r.get("bits", "-")), str(r.get("group_size", "-")), cell("bits_per_weight", ".3f")]
    cells += [cell("perplexity", ".5g"), cell("kl", ".4f"), cell("top1", ".1%"), cell("bytes", ".1f", 2**-20)]
    cells += [cell("seconds", ".0f"), cell("peak_bytes", ".0f", 2**-20)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a plain checkpoint: directory or hub id")
    parser.add_argument("--text", type=Path, help="UTF-8 text")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="64")
    parser.add_argument("--methods", help=f"some of: {'; '.join(METHODS)} (separated by ';')")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window; the stride is half of it")
    parser.add_argument("--windows", type=int, default=20, help="how many windows are scored")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--gaussian", action="store_true", help="the error on Gaussian weights only")
    parser.add_argument("--llama-perplexity", help="llama.cpp's tool, to score --gguf files on the same text")
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--output", type=Path, help="also write the results as JSON, after each")
    args = parser.parse_args()
    if args.gaussian:
        gaussian_table()
        return
    if not args.model or not args.text:
        parser.error("give MODEL and --text, or --gaussian")
    lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
    results = []

    def report(result: dict) -> None:
        results.append(result)
        print(line(result), flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")

    print("| method | bits | group | bits a weight | perplexity | KL | top-1 | MiB | s | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        calibration, scored = Path(directory) / "calibration.txt", Path(directory) / "scored.txt"
        calibration.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
        scored.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
        evaluation = Evaluation(args.model, scored.read_text(), args.window, args.windows, Path(directory))
        report({"method": "bf16", "bytes": Checkpoint(args.model).nbytes} | evaluation.score(keep=True))
        for bits in map(int, args.bits.split(",")):
            for group_size in map(int, args.groups.split(",")):
                for name in args.methods.split(";") if args.methods else METHODS:
                    options, calibrated = METHODS[name]
                    out = Path(directory) / "out"
                    options = options | {"src": args.model, "out": str(out), "bits": bits, "group_size": group_size}
                    if calibrated:
                        options |= {"calibrate": str(calibration), "tokens": args.tokens}
                    command = [sys.executable, "-c", QUANTIZE, json.dumps(options | {"overwrite": True})]
                    made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                    evaluation.load(out)
                    report({"method": name, "bits": bits, "group_size": group_size} | made | evaluation.score())
        if args.llama_perplexity:
            for result in llama_cpp(args.llama_perplexity, args.gguf, scored, args.window, args.windows):
                report(result)


if __name__ == "__main__":
    main()
