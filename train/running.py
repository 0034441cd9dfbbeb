"""A training run from its configuration to its report."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from train import checkpoint
from train.config import Config
from train.data.dataset import open_dataset
from train.data.duplicates import check_duplicates
from train.data.identities import check_same
from train.data.image_list import ImageList
from train.distributed import open_world
from train.errors import INTERRUPTED
from train.evaluation.during import Evaluator
from train.losses import headline
from train.resuming import report
from train.run_folder import RunFolder
from train.starting.start import load_start
from train.stopping import SAME_SIGNAL_S, stop_on_signal
from train.trackers import check_installed
from train.trainer import Trainer


def train(config: Config, path: Path | None, values: dict[str, Any] | None, *, auto: bool) -> int:
    """The exit code; a resumed run has the path and the contents of its checkpoint."""
    folder = Path(config.run.dir)
    run_folder = RunFolder(
        folder,
        # From the checkpoint of another run it is a run of its own.
        resume=path is not None and path.parent.parent.resolve() == folder.resolve(),
        overwrite=config.run.overwrite,
        auto=auto,
    )
    with run_folder, open_world(config.train.device, config.train.timeout_s) as world:
        world.print(headline(config.loss, world.device))
        world.from_main(lambda: check_installed(config))
        world.from_main(run_folder.check)
        data = open_dataset(config, world.size)
        images = data.train.images
        check_same(world, "data.path", images)
        check_same(world, "data.path (people held out)", data.test)
        evaluator = Evaluator(config, world, data.test)
        tests = [data.test, *(test.source.images for test in evaluator.sets)]
        warning = world.from_main(lambda: check_duplicates(config.data.duplicates, images, tests))
        if warning:
            world.print(f"warning: {warning}", file=sys.stderr)
        if values is not None and path is not None:
            checkpoint.check_backbone(values, path=path, config=config)
        trainer = Trainer(config, world, data.train)
        difference = ""
        if values is None and (started := load_start(trainer)):
            world.print(started)
        if values is not None and path is not None:
            held, path = checkpoint.load_or_earlier(trainer.load_state, values, path, take=auto)
            difference = report(held, path, config, trainer.course, trainer.people, world.size)
        step = None if values is None else trainer.step
        world.check_same("the step of the checkpoint", step)
        moved = world.from_main(lambda: run_folder.prepare(config, resume_step=step))
        if moved:
            world.print(f"what {folder} held was moved to {moved}")
        if difference:
            world.print(difference)
        world.print(
            f"{len(images)} images of {len(images.identities)} identities, "
            f"{config.model.name} at {config.model.input_size}, "
            f"{world.size} process(es) on {world.device.type}, "
            f"{trainer.total_steps} steps; run folder {folder}"
        )
        with stop_on_signal(SAME_SIGNAL_S if world.size > 1 else 0.0):
            finished = trainer.fit(folder, evaluator=evaluator)
        for skipped in world.gather_objects(data.train.skipped):  # each decodes its own images
            data.train.skipped.update(skipped)
        if world.is_main:
            report_skipped(data.train.skipped)
        if not finished:
            where = f"step {trainer.step} of {trainer.total_steps}"
            world.print(f"stopped at {where}; continue with --resume", file=sys.stderr)
            # A scheduler that preempts a job takes another code for a failure.
            return 0 if trainer.stopped_by == signal.SIGTERM else INTERRUPTED
        if len(data.test):
            evaluate(trainer, evaluator, data.test, folder)
        if world.is_main and config.run.report:
            write_report(folder)
        world.barrier()
    return 0


def report_skipped(skipped: dict[str, str]) -> None:
    if skipped:
        print(f"skipped {len(skipped)} unreadable image(s):", file=sys.stderr)
        for message in skipped.values():
            print(f"  {message}", file=sys.stderr)


def write_report(folder: Path) -> None:
    from train.tools.run_report import write  # matplotlib: slow to import

    print(f"report: {write(folder)}")


def evaluate(trainer: Trainer, evaluator: Evaluator, images: ImageList, folder: Path) -> None:
    """Score all pairs of the people held out; write and print what comes out."""
    threshold = trainer.threshold()
    result = evaluator.report_held_out(folder, trainer.evaluated, threshold, trainer.step)
    if not trainer.world.is_main:
        return
    for test in evaluator.sets:
        report_skipped(test.source.skipped)
    if result is None:
        print("no evaluation: the people held out give no positive or no negative pairs")
        return
    print(f"{len(images.identities)} identities held out, {result.pairs} pairs: {result}")
