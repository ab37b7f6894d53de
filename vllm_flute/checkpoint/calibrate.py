"""What calibration text puts into every linear layer of a checkpoint, one decoder layer in memory at a time."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import FluteError
from .config import FUSED
from .reader import Checkpoint

# Weights by their names within a decoder layer, as the layer computes with them from now on.
LayerWeights = Callable[[int], dict[str, torch.Tensor]]
_SEQUENCE = 1024  # tokens of one run, each with its own context
_DTYPE = torch.bfloat16


def calibration_tokens(source: Checkpoint, text: str | Path, count: int) -> torch.Tensor:
    """The first ``count`` tokens of a UTF-8 file as int64 ``[sequences, length]``, less those that fill no sequence.

    Raises FluteError for a text that is too short, a checkpoint without a tokenizer, or layers that are not LLaMA's.
    """
    from transformers import AutoTokenizer

    if source.config.get("model_type") != "llama":
        raise FluteError(
            f"calibration runs LLaMA's layers, {source.path} has model_type "
            f"{source.config.get('model_type')!r}: quantize it without --calibrate"
        )
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
    """Runs tokens through a LLaMA-like model layer by layer and takes second moments of the linear layers' inputs.

    Each layer gets the outputs of the layers before it with their final weights, so that what earlier layers lost is
    seen by later ones, as in GPTQ (arXiv 2210.17323, section 4, setup).

    Args:
        source: the plain checkpoint.
        tokens: int64 ``[sequences, length]``.
        final: the weights of a decoder layer that is done, by index.
        full: whole matrices of second moments ``[K, K]``; otherwise their diagonals ``[K]``.
    """

    def __init__(self, source: Checkpoint, tokens: torch.Tensor, final: LayerWeights, full: bool):
        from transformers import AutoConfig
        from transformers.models.llama import modeling_llama

        self.source, self.final, self.full = source, final, full
        self.config = AutoConfig.from_pretrained(source.path)
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.block = modeling_llama.LlamaDecoderLayer(self.config, layer_idx=0).to(_DTYPE).eval()
            self.norm = modeling_llama.LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        self.hidden = torch.nn.functional.embedding(tokens, source.tensor("model.embed_tokens.weight").to(_DTYPE))
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        self.rotary = modeling_llama.LlamaRotaryEmbedding(self.config)(self.hidden[:1], positions)
        self.layer = 0
        self.found: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def _run(self, weights: dict[str, torch.Tensor], advance: bool) -> None:
        """One pass through a layer with these weights; ``advance``: its outputs are the next layer's inputs."""
        self.block.load_state_dict({name: w.to(_DTYPE) for name, w in weights.items()}, assign=True)
        for i in range(len(self.hidden)):
            out = self.block(self.hidden[i : i + 1], position_embeddings=self.rotary)
            if advance:
                self.hidden[i : i + 1] = out
        self.block.to("meta")

    def _add(self, total: torch.Tensor, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        if self.full:
            total.addmm_(x.T, x)
        else:
            total += x.square().sum(0)

    def _empty(self, k: int) -> torch.Tensor:
        return torch.zeros((k, k) if self.full else (k,))

    def _prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def _advance(self, layer: int) -> None:
        while self.layer < layer:
            self._run(self.final(self.layer), advance=True)
            self.layer += 1

    @torch.inference_mode()
    def moments(self, layer: int, name: str) -> torch.Tensor:
        """The mean of ``x x^T`` over the inputs x ``[K]`` of a linear layer: fp32 ``[K, K]``, or its diagonal ``[K]``.

        Args:
            layer: index of the decoder layer; layers are asked for in order.
            name: of the linear within it, such as "self_attn.q_proj".
        """
        if self.found[0] != layer:
            self._advance(layer)
            totals: dict[str, torch.Tensor] = {}
            prefix = self._prefix(layer)
            with ExitStack() as hooks:
                # The first of the layers that are fused has the inputs of all.
                rest = {part for group in FUSED for part in group[1:]}
                for path, module in self.block.named_modules():
                    if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] not in rest:
                        total = totals[path] = self._empty(module.in_features)

                        def add(module, inputs, output, total=total) -> None:
                            self._add(total, inputs[0])

                        hooks.callback(module.register_forward_hook(add).remove)
                names = [name for name in self.source.headers if name.startswith(prefix)]
                self._run({name.removeprefix(prefix): self.source.tensor(name) for name in names}, advance=False)
            self.found = (layer, {path: total.div_(self.hidden[..., 0].numel()) for path, total in totals.items()})
        parent, _, last = name.rpartition(".")
        first = next((group[0] for group in FUSED if last in group), last)
        return self.found[1][f"{parent}.{first}"]

    @torch.inference_mode()
    def head_moments(self) -> torch.Tensor:
        """`moments` for the output head, after all decoder layers."""
        self._advance(self.config.num_hidden_layers)
        self.norm.load_state_dict({"weight": self.source.tensor("model.norm.weight").to(_DTYPE)}, assign=True)
        total = self._empty(self.config.hidden_size)
        for x in self.hidden:
            self._add(total, self.norm(x))
        return total.div_(self.hidden[..., 0].numel())
