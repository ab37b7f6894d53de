"""The error that a kernel may make, from first principles."""

import torch

from vllm_flute import LutTensor


def allowed_error(x: torch.Tensor, t: LutTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Bound ``[..., N]`` on |kernel - oracle| for activations x, element by element.

    Two errors, both relative to ``sum_k |x||w|``: fp32 accumulation in any order, K * 2^-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), twice because the oracle sums too; and, where x is 16-bit, one
    rounding of each weight to x's dtype and one of the result (eps is the spacing, twice the rounding error).
    """
    magnitude = x.float().abs() @ t.dequantize().abs().T
    if bias is not None:
        magnitude = magnitude + bias.float().abs()
    unit = 2 * t.shape[1] * 2.0**-24
    if x.dtype != torch.float32:
        unit += torch.finfo(x.dtype).eps
    return magnitude * unit


def assert_within_bound(actual: torch.Tensor, x: torch.Tensor, t: LutTensor, bias: torch.Tensor | None = None) -> None:
    """Assert that ``actual`` is the oracle's result for (x, t, bias) up to allowed_error."""
    exact = x.double() @ t.dequantize().double().T + (0 if bias is None else bias.double())
    error, bound = (actual.double() - exact).abs(), allowed_error(x, t, bias)
    worst = (error - bound).argmax()
    assert (error <= bound).all(), (
        f"error {error.flatten()[worst]:.3e} exceeds its bound {bound.flatten()[worst]:.3e} at element {worst}"
    )
