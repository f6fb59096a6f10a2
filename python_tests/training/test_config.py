"""Configurations: files, overrides, and what is refused by name."""

from pathlib import Path

import pytest

from lcr2s_ext.training import ConfigError, TrainConfig, dump_config, load_config, to_dict


def test_overrides_win_over_the_file_and_kinds_are_converted(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 3\noptim: {lr: 1e-3, weight_decay: 0}\nmodel:\n  image_size: [128, 64]\n")
    config = load_config(file, ["optim.lr=5e-4", "epochs=7", "model.width=64", "model.feed_forward=null"])
    assert (config.epochs, config.optim.lr, config.optim.weight_decay) == (7, 5e-4, 0.0)
    assert config.model.image_size == [128, 64]
    assert config.model.width == 64
    assert config.model.feed_forward is None


def test_epochs_reach_the_stages_that_do_not_say_theirs() -> None:
    config = load_config(None, ["epochs=4", "teacher.epochs=2"])
    assert (config.warm_epochs, config.teacher_epochs) == (4, 2)
    assert to_dict(config)["teacher"]["warm_epochs"] == 4


def test_written_configuration_is_whole_and_reads_back(tmp_path: Path) -> None:
    config = load_config(None, ["seed=5", "model.text_encoder={layers: 2}", "distill.relation=kl"])
    dump_config(config, tmp_path / "c.yaml")
    assert to_dict(load_config(tmp_path / "c.yaml")) == to_dict(config)
    text = (tmp_path / "c.yaml").read_text()
    assert all(f"{name}:" in text for name in ("logit_scale", "max_support", "warmup_epochs", "ramp_epochs"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key 'optim.lrr'; did you mean optim\.lr"),
        ("lr=1", r"unknown key 'lr'; did you mean optim\.lr"),
        ("sampler=identity", r"unknown key 'sampler'; did you mean data\.sampler"),
        ("nonsense.key=1", "unknown key 'nonsense'"),
        ("epochs=two", "epochs: expected int, got 'two'"),
        ("epochs=true", "epochs: expected int, got True"),
        ("epochs=0", "epochs: expected at least 1, got 0"),
        ("data.cache=3", "data.cache: expected bool, got 3"),
        ("optim=3", "optim: expected a mapping"),
        ("optim.lr=0", "optim.lr: expected a positive number"),
        ("data.flip=2", "data.flip"),
        ("data.batch_size=0", "data.batch_size"),
        ("loss.align=smd", "loss.align: expected one of sdm.*did you mean sdm"),
        ("loss.many_to_many=false", "loss.many_to_many"),
        ("loss.align=[sdm, tla]", "loss.align: expected one of sdm.*did you mean tal"),
        ("loss.align=[sdm, sdm]", "loss.align: expected at least one loss, each once"),
        ("loss.align={sdm: 0}", "loss.align: expected at least one loss"),
        ("loss.align={sdm: -1}", "loss.align: expected weights of at least 0"),
        ("loss.align={sdm: one}", "loss.align.sdm: expected float, got 'one'"),
        ("loss.align=3", "loss.align: expected"),
        ("loss.logit_scales={cmpm: 3}", "loss.logit_scales.cmpm"),
        ("loggers=[wandb]", "loggers"),
        ("epochs", "expected key=value"),
        ("epochs=[", "epochs"),
    ],
)
def test_refuses(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_refuses_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_config(tmp_path / "missing.yaml")
    file = tmp_path / "c.yaml"
    for text, message in (("- 1\n", "mapping of keys"), ("a: [", "not valid YAML")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(file)


def test_learnt_scale_needs_a_loss_that_has_one() -> None:
    with pytest.raises(ConfigError, match="learn_logit_scale"):
        load_config(None, ["loss.align=cmpm", "loss.learn_logit_scale=true"])
    assert TrainConfig().loss.align == "sdm"


def test_losses_combine(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("loss: {align: {sdm: 1, tal: 0.5, cmpm: 0}}\n")
    config = load_config(file, ["loss.logit_scales={tal: 60}"])
    assert config.loss.align_terms == {"sdm": 1.0, "tal": 0.5}
    dump_config(config, tmp_path / "d.yaml")
    assert load_config(tmp_path / "d.yaml").loss == config.loss
    # A later choice replaces an earlier one, it does not add to it.
    assert load_config(file, ["loss.align={info_nce: 2}"]).loss.align_terms == {"info_nce": 2.0}
    assert load_config(None, ["loss.align=[cmpm, tal]"]).loss.align_terms == {"cmpm": 1.0, "tal": 1.0}
