"""Evaluation of a split: galleries without duplicates, both directions, the oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcr2s_ext import ops
from lcr2s_ext.nn import SupportSetFusion
from lcr2s_ext.retrieval import embed_split, evaluate_features, evaluate_model, evaluate_oracle


@dataclass
class Split:
    image_paths: list[str]
    image_ids: Tensor
    captions: list[str]
    caption_image: Tensor
    caption_ids: Tensor


class Store:
    """Image i is a constant picture of brightness i."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def load(self, indices: Any) -> Tensor:
        self.loaded += torch.as_tensor(indices).tolist()
        return torch.as_tensor(indices).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 2)


class Model(nn.Module):
    """Features are rows of fixed tables: of the image's brightness, and of the number in the caption."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        super().__init__()
        self.images, self.texts = images, texts
        self.modes: list[bool] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.images[images[:, 0, 0, 0].long()]

    def encode_text(self, captions: Any) -> Tensor:
        rows = captions[:, 0] if isinstance(captions, Tensor) else torch.tensor([int(c) for c in captions])
        return self.texts[rows]


@pytest.fixture
def split() -> Split:
    # Image 2 is the same file as image 0; identity 9 has a caption but no image.
    return Split(
        ["a", "b", "a", "c", "d"],
        torch.tensor([5, 6, 5, 7, 6]),
        [str(number) for number in range(7)],
        torch.tensor([0, 0, 1, 3, 4, 2, 3]),
        torch.tensor([5, 5, 6, 7, 6, 5, 9]),
    )


@pytest.fixture
def model() -> Model:
    generator = torch.Generator().manual_seed(0)
    return Model(torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_image_enters_the_gallery_once(split: Split, model: Model, batch_size: int) -> None:
    store = Store()
    features = embed_split(model.encode_image, model.encode_text, split, store, batch_size=batch_size)
    assert store.loaded == features.image_rows.tolist() == [0, 1, 3, 4]
    assert features.image_ids.tolist() == [5, 6, 7, 6]
    torch.testing.assert_close(features.image, model.images[[0, 1, 3, 4]])
    torch.testing.assert_close(features.text, model.texts)


def test_both_directions_and_eval_mode(split: Split, model: Model) -> None:
    model.train()
    metrics = evaluate_model(model, split, Store(), batch_size=2)
    assert not any(model.modes)
    assert model.training
    gallery, gallery_ids = model.images[[0, 1, 3, 4]], split.image_ids[[0, 1, 3, 4]]
    forth = ops.retrieval_metrics(model.texts, gallery, split.caption_ids, gallery_ids)
    back = ops.retrieval_metrics(gallery, model.texts, gallery_ids, split.caption_ids)
    assert metrics == {"text_to_image": forth, "image_to_text": back}
    assert forth["queries_without_positive"] == 1


def test_tokens_given_are_not_made_again(split: Split, model: Model) -> None:
    tokens = torch.arange(7)[:, None]
    with_tokens = evaluate_model(model, split, Store(), tokens=tokens)
    assert with_tokens == evaluate_model(model, split, Store())


def test_a_split_without_captions_is_refused(split: Split, model: Model) -> None:
    split.captions = []
    with pytest.raises(ValueError, match="split: expected at least one caption"):
        embed_split(model.encode_image, model.encode_text, split, Store())


def test_oracle_fuses_identities_and_no_support_leaves_rows_alone(split: Split, model: Model) -> None:
    features = embed_split(model.encode_image, model.encode_text, split, Store())
    fusions: tuple[nn.Module, nn.Module] = (SupportSetFusion(8, 2).eval(), SupportSetFusion(8, 2).eval())
    calls: list[Callable[[], Any]] = [
        lambda: evaluate_oracle(fusions, features, max_support=0),
        lambda: evaluate_oracle(fusions, features, max_support=3),
    ]
    alone, oracle = (call() for call in calls)
    with torch.no_grad():
        features.image, features.text = fusions[0](features.image, None), fusions[1](features.text, None)
    assert alone == evaluate_features(features)
    assert oracle["text_to_image"]["queries"] == alone["text_to_image"]["queries"]
    assert oracle != alone
