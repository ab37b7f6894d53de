"""Learned scales: codes stand still, scales follow the gradient of what a whole decoder layer puts out."""

from collections.abc import Callable, Mapping

import torch

from ..errors import FluteError
from ..format import LutTensor

# Adam's rate is a share of each scale, falling to 0 over the steps.
RATE = 2e-3
EPOCHS = 4
_BETAS = (0.9, 0.95)

# (inputs [tokens, hidden], weights [N, K] by name, with gradients) -> outputs [tokens, hidden].
Run = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def learn_scales(
    run: Run,
    layers: Mapping[str, LutTensor],
    inputs: list[torch.Tensor],
    targets: list[torch.Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, LutTensor]:
    """The same layers with scales that bring a decoder layer's outputs closer to those of the plain one.

    A weight ``codebook[code] * scale`` is differentiable in its scale, so that the gradient is exact for given codes;
    the learned scales of NormalFloat (FLUTE, arXiv 2407.10960, section 3.4) are trained so against a model's loss,
    these against one decoder layer after the other (as in OmniQuant, arXiv 2308.13137, section 3.1), which holds one in
    memory. Each step is one sequence; an error counts relative to the size of its token's outputs, because few tokens
    have outputs that are a thousand times those of others.

    Args:
        run: the decoder layer.
        layers: its quantized linear layers by name.
        inputs: what the quantized layers before it put out, ``[tokens, hidden]`` for each sequence.
        targets: what the plain model has after this layer, like ``inputs``.
        dtype: of the computation.

    Raises:
        FluteError: outputs that are not finite.
    """
    fixed = {name: t.codebook[t.codes().long()].view(*t.scales.shape, -1) for name, t in layers.items()}
    start = {name: t.scales.to(torch.float32).unsqueeze(-1) for name, t in layers.items()}
    change = {name: torch.zeros_like(scales).requires_grad_() for name, scales in start.items()}
    optimizer = torch.optim.Adam(change.values(), RATE, _BETAS)
    steps = EPOCHS * len(inputs)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        x, target = (part[step % len(inputs)] for part in (inputs, targets))
        with torch.enable_grad():
            weights = {n: (fixed[n] * start[n] * (1 + change[n])).flatten(1).to(dtype) for n in layers}
            lost = (run(x, weights) - target).to(torch.float32).square().sum(-1)
            loss = (lost / target.to(torch.float32).square().sum(-1)).mean()
        if not torch.isfinite(loss):
            raise FluteError(f"{next(iter(layers.values())).name}: the decoder layer's outputs are not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    made = {}
    for name, t in layers.items():
        scales = (start[name] * (1 + change[name].detach())).squeeze(-1).to(t.scales.dtype)
        made[name] = LutTensor(t.qweight, scales, t.codebook, name=t.name)
    return made
