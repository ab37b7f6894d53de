"""bf16 products in fp32: the same sums as torch's own bf16 ones, and what is left alone."""

import pytest
import torch
from torch.nn import functional as F

from vllm_flute.checkpoint import products
from vllm_flute.checkpoint.learned import _Computed


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.fixture
def no_bf16_units(monkeypatch):
    """A CPU that multiplies bf16 values by a plain loop."""
    monkeypatch.setattr(products, "has_bf16_products", lambda: False)


def _close(found: torch.Tensor, exact: torch.Tensor) -> None:
    # One rounding to bf16 of an fp32 sum.
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "transposed weight"])
@pytest.mark.parametrize("at_once", [1, 64 * 7, 1 << 20])
def test_a_linear_layer_has_the_exact_sums_rounded_once(no_bf16_units, monkeypatch, transposed, at_once):
    monkeypatch.setattr(products, "_AT_ONCE", at_once)
    x, weight, bias = _bf16(5, 64), _bf16(64, 33).T if transposed else _bf16(33, 64), _bf16(33)
    with products.FastProducts():
        plain, biased, keyword = F.linear(x, weight), F.linear(x, weight, bias), F.linear(x, weight, bias=bias)
        module = torch.nn.Linear(64, 33, dtype=torch.bfloat16)
        assert module(x).dtype == torch.bfloat16
    exact = x.double() @ weight.double().T
    _close(plain, exact)
    _close(biased, exact + bias.double())
    assert torch.equal(biased, keyword)


def test_gradients_are_those_of_bf16_tensors(no_bf16_units):
    x, weight, at_output = _bf16(6, 64).requires_grad_(), _bf16(32, 64).requires_grad_(), _bf16(6, 32)
    with products.FastProducts():
        found = torch.autograd.grad(F.linear(x, weight), [x, weight], at_output)
    _close(found[0], at_output.double() @ weight.detach().double())
    _close(found[1], at_output.double().T @ x.detach().double())


def test_learning_scales_takes_them_backwards_too(no_bf16_units, monkeypatch):
    """What autograd calls is outside of function modes: a plain loop there makes an update seven times as slow."""
    x, weight, at_output = _bf16(6, 64).requires_grad_(), _bf16(32, 64), _bf16(6, 32)
    calls, wide, by_weight = [], products._linear, []
    monkeypatch.setattr(products, "_linear", lambda *args: calls.append(args) or wide(*args))
    out = _Computed.apply(x, weight, at_output, by_weight.append)
    assert torch.equal(out, at_output) and not calls
    [by_x] = torch.autograd.grad(out, x, at_output)
    assert len(calls) == 2
    _close(by_x, at_output.double() @ weight.double())
    _close(by_weight[0], at_output.double().T @ x.detach().double())


def test_attention_is_that_of_the_values_in_fp32(no_bf16_units):
    q, k, mask = _bf16(1, 6, 40, 16), _bf16(1, 2, 40, 16), _bf16(40, 40)
    attention, exact = F.scaled_dot_product_attention, (q.double(), k.double(), k.double())
    with products.FastProducts():
        causal = attention(q, k, k, is_causal=True, enable_gqa=True)
        masked = attention(q, k, k, attn_mask=mask, enable_gqa=True)
    _close(causal, attention(*exact, is_causal=True, enable_gqa=True))
    _close(masked, attention(*exact, attn_mask=mask.double(), enable_gqa=True))


def test_other_dtypes_and_functions_are_left_alone(no_bf16_units):
    x, weight = torch.randn(5, 64), torch.randn(8, 64)
    with products.FastProducts():
        assert torch.equal(F.linear(x, weight), torch._C._nn.linear(x, weight))
        assert F.linear(x.half(), weight.half()).dtype == torch.float16
        assert (x.bfloat16() + 1).dtype == torch.bfloat16
        assert F.embedding(torch.tensor([1, 2]), _bf16(4, 8)).dtype == torch.bfloat16


def test_a_cpu_with_bf16_units_uses_them(monkeypatch):
    monkeypatch.setattr(products, "has_bf16_products", lambda: True)
    monkeypatch.setattr(products, "_linear", lambda *a, **k: pytest.fail("taken"))
    with products.FastProducts():
        assert F.linear(_bf16(2, 8), _bf16(3, 8)).shape == (2, 3)


def test_nothing_is_left_on(no_bf16_units):
    with pytest.raises(ZeroDivisionError), products.FastProducts():
        raise ZeroDivisionError
    assert torch.overrides._get_current_function_mode() is None


def test_exact_products_put_the_setting_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    x, weight = _bf16(16, 64).float(), _bf16(64, 16).float()
    with products.exact_products():
        found = x @ weight
    torch.testing.assert_close(found.double(), x.double() @ weight.double(), rtol=1e-5, atol=1e-4)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
