"""Scale search: for each group the scale, of either sign, of least squared error with the nearest entries, exactly."""

import functools
import logging

import numpy as np
import torch

from ..backends import cpu

logger = logging.getLogger(__name__)


def _sides(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table as seen from zero, for negative weights (row 0) and positive ones (row 1), in magnitudes.

    Returns (thresholds ``[2, J]``, levels ``[2, J]`` beyond each threshold, first level ``[2, 1]`` before them all).
    The side with fewer thresholds is padded with infinite ones, which no weight reaches and which change no level.
    """
    thresholds, levels, first = [], [], []
    for sign in (-1, 1):
        side = (codebook * sign).unique()
        middle = (side[1:] + side[:-1]) / 2
        positive = middle > 0
        thresholds.append(middle[positive])
        levels.append(side[1:][positive])
        first.append(side[int((~positive).sum())])
    size = max(1, *map(len, thresholds))

    def padded(parts: list[torch.Tensor], values: list[float]) -> torch.Tensor:
        filled = [p.new_full((size - len(p),), value) for p, value in zip(parts, values, strict=True)]
        return torch.stack([torch.cat(pair) for pair in zip(parts, filled, strict=True)])

    last = [float(level[-1] if len(level) else start) for level, start in zip(levels, first, strict=True)]
    return padded(thresholds, [torch.inf] * 2), padded(levels, last), torch.stack(first).unsqueeze(1)


def search_scales(groups: torch.Tensor, codebook: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scales fp32 ``[...]`` that minimize ``sum(importance * (w - scale * entry)**2)`` in groups ``[..., group_size]``.

    As the scale falls from infinity each weight moves outward through the table, one entry at each of its few
    thresholds. Between two such events the codes stand still, and their best scale is ``A / B`` with
    ``A = sum(importance * w * entry)``, ``B = sum(importance * entry**2)``, which lowers the error by ``A**2 / B``.
    Sorting the events of a group and summing their changes of A and B visits every assignment that any scale can
    give, so the largest ``A**2 / B`` is the global minimum. The same sweep finds the thresholds of a ternary weight
    in TWN (arXiv 1605.04711, section 2.2) and XNOR-Net's scale (arXiv 1603.05279, section 3.1) in closed form.

    A table that is not symmetric is also tried mirrored, as a negative scale: each group takes the direction that
    suits it.

    Args:
        groups: fp32 ``[..., group_size]``.
        codebook: fp32 ``[2**bits]``, in any order, entries may repeat.
        importance: fp32 of at least 0, broadcast over ``groups``: the second moments of the inputs, or None.

    A group of zeros, or one whose weights all have importance 0, gets scale 0. On a CPU
    kernels/cpu/scale_search.cpp does the same without sorting most events.
    """
    levels = codebook.unique()
    if groups.device.type == "cpu" and groups.numel():
        flat = None if importance is None else _repeated(importance, groups.shape)
        found = cpu.search_scales(groups.reshape(-1, groups.shape[-1]).contiguous(), levels, flat)
        if found is not None:
            return found.view(groups.shape[:-1])
        _warn_of_slow_path()
    return sorted_search(groups, levels, importance)


@functools.cache
def _warn_of_slow_path() -> None:
    logger.warning("slower path: scales are searched by sorting in torch, because %s", cpu.load())


def _repeated(importance: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``[period, group_size]``, contiguous: what ``shape`` repeats along its first dimensions."""
    if importance.shape != shape[len(shape) - importance.dim() :]:
        importance = importance.expand(shape)
    return importance.reshape(-1, shape[-1]).contiguous()


def sorted_search(groups: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """`search_scales` in torch, for GPUs and where the CPU's library is not built: every event is sorted."""
    shape = groups.shape
    groups = groups.reshape(-1, shape[-1])
    if importance is not None:
        importance = importance.expand(shape).reshape(groups.shape)
    scales, gain = _sweep(groups, levels, importance)
    if not torch.equal(levels, -levels.flip(0)):
        mirrored, more = _sweep(-groups, levels, importance)
        scales = torch.where(more > gain, -mirrored, scales)
    return scales.view(shape[:-1])


def _ascending(values: torch.Tensor) -> torch.Tensor:
    """The order int64 of each row; on CPUs by numpy, a third of the time of torch's sort."""
    if values.device.type != "cpu":
        return values.argsort(-1)
    return torch.from_numpy(np.argsort(values.numpy(), -1))


def _sweep(
    groups: torch.Tensor, codebook: torch.Tensor, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scales of at least 0 for groups ``[count, group_size]``, and by how much they lower the error."""
    thresholds, levels, first = _sides(codebook)
    previous = torch.cat([first, levels[:, :-1]], dim=1)
    side = (groups > 0).to(torch.int32)
    magnitude = groups.abs()

    def of_side(table: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, side.view(-1)).view(*groups.shape, -1)

    changes_a = magnitude.unsqueeze(-1) * of_side(levels - previous)
    changes_b = of_side(levels.square() - previous.square())
    start_a, start_b = magnitude * of_side(first).squeeze(-1), of_side(first.square()).squeeze(-1)
    if importance is not None:
        changes_a, changes_b = changes_a * importance.unsqueeze(-1), changes_b * importance.unsqueeze(-1)
        start_a, start_b = start_a * importance, start_b * importance
    # Negative: the largest scale comes first.
    events = (magnitude.unsqueeze(-1) / -of_side(thresholds)).flatten(1)
    order = _ascending(events)

    def totals(start: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        changes = changes.flatten(1).gather(1, order)
        return torch.cat([start.sum(-1, keepdim=True), changes], dim=1).cumsum(-1)

    a, b = totals(start_a, changes_a), totals(start_b, changes_b)
    gain = torch.where((a > 0) & (b > 0), a.square() / b, 0.0)
    best = gain.argmax(-1, keepdim=True)
    gain = gain.gather(1, best)
    scales = torch.where(gain > 0, a.gather(1, best) / b.gather(1, best), 0.0)
    return scales.squeeze(1), gain.squeeze(1)
