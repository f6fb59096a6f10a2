"""How close a kernel must come: one table, and the comparison with PyTorch's own error in the same dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (2e-2, 1e-2),
    torch.float16: (3e-3, 1e-3),
}
"""dtype of the inputs -> (rtol, atol) against a float64 oracle; atol is relative to the oracle's largest magnitude,
which counts as at least 1e-3: gradients that cancel to zero leave roundings behind."""


def assert_matches_oracle(actual: Tensor, oracle: Tensor, dtype: torch.dtype, name: str = "result") -> None:
    """Compare a kernel's result with the float64 result on the same (already rounded) inputs."""
    rtol, atol = TOLERANCES[dtype]
    assert oracle.dtype == torch.float64
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    size = float(oracle.abs().nan_to_num().max()) if oracle.numel() else 0.0
    torch.testing.assert_close(
        actual.double().cpu(),
        oracle.cpu(),
        rtol=rtol,
        atol=atol * max(size, 1e-3),
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def assert_no_worse_than_pytorch(
    actual: Tensor, pytorch: Tensor, oracle: Tensor, name: str = "result", factor: float = 2.0
) -> None:
    """The kernel's largest error is at most twice PyTorch's in the same dtype, give or take one rounding."""
    rounding = torch.finfo(actual.dtype).eps * float(oracle.abs().max()) if oracle.numel() else 0.0
    ours = float((actual.double() - oracle).abs().max()) if oracle.numel() else 0.0
    theirs = float((pytorch.double() - oracle).abs().max()) if oracle.numel() else 0.0
    assert ours <= factor * theirs + rounding, f"{name}: error {ours:.3g}, PyTorch's own is {theirs:.3g}"


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """Value and gradients of `function(*inputs)`: [value, gradient, ...], inputs taken as fresh leaves."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    seed = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, seed)]
