"""Values as they are typed, in every place where they are; what is true of one start only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.training import arguments, losses, tiny, train, write_faces

from train import checkpoint
from train.config import make_config, parse_overrides, read_yaml, to_dict, to_yaml
from train.errors import UserError
from train.main import load_config, main

TEXTS = [
    *("#1", "a #b", "007", "1e3", "1_000", "0x10", "yes", "null", "~", "[a]", "{a: b}", "a: b"),
    *(
        "${HOME}",
        "${oc.env:HOME}",
        "${run.dir}",
        " a ",
        "ü/名前",
        "a=b",
        "2020-01-01",
        "1:30",
        "???",
    ),
    *("*a", "&a", "!a", "%a", "-", "- a", "'", '"', "a'b", "\\n", "\udce9", "a\u2028b", "???"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_is_typed(tmp_path: Path, text: str) -> None:
    given = parse_overrides([f"data.path={text}", f"eval.sets=[{text.replace(',', '')},b]"])
    config = make_config(("command line", given))
    assert config.data.path == text
    assert config.eval.sets == [text.strip(), "b"]
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert make_config((str(path), read_yaml(path))) == config


def test_text_in_a_file_is_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "data: {path: 007, holdout: ~}\nmodel:\n  name: timm:x\n  options: {size: 1e2, at: '1e2'}\n"
        "run:\n  dir: 1e3\neval: {sets: [01, no, 'a #b']}\ntrain: {lr: '1e-3', compile: yes}\n"
    )
    config = make_config((str(path), read_yaml(path)))
    assert (config.data.path, config.run.dir) == ("007", "1e3")
    assert config.eval.sets == ["01", "no", "a #b"]
    assert config.model.options == {"size": 100.0, "at": "1e2"}
    assert (config.data.holdout, config.train.lr, config.train.compile) == (None, 1e-3, True)
    path.write_text(to_yaml(config))
    assert make_config((str(path), read_yaml(path))) == config


def test_quotes_around_all_of_a_text_are_no_part_of_it() -> None:
    for quoted in ('"a, b"', "'a, b'"):
        values = parse_overrides([f"data.path={quoted}", f"eval.sets=[{quoted},c]"])
        assert values == {"data": {"path": "a, b"}, "eval": {"sets": ["a, b", "c"]}}


def test_options_are_merged_by_name_and_numbers_stay_numbers() -> None:
    file = {"loss": {"class_options": {"margin": 0.2, "scale": 64}}}
    given = parse_overrides(["loss.class_options.margin=1e-1", "train.lr=2e-1", "train.epochs=1_0"])
    config = make_config(("file", file), ("command line", given))
    assert config.loss.class_options == {"margin": 0.1, "scale": 64}
    assert file["loss"]["class_options"]["margin"] == 0.2
    assert (config.train.lr, config.train.epochs) == (0.2, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1, lr: 2}", "'lr' is there twice"),
        ("train: {lr: ${train.power}}", "not valid YAML|train.lr: expected a number"),
        ("train:\n  lr: ${train.power}", "train.lr: expected a number, got '..train.power}'"),
        ("train: {lr: .inf}", "train.lr: expected a number that is finite"),
        ("train: {milestones: [.nan]}", "train.milestones: expected finite numbers"),
        ("data: {path: }", "data.path: expected a path"),
        ('run: {dir: "a\\0b"}', "run.dir: expected text"),
        ("train: {epochs: " + "9" * 5000 + "}", "not valid YAML"),
        ("a: &a [*a]\nmodel: {options: *a}", "nested too deeply|unknown key"),
        ("model: {options: {a: &a [*a]}}", "nested too deeply"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("model: {options: !!python/object:os.system {}}", "not valid YAML"),
        ("&a a: 1\n" * 20_000, "more than 100000 characters"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        make_config((str(path), read_yaml(path)))
    assert len(str(caught.value)) < 2000


def test_aliases_do_not_expand_without_end(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    lines = ["l0: &l0 [1,1,1,1,1,1,1,1]"]
    lines += [f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 8)}]" for i in range(1, 12)]
    path.write_text("model:\n  options:\n" + "".join(f"    {line}\n" for line in lines))
    with pytest.raises(UserError, match="more than 100000 values"):
        read_yaml(path)


def test_a_model_is_fetched_for_a_name_on_the_command_line_only(tmp_path: Path) -> None:
    for name in ("timm:hf-hub:a/b", "timm:HF_hub:a/b", "timm: hf-hub:a/b"):
        with pytest.raises(UserError, match=r"x\.pt: model\.name=.* would be fetched"):
            make_config(("x.pt", {"model": {"name": name}}))
        typed = ("command line", parse_overrides([f"model.name={name}"]))
        assert make_config(("x.pt", {"model": {"name": name}}), typed).model.name == name
        other = ("command line", parse_overrides(["model.name=iresnet18"]))
        assert make_config(("x.pt", {"model": {"name": name}}), other).model.name == "iresnet18"


# -- what is true of one start only ---------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


def test_nothing_of_one_start_is_written_or_read(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [*arguments(tiny(faces, run, train={"max_steps": 1})), "run.overwrite=true"]
    assert main([*given, "--resume", "auto"]) == 0
    assert "overwrite" not in (run / "config.yaml").read_text()
    assert "overwrite" not in checkpoint.read_run(run / checkpoint.LAST)["config"]["run"]
    assert load_config(given)[0].run.overwrite
    assert "overwrite" not in to_dict(load_config(given)[0])["run"]


def test_overwrite_in_a_configuration_file_destroys_nothing(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As earlier versions wrote it into a run and its checkpoints."""
    run = tmp_path / "run"
    train(tiny(faces, run, train={"max_steps": 1}))
    path = run / "config.yaml"
    path.write_text(path.read_text() + "  overwrite: true\n")
    values = checkpoint.read_run(run / checkpoint.LAST)
    values["config"]["run"]["overwrite"] = True
    checkpoint.save_atomically(values, run / checkpoint.LAST)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["--config", str(path)]) == 2
    assert "run.overwrite=true on the command line" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert main(["--resume", str(run / checkpoint.LAST), "train.max_steps=2"]) == 0
    assert len(losses(run)) == 2

    # On the command line it moves the run aside, every time by another name.
    for number, steps in ((1, 2), (2, 1)):
        given = ["--config", str(path), "run.overwrite=true", "train.max_steps=1"]
        assert main(given) == 0
        moved = tmp_path / f"run.old-{number}"
        assert f"was moved to {moved}" in capsys.readouterr().out
        assert len(losses(moved)) == steps
        assert checkpoint.read_run(moved / checkpoint.LAST)["trainer"]["step"] == steps
    assert len(losses(run)) == 1


def test_auto_begins_again_only_where_nothing_is_lost(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    kept = run / "checkpoints" / "step-000001.pt"
    sections: dict[str, Any] = {"run": {"keep": 2, "save_steps": 1}, "data": {"holdout": 2}}
    given = arguments(tiny(faces, run, train={"max_steps": 2}, **sections))
    assert main(given) == 0
    whole = losses(run)
    # Without its last checkpoints it goes on from the newest there is.
    (run / checkpoint.LAST).unlink()
    kept.with_name("step-000002.pt").unlink()
    capsys.readouterr()
    assert main([*given, "--resume", "auto"]) == 0
    said = f"warning: checkpoint {run / checkpoint.LAST} is missing; going on from {kept}\n"
    assert said in capsys.readouterr().err
    assert losses(run) == whole
    # A run that has ended does not begin again, either.
    shutil.rmtree(kept.parent)
    assert main([*given, "--resume", "auto"]) == 2
    assert "holds a run without a checkpoint to go on from" in capsys.readouterr().err
    assert losses(run) == whole


def test_other_files_by_the_names_of_a_run_s_are_moved_not_removed(
    faces: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    (run / "tensorboard" / "mine").write_text("mine")
    (run / "config.yaml").write_text(to_yaml(tiny(faces, run, train={"max_steps": 1})))
    text = (run / "config.yaml").read_text()
    assert main(["--config", str(run / "config.yaml")]) == 0
    assert (tmp_path / "run.old-1" / "tensorboard" / "mine").read_text() == "mine"
    assert (tmp_path / "run.old-1" / "config.yaml").read_text() == text


def test_a_checkpoint_of_another_run_does_not_go_on_in_a_folder_with_one(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        train(tiny(faces, tmp_path / name, train={"max_steps": 2}))
    given = ["--resume", str(tmp_path / "a" / checkpoint.LAST), "train.max_steps=3"]
    assert main([*given, f"run.dir={tmp_path / 'b'}"]) == 2
    assert f"{tmp_path / 'b'} already holds a run" in capsys.readouterr().err
    assert main([*given, f"run.dir={tmp_path / 'b'}", "run.overwrite=true"]) == 0
    assert len(losses(tmp_path / "b.old-1")) == 2
    assert len(losses(tmp_path / "b")) == 1
    assert main([*given, f"run.dir={tmp_path / 'c'}"]) == 0
