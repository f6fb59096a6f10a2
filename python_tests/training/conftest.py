"""A very small generated corpus and its configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lcr2s_ext.data import generate_corpus
from lcr2s_ext.training import TrainConfig, TrainingData, load_config, prepare_data

SMALL = [
    "progress=none",
    "epochs=2",
    "eval_every=1",
    "log_every=1",
    "threads=1",
    "device=cpu",
    "data.batch_size=16",
    "data.max_support=2",
    "model.width=32",
    "model.heads=4",
    "model.image_encoder={widths: [8, 16], strides: [2], grid: [4, 2], dropout: 0.1}",
    "model.text_encoder={width: 16, hidden: 16, dropout: 0.1}",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    generate_corpus(root, identities=(10, 4, 5), views=3, seed=1, single_view_fraction=0.2)
    return root


@pytest.fixture(scope="session")
def config_of(corpus: Path) -> Callable[..., TrainConfig]:
    """Configurations of the small corpus; ``key=value`` strings change them."""
    return lambda *overrides: load_config(None, [f"data.root={corpus}", *SMALL, *overrides])


@pytest.fixture(scope="session")
def data(config_of: Callable[..., TrainConfig]) -> TrainingData:
    return prepare_data(config_of())
