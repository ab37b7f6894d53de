"""Scale search: for each group the scale whose nearest table entries have the least squared error, found exactly."""

import torch


def _sides(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table as seen from zero, for negative weights (row 0) and positive ones (row 1), in magnitudes.

    Returns (thresholds ``[2, J]``, levels ``[2, J]`` beyond each threshold, first level ``[2, 1]`` before them all).
    The side with fewer thresholds is padded with infinite ones, which no weight reaches.
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

    def padded(parts: list[torch.Tensor], value: float) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(part, (0, size - len(part)), value=value) for part in parts])

    return padded(thresholds, torch.inf), padded(levels, 0.0), torch.stack(first).unsqueeze(1)


def search_scales(groups: torch.Tensor, codebook: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scales fp32 ``[...]`` that minimize ``sum(importance * (w - scale * entry)**2)`` in groups ``[..., group_size]``.

    As the scale falls from infinity each weight moves outward through the table, one entry at each of its few
    thresholds. Between two such events the codes stand still, and their best scale is ``A / B`` with
    ``A = sum(importance * w * entry)``, ``B = sum(importance * entry**2)``, which lowers the error by ``A**2 / B``.
    Sorting the events of a group and summing their changes of A and B visits every assignment that any scale can
    give, so the largest ``A**2 / B`` is the global minimum. The same sweep finds the thresholds of a ternary weight
    in TWN (arXiv 1605.04711, section 2.2) and XNOR-Net's scale (arXiv 1603.05279, section 3.1) in closed form.

    Args:
        groups: fp32 ``[..., group_size]``.
        codebook: fp32 ``[2**bits]``, in any order, entries may repeat.
        importance: fp32 of at least 0, broadcast over ``groups``: the second moments of the inputs, or None.

    A group of zeros, or one whose weights all have importance 0, gets scale 0.
    """
    shape = groups.shape
    groups = groups.reshape(-1, shape[-1])
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
        importance = importance.expand(shape).reshape(groups.shape)
        changes_a, changes_b = changes_a * importance.unsqueeze(-1), changes_b * importance.unsqueeze(-1)
        start_a, start_b = start_a * importance, start_b * importance
    events, order = (magnitude.unsqueeze(-1) / of_side(thresholds)).flatten(1).sort(-1, descending=True)
    # A padded threshold has event 0 and comes last, where its change must not count.
    reached = events > 0

    def totals(start: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        changes = changes.flatten(1).gather(1, order).where(reached, 0.0)
        return torch.cat([start.sum(-1, keepdim=True), changes], dim=1).cumsum(-1)

    a, b = totals(start_a, changes_a), totals(start_b, changes_b)
    gain = torch.where((a > 0) & (b > 0), a.square() / b, 0.0)
    best = gain.argmax(-1, keepdim=True)
    found = gain.gather(1, best) > 0
    return torch.where(found, a.gather(1, best) / b.gather(1, best), 0.0).view(shape[:-1])
