"""On unit-variance Gaussian weights: squared errors of the methods, and of grids of pairs beside single values; times.

A grid of pairs stores one code of 2b bits for two weights: a table of 2^(2b) points of the plane (arXiv 2411.17525,
HIGGS, section 4). Its points are found by the generalized Lloyd algorithm (Y. Linde, A. Buzo, R. M. Gray, "An algorithm
for vector quantizer design", IEEE Trans. Communications 28(1), 1980).
"""

import statistics
import time

import torch

from vllm_flute import quantize
from vllm_flute.codebook import lloyd_max, make_codebook
from vllm_flute.quantization.scale_search import search_scales, sorted_search

_METHODS = (("nf", "absmax"), ("nf", "scale-search"), ("lloyd-max", "scale-search"))
_SAMPLES, _ROUNDS = 1 << 18, 60
_GROUPS, _REPEATS = 511, 9  # as many groups of 64 as the quantizer gives the search at once; timings of each


def _nearest(points: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    # |p - g|^2 less |p|^2, which is the same for all g.
    return (grid.square().sum(1) - 2 * points @ grid.T).argmin(1)


def pair_grid_error(bits: int) -> float:
    """Squared error a weight of the best grid of ``2**(2*bits)`` pairs for a standard normal plane.

    Fitted on one sample and measured on another; started from the product of the best grids of single values, so
    that it can only be better.
    """
    generator = torch.Generator().manual_seed(0)
    fitted, measured = torch.randn(2, _SAMPLES, 2, generator=generator)
    grid = torch.cartesian_prod(lloyd_max(bits), lloyd_max(bits))
    # Off the saddle point that the square grid is.
    grid = grid + 0.05 * torch.randn(grid.shape, generator=generator)
    for _ in range(_ROUNDS):
        nearest = _nearest(fitted, grid)
        count = torch.zeros(len(grid)).index_add_(0, nearest, torch.ones(_SAMPLES))
        total = torch.zeros_like(grid).index_add_(0, nearest, fitted)
        grid = torch.where(count.unsqueeze(1) > 0, total / count.clamp(min=1).unsqueeze(1), grid)
    return (measured - grid[_nearest(measured, grid)]).square().mean().item()


def single_grid_error(bits: int) -> float:
    """The same of Lloyd-Max's grid of single values."""
    weight = torch.randn(_SAMPLES, generator=torch.Generator().manual_seed(1)).unsqueeze(1)
    table = lloyd_max(bits).unsqueeze(1)
    return (weight - table[_nearest(weight, table)]).square().mean().item()


def gaussian_table() -> None:
    """Errors on unit-variance Gaussian weights and times of scale search only, which needs no model."""
    print("| bits | codebook, method | group 64 | group 128 |\n|---|---|---|---|")
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    for bits in (4, 3, 2):
        for codebook, method in _METHODS:
            errors = [
                (quantize(weight, bits, group, codebook, method=method).dequantize() - weight).square().mean().item()
                for group in (64, 128)
            ]
            print(f"| {bits} | {codebook}, {method} | {errors[0]:.5f} | {errors[1]:.5f} |", flush=True)
    print("\n| bits | single values | pairs | less | worth bits a weight |\n|---|---|---|---|---|")
    for bits in (2, 3):
        single, pair = single_grid_error(bits), pair_grid_error(bits)
        # Between widths the error of single values falls by a factor: the same fall, as a share of one bit.
        fall = torch.tensor(single_grid_error(bits) / single_grid_error(bits + 1)).log()
        worth = (torch.tensor(single / pair).log() / fall).item()
        print(f"| {bits} | {single:.5f} | {pair:.5f} | {1 - pair / single:.1%} | {worth:.3f} |", flush=True)
    print("\n| bits | scale search of a group of 64, us | sorting in torch | ratio |\n|---|---|---|---|")
    groups = torch.randn(_GROUPS, 64, generator=torch.Generator().manual_seed(0))
    for bits in (4, 3, 2):
        table = make_codebook("nf", bits)
        times = [[], []]
        for _ in range(_REPEATS):
            for search, found in zip((search_scales, sorted_search), times, strict=True):
                begin = time.perf_counter()
                search(groups, table, None)
                found.append((time.perf_counter() - begin) / _GROUPS * 1e6)
        ours, sorting = map(statistics.median, times)
        print(f"| {bits} | {ours:.1f} | {sorting:.1f} | {sorting / ours:.1f} |", flush=True)
