"""Ranking beside what PyTorch offers, in one run: argsort of the score matrix, torch.compile, topk, kernel.

    python benchmarks/retrieval.py --queries 6156 --gallery 3074 --compile --csv results.csv

The default sizes are those of CUHK-PEDES' test split, text to image. Every candidate's metrics and scores are checked
against float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from side_by_side import DTYPES, Candidate, Settings, Work, checked, compare, our_backends, parse_arguments, report
from torch import Tensor
from torch.nn.functional import normalize

from lcr2s_ext.ops import retrieval_metrics, topk_similarity

Metrics = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]


def argsort_form(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor]:
    """R@1, R@5, R@10, mAP and mINP the way re-identification repositories compute them: sort, gather, cumulate."""
    order = torch.argsort(normalize(query, dim=1) @ normalize(gallery, dim=1).T, dim=1, descending=True)
    hits = gallery_ids[order] == query_ids[:, None]
    hits = hits[hits.any(1)]
    found = hits.cumsum(1)
    recalls = [(found[:, k - 1] > 0).double().mean() for k in (1, 5, 10)]
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    count = found[:, -1]
    precision = (found / rank * hits).sum(1) / count
    last = (hits * rank).amax(1)
    return [*recalls, precision.double().mean(), (count / last).double().mean()]


def our_form(backend: str) -> Metrics:
    def form(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor]:
        metrics = retrieval_metrics(query, gallery, query_ids, gallery_ids, backend=backend)
        keys = ("R@1", "R@5", "R@10", "mAP", "mINP")
        return [torch.tensor(metrics[key], dtype=torch.float64, device=query.device) for key in keys]

    return form


def measure_metrics(
    query: Tensor, gallery: Tensor, ids: tuple[Tensor, Tensor], dtype: str, settings: Settings
) -> list[dict[str, object]]:
    forms: dict[str, Metrics | str] = {"argsort": argsort_form}
    if settings.compile:
        forms["argsort, compiled"] = torch.compile(argsort_form)
    for backend, reason in our_backends("retrieval_metrics", settings.device).items():
        forms[f"lcr2s_ext {backend}"] = reason or our_form(backend)
    exact = argsort_form(query.double(), gallery.double(), *ids)
    found: dict[str, Candidate | str] = {
        name: form if isinstance(form, str) else (lambda form=form: form(query, gallery, *ids))
        for name, form in forms.items()
    }
    # A pair of scores closer than the dtype's rounding may swap.
    found = checked(found, exact, 2e-3 if dtype == "float32" else 2e-2, "metrics")
    # What every ranking pays for at least.
    found["the product alone"] = lambda: [query @ gallery.T]
    return compare(found, settings, dtype, Work(flops=2 * query.shape[0] * gallery.numel()))


def measure_topk(query: Tensor, gallery: Tensor, dtype: str, args: argparse.Namespace) -> list[dict[str, object]]:
    settings: Settings = args.settings

    def eager(query: Tensor, gallery: Tensor) -> Tensor:
        return (normalize(query, dim=1) @ normalize(gallery, dim=1).T).topk(args.k).values

    exact = [eager(query.double(), gallery.double())]
    forms: dict[str, Callable[[Tensor, Tensor], Tensor] | str] = {"product + topk": eager}
    if settings.compile:
        forms["product + topk, compiled"] = torch.compile(eager)
    for backend, reason in our_backends("topk_similarity", settings.device).items():
        forms[f"lcr2s_ext {backend}"] = reason or (
            lambda q, g, backend=backend: topk_similarity(q, g, args.k, backend=backend)[0]
        )
    found: dict[str, Candidate | str] = {
        name: form if isinstance(form, str) else (lambda form=form: [form(query, gallery)])
        for name, form in forms.items()
    }
    found = checked(found, exact, 1e-5 if dtype == "float32" else 1e-2, "top-k")
    return compare(found, settings, dtype, Work(flops=2 * query.shape[0] * gallery.numel()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=["metrics", "topk"], nargs="+", default=["metrics", "topk"])
    parser.add_argument("--queries", type=int, default=6156)
    parser.add_argument("--gallery", type=int, default=3074)
    parser.add_argument("--identities", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    args = parse_arguments(parser, arguments)
    settings: Settings = args.settings
    generator = torch.Generator().manual_seed(0)
    query_ids = torch.arange(args.queries) * args.identities // args.queries
    gallery_ids = torch.arange(args.gallery) * args.identities // args.gallery
    centres = torch.randn(args.identities, args.width, generator=generator)
    features = [centres[i] + 4 * torch.randn(len(i), args.width, generator=generator) for i in (query_ids, gallery_ids)]
    ids = (query_ids.to(settings.device), gallery_ids.to(settings.device))
    title = f"{args.queries} x {args.gallery}, d = {args.width}"
    shape = {"part": "forward", "rows": args.queries, "columns": args.gallery, "width": args.width}
    for dtype in args.dtype:
        query, gallery = (x.to(settings.device, getattr(torch, dtype)) for x in features)
        if "metrics" in args.op:
            rows = measure_metrics(query, gallery, ids, dtype, settings)
            named = [{"op": "retrieval_metrics", **shape, "dtype": dtype, **row} for row in rows]
            report(f"metrics: {title}, {dtype}", named, settings)
        if "topk" in args.op:
            rows = measure_topk(query, gallery, dtype, args)
            named = [
                {"op": "topk_similarity", **shape, "detail": f"k = {args.k}", "dtype": dtype, **row} for row in rows
            ]
            report(f"top-{args.k}: {title}, {dtype}", named, settings)


if __name__ == "__main__":
    main()
