"""Ranking beside what PyTorch offers, in one run: argsort of the score matrix, torch.compile, topk, kernel.

    python benchmarks/retrieval.py --queries 6156 --gallery 3074 --compile --csv results.csv

The default sizes are those of CUHK-PEDES' test split, text to image. Every candidate's metrics and scores are checked
against float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side import Candidate, compare, parse_arguments, report, verify
from torch import Tensor
from torch.nn.functional import normalize

from lcr2s_ext.ops import retrieval_metrics, topk_similarity

Metrics = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]
KERNEL = "lcr2s_ext cpu"


def argsort_form(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor]:
    """R@1, R@5, R@10, mAP and mINP the way re-identification repositories compute them: sort, gather, cumulate."""
    order = torch.argsort(normalize(query, dim=1) @ normalize(gallery, dim=1).T, dim=1, descending=True)
    hits = gallery_ids[order] == query_ids[:, None]
    hits = hits[hits.any(1)]
    found = hits.cumsum(1)
    recalls = [(found[:, k - 1] > 0).double().mean() for k in (1, 5, 10)]
    rank = torch.arange(1, hits.shape[1] + 1)
    count = found[:, -1]
    precision = (found / rank * hits).sum(1) / count
    last = (hits * rank).amax(1)
    return [*recalls, precision.double().mean(), (count / last).double().mean()]


def kernel_form(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor]:
    metrics = retrieval_metrics(query, gallery, query_ids, gallery_ids, backend="cpu")
    return [torch.tensor(metrics[key], dtype=torch.float64) for key in ("R@1", "R@5", "R@10", "mAP", "mINP")]


def measure_metrics(
    query: Tensor, gallery: Tensor, ids: tuple[Tensor, Tensor], args: argparse.Namespace
) -> list[dict[str, object]]:
    forms: dict[str, Metrics] = {"argsort": argsort_form}
    if args.compile:
        forms["argsort, compiled"] = torch.compile(argsort_form)
    forms[KERNEL] = kernel_form
    exact = argsort_form(query.double(), gallery.double(), *ids)
    candidates: dict[str, Candidate] = {}
    for name, form in forms.items():
        candidates[name] = lambda form=form: form(query, gallery, *ids)
        # A pair of scores closer than float32's rounding may swap.
        verify(f"metrics, {name}", candidates[name](), exact, 2e-3)
    # What every ranking pays for at least.
    candidates["the product alone"] = lambda: [query @ gallery.T]
    return compare(candidates, KERNEL, args.rounds)


def measure_topk(query: Tensor, gallery: Tensor, args: argparse.Namespace) -> list[dict[str, object]]:
    def eager(query: Tensor, gallery: Tensor) -> Tensor:
        return (normalize(query, dim=1) @ normalize(gallery, dim=1).T).topk(args.k).values

    exact = [eager(query.double(), gallery.double())]
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"product + topk": eager}
    if args.compile:
        forms["product + topk, compiled"] = torch.compile(eager)
    forms[KERNEL] = lambda q, g: topk_similarity(q, g, args.k, backend="cpu")[0]
    candidates: dict[str, Candidate] = {}
    for name, form in forms.items():
        candidates[name] = lambda form=form: [form(query, gallery)]
        verify(f"top-k, {name}", candidates[name](), exact, 1e-5)
    return compare(candidates, KERNEL, args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=6156)
    parser.add_argument("--gallery", type=int, default=3074)
    parser.add_argument("--identities", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    args = parse_arguments(parser)
    generator = torch.Generator().manual_seed(0)
    query_ids = torch.arange(args.queries) * args.identities // args.queries
    gallery_ids = torch.arange(args.gallery) * args.identities // args.gallery
    centres = torch.randn(args.identities, args.width, generator=generator)
    query, gallery = (
        centres[i] + 4 * torch.randn(len(i), args.width, generator=generator) for i in (query_ids, gallery_ids)
    )
    title = f"{args.queries} x {args.gallery}, d = {args.width}"
    shape = {"queries": args.queries, "gallery": args.gallery, "width": args.width}
    for op, rows in (
        ("retrieval_metrics", measure_metrics(query, gallery, (query_ids, gallery_ids), args)),
        ("topk_similarity", measure_topk(query, gallery, args)),
    ):
        named = [{"op": op, **shape, **row} for row in rows]
        report(f"{op}: {title}" + (f", k = {args.k}" if op.startswith("topk") else ""), named, args.csv)


if __name__ == "__main__":
    main()
