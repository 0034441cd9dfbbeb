"""The demo's report: one table, three plots, and what they are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.orl import CREDIT
from train.evaluation.verification import FOLDS, Verification
from train.run_folder import write_json, write_text

# What a comparison of losses leaves for this report: its table, with a caption.
LOSSES_TABLE = "table.md"


@dataclass(frozen=True)
class Setup:
    """What the reader must know to repeat the numbers."""

    smoke: bool
    train_identities: int
    train_images: int
    test_identities: int
    test_images: int
    model: str
    epochs: int
    seed: int
    seconds: Mapping[str, float]  # training time of each run
    commands: Mapping[str, str]


def layout(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def table(results: Mapping[str, Verification]) -> str:
    """The comparison as a Markdown table."""
    fars = list(next(iter(results.values())).tar_at_far)
    header = [
        "method",
        "accuracy",
        "AUC",
        *(f"TAR@FAR={f}" for f in fars),
        "accuracy at b/s",
        "b/s",
    ]
    rows = []
    for name, r in results.items():
        learned = ["-", "-"]
        if r.threshold is not None and r.accuracy_at_threshold is not None:
            learned = [f"{r.accuracy_at_threshold:.3f}", f"{r.threshold:.3f}"]
        rates = [r.rates()[f] for f in fars]
        accuracy = f"{r.accuracy:.3f}"
        if r.accuracy_std is not None:
            accuracy += f" ± {r.accuracy_std:.3f}"
        rows.append([name, accuracy, f"{r.auc:.3f}", *rates, *learned])
    return layout(header, rows)


def verdict(results: Mapping[str, Verification], trained: list[str]) -> str:
    """Whether every trained model beats every baseline, in figures, whatever the outcome."""
    baselines = [r for name, r in results.items() if name not in trained]
    auc, accuracy = max(r.auc for r in baselines), max(r.accuracy for r in baselines)
    lines = []
    for name in trained:
        r = results[name]
        lines.append(
            f"- {name}: AUC {r.auc:.3f} against {auc:.3f} of the better baseline "
            f"({'better' if r.auc > auc else 'NOT better'}), accuracy {r.accuracy:.3f} against "
            f"{accuracy:.3f} ({'better' if r.accuracy > accuracy else 'NOT better'})."
        )
    return "\n".join(lines)


def other_losses(path: Path, folder: Path) -> str:
    """The section with the comparison of losses, as far as one has been made, for ``folder``."""
    if not path.is_file():
        return "`make losses` compares more losses on the same people."
    link = Path(os.path.relpath(path.parent / "report.md", folder)).as_posix()
    return f"{path.read_text().strip()}\n\n[How it was made]({link})."


def markdown(
    results: Mapping[str, Verification], trained: list[str], setup: Setup, losses: str
) -> str:
    any_result = next(iter(results.values()))
    smoke = (
        "> **Smoke run.** A few epochs, to see that everything works: the trained models' "
        "figures mean nothing. Run without `--quick` for real ones.\n\n"
        if setup.smoke
        else ""
    )
    times = ", ".join(f"{name}: {seconds:.0f} s" for name, seconds in setup.seconds.items())
    commands = "\n".join(f"    {command}" for command in setup.commands.values())
    return f"""# Face verification on people never seen in training

{smoke}{setup.train_identities} people ({setup.train_images} photographs) of the ORL database \
train the models; the other {setup.test_identities} people ({setup.test_images} photographs) are \
never seen. All {any_result.pairs} pairs of the latter are scored: {any_result.positives} of the \
same person, {any_result.pairs - any_result.positives} of different ones. The split is fixed: \
people are ordered s1, s2, ..., s40 and the last {setup.test_identities} are the test.

{table(results)}

{verdict(results, trained)}

- *accuracy*: balanced (mean of the accuracies on positive and on negative pairs; chance is 0.5), \
{FOLDS}-fold over pairs: the threshold is the best one of the other folds. Mean ± standard \
deviation over folds.
- *TAR@FAR*: share of positive pairs accepted where at most that share of negative pairs is.
- *accuracy at b/s*: balanced accuracy at the threshold that USS learned on the training people, \
with nothing fitted on the test people. The training people's images are packed more tightly \
than those of people never seen, so expect less than at a threshold fitted to the latter.
- *raw pixels*: cosine of gray images minus the mean training image. *PCA*: cosine of \
eigenface coordinates, fitted on the training people. *CosFace* and *CosFace + USS-m*: cosine of \
{setup.model} features, summed over the image and its mirror image.
- With this few people a different seed or split moves the figures by a few hundredths: compare \
methods by more than that.

![ROC](roc.png)

![Scores of positive and negative pairs](histograms.png)

![Loss and learned threshold](loss.png)

## Other losses

{losses}

## How it was made

{setup.model}, {setup.epochs} epochs, seed {setup.seed}. Training time: {times}.
Each run on its own:

{commands}

{CREDIT}
"""


def write_report(
    folder: Path,
    results: Mapping[str, Verification],
    trained: list[str],
    setup: Setup,
    *,
    losses: Path,
) -> None:
    """``report.json`` and ``report.md``; ``losses`` is where a comparison's table would be."""
    values: dict[str, Any] = {
        "smoke": setup.smoke,
        "model": setup.model,
        "epochs": setup.epochs,
        "seed": setup.seed,
        "train_identities": setup.train_identities,
        "train_images": setup.train_images,
        "test_identities": setup.test_identities,
        "test_images": setup.test_images,
        "training_seconds": {k: round(v, 1) for k, v in setup.seconds.items()},
        "results": {name: r.to_dict() for name, r in results.items()},
        "credit": CREDIT,
    }
    write_json(folder / "report.json", values)
    text = markdown(results, trained, setup, other_losses(losses, folder))
    write_text(folder / "report.md", text)
