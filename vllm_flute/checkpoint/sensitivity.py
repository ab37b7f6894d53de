"""What a model loses by each width of each linear layer, estimated with one decoder layer in memory.

To second order, quantization that changes a layer's output at token t by d_t moves the next-token distributions by a
Kullback-Leibler divergence of ``E[(g_t . d_t)**2] / 2`` nats a token, where g_t is the gradient, at that output, of the
negative log-likelihood of tokens drawn from the model itself: the Fisher information (S. Amari, "Natural gradient works
efficiently in learning", Neural Computation 10(2), 1998; for pruning: L. Theis et al., arXiv 1801.05787).
Changes at different tokens and of different layers count as independent.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

import torch
from torch.nn import functional as F

from ..codebook import BITS
from . import products
from .calibrate import layer_weights
from .llama import DTYPE, LlamaBlock, plain_linear, require_llama_layers
from .reader import Checkpoint
from .rewrite import Progress

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


def _head_gradients(source: Checkpoint, block: LlamaBlock, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of sampled tokens' likelihood at the last layer's outputs: each ``[length, hidden]``."""
    head = source.tensor("model.embed_tokens.weight" if source.tied_head else "lm_head.weight").to(DTYPE)
    norm = source.tensor("model.norm.weight").to(DTYPE)
    generator, result = torch.Generator().manual_seed(0), []
    for one in hidden:
        one = one.detach().requires_grad_()
        normed = block.norm(one, norm)
        gradient = torch.empty_like(normed)
        with torch.no_grad():
            for i in range(0, len(normed), _ROWS):
                share = products.linear(normed[i : i + _ROWS], head).float().softmax(-1)
                drawn = torch.multinomial(share, 1, generator=generator)
                share.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
                gradient[i : i + _ROWS] = products.linear(share.to(DTYPE), head.T)
        result.append(torch.autograd.grad(normed, one, gradient)[0])
    return result


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
        source: a plain checkpoint of one of `llama.MODEL_TYPES`.
        tokens: int64 ``[sequences, length]``.
        names: linear layers of decoder blocks.
        quantizer: makes the weights of each width.
        progress: called as ``progress(done, total, label)`` after each layer.
    """
    wanted: dict[int, dict[str, str]] = defaultdict(dict)
    for name in names:
        _, _, layer, own = name.split(".", 3)
        wanted[int(layer)][own] = name
    require_llama_layers(source, "--target-bits", "give widths by --override", tokens.shape[1])
    block = LlamaBlock(source, tokens.shape[1])
    inputs = [list(F.embedding(tokens, source.tensor("model.embed_tokens.weight").to(DTYPE)))]
    with torch.no_grad():
        for layer in range(block.layers):
            inputs.append(block.run(inputs[layer], layer_weights(source, layer)))
    gradients = _head_gradients(source, block, inputs.pop())
    found = {}
    for layer in range(block.layers - 1, min(wanted, default=block.layers) - 1, -1):
        weights = layer_weights(source, layer)
        x, g, gradients = _backward(block, weights, inputs.pop(), gradients, wanted[layer])
        for own, name in wanted[layer].items():
            found[name] = _losses(source.tensor(f"{name}.weight"), x[own], g[own], quantizer, name)
        if progress:
            progress(block.layers - layer, block.layers, "sensitivity")
    return found


def _backward(
    block: LlamaBlock,
    weights: dict[str, torch.Tensor],
    inputs: list[torch.Tensor],
    gradients: list[torch.Tensor],
    names: Collection[str],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]:
    """Each named linear's inputs ``[tokens, K]`` and output gradients ``[tokens, N]``; the layer's gradients."""
    x: dict[str, list[torch.Tensor]] = defaultdict(list)
    g: dict[str, list[torch.Tensor]] = defaultdict(list)
    before = []

    def linear(name: str, one: torch.Tensor) -> torch.Tensor:
        outputs = plain_linear(weights, name, one)
        if name in names:
            x[name].append(one.detach())
            outputs.register_hook(g[name].append)
        return outputs

    for one, gradient in zip(inputs, gradients, strict=True):
        one = one.detach().requires_grad_()
        before.append(torch.autograd.grad(block.run([one], weights, linear)[0], one, gradient)[0])
    return {own: torch.cat(x[own]) for own in x}, {own: torch.cat(g[own]) for own in g}, before


def _losses(
    weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor, quantizer: Quantizer, name: str
) -> dict[int, float]:
    moments = x.float().square().mean(0)
    losses = {}
    for bits in BITS:
        change = (quantizer(weight, moments, bits, name) - weight.float()).to(DTYPE)
        losses[bits] = (products.linear(x, change).float() * g.float()).sum(-1).square().mean().item() / 2
    return losses
