"""A batch at which a run stopped, computed again."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from lcr2s_ext.training.config import load_config
from lcr2s_ext.training.failures import load_failed_batch
from lcr2s_ext.training.fit import joint_stage, student_stage, teacher_stage
from lcr2s_ext.training.prepare import TrainingData, make_teacher, prepare_data
from lcr2s_ext.training.run import CONFIG_FILE, STAGE_WEIGHTS
from lcr2s_ext.training.stage import Stage, TrainingError

__all__ = ["replay_failed_batch"]


def replay_failed_batch(path: str | Path, data: TrainingData | None = None) -> dict[str, float]:
    """Loss and terms of the batch at which a run stopped, with the weights and random numbers it had.

    Args:
        path: what the message named, ``OUT/<stage>/nonfinite_batch.pt``; the configuration is OUT's.
        data: prepared corpus; ``None`` reads it.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is another one.
        TrainingError: the file lies in no run's folder.
    """
    failed = load_failed_batch(path)
    out = Path(path).resolve().parent.parent
    if not (out / CONFIG_FILE).is_file():
        raise TrainingError(f"path: {path} lies in no stage of a run (there is no {out / CONFIG_FILE})")
    config = load_config(out / CONFIG_FILE)
    if data is None:
        data = prepare_data(config)
    stage: Stage
    if failed.stage == "one_stage":
        stage = joint_stage(config, data)[0]
    elif failed.stage == "teacher":
        stage = teacher_stage(config, data)[0]
    else:
        teacher = None
        if failed.stage == "student" and config.method == "lcr2s":
            teacher = make_teacher(config, data)
            teacher.load_state_dict(load_file(str(out / "teacher" / STAGE_WEIGHTS)))
        stage = student_stage(config, data, teacher=teacher, name=failed.stage)[0]
    return {name: float(value.detach()) for name, value in stage.replay(failed).items()}
