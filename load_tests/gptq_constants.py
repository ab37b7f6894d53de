"""What GPTQ's damping and sweeps are worth: loss on text that they were not calibrated on.

    python load_tests/gptq_constants.py MODEL --text wikitext2_valid.txt

The first lines of the text calibrate, the lines after them are held out; both are of the half that `quality.py`
calibrates on, so that what is chosen here has not seen the text that is scored there. Printed for each choice: the
loss ``tr((W - W_q) H (W - W_q)^T)``, H of the held-out text, against the constants that are in use, as the geometric
mean over the linear layers of three decoder layers.
"""

import argparse
import importlib
import math
import statistics
from pathlib import Path

import torch
from transformers import AutoTokenizer

from vllm_flute.checkpoint import Checkpoint
from vllm_flute.checkpoint.calibrate import layer_weights, second_moments
from vllm_flute.checkpoint.llama import DTYPE, LlamaBlock
from vllm_flute.codebook import BITS
from vllm_flute.quantization import FITTED

# The package's name `gptq` is the function.
gptq = importlib.import_module("vllm_flute.quantization.gptq")
_LAYERS = (2, 14, 26)
_LENGTH = 1024
_DAMPINGS = (0.01, 0.03, 0.06, 0.1, 0.2)
_SWEEPS = (0, 1, 2, 3, 4)


def inputs(source: Checkpoint, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments ``[K, K]`` of the inputs of each linear layer of the chosen decoder layers."""
    block = LlamaBlock(source, ids.shape[1])
    embedding = source.tensor("model.embed_tokens.weight").to(DTYPE)
    hidden, found = list(torch.nn.functional.embedding(ids, embedding)), {}
    for layer in range(_LAYERS[-1] + 1):
        for names, x in block.stages(hidden, layer_weights(source, layer)):
            if names and layer in _LAYERS:
                moments = second_moments(x, full=True)
                found |= {f"model.layers.{layer}.{name}.weight": moments for name in names}
            elif not names:
                hidden = x
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a plain LLaMA checkpoint: directory or hub id")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--held-out", type=int, default=16384, help="tokens of the text after those")
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    source = Checkpoint(args.model)
    lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(lines[: len(lines) // 2])
    ids = AutoTokenizer.from_pretrained(source.path)(text, add_special_tokens=False)["input_ids"]
    if len(ids) < args.tokens + args.held_out:
        parser.error(f"the first half of {args.text} has {len(ids)} tokens, fewer than asked for")
    seen, held = (
        inputs(source, torch.tensor(part[: len(part) // _LENGTH * _LENGTH]).view(-1, _LENGTH))
        for part in (ids[: args.tokens], ids[args.tokens : args.tokens + args.held_out])
    )
    used = (gptq.DAMPING, gptq._SWEEPS)
    choices = [(damping, used[1]) for damping in _DAMPINGS] + [(used[0], sweeps) for sweeps in _SWEEPS]
    for bits in BITS:
        losses: dict[tuple[float, int], list[float]] = {choice: [] for choice in {used, *choices}}
        for name, moments in seen.items():
            weight = source.tensor(name)
            for choice, found in losses.items():
                gptq.DAMPING, gptq._SWEEPS = choice
                change = weight.float() - gptq.gptq(weight, moments, bits, args.group_size, FITTED).dequantize()
                found.append(math.log(((change @ held[name]) * change).sum().item()))
        base = statistics.mean(losses[used])
        for choice in dict.fromkeys(choices):
            change = math.exp(statistics.mean(losses[choice]) - base)
            print(f"{bits} bits, damping {choice[0]:g}, {choice[1]} sweeps: {change:.3f}", flush=True)


if __name__ == "__main__":
    main()
