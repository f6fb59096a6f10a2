"""k-reciprocal re-ranking against a dense version written from the paper."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lcr2s_ext import ops
from lcr2s_ext.retrieval import KReciprocal, Rerank, RetrievalFeatures, evaluate_features, rerank


def dense(query: Tensor, gallery: Tensor, options: Rerank) -> Tensor:
    """Zhong et al., CVPR 2017, equations 3 to 12, with sets and an N x N matrix, in float64."""
    q, g = (torch.nn.functional.normalize(x.double(), dim=1) for x in (query, gallery))
    blocks = {("q", "q"): q @ q.T, ("q", "g"): q @ g.T, ("g", "g"): g @ g.T}
    if options.standardize:
        across = blocks["q", "g"]
        for own in (("q", "q"), ("g", "g")):
            off = blocks[own][~torch.eye(len(blocks[own]), dtype=torch.bool)]
            spread = across.std(correction=0) / off.std(correction=0)
            blocks[own] = across.mean() + (blocks[own] - off.mean()) * spread
    similarity = torch.cat(
        [torch.cat([blocks["q", "q"], blocks["q", "g"]], 1), torch.cat([blocks["q", "g"].T, blocks["g", "g"]], 1)]
    )
    distance = (1 - similarity).clamp(min=0).fill_diagonal_(0)
    similarity.fill_diagonal_(torch.inf)
    order = torch.sort(similarity, dim=1, descending=True, stable=True).indices.tolist()
    everyone = range(len(order))

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    encoding = torch.zeros_like(distance)
    for i in everyone:
        core = reciprocal(i, options.k1)
        grown = set(core)
        for j in core:
            other = reciprocal(j, round(options.k1 / 2))
            if len(core & other) >= 2 / 3 * len(other) - 1e-9:
                grown |= other
        members = sorted(grown)
        weights = torch.exp(-distance[i, members])
        encoding[i, members] = weights / weights.sum()
    encoding = torch.stack([encoding[order[i][: options.k2]].mean(0) for i in everyone])
    count = len(q)
    low = torch.minimum(encoding[:count, None], encoding[None, count:]).sum(2)
    high = torch.maximum(encoding[:count, None], encoding[None, count:]).sum(2)
    return (1 - options.weight) * (1 - low / high) + options.weight * (1 - q @ g.T)


def features(
    seed: int, queries: int = 37, gallery: int = 26, gap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(9, 12, generator=generator)
    query_ids = torch.arange(queries) % 9
    gallery_ids = torch.arange(gallery) % 9
    query = centres[query_ids] + torch.randn(queries, 12, generator=generator)
    images = centres[gallery_ids] + torch.randn(gallery, 12, generator=generator)
    shift = torch.randn(12, generator=generator)
    return query + gap * shift, images - gap * shift, query_ids, gallery_ids


@pytest.mark.parametrize("block", [1, 500, 1 << 21])
@pytest.mark.parametrize(
    "options",
    [Rerank(7, 3, 0.3, standardize=False), Rerank(5, 1, 0.6), Rerank(6, 4, 0.0), Rerank(200, 9, 0.5)],
    ids=Rerank.describe,
)
def test_equals_the_dense_version(options: Rerank, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "_BLOCK", block)
    query, gallery, query_ids, gallery_ids = features(1)
    expected = dense(query, gallery, options)
    made = KReciprocal(query.double(), gallery.double(), options)
    torch.testing.assert_close(torch.cat(list(made.distances())), expected, rtol=0, atol=1e-12)
    single = KReciprocal(query, gallery, options)
    torch.testing.assert_close(torch.cat(list(single.distances())).double(), expected, rtol=0, atol=1e-5)
    # The other direction reads the same encoding: only the original distance and the Jaccard are transposed.
    torch.testing.assert_close(torch.cat(list(made.distances(reverse=True))), expected.T, rtol=0, atol=1e-12)
    ranking = gallery_ids[torch.sort(expected, dim=1, stable=True).indices]
    first = (ranking[:, 0] == query_ids).double().mean()
    assert made.metrics(query_ids, gallery_ids)["R@1"] == pytest.approx(float(first))


def test_weight_one_leaves_the_ranking_and_any_order_of_rows_gives_the_same_distances() -> None:
    query, gallery, query_ids, gallery_ids = features(2)
    plain = ops.retrieval_metrics(query, gallery, query_ids, gallery_ids)
    assert KReciprocal(query, gallery, Rerank(5, 2, 1.0)).metrics(query_ids, gallery_ids) == pytest.approx(plain)
    options = Rerank(6, 3, 0.2)
    generator = torch.Generator().manual_seed(3)
    rows, columns = torch.randperm(len(query), generator=generator), torch.randperm(len(gallery), generator=generator)
    straight = torch.cat(list(KReciprocal(query.double(), gallery.double(), options).distances()))
    mixed = torch.cat(list(KReciprocal(query[rows].double(), gallery[columns].double(), options).distances()))
    torch.testing.assert_close(mixed, straight[rows][:, columns], rtol=0, atol=1e-12)


def test_it_helps_where_neighbours_agree_and_survives_a_gap_between_the_sets() -> None:
    query, gallery, query_ids, gallery_ids = features(4, 90, 90)
    plain = ops.retrieval_metrics(query, gallery, query_ids, gallery_ids)["mAP"]
    assert KReciprocal(query, gallery, Rerank(9, 3)).metrics(query_ids, gallery_ids)["mAP"] > plain + 0.02
    query, gallery, query_ids, gallery_ids = features(4, 90, 90, gap=3.0)
    # The published method sees texts near texts only: no image shares anything with a query.
    apart = torch.cat(list(KReciprocal(query, gallery, Rerank(9, 3, 0.0, standardize=False)).distances()))
    assert bool((apart == 1).all())
    met = torch.cat(list(KReciprocal(query, gallery, Rerank(9, 3, 0.0)).distances()))
    own = query_ids[:, None] == gallery_ids
    assert met[own].mean() < met[~own].mean() - 0.05


def test_equal_rows_and_small_sets() -> None:
    query = torch.ones(4, 3, dtype=torch.float64)
    distances = torch.cat(list(KReciprocal(query, torch.ones(30, 3, dtype=torch.float64), Rerank(3, 2)).distances()))
    assert distances.shape == (4, 30)
    assert bool(((distances >= 0) & (distances <= 1)).all())
    one = torch.cat(list(KReciprocal(torch.eye(3)[:1], torch.eye(3)[1:2]).distances()))
    assert one.shape == (1, 1)


def test_evaluation_labels_what_is_re_ranked() -> None:
    query, gallery, query_ids, gallery_ids = features(5)
    of = RetrievalFeatures(gallery, query, gallery_ids, query_ids, torch.arange(len(gallery)))
    plain, both = evaluate_features(of), evaluate_features(of, rerank=Rerank(6, 2))
    assert set(both) == {"text_to_image", "image_to_text", "text_to_image_reranked", "image_to_text_reranked"}
    assert {name: both[name] for name in plain} == plain
    encoding = KReciprocal(query, gallery, Rerank(6, 2))
    assert both["image_to_text_reranked"] == encoding.metrics(query_ids, gallery_ids, reverse=True)
    with pytest.raises(ValueError, match="expected \\(37, 26\\) identities"):
        encoding.metrics(gallery_ids, query_ids)


@pytest.mark.parametrize("bad", [{"k1": 0}, {"k2": True}, {"weight": 1.5}])
def test_refuses_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(Rerank(), **bad)
