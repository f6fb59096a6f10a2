"""Training on Lightning: configuration, the stages, whole runs, the demo. Names are imported when they are asked
for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcr2s_ext.training.config import ConfigError, TrainConfig, dump_config, load_config, to_dict
    from lcr2s_ext.training.failures import load_failed_batch
    from lcr2s_ext.training.fit import StageResult, fit_one_stage, fit_student, fit_teacher
    from lcr2s_ext.training.prepare import (
        TrainingData,
        evaluate_student,
        evaluate_teacher,
        make_loader,
        prepare_data,
    )
    from lcr2s_ext.training.replay import replay_failed_batch
    from lcr2s_ext.training.run import TrainResult, train
    from lcr2s_ext.training.stage import TrainingError

_HOMES = {
    "ConfigError": "config",
    "StageResult": "fit",
    "TrainConfig": "config",
    "TrainResult": "run",
    "TrainingData": "prepare",
    "TrainingError": "stage",
    "dump_config": "config",
    "evaluate_student": "prepare",
    "evaluate_teacher": "prepare",
    "fit_one_stage": "fit",
    "fit_student": "fit",
    "fit_teacher": "fit",
    "load_config": "config",
    "load_failed_batch": "failures",
    "make_loader": "prepare",
    "prepare_data": "prepare",
    "replay_failed_batch": "replay",
    "to_dict": "config",
    "train": "run",
}

__all__ = [
    "ConfigError",
    "StageResult",
    "TrainConfig",
    "TrainResult",
    "TrainingData",
    "TrainingError",
    "dump_config",
    "evaluate_student",
    "evaluate_teacher",
    "fit_one_stage",
    "fit_student",
    "fit_teacher",
    "load_config",
    "load_failed_batch",
    "make_loader",
    "prepare_data",
    "replay_failed_batch",
    "to_dict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lcr2s_ext.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lcr2s_ext.training' has no attribute {name!r}")
