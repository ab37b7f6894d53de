"""Mixed precision: the width of every layer that loses least within a budget of bits."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..codebook import BITS
from ..errors import FluteError
from .config import FUSED, HEAD, LayerSpec, LutConfig, first_match

# Steps that the budget is divided into at most; a unit's size is rounded up to steps, so that the budget holds. Of
# models with equal layers the steps are exact: LLaMA's matrices have a large common divisor.
_STEPS = 1 << 15


class Unit(NamedTuple):
    """Layers that take the same width, because vLLM fuses them: their weights, and what each width of BITS loses."""

    names: tuple[str, ...]
    weights: int
    losses: tuple[float, ...]


def choose_bits(units: list[Unit], budget: int) -> list[int]:
    """The bits of each unit with the least sum of losses among those with ``sum(weights * bits) <= budget``.

    The multiple-choice knapsack problem, by dynamic programming over the bits that are left (H. Kellerer, U. Pferschy
    and D. Pisinger, "Knapsack Problems", Springer 2004, section 11.5). Exact where the units' weights are multiples of
    a common step that divides the budget into few enough parts.
    """
    least = sum(u.weights for u in units) * BITS[0]
    room = max(0, budget - least)
    step = max(math.gcd(*(u.weights for u in units)), -(-room // _STEPS), 1)
    capacity = room // step
    best = np.zeros(capacity + 1)  # the least loss of the units so far with so many steps
    taken = np.zeros((len(units), capacity + 1), dtype=np.int8)
    for i, unit in enumerate(units):
        options = np.full((len(BITS), capacity + 1), np.inf)
        for j, bits in enumerate(BITS):
            cost = -(-unit.weights * (bits - BITS[0]) // step)
            if cost <= capacity:
                options[j, cost:] = best[: capacity + 1 - cost] + unit.losses[j]
        taken[i], best = options.argmin(0), options.min(0)
    left, chosen = capacity, []
    for i in range(len(units) - 1, -1, -1):
        j = taken[i, left]
        chosen.append(BITS[j])
        left -= -(-units[i].weights * (BITS[j] - BITS[0]) // step)
    return chosen[::-1]


def fused_units(names: list[str]) -> list[tuple[str, ...]]:
    """The names in groups that vLLM makes one layer, in their order."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        first = next((group[0] for group in FUSED if last in group), last)
        groups.setdefault((parent, first), []).append(name)
    return [tuple(members) for members in groups.values()]


def mix(
    lut: LutConfig,
    shapes: Mapping[str, tuple[int, int]],
    target: float,
    fixed: list[str],
    losses: Callable[[list[str]], Mapping[str, Mapping[int, float]]],
) -> LutConfig:
    """The config with the widths chosen for ``target`` bits a weight, scales and tables included.

    Args:
        lut: the plan at one width; its group sizes stay.
        shapes: (N, K) by module name.
        target: bits a weight on average over all quantized layers.
        fixed: names or patterns whose width was asked for; the output head keeps the plan's width too.
        losses: what the named layers lose at every width of BITS (see `sensitivities`).

    Raises:
        FluteError: a target that no choice reaches.
    """
    specs = {name: lut.layer(name) for name in shapes if not lut.is_ignored(name)}
    free = [name for name in specs if name != HEAD and not first_match(fixed, name)]
    if not free:
        raise FluteError("--target-bits has no layer to choose for: every one has a width of its own")
    size = {name: math.prod(shapes[name]) for name in specs}

    def stored(name: str, bits: int) -> int:
        """Bits of codes, scales and table."""
        return size[name] * bits + size[name] // specs[name].group_size * 16 + 2**bits * 32

    total = sum(size.values())
    kept = sum(stored(name, specs[name].bits) for name in specs if name not in free)
    # Tables count as the widest's, which is a thousandth of a bit a weight too much in a small model.
    budget = int(target * total) - kept - sum(stored(name, BITS[-1]) - size[name] * BITS[-1] for name in free)
    low, high = ((kept + sum(stored(name, bits) for name in free)) / total for bits in (BITS[0], BITS[-1]))
    if budget < sum(size[name] for name in free) * BITS[0] or target > high:
        raise FluteError(f"--target-bits {target:g}: these layers and group sizes take {low + 5e-3:.2f} to {high:.2f}")
    found = losses(free)
    units = [
        Unit(
            names,
            sum(size[name] for name in names),
            tuple(sum(found[name][bits] for name in names) for bits in BITS),
        )
        for names in fused_units(free)
    ]
    for unit, bits in zip(units, choose_bits(units, budget), strict=True):
        specs |= {name: LayerSpec(bits, specs[name].group_size) for name in unit.names}
    default = Counter(specs[name] for name in free).most_common(1)[0][0]
    overrides = {name: spec for name, spec in specs.items() if spec != default}
    return replace(lut, bits=default.bits, group_size=default.group_size, overrides=overrides)
