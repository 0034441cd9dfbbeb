"""Train a face-recognition backbone.

python train/main.py key=value ... [--config file.yaml ...] [--resume [auto | checkpoint]]
python train/main.py key=value ... [--config file.yaml ...] --dry-run
torchrun --nproc_per_node=2 train/main.py key=value ...
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: sys.path[0] is train/, the package is one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.environment import prepare_environment
from train.errors import INTERRUPTED, Parser, UserError, exit_code
from train.stopping import SAME_SIGNAL_S, stop_on_signal

prepare_environment()


class _Parser(Parser):
    def format_help(self) -> str:
        from train.config import describe_keys

        return f"{super().format_help()}\nkeys, with their defaults:\n{describe_keys()}\n"


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, bool]:
    """The arguments, and whether to resume."""
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
    resume = arguments.resume is not None
    if resume and arguments.dry_run:
        raise UserError("--dry-run and --resume: a dry run takes its step from the start")
    # `--resume run.dir=x` means the default checkpoint and an override.
    if resume and "=" in arguments.resume and not Path(arguments.resume).exists():
        arguments.overrides.append(arguments.resume)
        arguments.resume = ""
    return arguments, resume


def load_config(argv: list[str]) -> tuple[Any, Path | None, dict[str, Any] | None]:
    """The configuration, and when resuming the checkpoint's path and contents.

    A resumed run starts from the configuration in its checkpoint; the run folder, unless named,
    is the one the checkpoint lies in.
    """
    from train import checkpoint
    from train.checkpoints import newest, read_or_earlier
    from train.config import (
        COMMAND_LINE,
        Config,
        make_config,
        of_a_run,
        parse_overrides,
        read_yaml,
    )

    arguments, resume = parse_arguments(argv)
    layers = []
    for path in arguments.config:
        layers.append((path, read_yaml(path)))
    layers.append((COMMAND_LINE, parse_overrides(arguments.overrides)))
    if not resume:
        return make_config(*layers), None, None
    sections = [values.get("run") for _, values in layers]
    named = [run["dir"] for run in sections if isinstance(run, dict) and "dir" in run]
    run_dir = named[-1] if named else Config().run.dir
    auto = arguments.resume == "auto"
    path = Path("" if auto else arguments.resume)
    if auto or not arguments.resume:
        path = checkpoint.last(Path(str(run_dir)))
    path = newest(path) if auto else checkpoint.found(path)
    if auto and not checkpoint.exists(path):
        return make_config(*layers), None, None
    path, values = read_or_earlier(path, take=auto)
    base = values["config"] = of_a_run(values["config"])
    # What "auto" would choose for this number of processes may not be what the checkpoint holds.
    sharded = "always" if checkpoint.is_sharded(path) else "never"
    base.setdefault("partial_fc", {})["enabled"] = sharded
    if path.parent.name == checkpoint.LAST.parent.name:
        base.setdefault("run", {})["dir"] = str(path.parent.parent)  # the run may have been moved
    return make_config((str(path), base), *layers), path, values


def run(argv: list[str]) -> int:
    config, resume_path, values = load_config(argv)
    arguments, _ = parse_arguments(argv)
    if arguments.dry_run:
        from train.dry_run import dry_run

        batch, processes = arguments.dry_run_batch, arguments.dry_run_processes
        return dry_run(config, batch=batch, processes=processes)
    from train.checkpoint import check_backbone
    from train.checkpoints import load_or_earlier
    from train.data.dataset import open_dataset
    from train.data.duplicates import check_duplicates
    from train.data.identities import check_same
    from train.distributed import open_world
    from train.engine import Trainer
    from train.evaluation.during import Evaluator
    from train.losses import headline
    from train.resuming import report
    from train.run_folder import RunFolder

    folder = Path(config.run.dir)
    owned = RunFolder(
        folder,
        # From the checkpoint of another run it is a run of its own.
        resume=resume_path is not None and resume_path.parent.parent.resolve() == folder.resolve(),
        overwrite=config.run.overwrite,
        auto=arguments.resume == "auto",
    )
    with owned, open_world(config.train.device, config.train.timeout_s) as world:
        if world.is_main:
            print(headline(config.loss, world.device), flush=True)
        world.from_main(owned.check)
        data = open_dataset(config, world.size)
        images = data.train.images
        check_same(world, "data.path", images)
        check_same(world, "data.path (people held out)", data.test)
        evaluator = Evaluator(config, world, data.test)
        tests = [data.test, *(test.source.images for test in evaluator.sets)]
        warning = world.from_main(lambda: check_duplicates(config.data.duplicates, images, tests))
        if warning and world.is_main:
            print(f"warning: {warning}", file=sys.stderr)
        if values is not None and resume_path is not None:
            check_backbone(values, path=resume_path, config=config)
        trainer = Trainer(config, world, data.train, load_weights=values is None)
        said = ""
        if values is not None and resume_path is not None:

            def load(values: dict[str, Any], path: Path) -> None:
                nonlocal said
                trainer.load_state(values, path)
                said = report(values, path, config, trainer.course, trainer.people, world.size)

            load_or_earlier(load, values, resume_path, take=arguments.resume == "auto")
        step = None if values is None else trainer.step
        world.check_same("the step of the checkpoint", str(step).encode())
        moved = world.from_main(lambda: owned.prepare(config, resume_step=step))
        if moved and world.is_main:
            print(f"what {folder} held was moved to {moved}")
        if said and world.is_main:
            print(said)
        if world.is_main:
            print(
                f"{len(images)} images of {len(images.identities)} identities, "
                f"{config.model.name} at {config.model.input_size}, "
                f"{world.size} process(es) on {world.device.type}, "
                f"{trainer.total_steps} steps; run folder {folder}"
            )
        with stop_on_signal(SAME_SIGNAL_S if world.size > 1 else 0.0) as received:
            stop = lambda step: received[0] if received else 0  # noqa: E731
            finished = trainer.fit(folder, stop, evaluator)
        for skipped in world.gather_objects(data.train.skipped):  # each decodes its own images
            data.train.skipped.update(skipped)
        if world.is_main:
            report_skipped(data.train.skipped)
        if not finished:
            if world.is_main:
                where = f"step {trainer.step} of {trainer.total_steps}"
                print(f"stopped at {where}; continue with --resume", file=sys.stderr)
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
    from train.html_report import write

    print(f"report: {write(folder)}")


def evaluate(trainer: Any, evaluator: Any, images: Any, folder: Path) -> None:
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
