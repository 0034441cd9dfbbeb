"""Train a face-recognition backbone.

python train/main.py key=value ... [--config file.yaml ...] [--resume [auto | checkpoint]]
python train/main.py key=value ... [--config file.yaml ...] --dry-run
torchrun --nproc_per_node=2 train/main.py key=value ...

``python -m train`` and ``torchrun -m train`` do the same where the package can be imported.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from train import checkpoint
from train.config import (
    COMMAND_LINE,
    Config,
    describe_keys,
    make_config,
    of_a_run,
    parse_overrides,
    read_yaml,
)
from train.data.dataset import open_dataset
from train.data.duplicates import check_duplicates
from train.data.identities import check_same
from train.data.image_list import ImageList
from train.distributed import open_world
from train.errors import INTERRUPTED, Parser, UserError, exit_code
from train.evaluation.during import Evaluator
from train.losses import headline
from train.resuming import report
from train.run_folder import RunFolder
from train.stopping import SAME_SIGNAL_S, stop_on_signal
from train.tools.dry_run import dry_run
from train.trainer import Trainer


class _Parser(Parser):
    def format_help(self) -> str:
        return f"{super().format_help()}\nkeys, with their defaults:\n{describe_keys()}\n"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments; ``resume`` is None, "auto", a path, or empty for the checkpoint of run.dir."""
    parser = _Parser(
        prog="train/main.py",
        description="Train a face-recognition backbone on a folder of images per identity.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the keys below")
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file of keys, under the arguments; of several the later ones win",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take one step on made-up images, say what the run would take",
    )
    parser.add_argument("--dry-run-batch", type=int, default=4, metavar="N", help="images of it")
    parser.add_argument(
        "--dry-run-processes", type=int, default=1, metavar="N", help="processes of the run"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="continue from a checkpoint, or the last one of a run's folder; default: that of"
        " run.dir; auto: from that, or from the beginning as long as there is none",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume is not None and arguments.dry_run:
        raise UserError("--dry-run and --resume: a dry run takes its step from the start")
    # `--resume run.dir=x` means the default checkpoint and an override.
    if arguments.resume and "=" in arguments.resume and not Path(arguments.resume).exists():
        arguments.overrides.append(arguments.resume)
        arguments.resume = ""
    return arguments


def load_config(argv: list[str]) -> tuple[Config, Path | None, dict[str, Any] | None]:
    """The configuration, and when resuming the checkpoint's path and contents.

    A resumed run starts from the configuration in its checkpoint; the run folder, unless named,
    is the one the checkpoint lies in.
    """
    arguments = parse_arguments(argv)
    layers = [(path, read_yaml(path)) for path in arguments.config]
    layers.append((COMMAND_LINE, parse_overrides(arguments.overrides)))
    if arguments.resume is None:
        return make_config(*layers), None, None
    auto = arguments.resume == "auto"
    if auto or not arguments.resume:
        sections = [values.get("run") for _, values in layers]
        named = [run["dir"] for run in sections if isinstance(run, dict) and "dir" in run]
        path = checkpoint.last(Path(str(named[-1] if named else Config().run.dir)))
    else:
        path = Path(arguments.resume)
    path = checkpoint.newest(path) if auto else checkpoint.found(path)
    if auto and not checkpoint.exists(path):
        return make_config(*layers), None, None
    path, values = checkpoint.read_or_earlier(path, take=auto)
    base = values["config"] = of_a_run(values["config"])
    # What "auto" would choose for this number of processes may not be what the checkpoint holds.
    sharded = "always" if checkpoint.is_sharded(path) else "never"
    base.setdefault("partial_fc", {})["enabled"] = sharded
    if path.parent.name == checkpoint.LAST.parent.name:
        base.setdefault("run", {})["dir"] = str(path.parent.parent)  # the run may have been moved
    return make_config((str(path), base), *layers), path, values


def run(argv: list[str]) -> int:
    config, path, values = load_config(argv)
    arguments = parse_arguments(argv)
    if arguments.dry_run:
        batch, processes = arguments.dry_run_batch, arguments.dry_run_processes
        return dry_run(config, batch=batch, processes=processes)
    folder, auto = Path(config.run.dir), arguments.resume == "auto"
    run_folder = RunFolder(
        folder,
        # From the checkpoint of another run it is a run of its own.
        resume=path is not None and path.parent.parent.resolve() == folder.resolve(),
        overwrite=config.run.overwrite,
        auto=auto,
    )
    with run_folder, open_world(config.train.device, config.train.timeout_s) as world:
        world.print(headline(config.loss, world.device))
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
        trainer = Trainer(config, world, data.train, load_weights=values is None)
        difference = ""
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


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
