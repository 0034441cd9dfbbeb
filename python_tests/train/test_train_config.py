"""Configuration: layers, checks, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import training  # noqa: F401

import unitsface_kernels
from train.config import (
    Config,
    describe_keys,
    iter_keys,
    make_config,
    parse_overrides,
    read_yaml,
    to_dict,
    to_yaml,
)
from train.errors import UserError
from train.main import load_config, main, parse_arguments

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"


def from_arguments(*overrides: str) -> Config:
    return make_config(("command line", parse_overrides(list(overrides))))


def test_later_layers_win_and_the_rest_keeps_its_default() -> None:
    file = {"train": {"lr": 0.2, "epochs": 7}}
    config = make_config(("file", file), ("command line", parse_overrides(["train.lr=0.3"])))
    assert (config.train.lr, config.train.epochs) == (0.3, 7)
    assert config.train.momentum == 0.9
    assert config.train.weight_decay == 5e-4


def test_values_have_the_declared_types() -> None:
    config = from_arguments(
        "loss.class=arcface",
        "loss.class_options.margin=0.3",
        "train.milestones=[10,20.5]",
        "train.lr=1",
        "data.holdout=null",
        "data.path=2024",
    )
    assert config.loss.class_name == "arcface"
    assert config.loss.class_options == {"margin": 0.3}
    assert config.train.milestones == [10.0, 20.5]
    assert isinstance(config.train.lr, float)
    assert config.data.holdout is None
    assert config.data.path == "2024"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", "unknown key 'train.learning_rate'"),
        ("trian.lr=1", "did you mean 'train.lr'"),
        ("train=3", "unknown key 'train'"),
        ("train.lr.x=3", "train.lr"),
        ("loss.class_name=cosface", "unknown key 'loss.class_name'"),
        ("train.lr=fast", "train.lr.*'fast'"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs=0", "train.epochs: expected a number at least 1, got 0"),
        ("train.lr=.nan", "train.lr: expected a number"),
        ("model.dropout=1.0", "model.dropout: expected a number between"),
        ("model.name=resnet", "model.name: expected one of iresnet18, .*'resnet'"),
        ("loss.class=bigface", "loss.class: expected one of none, .*cosface"),
        ("train.amp=int8", "train.amp: expected one of none, bf16, fp16"),
        ("train.schedule=step", "train.milestones"),
        ("data.holdout=1", "data.holdout"),
        ("justtext", "expected key=value"),
        ("train.milestones=[1", "train.milestones=\\[1"),
    ],
)
def test_mistakes_are_errors_that_name_the_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_arguments(override)
    assert "\n" not in str(caught.value)


def test_no_loss_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        from_arguments("loss.class=none", "loss.pair=none")


def test_every_registered_loss_can_be_chosen_by_name() -> None:
    assert unitsface_kernels.CLASS_LOSSES
    for name in unitsface_kernels.CLASS_LOSSES:
        assert from_arguments(f"loss.class={name}").loss.class_name == name
    for name in unitsface_kernels.PAIR_LOSSES:
        assert from_arguments(f"loss.pair={name}").loss.pair_name == name


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = from_arguments("loss.class=arcface", "loss.pair_options.margin=0.2", "data.holdout=3")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert yaml.safe_load(path.read_text())["loss"]["class"] == "arcface"
    assert make_config((str(path), read_yaml(path))) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = make_config((str(path), read_yaml(path)))
    assert to_dict(config) != to_dict(Config())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: [", "not valid YAML"),
        ("train:\n  lr: 0.1\n  speed: 3\n", "unknown key 'train.speed'"),
        ("- 1\n- 2\n", "expected sections"),
        ("train:\n", "unknown key 'train'"),
    ],
)
def test_bad_files_are_errors_that_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        make_config((str(path), read_yaml(path)))
    assert "bad.yaml" in str(caught.value)


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "nowhere.yaml"]) == 2
    assert "error: cannot read configuration nowhere.yaml" in capsys.readouterr().err


def test_help_lists_every_key_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert describe_keys() in text
    for key, field in iter_keys():
        assert f"  {key}=" in text
        assert len(field.metadata["help"]) > 5
        assert field.metadata["help"] in text
    assert "train.lr=0.1\n" in text
    assert "loss.class=cosface\n" in text


def test_arguments_may_come_in_any_order() -> None:
    arguments = parse_arguments(["a.b=1", "--resume", "c.d=2"])
    assert arguments.resume == ""
    assert sorted(arguments.overrides) == ["a.b=1", "c.d=2"]
    assert parse_arguments(["--resume", "x/last.pt", "a.b=1"]).resume == "x/last.pt"
    assert parse_arguments(["a.b=1"]).resume is None


def test_unknown_option_and_missing_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--fast"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --fast\n"
    assert main(["--resume", f"run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no such checkpoint")
    assert error.count("\n") == 1


def test_load_config_without_resume() -> None:
    config, path, values = load_config(["train.lr=0.5"])
    assert config.train.lr == 0.5
    assert path is None
    assert values is None
