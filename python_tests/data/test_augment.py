"""Augmentation of whole batches."""

import pytest
import torch

from lcr2s_ext.data import BatchAugment

SIZE = (16, 8)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture
def images():
    return torch.randint(0, 256, (12, 3, *SIZE), dtype=torch.uint8)


def test_eval_normalises_only(images):
    augment = BatchAugment(SIZE, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), erasing=1.0).eval()
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    expected = (images.float() / 255 - mean) / std
    torch.testing.assert_close(augment(images, 3), expected)
    torch.testing.assert_close(augment.train().normalize(images), expected)


def test_the_seed_determines_the_result(images):
    augment = BatchAugment(SIZE, erasing=0.5, brightness=0.1, contrast=0.2)
    before = images.clone()
    state = torch.get_rng_state()
    first = augment(images, 5)
    assert first.dtype == torch.float32
    assert first.shape == images.shape
    assert torch.equal(first, augment(images, 5))
    assert not torch.equal(first, augment(images, 6))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_crop_and_flip_are_exact(images):
    """Every result is one of the shifted, maybe flipped pictures, borders repeated; and draws differ between images."""
    pad = 2
    result = BatchAugment(SIZE, pad=pad, **RAW)(images, 1)
    padded = torch.nn.functional.pad(images.float() / 255, (pad,) * 4, mode="replicate")
    height, width = SIZE
    found = []
    for number in range(len(images)):
        for dy in range(2 * pad + 1):
            for dx in range(2 * pad + 1):
                crop = padded[number, :, dy : dy + height, dx : dx + width]
                for flip in (False, True):
                    if torch.equal(crop.flip(-1) if flip else crop, result[number]):
                        found.append((number, dy, dx, flip))
    assert [entry[0] for entry in found] == list(range(len(images)))
    assert len({entry[1:3] for entry in found}) > 3
    assert {entry[3] for entry in found} == {False, True}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_probability(images, flip):
    result = BatchAugment(SIZE, pad=0, flip=flip, **RAW)(images, 0)
    expected = images.float() / 255
    assert torch.equal(result, expected.flip(-1) if flip else expected)


def test_erasing_leaves_a_rectangle_of_the_mean():
    images = torch.full((200, 3, 32, 16), 255, dtype=torch.uint8)
    augment = BatchAugment((32, 16), pad=0, flip=0.0, erasing=0.5)
    result = augment(images, 2)
    erased = (result == 0).all(1)
    shares = erased.float().mean((1, 2))
    hit = shares > 0
    assert 70 < int(hit.sum()) < 130
    assert float(shares.max()) < 0.45
    for mask in erased[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        assert int((rows[1:] != rows[:-1]).sum()) <= 2
    assert len({float(share) for share in shares[hit]}) > 10


def test_brightness_and_contrast_are_bounded(images):
    grey = torch.full((50, 3, *SIZE), 128, dtype=torch.uint8)
    result = BatchAugment(SIZE, pad=0, flip=0.0, brightness=0.2, **RAW)(grey, 0)
    change = result[:, 0, 0, 0] - 128 / 255
    assert float(change.abs().max()) <= 0.2 + 1e-6
    assert float(change.max()) > 0.1
    assert float(change.min()) < -0.1
    result = BatchAugment(SIZE, pad=0, flip=0.0, contrast=0.2, **RAW)(grey, 0)
    ratio = result[:, 0, 0, 0] / (128 / 255)
    assert 0.8 - 1e-5 <= float(ratio.min()) < 0.9
    assert 1.1 < float(ratio.max()) <= 1.2 + 1e-5


def test_empty_pool():
    assert BatchAugment(SIZE)(torch.zeros((0, 3, *SIZE), dtype=torch.uint8), 0).shape == (0, 3, *SIZE)


def test_no_state_goes_into_a_checkpoint():
    assert BatchAugment(SIZE).state_dict() == {}


def test_bad_arguments(images):
    augment = BatchAugment(SIZE)
    with pytest.raises(TypeError, match=r"images must be uint8, got torch\.float32"):
        augment(images.float(), 0)
    with pytest.raises(ValueError, match=r"images must have shape \(n, 3, 16, 8\), got \(12, 3, 16, 7\)"):
        augment(images[..., :-1], 0)
    for options, error, message in (
        ({"size": 4}, TypeError, "size must be two ints"),
        ({"pad": 8}, ValueError, r"pad must be in \[0, 8\), got 8"),
        ({"pad": 1.5}, TypeError, "pad must be an int"),
        ({"flip": 2.0}, ValueError, r"flip must be in \[0, 1\], got 2.0"),
        ({"erasing": "yes"}, TypeError, "erasing must be a float"),
        ({"mean": (0.5,)}, ValueError, "mean must have three values"),
        ({"std": (0.5, 0.0, 1.0)}, ValueError, "std must be positive"),
    ):
        with pytest.raises(error, match=message):
            BatchAugment(**{"size": SIZE} | options)
