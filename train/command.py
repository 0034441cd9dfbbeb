"""The command line of a training run. The rest of it is imported once the arguments are right."""

from __future__ import annotations

import argparse
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
from train.errors import Parser, UserError
from train.own_loss import refuse_stored


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
        help="build everything, take two steps on synthetic images, print what the run would take",
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
    refuse_stored(base, layers, str(path))
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
        from train.tools.dry_run import dry_run

        return dry_run(config, batch=arguments.dry_run_batch, processes=arguments.dry_run_processes)
    from train.running import train

    return train(config, path, values, auto=arguments.resume == "auto")
