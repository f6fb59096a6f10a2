"""One problem for every operator, small by default."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcr2s_ext import ops


class Problem:
    """An operator with inputs for it, which can be moved, cast and run on any backend."""

    def __init__(self, name: str, features: list[Tensor], call: Callable[..., Tensor], extra: list[Any]) -> None:
        self.name = name
        self.features = features
        self._call = call
        self._extra = extra

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        return [tensor.to(device, dtype) for tensor in self.features]

    def extra(self, device: str) -> list[Any]:
        return [value.to(device) for value in self._extra]

    def run(self, inputs: list[Tensor], extra: list[Any], backend: str) -> list[Tensor]:
        """The value and the gradient of every floating input."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        value = self._call(*leaves, *extra, backend=backend)
        if not value.requires_grad:
            return [value]
        # A fixed upstream gradient; a vector of ones would hide rows that were mixed up.
        weights = torch.linspace(0.5, 1.5, value.numel(), device=value.device).reshape(value.shape).to(value.dtype)
        return [value.detach(), *torch.autograd.grad(value, leaves, weights, allow_unused=True, materialize_grads=True)]


def problems(rows: int = 150, columns: int = 201, width: int = 72) -> list[Problem]:
    """Every differentiable operator, and top-k, on shapes that are no multiples of a tile."""
    generator = torch.Generator().manual_seed(7)

    def features(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator, dtype=torch.float64)

    image, text = features(rows, width), features(columns, width)
    teacher = [features(rows, width + 8), features(columns, width + 8)]
    ids = [torch.randint(0, rows // 4, (n,), generator=generator) for n in (rows, columns)]
    heads = [torch.randn(n, 4, 24, generator=generator, dtype=torch.float64) for n in (rows, columns, columns)]
    sizes = torch.randint(0, 9, (rows,), generator=generator)
    sizes[3] = 100
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    members = torch.randint(0, columns, (int(indptr[-1]),), generator=generator)
    members[: len(members) // 2] %= 3  # a few rows with many users
    index = ops.SupportIndex(indptr, members, columns)
    scale = torch.tensor(30.0, dtype=torch.float64)
    return [
        Problem("support_attention", heads, ops.support_attention, [index]),
        Problem(
            "info_nce",
            [image, text, scale],
            lambda v, t, s, a, b, backend: ops.info_nce_loss(v, t, a, b, logit_scale=s, backend=backend),
            ids,
        ),
        Problem(
            "sdm",
            [image, text, scale],
            lambda v, t, s, a, b, backend: ops.sdm_loss(v, t, a, b, logit_scale=s, backend=backend),
            ids,
        ),
        Problem("cmpm", [image, text], ops.cmpm_loss, ids),
        Problem("tal", [image, text], ops.tal_loss, ids),
        Problem("relation_frobenius", [image, text, *teacher], ops.relation_frobenius_loss, []),
        Problem(
            "relation_kl",
            [image, text, *teacher, scale],
            lambda v, t, e, f, s, backend: ops.relation_kl_loss(
                v, t, e, f, student_scale=s, teacher_scale=20.0, backend=backend
            ),
            [],
        ),
        Problem(
            "topk_similarity",
            [image, text],
            lambda v, t, backend: ops.topk_similarity(v.detach(), t.detach(), 7, backend=backend)[0],
            [],
        ),
    ]
