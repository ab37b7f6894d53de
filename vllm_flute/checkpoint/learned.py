"""Learned scales: codes stand still, scales follow the gradient of what the whole model predicts."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ..errors import FluteError
from ..format import PARTS, LutTensor
from . import products
from .calibrate import layer_weights
from .config import HEAD
from .llama import DTYPE, LlamaBlock, plain_linear
from .output import Output, write_tensors
from .reader import Checkpoint
from .rewrite import Progress

# Where the quantized model lies before its scales are learned, below the output; and how far learning is.
UNLEARNED = ".unlearned"
_STATE = "learning.safetensors"

# One sequence an update. On text beside the calibration's, updates of 1024 tokens took a KL divergence of .32 to .21
# (3 bits, 40 updates) and of 1.37 to .84 (2 bits, 20 of them): SmolLM2-135M, group 64. More are affordable: a few
# seconds each.
UPDATES = 160
# Adam's rate is a share of each scale, by bits: up over the first updates, then down to 0 as a cosine. A step moves
# every scale by about as much whatever its gradient, which is noise where rounding leaves little to win: 5e-3 at all
# widths ended at KL divergences of .078 with 4 bits and .181 with 3, these at .048 and .163 (docs/quality.md, rotated
# twin).
RATES = {2: 5e-3, 3: 2.5e-3, 4: 1e-3}
_WARM_UP = 10
_BETAS = (0.9, 0.95)
_ROWS = 128  # tokens whose logits are in memory at once
# Linear layers' outputs are kept for the backward pass where they have so many bytes at most; else computed twice. A
# model of 1B fits, so that what larger ones need stays small beside their codes.
_KEPT = 1 << 30
_SAVE_EVERY = 20  # updates that an interruption may cost


class _Head:
    """Next-token distributions from the last decoder layer's outputs: the plain model's, and the quantized one's."""

    def __init__(self, source: Checkpoint, quantized: torch.Tensor | None, block: LlamaBlock):
        name = "model.embed_tokens.weight" if source.tied_head else "lm_head.weight"
        self.plain = source.tensor(name).to(DTYPE)
        self.quantized = self.plain if quantized is None else quantized
        self.norm, self.block = source.tensor("model.norm.weight").to(DTYPE), block

    def divergence(self, hidden: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
        """(KL divergence from the plain model in nats a token, its gradient by ``hidden``); ``[tokens, hidden_size]``.

        ``target``: what the plain model has in the place of ``hidden``.
        """
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            x = self.block.norm(hidden, self.norm)
        wanted = self.block.norm(target, self.norm)
        total, gradient = 0.0, torch.empty_like(x)
        for i in range(0, len(x), _ROWS):
            part = slice(i, i + _ROWS)
            own = products.linear(x[part].detach(), self.quantized).log_softmax(-1, torch.float32)
            plain = products.linear(wanted[part], self.plain).log_softmax(-1, torch.float32)
            share = plain.exp()
            total += plain.sub_(own).mul_(share).sum().item()
            gradient[part] = products.linear(own.exp_().sub_(share).to(DTYPE), self.quantized.T)
        return total / len(x), torch.autograd.grad(x, hidden, gradient / len(x))[0]


class _Entries:
    """The table's entry of each weight, looked up for two neighbours at once: torch has no faster way to gather."""

    def __init__(self, t: LutTensor):
        codes = t.codes()
        self.shape = *t.scales.shape, t.group_size
        self.pairs = codes[:, 0::2] + (codes[:, 1::2] << t.bits)
        entries = t.codebook.to(DTYPE)
        second, first = torch.meshgrid(entries, entries, indexing="ij")
        self.table = torch.stack([first, second], dim=-1).view(torch.int32).flatten()

    def look_up(self) -> torch.Tensor:
        """bf16 ``[N, G, group_size]``."""
        return self.table.index_select(0, self.pairs.view(-1).to(torch.int32)).view(DTYPE).view(self.shape)


class _Computed(torch.autograd.Function):
    """A linear layer whose outputs are known, for its backward pass.

    ``apply(x [tokens, K], weight [N, K], outputs [tokens, N], learn)``: ``learn``, where it is not None, is called with
    the gradient ``[N, K]`` of the weight.
    """

    @staticmethod
    def forward(ctx, x, weight, outputs, learn):
        ctx.save_for_backward(x, weight)
        ctx.learn = learn
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        if ctx.learn:
            ctx.learn(products.linear(gradient.T, x.T))
        return products.linear(gradient, weight.T), None, None, None


class _Layer:
    """A decoder layer whose quantized matrices are ``table entry * scale``, computed for each pass anew."""

    def __init__(self, plain: Mapping[str, torch.Tensor], linears: Mapping[str, LutTensor]):
        self.linears = {name: _Entries(t) for name, t in linears.items()}
        self.rate = {name: RATES[t.bits] for name, t in linears.items()}
        self.dtype = {name: t.scales.dtype for name, t in linears.items()}
        self.rest = {name: w for name, w in plain.items() if name.removesuffix(".weight") not in linears}
        self.start = {name: t.scales.to(torch.float32) for name, t in linears.items()}
        # What is learned: by which share each scale changes.
        self.change = {name: torch.zeros_like(scales) for name, scales in self.start.items()}

    def scales(self, name: str) -> torch.Tensor:
        """``[N, G]`` as they are stored."""
        return (self.start[name] * (1 + self.change[name])).to(self.dtype[name])

    def weights(self, entries: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All weights of the layer, bf16, by their names within it."""
        made = {n: (entries[n] * self.scales(n).to(DTYPE).unsqueeze(-1)).flatten(1) for n in self.linears}
        return self.rest | {f"{name}.weight": w for name, w in made.items()}

    def entries(self) -> dict[str, torch.Tensor]:
        return {name: e.look_up() for name, e in self.linears.items()}

    def forward(
        self, block: LlamaBlock, hidden: torch.Tensor, weights: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(the layer's outputs, those of each linear layer in it)."""
        weights = weights or self.weights(self.entries())
        results: dict[str, torch.Tensor] = {}

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            return results.setdefault(name, plain_linear(weights, name, x))

        return block.run([hidden], weights, linear)[0], results

    def backward(
        self,
        block: LlamaBlock,
        hidden: torch.Tensor,
        results: dict[str, torch.Tensor] | None,
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(gradient at the inputs, gradients of ``change`` fp32 ``[N, G]``) for that at the outputs.

        Args:
            results: of `forward`, which are computed anew where they were not kept.
        """
        entries = self.entries()
        weights = self.weights(entries)
        results = results or self.forward(block, hidden, weights)[1]
        found: dict[str, torch.Tensor] = {}

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            def learn(by_weight: torch.Tensor) -> None:
                by_entry = by_weight.view_as(entries[name]) * entries[name]
                found[name] = by_entry.sum(-1, dtype=torch.float32) * self.start[name]

            return _Computed.apply(x, weights[f"{name}.weight"], results[name], learn if name in entries else None)

        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            outputs = block.run([hidden], weights, linear)[0]
        return torch.autograd.grad(outputs, hidden, gradient)[0], found


class _Adam:
    """Adam (arXiv 1412.6980) over named tensors, each with its rate, with a state that is saved beside them."""

    def __init__(self, parameters: dict[str, torch.Tensor], rates: Mapping[str, float], updates: int):
        self.parameters, self.rates, self.updates, self.step = parameters, rates, updates, 0
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def update(self, gradients: Mapping[str, torch.Tensor]) -> None:
        one, two = _BETAS
        share = min(1.0, (self.step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.step / self.updates))
        self.step += 1
        for name, g in gradients.items():
            first, second = self.first[name].lerp_(g, 1 - one), self.second[name].lerp_(g.square(), 1 - two)
            size = (second / (1 - two**self.step)).sqrt_().add_(1e-12)
            self.parameters[name].sub_(first.div(1 - one**self.step).div_(size), alpha=self.rates[name] * share)

    def save(self, path: Path) -> None:
        parts = {"parameter": self.parameters, "first": self.first, "second": self.second}
        state = {f"{part}:{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        write_tensors(path, state | {"step": torch.tensor(self.step)})

    def load(self, path: Path) -> None:
        state = load_file(path)
        self.step = int(state.pop("step"))
        for key, tensor in state.items():
            part, _, name = key.partition(":")
            {"parameter": self.parameters, "first": self.first, "second": self.second}[part][name].copy_(tensor)


def _linears(written: Output, prefix: str) -> dict[str, LutTensor]:
    """The quantized linears below a prefix, by what follows it."""
    layers = [key.removesuffix(".qweight") for key in written.names(prefix) if key.endswith(".qweight")]
    return {
        layer.removeprefix(prefix): LutTensor(*(written.tensor(f"{layer}.{part}") for part in PARTS), name=layer)
        for layer in layers
    }


@torch.no_grad()
def learn_scales(
    source: Checkpoint, written: Output, tokens: torch.Tensor, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Scales ``[N, G]`` by layer name that bring a quantized LLaMA's predictions closer to the plain model's.

    A weight ``codebook[code] * scale`` is differentiable in its scale, so the gradient is exact for given codes; its
    rounding to a stored dtype is passed over (straight-through). Scales are trained against the whole model's loss, as
    FLUTE's learned NormalFloat scales are (arXiv 2407.10960, section 3.4) and EfficientQAT's in its second stage (arXiv
    2407.11062, section 3.3); the loss is the KL divergence from the plain model's next-token distributions, so that a
    few ten thousand tokens of text do not teach the model the text.

    In memory: the codes, two to a byte, four numbers for each scale, one decoder layer's weights, one sequence's inputs
    of every layer, up to 1 GiB of what they compute, and what the plain model has after its last layer for all
    tokens.

    Args:
        source: the plain checkpoint.
        written: the quantized one, complete but not finished; training keeps its state beside it, and continues there.
        tokens: int64 ``[sequences, length]``; a sequence is one update, each in turn in a random order.

    Raises:
        FluteError: predictions that are not finite.
    """
    block = LlamaBlock(source, tokens.shape[1])
    embedding = source.tensor("model.embed_tokens.weight").to(DTYPE)
    target = list(F.embedding(tokens, embedding))
    layers = []
    for index in range(block.layers):
        plain = layer_weights(source, index)
        target = block.run(target, plain)
        layers.append(_Layer(plain, _linears(written, f"model.layers.{index}.")))
        if progress:
            progress(index + 1, block.layers, "the plain model")
    head = _linears(written, HEAD)
    output = _Head(source, head[""].dequantize(DTYPE) if head else None, block)
    changes = {f"model.layers.{i}.{n}": c for i, layer in enumerate(layers) for n, c in layer.change.items()}
    rates = {f"model.layers.{i}.{name}": rate for i, layer in enumerate(layers) for name, rate in layer.rate.items()}
    optimizer = _Adam(changes, rates, UPDATES)
    state = written.path / _STATE
    if state.exists():
        optimizer.load(state)
    generator = torch.Generator().manual_seed(0)
    rounds = -(-UPDATES // len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(rounds)])[:UPDATES].tolist()
    while optimizer.step < UPDATES:
        sequence = order[optimizer.step]
        inputs, kept = [F.embedding(tokens[sequence], embedding)], []
        for layer in layers:
            outputs, results = layer.forward(block, inputs[-1])
            inputs.append(outputs)
            size = len(layers) * sum(one.nbytes for one in results.values())
            kept.append(results if size <= _KEPT else None)
        loss, gradient = output.divergence(inputs.pop(), target[sequence])
        if not math.isfinite(loss):
            raise FluteError(
                f"{source.path}: the quantized model's predictions are not finite: use --method gptq, or more bits"
            )
        gradients = {}
        for index in range(len(layers) - 1, -1, -1):
            gradient, found = layers[index].backward(block, inputs.pop(), kept.pop(), gradient)
            gradients |= {f"model.layers.{index}.{name}": g for name, g in found.items()}
        optimizer.update(gradients)
        if optimizer.step % _SAVE_EVERY == 0:
            optimizer.save(state)
        if progress:
            progress(optimizer.step, UPDATES, f"scales, KL {loss:.3f}")
    return {f"model.layers.{i}.{n}": layer.scales(n) for i, layer in enumerate(layers) for n in layer.linears}
