"""Fake tensors, autograd and autocast of the operators, the same for the compiled and for the Triton ones.

The stable ABI has none of the three, so they are registered from Python.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcr2s_ext import triton
from lcr2s_ext.ops import _library

COMPILED = "lcr2s"
TRITON = "lcr2s_triton"

_FAMILIES: dict[str, Callable[[str], None]] = {}
_LOADED: set[str] = set()


class Operators:
    """The operators of one module: torch.ops.lcr2s, or torch.ops.lcr2s_triton, imported when first asked for.

    Args:
        module: its name in lcr2s_ext.triton.
        register: called once with each namespace that has the operators, to register fakes, autograd and autocast.
    """

    def __init__(self, module: str, register: Callable[[str], None]) -> None:
        self._module = module
        _FAMILIES[module] = register
        if _library.compiled():
            register(COMPILED)

    def __call__(self, backend: str) -> Any:
        """The namespace in which `backend`, one that :func:`_backend.resolve` returned, has its operators."""
        if backend != "triton":
            return torch.ops.lcr2s
        _load_triton(self._module)
        return torch.ops.lcr2s_triton


def _load_triton(module: str) -> None:
    if module not in _LOADED:
        triton.load(module)
        _FAMILIES[module](TRITON)
        _LOADED.add(module)


# torch.compile calls it while tracing: an import and registrations are no part of a graph. This is what
# torch.compiler.assume_constant_result does, but for importing torch._dynamo, which takes as long as importing torch.
_load_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _fragment(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")


def register_autocast(namespace: str, op: str, cast: Callable[[tuple[Any, ...], torch.dtype], tuple[Any, ...]]) -> None:
    """Under autocast, call `namespace`::`op` with `cast(arguments, autocast dtype)` instead of its arguments."""
    overload = getattr(getattr(torch.ops, namespace), op).default
    for device in ("cpu", "cuda"):
        key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
        keyset = torch._C.DispatchKeySet(key)

        def kernel(_: Any, *args: Any, device: str = device, keyset: Any = keyset) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return overload(*cast(args, torch.get_autocast_dtype(device)))

        _fragment(namespace).impl(op, kernel, key.name, with_keyset=True)


def cast_to_autocast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """What matrix products do under autocast: floating arguments other than float64 take the autocast dtype."""
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a for a in args
    )


def no_double_backward(op: str) -> Callable[..., Any]:
    """An autograd formula for backward operators that refuses to be differentiated."""

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{op}: double backward (create_graph=True through this operator) is not supported")

    return backward


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, anchor: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return no_double_backward(ctx.op)(ctx, *grads)


def refuse_differentiation(op: str, gradient: Tensor) -> Tensor:
    """The gradient, which raises an error where it is differentiated."""
    # Only under create_graph=True is a backward run with gradients enabled. Without this a gradient computed in the
    # forward would pass for a constant, and second derivatives would silently be wrong.
    if not torch.is_grad_enabled():
        return gradient
    anchor = torch.empty(0, device=gradient.device, requires_grad=True)
    return _Refusal.apply(op, gradient, anchor)


def register_scalar_loss(namespace: str, op: str, differentiable: tuple[int, ...]) -> None:
    """Autograd of an operator that returns its loss and, already computed, the loss's gradients.

    Args:
        namespace, op: `namespace`::`op` returns (loss, gradient, ...): the () loss, then one gradient for each
            differentiable argument, in order and in the statistics dtype; one without elements where the caller did
            not ask for it.
        differentiable: positions of those arguments.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.arguments = len(inputs)
        ctx.dtypes = tuple(inputs[position].dtype for position in differentiable)
        ctx.save_for_backward(*output[1:])

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * ctx.arguments
        if grad_loss is not None:
            for position, dtype, gradient in zip(differentiable, ctx.dtypes, ctx.saved_tensors, strict=True):
                if ctx.needs_input_grad[position]:
                    # Scaled in the statistics dtype: a half gradient would underflow before a GradScaler acts.
                    scaled = (gradient * grad_loss).to(dtype)
                    result[position] = refuse_differentiation(op, scaled)
        return tuple(result)

    torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=setup_context)


def register_pass(namespace: str, op: str, fake: Callable[..., Any]) -> None:
    """Fake tensors of an operator that is one pass of a loss over a block, and a backward that refuses: the gradients
    are what the passes are for."""

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{op}: one pass of a loss is not differentiable")

    torch.library.register_fake(f"{namespace}::{op}", fake)
    torch.library.register_autograd(f"{namespace}::{op}", backward)


def needs_grad(*tensors: Tensor) -> list[bool]:
    """For each tensor, whether autograd will want its gradient; decided here, as part of the call."""
    enabled = torch.is_grad_enabled()
    return [enabled and tensor.requires_grad for tensor in tensors]
