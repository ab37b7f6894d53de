"""Quantization methods against brute force, closed forms and published figures."""

import sys
from functools import partial
from itertools import combinations_with_replacement, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flute import FluteError, LutTensor, quantize
from vllm_flute.backends import cpu
from vllm_flute.codebook import make_codebook
from vllm_flute.quantization import scale_search
from vllm_flute.quantization.cluster import cluster
from vllm_flute.quantization.gptq import DAMPING, _inverse_factor, gptq
from vllm_flute.quantization.scale_search import search_scales, sorted_search

search = partial(quantize, method="scale-search")

NAMED = [
    ("lloyd-max", 4),
    ("lloyd-max", 3),
    ("lloyd-max", 2),
    ("nf", 3),
    ("nf", 2),
    ("ternary", 2),
    ("fp4", 4),
    ("int", 3),
]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_at(groups: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, importance=1.0) -> torch.Tensor:
    """Weighted squared error of each group ``[..., g]`` with the nearest entries, by trying them all."""
    distance = (table.double() * scales.double()[..., None, None] - groups.double().unsqueeze(-1)).square()
    return (distance.amin(-1) * importance).sum(-1)


# N(0, 1) and 2**bits levels: J. Max, "Quantizing for minimum distortion" (1960), table I.
@pytest.mark.parametrize("bits, error", [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_has_the_published_error(bits, error):
    table = make_codebook("lloyd-max", bits).double()
    assert torch.equal(table, -table.flip(0)) and (table.diff() > 0).all()
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    distance = (table - x.unsqueeze(-1)).square().amin(-1)
    assert torch.trapezoid(distance * density, x).item() == pytest.approx(error, rel=1e-3)


# Mean squared error for unit-variance Gaussian weights, groups of 64 and 128: the marks that the project set itself.
MARKS = {
    ("nf", 4): (0.0073, 0.0081),
    ("nf", 3): (0.0331, 0.0361),
    ("nf", 2): (0.145, 0.151),
    ("lloyd-max", 4): (0.0071, 0.0078),
    ("lloyd-max", 3): (0.0295, 0.0317),
    ("lloyd-max", 2): (0.111, 0.114),
}


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("codebook, bits", MARKS)
def test_error_of_scale_search_on_gaussian_weights(codebook, bits, group_size):
    weight = gaussian(512, 1024)
    t = search(weight, bits, group_size, codebook)
    error = (t.dequantize() - weight).square().mean().item()
    # The marks are rounded to their last digit.
    assert error <= MARKS[codebook, bits][group_size == 128] * 1.003
    assert error < (quantize(weight, bits, group_size, codebook, method="absmax").dequantize() - weight).square().mean()


SEARCHES = {
    "native": search_scales,
    "torch": lambda groups, table, importance: sorted_search(groups, table.unique(), importance),
}


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("codebook, bits", NAMED)
def test_no_scale_is_better(codebook, bits, weighted, how):
    """Against a fine scan of scales, and against the scales around the one that was found."""
    groups, table = gaussian(40, 16), make_codebook(codebook, bits)
    importance = gaussian(16, seed=1).square() if weighted else None
    found = SEARCHES[how](groups, table, importance)
    weights = 1.0 if importance is None else importance.double()
    best = error_at(groups, found, table, weights)
    largest = groups.abs().amax(-1) / table[table != 0].abs().amin()
    for ratio in torch.linspace(0.002, 1, 700).tolist():
        for scales in (largest * ratio, -largest * ratio):
            assert (best <= error_at(groups, scales, table, weights) * (1 + 1e-5)).all(), ratio


@st.composite
def small_groups(draw):
    bits = draw(st.sampled_from([2, 3]))
    values = st.floats(-4, 4, width=32).map(lambda v: round(v, 2))
    table = draw(st.lists(values, min_size=2, max_size=2**bits))
    group = draw(st.lists(values, min_size=3, max_size=3))
    importance = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.0]), min_size=3, max_size=3))
    return torch.tensor(group), torch.tensor(table), torch.tensor(importance)


@pytest.mark.parametrize("how", SEARCHES)
@given(small_groups())
@settings(max_examples=150, deadline=None)
def test_any_table_against_every_assignment(how, parts):
    """All codes of three weights, each with its best scale: nothing is better, also with one-sided tables."""
    scale = SEARCHES[how](parts[0].unsqueeze(0), *parts[1:])
    group, table, importance = (part.double() for part in parts)
    assert scale.shape == (1,) and torch.isfinite(scale).all()
    best = (importance * group.square()).sum()
    for codes in product(range(len(table)), repeat=3):
        entries = table[list(codes)]
        a, b = (importance * group * entries).sum(), (importance * entries.square()).sum()
        if b > 0:
            best = min(best, (importance * group.square()).sum() - a**2 / b)
    error = (importance * (table * scale.double().view(1, 1) - group.unsqueeze(-1)).square().amin(-1)).sum()
    assert error <= best + 1e-4 * (1e-3 + (importance * group.square()).sum())


@pytest.mark.parametrize("codebook, bits", [*NAMED, ([0.0, 1.0, 2.0, 3.5], 2), ([-2.0, -0.5, 0.1, 0.2], 2), ([0.5], 2)])
def test_both_searches_lose_the_same(codebook, bits):
    """Groups of all sizes and kinds, with an importance for each group and for each of a row's groups."""
    table = make_codebook(codebook, bits) if isinstance(codebook, str) else torch.tensor(codebook)
    for size in (8, 16, 64, 128, 520, 4096):
        kinds = [gaussian(24, size), gaussian(24, size) ** 5, gaussian(24, size).sign(), gaussian(24, size).round()]
        groups = torch.cat(kinds).view(24, 4, size)
        groups[0, 0] = 0
        groups[0, 1, 1:] = 0
        for importance in (None, gaussian(4, size, seed=1) ** 4, gaussian(96, size, seed=2).view(24, 4, size) ** 2):
            found = search_scales(groups, table, importance)
            expected = sorted_search(groups, table.unique(), importance)
            assert found.shape == (24, 4) and found[0, 0] == 0
            weights = (
                1.0
                if importance is None
                else importance.double().reshape(-1, size).repeat(96 // (importance.numel() // size), 1)
            )
            flat = groups.view(-1, size)
            lost, least = (error_at(flat, s.view(-1), table, weights) for s in (found, expected))
            # Both sum up in fp32, in different orders.
            assert (lost <= least + 1e-5 * (weights * flat.double().square()).sum(-1)).all(), size


def test_weights_that_are_not_finite_have_no_scale():
    groups = gaussian(6, 64)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        groups[row, row] = value
    found = search_scales(groups, make_codebook("nf", 4))
    assert found[:3].isnan().all() and found[3:].isfinite().all()
    torch.testing.assert_close(found[3:], search_scales(groups[3:], make_codebook("nf", 4)), rtol=0, atol=0)
    assert search_scales(groups[3:], make_codebook("nf", 4), torch.full((64,), torch.nan)).isnan().all()


def test_ternary_scale_by_its_closed_form():
    """The best k weights of largest magnitude give their mean as scale (TWN, arXiv 1605.04711, equation 5)."""
    groups = gaussian(30, 64)
    ordered = groups.abs().sort(-1, descending=True).values.double()
    gains = ordered.cumsum(-1).square() / torch.arange(1, 65)
    k = gains.argmax(-1, keepdim=True)
    expected = ordered.cumsum(-1).gather(1, k) / (k + 1)
    found = search_scales(groups, make_codebook("ternary", 2))
    torch.testing.assert_close(found.double(), expected.squeeze(1), rtol=1e-5, atol=0)


def test_importance_moves_error_to_inputs_that_matter_less():
    weight = gaussian(64, 128)
    importance = torch.ones(128)
    importance[::4] = 50
    plain, weighted = (search(weight, 2, importance=h).dequantize() - weight for h in (None, importance))
    assert weighted[:, ::4].square().mean() < 0.9 * plain[:, ::4].square().mean()
    assert (weighted.square() * importance).sum() < (plain.square() * importance).sum()


def test_inputs_that_never_occur():
    """Importance 0 for a whole group: its weights become 0, the others do not change."""
    weight, importance = gaussian(8, 128), torch.ones(128)
    importance[:64] = 0
    t = search(weight, 3, importance=importance)
    assert (t.scales[:, 0] == 0).all() and t.dequantize()[:, :64].abs().max() == 0
    assert torch.equal(t.dequantize()[:, 64:], search(weight, 3).dequantize()[:, 64:])


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_codes_suit_the_rounded_scale(scale_dtype):
    weight = gaussian(16, 128)
    t = search(weight, 4, 32, scale_dtype=scale_dtype)
    groups = weight.view(16, 4, 32)
    torch.testing.assert_close(
        (t.dequantize() - weight).view(16, 4, 32).square().sum(-1).double(),
        error_at(groups, t.scales.double(), t.codebook),
        rtol=1e-4,
        atol=1e-6,
    )


def test_unknown_method():
    with pytest.raises(FluteError, match="unknown method 'best'"):
        quantize(torch.ones(2, 64), method="best")
    with pytest.raises(FluteError, match="importance is for scale-search"):
        quantize(torch.ones(2, 64), method="absmax", importance=torch.ones(64))


def test_not_finite_among_finite():
    weight = gaussian(4, 64)
    weight[2, 5] = torch.inf
    with pytest.raises(FluteError, match="not finite"):
        quantize(weight)


def correlated(k: int, rows: int = 4096) -> torch.Tensor:
    """Second moments of inputs of unequal size that share a common part."""
    x = gaussian(rows, k, seed=2) * torch.linspace(0.2, 2, k) + gaussian(rows, 1, seed=3) * gaussian(k, seed=4)
    return x.T @ x / rows


@pytest.mark.parametrize("codebook, bits, group_size", [("nf", 4, 64), ("lloyd-max", 3, 32), ("ternary", 2, 256)])
def test_gptq_without_correlations_is_scale_search(codebook, bits, group_size):
    """Equal inputs that have nothing in common: no error can be made up for, and no order matters.

    Up to ties: two assignments whose gains are equal to fp32's resolution.
    """
    weight = gaussian(300, 256)
    expected = search(weight, bits, group_size, codebook)
    found = gptq(weight, 4 * torch.eye(256), bits, group_size, codebook)
    assert (found.codes() != expected.codes()).float().mean() < 1e-3
    errors = [(t.dequantize() - weight).square().sum() for t in (found, expected)]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=0)


def test_gptq_against_its_definition(monkeypatch):
    """One group, without coordinate descent.

    Each column in its order is rounded, the rest set to what minimizes the loss, solved anew in fp64.
    """
    monkeypatch.setattr(sys.modules["vllm_flute.quantization.gptq"], "_SWEEPS", 0)
    k, table = 16, make_codebook("lloyd-max", 3)
    weight, moments = gaussian(12, k), correlated(k)
    t = gptq(weight, moments, 3, k, "lloyd-max")
    h = moments.double() + DAMPING * moments.diagonal().mean() * torch.eye(k)
    target, current, scale = weight.double(), weight.double().clone(), t.scales.double()
    order = moments.diagonal().argsort(descending=True)
    for i, column in enumerate(order):
        choices = table.double() * scale
        nearest = (choices - current[:, column : column + 1]).abs().argmin(-1)
        assert torch.equal(t.codes()[:, column].long(), nearest)
        current[:, column] = choices.gather(1, nearest.unsqueeze(1)).squeeze(1)
        done, rest = order[: i + 1], order[i + 1 :]
        lost = (current - target)[:, done] @ h[done][:, rest]
        current[:, rest] = target[:, rest] - torch.linalg.solve(h[rest][:, rest], lost.T).T


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_at_the_outputs(bits):
    weight, moments = gaussian(64, 256), correlated(256)

    def loss(t) -> float:
        difference = t.dequantize() - weight
        return ((difference @ moments) * difference).sum().item()

    found = loss(gptq(weight, moments, bits, 64, "lloyd-max"))
    for importance in (None, moments.diagonal()):
        assert found < 0.75 * loss(search(weight, bits, importance=importance))


def test_coordinate_descent_ends_where_no_code_alone_is_better(monkeypatch):
    """With many passes, against every other entry for every weight; and each pass lowers the loss."""
    weight, moments = gaussian(20, 256), correlated(256)
    damped = (moments + DAMPING * moments.diagonal().mean() * torch.eye(256)).double()
    losses = []
    for sweeps in (0, 1, 40):
        monkeypatch.setattr(sys.modules["vllm_flute.quantization.gptq"], "_SWEEPS", sweeps)
        t = gptq(weight, moments, 2, 128, "nf")
        difference = t.dequantize().double() - weight.double()
        losses.append(((difference @ damped) * difference).sum().item())
    assert losses[2] < losses[1] < losses[0]
    entries = t.codebook.double() * t.scales.double().repeat_interleave(128, 1).unsqueeze(-1)
    step = entries - t.dequantize().double().unsqueeze(-1)
    change = 2 * step * (difference @ damped).unsqueeze(-1) + step.square() * damped.diagonal().unsqueeze(-1)
    assert change.min() > -1e-4 * losses[2] / weight.numel()


def test_gptq_with_inputs_that_never_occur():
    """They are rounded by themselves: no other input makes up for them, and they for no other."""
    weight, moments = gaussian(8, 128), correlated(128)
    moments[:64], moments[:, :64] = 0, 0
    t = gptq(weight, moments, 3, 64, "lloyd-max")
    assert torch.equal(t.dequantize()[:, :64], search(weight, 3, 64, "lloyd-max").dequantize()[:, :64])


@pytest.mark.parametrize("value", [torch.inf, -1.0])
def test_gptq_refuses_moments_that_are_none(value):
    moments = torch.eye(64)
    moments[3, 3] = value
    with pytest.raises(FluteError, match="q_proj.*(not finite|cannot be inverted)"):
        gptq(gaussian(8, 64), moments, 3, 64, "nf", name="q_proj")


@given(
    st.lists(st.tuples(st.integers(-20, 20), st.sampled_from([0.0, 1.0, 2.5])), min_size=1, max_size=9),
    st.integers(2, 4),
)
@settings(max_examples=100, deadline=None)
def test_clusters_against_every_partition(points, count):
    values, weights = (np.array(part, dtype=np.float64) for part in zip(*points, strict=True))
    if not weights.any():
        weights += 1
    centres = cluster(values, weights, count)
    assert centres.shape == (count,) and (np.diff(centres) >= 0).all()
    order = values.argsort()
    values, weights = values[order], weights[order]

    def spread(i: int, j: int) -> float:
        mass = weights[i:j].sum()
        mean = (weights[i:j] * values[i:j]).sum() / mass if mass else 0
        return (weights[i:j] * (values[i:j] - mean) ** 2).sum()

    cuts = combinations_with_replacement(range(len(values) + 1), count - 1)
    best = min(sum(spread(i, j) for i, j in pairwise([0, *cut, len(values)])) for cut in cuts)
    error = (weights[:, None] * (values[:, None] - centres) ** 2).min(-1).sum()
    assert error == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fitted_table_finds_the_one_that_made_the_weights(bits):
    """Levels that no named table has; the error falls to what the scales' rounding leaves."""
    generator = torch.Generator().manual_seed(bits)
    levels = torch.tensor([-1.0, -0.9, 0.1, 0.3] if bits == 2 else sorted(gaussian(2**bits, seed=bits).tolist()))
    scales = (1 + torch.rand(128, 4, generator=generator)).bfloat16()
    codes = torch.randint(0, 2**bits, (128, 256), generator=generator, dtype=torch.uint8)
    weight = LutTensor.from_codes(codes, scales, levels).dequantize()
    errors = [(search(weight, bits, 64, c).dequantize() - weight).square().mean() for c in ("lloyd-max", "fitted")]
    assert errors[1] < 0.05 * errors[0]


@pytest.mark.parametrize("importance", [None, torch.linspace(0.01, 4, 256)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fitted_table_is_better_on_skewed_weights(bits, importance):
    weight = gaussian(256, 256).exp()
    errors = []
    for codebook in ("lloyd-max", "fitted"):
        lost = search(weight, bits, 64, codebook, importance=importance).dequantize() - weight
        errors.append((lost.square() * (1 if importance is None else importance)).sum())
    assert errors[1] < 0.7 * errors[0]


def test_a_table_for_weights_of_zero():
    assert quantize(torch.zeros(2, 64), codebook="fitted").dequantize().abs().max() == 0


def test_scales_are_fp32_whatever_the_default_dtype():
    """vLLM quantizes with the model's dtype as torch's default."""
    groups, table = gaussian(1000, 8), make_codebook("nf", 4)
    expected, before = search_scales(groups, table), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = search_scales(groups, table)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_without_the_library_scales_are_searched_in_torch_and_a_log_line_says_so(monkeypatch, caplog):
    groups, table = gaussian(10, 64), make_codebook("nf", 4)
    monkeypatch.setattr(cpu, "_load", lambda: (None, "it was not built"))
    scale_search._warn_of_slow_path.cache_clear()
    found = [search_scales(groups, table) for _ in range(2)]
    assert torch.equal(found[0], sorted_search(groups, table.unique(), None)) and torch.equal(*found)
    assert [r.getMessage() for r in caplog.records] == [
        "slower path: scales are searched by sorting in torch, because it was not built"
    ]


@pytest.mark.parametrize("size", [1, 8, 127, 128, 129, 264, 1000])
def test_factor_of_an_inverse(size):
    x = gaussian(2 * size, size)
    moments = x.T @ x / len(x) + 0.1 * torch.eye(size)
    factor = _inverse_factor(moments, "weight")
    assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
    torch.testing.assert_close((factor.T @ factor).double(), moments.double().inverse(), rtol=1e-3, atol=1e-4)
