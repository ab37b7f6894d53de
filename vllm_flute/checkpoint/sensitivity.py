"""What a model loses by each width of each linear layer, estimated with one decoder layer in memory.

To second order, quantization that changes a layer's output at token t by d_t moves the next-token distributions by a
Kullback-Leibler divergence of ``E[(g_t . d_t)**2] / 2`` nats a token, where g_t is the gradient, at that output, of the
negative log-likelihood of tokens drawn from the model itself: the Fisher information (S. Amari, "Natural gradient works
efficiently in learning", Neural Computation 10(2), 1998; for pruning: L. Theis et al., arXiv 1801.05787).
Changes at different tokens and of different layers count as independent.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch.nn import functional as F

from ..codebook import BITS
from ..errors import FluteError
from .products import fast_products
from .reader import Checkpoint
from .rewrite import Progress

_DTYPE = torch.bfloat16
_SEQUENCES, _LENGTH = 4, 512
_ROWS = 256  # tokens whose logits are in memory at once

# (weight [N, K], second moments [K] of its inputs, bits, name) -> the quantized weight, dequantized [N, K].
Quantizer = Callable[[torch.Tensor, torch.Tensor, int, str], torch.Tensor]


def sample_tokens(source: Checkpoint, tokens: torch.Tensor | None) -> torch.Tensor:
    """int64 ``[sequences, length]``: the beginning of the calibration's tokens, or without any random ones."""
    length = min(_LENGTH, source.config.get("max_position_embeddings", _LENGTH))
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(source.config["vocab_size"], (_SEQUENCES, length), generator=generator)
    length = min(length, tokens.numel())
    return tokens.flatten()[: min(_SEQUENCES, tokens.numel() // length) * length].view(-1, length)


class _Model:
    """The parts of a LLaMA checkpoint, one decoder layer in memory."""

    def __init__(self, source: Checkpoint, length: int):
        from transformers import AutoConfig
        from transformers.models.llama import modeling_llama

        if source.config.get("model_type") != "llama":
            raise FluteError(
                f"--target-bits runs LLaMA's layers, {source.path} has model_type "
                f"{source.config.get('model_type')!r}: give widths by --override"
            )
        self.source = source
        self.config = AutoConfig.from_pretrained(source.path)
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.block = modeling_llama.LlamaDecoderLayer(self.config, layer_idx=0).to(_DTYPE).eval()
            self.norm = modeling_llama.LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        self.block.requires_grad_(False)
        self.norm.load_state_dict({"weight": source.tensor("model.norm.weight").to(_DTYPE)}, assign=True)
        self.norm.requires_grad_(False)
        like = torch.empty(1, length, self.config.hidden_size, dtype=_DTYPE)
        self.rotary = modeling_llama.LlamaRotaryEmbedding(self.config)(like, torch.arange(length).unsqueeze(0))

    def load(self, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        names = [name for name in self.source.headers if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.source.tensor(name).to(_DTYPE) for name in names}
        self.block.load_state_dict(weights, assign=True)
        self.block.requires_grad_(False)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, length, hidden]`` through the layer that is loaded."""
        return self.block(x, position_embeddings=self.rotary)

    def head_gradients(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of sampled tokens' likelihood at the last layer's outputs: each ``[1, length, hidden]``."""
        head = self.source.tensor("model.embed_tokens.weight" if self.source.tied_head else "lm_head.weight")
        head, generator, result = head.to(_DTYPE), torch.Generator().manual_seed(0), []
        for one in hidden.split(1):
            one = one.detach().requires_grad_()
            normed = self.norm(one)
            gradient = torch.empty_like(normed)
            with torch.no_grad():
                for i in range(0, normed.shape[1], _ROWS):
                    share = F.linear(normed[0, i : i + _ROWS], head).float().softmax(-1)
                    drawn = torch.multinomial(share, 1, generator=generator)
                    share.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
                    gradient[0, i : i + _ROWS] = F.linear(share.to(_DTYPE), head.T)
            result.append(torch.autograd.grad(normed, one, gradient)[0])
        return result


@fast_products()
def sensitivities(
    source: Checkpoint,
    tokens: torch.Tensor,
    names: Iterable[str],
    quantizer: Quantizer,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Nats a token that the model loses when the layer of a name has so many bits: ``{name: {bits: nats}}``.

    The forward pass keeps every layer's inputs (bf16: tokens * hidden * layers * 2 bytes), the backward pass takes the
    layers from the last to the first; each is read twice.

    Args:
        source: a plain checkpoint of LLaMA's architecture.
        tokens: int64 ``[sequences, length]``.
        names: linear layers of decoder blocks.
        quantizer: makes the weights of each width.
        progress: called as ``progress(done, total, label)`` after each layer.
    """
    wanted: dict[int, dict[str, str]] = defaultdict(dict)
    for name in names:
        _, _, layer, own = name.split(".", 3)
        wanted[int(layer)][own] = name
    model = _Model(source, tokens.shape[1])
    layers = model.config.num_hidden_layers
    embedding = source.tensor("model.embed_tokens.weight")
    inputs = [F.embedding(tokens, embedding).to(_DTYPE)]
    with torch.no_grad():
        for layer in range(layers):
            model.load(layer)
            inputs.append(torch.cat([model.run(x) for x in inputs[layer].split(1)]))
    gradients = model.head_gradients(inputs.pop())
    found = {}
    for layer in range(layers - 1, min(wanted, default=layers) - 1, -1):
        model.load(layer)
        x, g, gradients = _backward(model, inputs.pop(), gradients, wanted[layer])
        for own, name in wanted[layer].items():
            found[name] = _losses(source.tensor(f"{name}.weight"), x[own], g[own], quantizer, name)
        if progress:
            progress(layers - layer, layers, "sensitivity")
    return found


def _backward(
    model: _Model, inputs: torch.Tensor, gradients: list[torch.Tensor], names: Iterable[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]:
    """Each named linear's inputs ``[tokens, K]`` and output gradients ``[tokens, N]``; the layer's gradients."""
    x: dict[str, list[torch.Tensor]] = defaultdict(list)
    g: dict[str, list[torch.Tensor]] = defaultdict(list)
    before = []
    with ExitStack() as hooks:
        for own in names:

            def keep(module, args, output, own=own) -> None:
                x[own].append(args[0].detach()[0])
                output.register_hook(lambda gradient: g[own].append(gradient[0]))

            hooks.callback(model.block.get_submodule(own).register_forward_hook(keep).remove)
        for one, gradient in zip(inputs.split(1), gradients, strict=True):
            one = one.detach().requires_grad_()
            before.append(torch.autograd.grad(model.run(one), one, gradient)[0])
    return {own: torch.cat(x[own]) for own in x}, {own: torch.cat(g[own]) for own in g}, before


def _losses(
    weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor, quantizer: Quantizer, name: str
) -> dict[int, float]:
    moments = x.float().square().mean(0)
    losses = {}
    for bits in BITS:
        change = (quantizer(weight, moments, bits, name) - weight.float()).to(_DTYPE)
        losses[bits] = (F.linear(x, change).float() * g.float()).sum(-1).square().mean().item() / 2
    return losses
