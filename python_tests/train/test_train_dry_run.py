"""Recipes parse and have the published numbers; a dry run builds them, and predicts what is so."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import IRESNET, ROOT, tiny, trainer_of, write_faces

from train.config import Config
from train.errors import UserError
from train.losses import shards_classes
from train.main import load_config, main
from train.run_folder import prepare, read_metrics
from train.schedule import learning_rate
from train.tools import dry_run

CONFIGS = ROOT / "train" / "configs"
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
LOSSES = sorted(path.stem for path in (CONFIGS / "loss").glob("*.yaml"))
# A recipe's schedule, with a network and a batch for one core.
SMALL = [
    "model.name=iresnet18",
    "model.input_size=16",
    "model.options={}",
    "train.device=cpu",
    "--dry-run",
]


def files(data: str, loss: str) -> list[str]:
    return [f"--config={CONFIGS / 'data' / data}.yaml", f"--config={CONFIGS / 'loss' / loss}.yaml"]


def recipe(data: str, loss: str = "cosface") -> Config:
    config = load_config(files(data, loss))[0]
    assert isinstance(config, Config)
    return config


#: Without class weights that many processes could share.
PAIRS = {"batch_hard", "circle", "contrastive", "multi_similarity", "simple", "uss"}


def test_the_recipes_are_these() -> None:
    assert len(DATA) == 5
    assert {data.split("_", 1)[0] for data in DATA} == {
        *("casia", "webface4m", "glint360k", "webface42m")
    }
    assert {*LOSSES} == {
        *(
            "adacos",
            "adaface",
            "arcface",
            "class_margin",
            "cosface",
            "curricularface",
            "elasticface",
        ),
        *("epl", "magface", "mv_softmax", "proxy_anchor", "proxy_nca", "simple_proxy"),
        *("sphereface2", "subcenter_arcface"),
        *("uniface", "unitsface", "unpg", "vpl", "own_contrastive", *PAIRS),
    }


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_combination_is_a_configuration(data: str, loss: str) -> None:
    config = recipe(data, loss)
    assert config.data.num_identities > 10_000
    # Where the class loss goes on to the end, many processes share the classes.
    assert shards_classes(config.loss, config.partial_fc, 8) == (loss not in PAIRS)


@pytest.mark.parametrize(
    ("data", "steps", "at"),
    [
        # 490623 // 512 steps an epoch; step 15327 is the last of epoch 16.
        ("casia_r50", 958, {0: 0.1, 15327: 0.1, 15328: 0.01, 22992: 0.001, 26823: 0.001}),
        ("webface4m_r50", 4135, {0: 0.1, 41350: 0.025, 82699: 0.1 / 82700**2}),
        ("glint360k_r100", 16691, {0: 0.1, 166910: 0.025}),
        # One epoch of warm-up, then a parabola over the other 19.
        ("webface42m_r200", 10369, {0: 0.4 / 10369, 10368: 0.4, 10369 + 197011 // 2: 0.1}),
        ("webface42m_vit_s", 1728, {6911: 1e-3, 6912: 1e-3}),
    ],
)
def test_learning_rates_are_the_published_ones(data: str, steps: int, at: dict[int, float]) -> None:
    config = recipe(data)
    plan = dry_run.make_plan(config, 1)
    assert plan.course.steps_per_epoch == steps
    assert plan.course.total_steps == steps * config.train.epochs
    for step, expected in at.items():
        rate = learning_rate(config.train, step, plan.course.total_steps, steps)
        assert rate == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("data", "loss"),
    [
        *(("casia_r50", name) for name in ("uss", "unitsface")),
        ("webface42m_r200", "epl"),
        *(
            pytest.param("casia_r50", name, marks=pytest.mark.extended)
            for name in LOSSES
            if name not in ("uss", "unitsface")
        ),
    ],
)
def test_small_dry_run_of_a_recipe(
    data: str, loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "CLASSES_BUILT", 64)
    assert main([*files(data, loss), *SMALL, "--dry-run-processes=8"]) == 0
    text = capsys.readouterr().out
    config = recipe(data, loss)
    count = config.data.num_identities
    # The first process has one class more where they do not go up.
    classes = count if loss == "uss" else 0 if loss in PAIRS else -(-count // 8)
    assert f"{config.data.num_images} images of {count} identities" in text
    assert f"{classes * 512} class weights of {classes} classes in each process" in text
    assert re.search(r"one step: 4 images of 64 classes in \d+\.\d s on cpu, loss \d+\.\d+\n", text)
    assert re.search(r"time to the end, .* \(cpu, float32\): \d+\.\d (h|min), \d+ steps of", text)
    assert list(tmp_path.iterdir()) == []


def test_the_time_to_the_end_is_scaled_from_the_step(tmp_path: Path) -> None:
    data = {"num_identities": 300, "num_images": 8000}
    keys = {"epochs": 9, "batch_size": 80}
    config = tiny(tmp_path / "none", tmp_path, model={"name": "conv4"}, data=data, train=keys)
    trainer = None
    for processes, hours in ((1, "9.0 h"), (4, "2.2 h")):
        plan = dry_run.make_plan(config, processes)
        trainer = trainer or dry_run.build_trainer(config, plan, 50, 4)
        # 900 steps, each of 80 images, 20 times those of the step that took 1.8 s.
        said = dry_run.estimate(trainer, plan, 50, 4, 1.8)
        assert f"on this machine (cpu, float32): {hours}, 900 steps of {80 // processes} im" in said
        assert f"the other {300 // processes - 50} classes of a process" in said
        assert ("the exchange between processes" in said) is (processes > 1)
    assert trainer is not None
    assert "(cpu, float32): 18.0 min, 900" in dry_run.estimate(
        trainer, dry_run.make_plan(config, 1), 300, 80, 1.2
    )


@pytest.mark.slow
def test_unmodified_recipe_of_casia(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--dry-run-processes=4", "train.device=cpu"]
    assert main([*files("casia_r50", "unitsface"), *arguments]) == 0
    assert "42377920 of the backbone, 1353216 class weights of 2643" in capsys.readouterr().out


def predicted(config: Config, processes: int, built: int, batch: int) -> dry_run.Memory:
    plan = dry_run.make_plan(config, processes)
    trainer = dry_run.build_trainer(config, plan, built, batch)
    _, _, activations = dry_run.synthetic_step(trainer)
    return dry_run.measure(trainer, plan, built, activations // batch)


@pytest.mark.parametrize(
    ("processes", "sections"),
    [
        (1, {"loss": {"memory": True}}),
        (1, {"loss": {"class": "class_bce", "pair": "pair_bce"}}),
        (4, {"loss": {"class": "epl", "memory": True}}),
        (4, {"partial_fc": {"sample_rate": 0.5}, "train": {"optimizer": "adamw"}}),
    ],
    ids=["memory", "thresholds", "shards", "drawn classes"],
)
def test_prediction_does_not_depend_on_what_is_built(
    processes: int, sections: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    data = {"num_identities": 400, "num_images": 4000}
    config = tiny(tmp_path / "none", tmp_path, data=data, **sections)
    config.train.batch_size = 32
    whole = predicted(config, processes, 400 // processes, 8)
    part = predicted(config, processes, 20, 4)
    assert part.weights == whole.weights
    assert part.optimizer == whole.optimizer
    assert part.gradients == pytest.approx(whole.gradients, rel=1e-5)
    assert part.activations == pytest.approx(whole.activations, rel=1e-2)
    if processes == 1:
        # Class weights, and the memory where there is one; thresholds of UCE and pairs are small.
        features = 400 * 512 * 4
        backbone = predicted(
            tiny(tmp_path / "none", tmp_path, data=data, loss={"class": "none"}), 1, 20, 4
        )
        extra = whole.weights - backbone.weights
        assert features <= extra - (features if config.loss.memory else 0) < 1.02 * features


def test_activations_are_what_autograd_keeps() -> None:
    x = torch.ones(10, 10, requires_grad=True)
    kept = dry_run.Kept([x])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        y = (x * x).exp()  # x is known; exp keeps its result
        (y.view(100) * y.view(100)).sum()  # the same storage again
    assert kept.bytes == 400


def test_data_that_is_there_counts_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = write_faces(tmp_path / "faces", identities=5, images=4)
    arguments = [*files("casia_r50", "cosface"), *SMALL, f"data.path={faces}", "data.holdout=2"]
    assert main(arguments) == 0
    assert f"12 images of 3 identities, in {faces}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=nowhere"], r"nowhere.*data\.num_images"),
        (["--dry-run-batch=1"], "expected at least 2 and 1, got 1 and 1"),
        (["--dry-run-processes=40", "data.path=orl"], "over 40 processes: BatchNorm needs 2"),
        (["--resume"], "--dry-run and --resume"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_what_a_run_starts_from_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone of the file; the classes of a dry run are made up."""
    faces = write_faces(tmp_path / "faces", identities=2, images=2)
    torch.save(
        trainer_of(tiny(faces, tmp_path, model=IRESNET)).backbone.state_dict(),
        tmp_path / "weights.pt",
    )
    given = [f"data.path={faces}", *SMALL]
    for key in ("model.weights", "train.init", "train.finetune"):
        assert main([*given, f"{key}={tmp_path / 'weights.pt'}"]) == 0
        assert main([*given, f"{key}={tmp_path / 'none.pt'}"]) == 2
        assert f"error: {key}: no such checkpoint: " in capsys.readouterr().err


def test_later_files_win(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        (tmp_path / f"{name}.yaml").write_text(f"train: {{lr: {lr}, epochs: 3}}\n")
    a, b = (f"--config={tmp_path / name}.yaml" for name in "ab")
    assert load_config([a, b])[0].train.lr == 0.2
    assert load_config([b, a])[0].train.lr == 0.1
    assert load_config([b, a, "train.lr=0.5"])[0].train.lr == 0.5


def test_class_loss_that_only_fills_the_memory(tmp_path: Path) -> None:
    """USS alone as published: after the first epoch nothing moves the class weights."""
    faces = write_faces(tmp_path / "faces", identities=4, images=4)
    sections: dict[str, dict[str, Any]] = {
        "loss": {"memory": True, "class_until_filled": True},
        "train": {"epochs": 3, "momentum": 0.0, "weight_decay": 0.0},
    }
    trainer = trainer_of(tiny(faces, tmp_path / "run", **sections))
    prepare(tmp_path / "run", trainer.config, resume_step=None)
    assert trainer.loss.class_loss is not None
    weight = trainer.loss.class_loss.state_dict()["weight"]
    moved = [weight.clone()]

    def stop(step: int) -> bool:
        moved.append(weight.clone())
        return False

    assert trainer.fit(tmp_path / "run", stop)
    steps = [not torch.equal(a, b) for a, b in itertools.pairwise(moved)]
    assert steps == [True, True, False, False, False, False]
    lines = read_metrics(tmp_path / "run")
    assert [line["pair_loss"] is None for line in lines] == [True, True, False, False, False, False]
    assert all(line["loss"] == pytest.approx(line["pair_loss"]) for line in lines[2:])
    with pytest.raises(UserError, match=r"class_until_filled=true needs loss\.memory"):
        tiny(faces, tmp_path, loss={"class_until_filled": True})
    with pytest.raises(UserError, match=r"sample_rate=0\.5: .* needs whole class weights"):
        tiny(faces, tmp_path, **sections, partial_fc={"sample_rate": 0.5})
