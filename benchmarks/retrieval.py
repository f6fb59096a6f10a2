"""Ranking beside other ways to compute it, in one run: argsort of the score matrix, torch.compile, peers, our kernels.

    python benchmarks/retrieval.py --queries 6156 --gallery 3074 --compile --csv results.csv

The default sizes are those of CUHK-PEDES' test split, text to image. Every candidate's metrics and scores are checked
against float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from peers import METRICS, TOP_K, forms, ranked_metrics
from problem import Form, Part, Problem, add_arguments, chosen, our_forms, providers, run
from side_by_side import DTYPES, Candidate, Work, parse_arguments
from torch import Tensor
from torch.nn.functional import normalize

from lcr2s_ext.ops import retrieval_metrics, topk_similarity

Metrics = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]


def scores(query: Tensor, gallery: Tensor) -> Tensor:
    return normalize(query, dim=1) @ normalize(gallery, dim=1).T


def argsort_form(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor]:
    """R@1, R@5, R@10, mAP and mINP the way re-identification repositories compute them: sort, gather, cumulate."""
    return ranked_metrics(scores(query, gallery).argsort(dim=1, descending=True), query_ids, gallery_ids)


def our_metrics(backend: str) -> Metrics:
    def form(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> list[Tensor]:
        metrics = retrieval_metrics(query, gallery, query_ids, gallery_ids, backend=backend)
        keys = ("R@1", "R@5", "R@10", "mAP", "mINP")
        return [torch.tensor(metrics[key], dtype=torch.float64, device=query.device) for key in keys]

    return form


def described(op: str, query: Tensor, gallery: Tensor, dtype: str, detail: str = "") -> tuple[str, dict[str, object]]:
    """Title and columns of the results file."""
    shape: dict[str, object] = {"op": op, "rows": len(query), "columns": len(gallery), "width": query.shape[1]}
    shape |= {"detail": detail, "dtype": dtype}
    return f"{op}: {len(query)} x {len(gallery)}, d = {query.shape[1]}, {detail and detail + ', '}{dtype}", shape


def setup_metrics(query: Tensor, gallery: Tensor, ids: tuple[Tensor, Tensor], dtype: str, wanted: set[str]) -> Problem:
    """Metrics of the gallery's ranking; `ids` are the identities of query and gallery."""
    found = {"argsort": Form("eager", argsort_form)}
    found |= our_forms("retrieval_metrics", query.device, our_metrics)
    if "peers" in wanted:
        found |= forms(METRICS, query.device, dtype)

    def product(query: Tensor, gallery: Tensor, *_: Tensor) -> list[None]:
        torch.mm(query, gallery.T)
        return [None] * 5

    measured = chosen(found, wanted)
    if "eager" in wanted:
        measured["the product alone"] = Form("eager", product, "no metric: what every ranking pays for at least")
    exact = argsort_form(query.double(), gallery.double(), *ids)
    work = Work(flops=2 * len(query) * gallery.numel())
    title, shape = described("retrieval_metrics", query, gallery, dtype)
    # A pair of scores closer than the dtype's rounding may swap.
    tolerance = 2e-3 if dtype == "float32" else 2e-2

    def candidate(form: Callable[..., list[Tensor]]) -> Candidate:
        return lambda: form(query, gallery, *ids)

    return Problem(title, shape, tolerance, measured, {"forward": Part(candidate, exact, work)})


def setup_topk(query: Tensor, gallery: Tensor, k: int, dtype: str, wanted: set[str]) -> Problem:
    """Scores of the k nearest gallery rows."""

    def eager(query: Tensor, gallery: Tensor) -> Tensor:
        return scores(query, gallery).topk(k).values

    def ours(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, g: topk_similarity(q, g, k, backend=backend)[0]

    found = {"product + topk": Form("eager", eager)}
    found |= our_forms("topk_similarity", query.device, ours)
    if "peers" in wanted:
        found |= forms(TOP_K, query.device, dtype, k)
    exact = [eager(query.double(), gallery.double())]
    work = Work(flops=2 * len(query) * gallery.numel())
    title, shape = described("topk_similarity", query, gallery, dtype, f"k = {k}")

    def candidate(form: Callable[..., Tensor]) -> Candidate:
        return lambda: [form(query, gallery)]

    tolerance = 1e-5 if dtype == "float32" else 1e-2
    return Problem(title, shape, tolerance, chosen(found, wanted), {"forward": Part(candidate, exact, work)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=["metrics", "topk"], nargs="+", default=["metrics", "topk"])
    parser.add_argument("--queries", type=int, nargs="+", default=[6156])
    parser.add_argument("--gallery", type=int, nargs="+", default=[3074])
    parser.add_argument("--identities", type=int, default=1000)
    parser.add_argument("--width", type=int, nargs="+", default=[512])
    parser.add_argument("--k", type=int, nargs="+", default=[10])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    add_arguments(parser)
    args = parse_arguments(parser, arguments)
    wanted, device = providers(args), args.settings.device
    for dtype, width, rows, columns in itertools.product(args.dtype, args.width, args.queries, args.gallery):
        generator = torch.Generator().manual_seed(0)
        ids = [torch.arange(count) * args.identities // count for count in (rows, columns)]
        centres = torch.randn(args.identities, width, generator=generator)
        query, gallery = (
            (centres[own] + 4 * torch.randn(len(own), width, generator=generator)).to(device, getattr(torch, dtype))
            for own in ids
        )
        if "metrics" in args.op:
            query_ids, gallery_ids = (own.to(device) for own in ids)
            run(setup_metrics(query, gallery, (query_ids, gallery_ids), dtype, wanted), args.settings)
        if "topk" in args.op:
            for k in args.k:
                run(setup_topk(query, gallery, k, dtype, wanted), args.settings)


if __name__ == "__main__":
    main()
