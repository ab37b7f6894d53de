"""Quantization on what calibration text puts into the linear layers, one decoder layer in memory at a time."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import FluteError
from ..format import LutTensor
from .llama import DTYPE, LlamaBlock, require_llama_layers
from .products import exact_products
from .reader import Checkpoint

# Weights by their names within a decoder layer, as the layer computes with them from now on.
LayerWeights = Callable[[int], dict[str, torch.Tensor]]
# (names within the decoder layer, second moments of their common inputs) -> what those that are quantized become.
Stage = Callable[[tuple[str, ...], torch.Tensor], dict[str, LutTensor]]
_SEQUENCE = 1024  # tokens of one run, each with its own context


def calibration_tokens(source: Checkpoint, text: str | Path, count: int) -> torch.Tensor:
    """The first ``count`` tokens of a UTF-8 file as int64 ``[sequences, length]``, less those that fill no sequence.

    Raises FluteError for a text that is too short, a checkpoint without a tokenizer, or layers that
    `LlamaBlock` does not run.
    """
    from transformers import AutoTokenizer

    require_llama_layers(source, "--calibrate", "quantize it without", _SEQUENCE)
    try:
        body = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FluteError(f"--calibrate: {text} cannot be read as UTF-8 text: {e}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as e:
        raise FluteError(f"--calibrate: {source.path} has no tokenizer that transformers can load: {e}") from None
    ids = tokenizer(body, add_special_tokens=False)["input_ids"]
    if not 1 <= count <= len(ids):
        raise FluteError(
            f"--calibrate: {text} has {len(ids)} tokens, --tokens asks for {count}: give a longer text or fewer tokens"
        )
    length = min(_SEQUENCE, source.config.get("max_position_embeddings", _SEQUENCE), count)
    rows = count // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


class Calibration:
    """Runs tokens through a LLaMA-like model layer by layer, and quantizes each layer on the way.

    Every linear layer is calibrated on what the layers before it, quantized, give it: those of earlier decoder layers
    as in GPTQ (arXiv 2210.17323, section 4, setup), and those of its own.

    Args:
        source: the plain checkpoint.
        tokens: int64 ``[sequences, length]``.
        final: the weights of a decoder layer that is done, by index.
        full: whole matrices of second moments ``[K, K]``; otherwise their diagonals ``[K]``.
    """

    def __init__(self, source: Checkpoint, tokens: torch.Tensor, final: LayerWeights, full: bool):
        self.source, self.final, self.full = source, final, full
        self.block = LlamaBlock(source, tokens.shape[1])
        embedding = source.tensor("model.embed_tokens.weight").to(DTYPE)
        self.hidden = list(torch.nn.functional.embedding(tokens, embedding))
        self.layer = 0

    def _advance(self, layer: int) -> None:
        while self.layer < layer:
            self.hidden = self.block.run(self.hidden, _computed(self.final(self.layer)))
            self.layer += 1

    @torch.no_grad()
    def quantize(self, layer: int, stage: Stage) -> dict[str, LutTensor]:
        """The quantized linear layers of a decoder layer by their names within it; layers are asked for in order.

        ``stage`` is called for the linear layers that share their inputs, in the order of the computation.
        """
        self._advance(layer)
        weights = layer_weights(self.source, layer)
        made: dict[str, LutTensor] = {}
        for names, inputs in self.block.stages(self.hidden, weights):
            if names:
                found = stage(names, second_moments(inputs, self.full))
                weights |= {f"{name}.weight": t.dequantize(DTYPE) for name, t in found.items()}
                made |= found
            else:
                self.hidden, self.layer = inputs, layer + 1
        return made

    @torch.no_grad()
    def head_moments(self) -> torch.Tensor:
        """Second moments of the output head's inputs, after all decoder layers."""
        self._advance(self.block.layers)
        weight = self.source.tensor("model.norm.weight").to(DTYPE)
        return second_moments([self.block.norm(x, weight) for x in self.hidden], self.full)


def layer_weights(source: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """The weights of a decoder layer as it computes with them, by their names within it."""
    prefix = f"model.layers.{layer}."
    names = [name for name in source.headers if name.startswith(prefix)]
    return _computed({name.removeprefix(prefix): source.tensor(name) for name in names})


def second_moments(inputs: list[torch.Tensor], full: bool) -> torch.Tensor:
    """The mean of ``x x^T`` over the inputs x ``[K]``: fp32 ``[K, K]``, or its diagonal ``[K]``.

    Args:
        inputs: bf16 ``[tokens, K]`` of each sequence.
    """
    k = inputs[0].shape[-1]
    total = torch.zeros((k, k) if full else (k,))
    with exact_products():
        for one in inputs:
            x = one.to(torch.float32)
            if full:
                total.addmm_(x.T, x)
            else:
                total += x.square().sum(0)
    return total.div_(sum(map(len, inputs)))


def _computed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.to(DTYPE) for name, weight in weights.items()}
