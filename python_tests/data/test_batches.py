"""Samplers, support draws and batches: what they hold, and that seeds alone determine them."""

import functools
import itertools
import operator
import pickle

import numpy as np
import pytest
import torch

from lcr2s_ext.data import (
    BatchAugment,
    CaptionTokenizer,
    IdentityBatchSampler,
    ImageStore,
    RandomBatchSampler,
    SampleBatch,
    TrainingDataset,
    load_dataset,
)


@pytest.fixture(scope="module")
def train(corpus):
    return load_dataset("cuhk-pedes", corpus)["train"]


@pytest.fixture(scope="module")
def store(train):
    return ImageStore(train.image_paths, (64, 32))


@pytest.fixture(scope="module")
def tokenizer(train):
    return CaptionTokenizer.train(train.captions)


@pytest.fixture
def dataset(train, store, tokenizer):
    def make(support="drawn", **options):
        return TrainingDataset(train, store, tokenizer, support=support, **{"max_support": 3, "seed": 7} | options)

    return make


def sets_of(index):
    bounds = index.indptr.tolist()
    return [index.indices[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def equal(a, b):
    def same(x, y):
        if x is None or y is None:
            return x is y
        if hasattr(x, "indptr"):
            return torch.equal(x.indptr, y.indptr) and torch.equal(x.indices, y.indices) and x.num_rows == y.num_rows
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def rows_of(pool, everything):
    """Position of each pool row among all rows; rows are told apart by their content."""
    known = {row.numpy().tobytes(): number for number, row in enumerate(everything)}
    assert len(known) == len(everything)
    return [known[row.numpy().tobytes()] for row in pool]


def test_random_sampler():
    sampler = RandomBatchSampler(10, 4, seed=1)
    assert len(sampler) == 2
    first = list(sampler)
    assert [(batch.epoch, batch.step) for batch in first] == [(0, 0), (0, 1)]
    assert len({sample for batch in first for sample in batch}) == 8
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(1, start=1)
    resumed = list(sampler)
    assert resumed == second[1:]
    assert resumed[0].step == 1
    assert list(sampler) == second
    whole = RandomBatchSampler(10, 4, seed=1, drop_last=False)
    assert [len(batch) for batch in whole] == [4, 4, 2]
    assert sorted(functools.reduce(operator.iadd, whole, [])) == list(range(10))
    assert list(RandomBatchSampler(10, 4, seed=2)) != first


def test_identity_sampler():
    # 9 identities of 1 to 9 images with two captions each.
    labels = np.repeat(np.arange(9), 2 * (1 + np.arange(9)))
    items = np.arange(len(labels)) // 2
    sampler = IdentityBatchSampler(torch.tensor(labels), 3, 4, items=torch.tensor(items), seed=5)
    seen = set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == (1 + sum((2 * size) // 4 for size in range(2, 10))) // 3
        assert all(len(batch) == 12 for batch in batches)
        for batch in batches[:-2]:
            groups = np.array(batch).reshape(3, 4)
            assert (labels[groups] == labels[groups][:, :1]).all()
            assert len(set(labels[groups][:, 0])) == 3
        for batch in batches:
            for group in np.array(batch).reshape(3, 4):
                size = labels[group[0]] + 1
                assert len(set(group)) == min(4, 2 * size)
                # Other images before the other captions of the same image: the first group of an identity has
                # as many images as there are, and no group fewer than half of K.
                assert len(set(items[group])) >= min(size, 2)
        seen |= {sample for batch in batches for sample in batch}
    assert seen == set(range(len(labels)))
    sampler.set_epoch(0)
    assert list(sampler) == list(IdentityBatchSampler(labels.tolist(), 3, 4, items=items.tolist(), seed=5))
    sampler.set_epoch(1)
    assert list(sampler) != list(IdentityBatchSampler(labels.tolist(), 3, 4, items=items.tolist(), seed=5))


def test_identity_sampler_takes_different_images_first():
    labels, items = np.repeat(np.arange(5), 8), np.arange(40) // 2
    for batch in IdentityBatchSampler(torch.tensor(labels), 5, 4, items=torch.tensor(items), seed=0):
        assert all(len(set(items[group])) == 4 for group in np.array(batch).reshape(5, 4))


def test_sampler_arguments():
    with pytest.raises(ValueError, match="batch_size must be at most num_samples=3 with drop_last, got 4"):
        RandomBatchSampler(3, 4)
    with pytest.raises(TypeError, match="batch_size must be an int"):
        RandomBatchSampler(3, 2.0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        RandomBatchSampler(3, 2, seed=-1)
    with pytest.raises(ValueError, match=r"p must be at most the number of identities \(2\), got 3"):
        IdentityBatchSampler([0, 0, 1], 3, 2)
    with pytest.raises(ValueError, match="items must have as many elements"):
        IdentityBatchSampler([0, 0, 1], 2, 2, items=[0])
    with pytest.raises(TypeError, match="labels must be int32 or int64"):
        IdentityBatchSampler([0.5], 1, 2)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        RandomBatchSampler(3, 2).set_epoch(-1)


def test_no_support(dataset, train, store):
    data = dataset("none")
    batch = data.make_batch([5, 0, 5], step=4, epoch=2)
    assert len(batch) == 3
    assert batch.image_support is None
    assert batch.text_support is None
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images, store.load(train.caption_image[[5, 0, 5]]))
    assert torch.equal(batch.tokens, data.tokens[[5, 0, 5]])
    assert batch.labels.tolist() == train.labels[[5, 0, 5]].tolist()
    assert batch.item_ids.tolist() == train.caption_image[[5, 0, 5]].tolist()
    assert batch.samples.tolist() == [5, 0, 5]
    assert (batch.epoch, batch.step) == (2, 4)


@pytest.mark.parametrize("max_support", [0, 1, 3, 100])
def test_drawn_support(dataset, train, store, max_support):
    data = dataset("drawn", max_support=max_support)
    samples = [*list(next(iter(RandomBatchSampler(len(train), 24, seed=3)))), 0, 1, 0]
    batch = data.make_batch(samples)
    images = rows_of(batch.images, store.all())
    assert images[: len(samples)] == train.caption_image[samples].tolist()
    extras = images[len(samples) :]
    assert len(set(extras)) == len(extras)
    assert not set(extras) & set(images[: len(samples)])
    assert torch.equal(batch.tokens[: len(samples)], data.tokens[samples])
    assert batch.image_support.num_rows == len(batch.images)
    assert batch.text_support.num_rows == len(batch.tokens)
    used = set()
    for row, (sample, support) in enumerate(zip(samples, sets_of(batch.image_support), strict=True)):
        assert support[0] == row
        drawn = [images[position] for position in support[1:]]
        own = int(train.caption_image[sample])
        others = set(torch.nonzero(train.image_ids == train.image_ids[own]).flatten().tolist()) - {own}
        assert len(drawn) == len(set(drawn)) == min(max_support, len(others))
        assert set(drawn) <= others
        used |= set(support)
    # No row is encoded in vain.
    assert used == set(range(len(images)))


def test_drawn_captions(dataset, train):
    data = dataset("drawn", max_support=4)
    # Captions by their number instead of their words, which may be the same twice.
    data.tokens = torch.arange(len(train))[:, None]
    samples = list(range(0, len(train), 3))
    batch = data.make_batch(samples)
    pool = batch.tokens[:, 0].tolist()
    assert len(set(pool)) == len(pool)
    for row, (sample, support) in enumerate(zip(samples, sets_of(batch.text_support), strict=True)):
        assert support[0] == row
        drawn = [pool[position] for position in support[1:]]
        others = set(torch.nonzero(train.caption_ids == train.caption_ids[sample]).flatten().tolist()) - {sample}
        assert len(drawn) == len(set(drawn)) == min(4, len(others))
        assert set(drawn) <= others


def test_single_image_identities_have_an_empty_image_support(dataset, train):
    counts = torch.bincount(train.image_labels)
    sample = int(torch.nonzero(counts[train.labels] == 1)[0])
    batch = dataset("drawn").make_batch([sample])
    assert sets_of(batch.image_support) == [[0]]
    # Its other caption is still there.
    assert sets_of(batch.text_support) == [[0, 1]]


def test_support_from_the_batch(dataset, train):
    data = dataset("batch", max_support=2)
    sampler = IdentityBatchSampler(train.labels, 4, 6, items=train.caption_image, seed=2)
    for samples in sampler:
        batch = data.make_batch(samples)
        assert batch.images.shape[0] == batch.tokens.shape[0] == len(samples) == 24
        items = batch.item_ids.tolist()
        for support, keys in ((batch.image_support, items), (batch.text_support, list(samples))):
            for row, chosen in enumerate(sets_of(support)):
                assert chosen[0] == row
                members = [keys[position] for position in chosen]
                assert len(set(members)) == len(members)
                available = {keys[r] for r in range(24) if batch.labels[r] == batch.labels[row]} - {keys[row]}
                assert len(members) - 1 == min(2, len(available))
                assert set(members[1:]) <= available


@pytest.mark.parametrize("support", ["drawn", "batch"])
def test_draws_do_not_depend_on_the_company(dataset, train, store, support):
    """The same sample draws the same support in another batch, order, process and after a resume."""
    data = dataset(support, max_support=1)
    if support == "drawn":
        drawn = []
        for samples in ([4, 40, 17], [17, 4], [4]):
            batch = data.make_batch(samples, epoch=3)
            images = rows_of(batch.images, store.all())
            drawn.append([images[position] for position in sets_of(batch.image_support)[samples.index(4)]])
        assert drawn[0] == drawn[1] == drawn[2]
    samples = list(range(60))
    again = pickle.loads(pickle.dumps(data))
    assert equal(data.make_batch(samples, epoch=3), again.make_batch(samples, epoch=3))
    other_epoch, other_seed = (
        data.make_batch(samples, epoch=4),
        dataset(support, max_support=1, seed=8).make_batch(samples, epoch=3),
    )
    now = data.make_batch(samples, epoch=3)
    for other in (other_epoch, other_seed):
        assert sets_of(now.image_support) != sets_of(other.image_support) or not torch.equal(now.images, other.images)


def test_workers_and_resuming_change_nothing(dataset, train):
    data = dataset("drawn", max_support=2)
    sampler = RandomBatchSampler(len(train), 16, seed=9)
    sampler.set_epoch(5)
    here = list(data.loader(sampler))
    sampler.set_epoch(5, start=2)
    there = list(data.loader(sampler, num_workers=2))
    assert [batch.step for batch in here] == list(range(5))
    assert [batch.step for batch in there] == [2, 3, 4]
    assert all(batch.epoch == 5 for batch in here + there)
    assert all(equal(a, b) for a, b in zip(here[2:], there, strict=True))


def test_set_epoch_reaches_plain_lists(dataset):
    data = dataset("drawn")
    data.set_epoch(6)
    assert equal(data.make_batch([1, 2, 3]), data.make_batch(SampleBatch([1, 2, 3], 6, 0)))
    assert data[3].samples.tolist() == [3]
    assert data[3].epoch == 6


def test_moving_a_batch(dataset):
    batch = dataset("drawn").make_batch([0, 9])
    moved = batch.to("meta")
    assert moved.images.device.type == moved.text_support.indptr.device.type == "meta"
    assert (moved.epoch, moved.step) == (batch.epoch, batch.step)
    assert batch.images.device.type == "cpu"


def test_dataset_arguments(train, store, tokenizer, dataset):
    with pytest.raises(ValueError, match="support must be one of none, drawn, batch, got 'some'"):
        TrainingDataset(train, store, tokenizer, support="some")
    with pytest.raises(ValueError, match="max_support must not be negative, got -1"):
        dataset(max_support=-1)
    with pytest.raises(TypeError, match="seed must be an int"):
        dataset(seed=None)
    with pytest.raises(ValueError, match="store must hold the split's 47 images, it holds 0"):
        TrainingDataset(train, ImageStore([], (64, 32)), tokenizer)
    with pytest.raises(IndexError, match=r"samples must lie in \[0, 94\), got 94"):
        dataset().make_batch([94])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("support", ["none", "drawn", "batch"])
@pytest.mark.parametrize("kind", ["random", "identity"])
def test_parts_of_a_batch_are_the_whole(train, dataset, kind, support, ranks):
    made = dataset(support)
    augment = BatchAugment((64, 32), erasing=0.5).train()

    def sampler(rank=0, ranks=1):
        found = (
            RandomBatchSampler(len(made), 16, seed=3)
            if kind == "random"
            else IdentityBatchSampler(train.labels, 4, 3, items=train.caption_image, seed=3)
        )
        found.share(rank, ranks)
        return found

    parts = [[made.make_batch(samples) for samples in sampler(rank, ranks)] for rank in range(ranks)]
    for step, samples in enumerate(sampler()):
        whole = made.make_batch(samples)
        own = [part[step] for part in parts]
        assert torch.cat([part.samples for part in own]).tolist() == list(samples)
        assert torch.equal(torch.cat([part.labels for part in own]), whole.labels)
        if kind == "identity" and step == 0:
            assert all(len(part.labels.unique()) == 4 // ranks for part in own)
        images, row = augment(whole.images, 5), 0
        for part in own:
            augmented = augment(part.images, 5, rows=part.image_rows, total=part.whole_images)
            assert torch.equal(augmented, images[part.image_rows])
            assert torch.equal(part.tokens[: len(part)], whole.tokens[row : row + len(part)])
            for name, pool, of_all in (("image", augmented, images), ("text", part.tokens, whole.tokens)):
                if support != "none":
                    sets = sets_of(getattr(part, f"{name}_support"))
                    wanted = sets_of(getattr(whole, f"{name}_support"))[row : row + len(part)]
                    assert all(torch.equal(pool[a], of_all[b]) for a, b in zip(sets, wanted, strict=True))
            row += len(part)


def test_parts_must_be_equal(train):
    with pytest.raises(ValueError, match="ranks must divide batches of 10 samples, got 4"):
        RandomBatchSampler(40, 10).share(0, 4)
    with pytest.raises(ValueError, match="ranks must divide batches of 4 identities, got 3"):
        IdentityBatchSampler(train.labels, 4, 3).share(0, 3)
    with pytest.raises(ValueError, match="ranks must be 1 without drop_last"):
        RandomBatchSampler(40, 10, drop_last=False).share(0, 2)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        RandomBatchSampler(40, 10).share(2, 2)
