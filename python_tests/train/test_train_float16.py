"""Gradient scales in float16: what skipped steps say, and what of a step is not finite."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.training import CPU, tiny, train, trainer_of, write_faces
from torch import Tensor, nn

from train.distributed import DistributedEnv
from train.divergence import SKIPS_IN_A_ROW, ScaleWatch, first_bad_gradient, first_not_finite
from train.errors import DivergedError
from train.run_folder import prepare, read_metrics


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


def config_of(faces: Path, run: Path, **train: Any) -> Any:
    keys = {"amp": "fp16", "epochs": 20, **train}
    return tiny(faces, run, model={"name": "conv4"}, train=keys, run={"log_every": 100})


class Scaler:
    """A scale that is halved before every look at it."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        self.scale /= 2
        return self.scale

    def is_enabled(self) -> bool:
        return True


def watch_of(scale: float, world: DistributedEnv = CPU) -> ScaleWatch:
    return ScaleWatch(Scaler(scale), world)  # type: ignore[arg-type]


FINITE = torch.ones(3)


@pytest.mark.extended
def test_a_run_without_steps_names_the_gradient_that_stops_it(faces: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(faces, tmp_path))
    names = [n for n, p in trainer.backbone.named_parameters() if p.dim() == 4]
    spoiled = dict(trainer.backbone.named_parameters())[names[2]]
    # Clipping makes every gradient a NaN where one is.
    spoiled.register_hook(lambda grad: grad * (math.nan if trainer.step >= 8 else 1.0))
    before = {}
    trainer.optimizer.register_step_post_hook(
        lambda *_: before.update({n: p.clone() for n, p in trainer.backbone.named_parameters()})
    )
    prepare(tmp_path, trainer.config, resume_step=None)
    with pytest.raises(DivergedError) as caught:
        trainer.fit(tmp_path)
    said = str(caught.value)
    assert f"the last {SKIPS_IN_A_ROW} steps were skipped" in said
    course = re.findall(r"([\d.e-]+) at step (\d+)", said)
    assert [int(step) for _, step in course] == [9, 22, 23, 24]
    assert float(course[0][0]) == 2**15 * float(course[-1][0])
    assert said.endswith("or a loss of a smaller scale")
    assert f"first not finite: the gradient of backbone.{names[2]}; try train.amp=bf16" in said
    after = dict(trainer.backbone.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in after)


def test_a_loss_that_overflows_names_the_layer(faces: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(faces, tmp_path))
    layers = [(n, m) for n, m in trainer.backbone.named_modules() if isinstance(m, nn.Conv2d)]
    name, layer = layers[2]
    with torch.no_grad():
        layer.weight.mul_(1e6)
    trainer.config.run.log_every = 2
    prepare(tmp_path, trainer.config, resume_step=None)
    with pytest.raises(DivergedError) as caught:
        trainer.fit(tmp_path)
    said = str(caught.value)
    assert "the loss is nan at step 1" in said
    assert f"first not finite: at step 1 the output of backbone.{name} (Conv2d, float16" in said
    assert "its input reaches" in said


def test_a_scale_that_sinks_slowly_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = watch_of(8.0)
    for step in range(1, 60):
        watch.after(step, step % 10 != 0, FINITE, lambda: "")
    (line,) = capsys.readouterr().err.splitlines()
    assert "the scale of gradients sinks below 1, where small ones are lost" in line
    assert "4 at step 10, 2 at step 20, 1 at step 30, 0.5 at step 40; losses and" in line
    assert watch.take() == {"grad_scale": 2.0**-3, "skipped_steps": 5}
    assert watch.take()["skipped_steps"] == 0


def test_a_run_whose_steps_are_all_skipped_ends() -> None:
    watch = watch_of(2.0**17)
    watch.after(3, True, FINITE, lambda: "")
    for step in range(4, 3 + SKIPS_IN_A_ROW):
        watch.after(step, False, FINITE, lambda: "")
        assert watch.suspicious
        watch.gradient = "the gradient of backbone.fc.weight"
    with pytest.raises(DivergedError) as caught:
        watch.after(19, False, FINITE, lambda: "")
    assert str(caught.value) == (
        "train.amp=fp16: the last 16 steps were skipped, the scale of gradients halved: 65536 at "
        "step 4, ..., 8 at step 17, 4 at step 18, 2 at step 19; first not finite: the gradient of "
        "backbone.fc.weight; try train.amp=bf16, which needs no scale, a smaller train.lr, "
        "train.warmup_epochs, or a loss of a smaller scale"
    )


def test_a_short_course_names_no_scale_twice(capsys: pytest.CaptureFixture[str]) -> None:
    watch = watch_of(1.0)  # of a run that was resumed with it
    watch.after(7, False, FINITE, lambda: "")
    assert "where small ones are lost: 0.5 at step 7; losses and" in capsys.readouterr().err


class Pair(nn.Module):
    """A layer as other packages have them."""

    def forward(self, x: Tensor, factor: float = 1.0) -> tuple[Tensor, float]:
        return x * factor, factor


class Taker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.norm = Pair(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.pair(x, factor=math.inf)[0])


def test_layers_that_return_more_than_a_tensor_are_passed_over() -> None:
    found = first_not_finite(Taker(), [torch.ones(2, 3)], torch.tensor([math.nan]), nullcontext)
    assert found == "the output of backbone.norm (Identity, float32)"


def test_usual_skips_say_nothing_and_are_counted(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = watch_of(2.0**40)
    for step in range(1, 400):
        watch.after(step, step % SKIPS_IN_A_ROW == 0, FINITE, lambda: "never")
        watch._scaler.scale = 2.0**40  # type: ignore[attr-defined]
    assert capsys.readouterr().err == ""
    (line,) = read_metrics(Path(train(config_of(faces, tmp_path, epochs=1)).config.run.dir))
    assert line["grad_scale"] == 2.0 ** (16 - line["skipped_steps"])


def _two_ranks(rank: int) -> list[str]:
    watch = watch_of(2.0**40, DistributedEnv(rank, 2, torch.device("cpu")))
    terms = torch.tensor([math.nan, math.nan, 1.0]) if rank == 1 else FINITE
    said = ""
    try:
        for step in range(1, SKIPS_IN_A_ROW + 1):
            watch.after(step, False, terms, lambda: f"what rank {rank} finds" if rank else "")
    except DivergedError as error:
        said = str(error)
    return [said.split("; ")[1]]


@pytest.mark.extended
def test_all_processes_say_what_one_of_them_finds() -> None:
    expected = "first not finite (process 1): at step 1 what rank 1 finds"
    assert run_ranks(2, _two_ranks) == [[expected]] * 2


class Half(nn.Module):
    """Two layers, the second of which overflows in float16 where ``factor`` is large."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.wide = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.wide.weight, factor)
        self.act = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.wide(self.norm(x)).half().float())


def test_the_first_of_weights_layers_and_losses_is_named() -> None:
    images = torch.randn(8, 4)
    model = Half(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def found(terms: list[float]) -> str:
        return first_not_finite(model, images.split(4), torch.tensor(terms), nullcontext)

    assert found([1.0, 1.0, 0.0]) == ""
    assert found([math.nan, 1.0, math.nan]) == "the pair loss (nan), of finite features"
    assert found([math.inf, math.inf, 0.0]) == "the class loss (inf), of finite features"
    assert found([math.inf, 1.0, 1.0]) == "the loss (inf), of finite features"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.norm._forward_hooks
    with torch.no_grad():
        model.wide.weight.fill_(1e6)
    assert found([math.nan] * 3).startswith("the output of backbone.act (PReLU, float32")
    with torch.no_grad():
        model.wide.weight[0, 0] = math.inf
    assert found([math.nan] * 3) == "the weight backbone.wide.weight"


def test_gradients_are_searched_in_the_order_of_the_backward_pass() -> None:
    model, head = Half(1.0), nn.Embedding(6, 4, sparse=True)
    (model(torch.randn(8, 4)).sum() + head(torch.tensor([1, 2])).sum()).backward()
    assert first_bad_gradient((model, None, head)) == ""
    for name in ("norm.bias", "wide.weight"):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = math.nan
        assert first_bad_gradient((model, None, head)) == f"the gradient of {name}"
    assert head.weight.grad is not None
    head.weight.grad._values()[0, 0] = math.inf
    assert first_bad_gradient((model, None, head)) == "the gradient of weight"
