"""Reports of results that are at hand, without a training."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from support.training import ROOT

from train.evaluation.verification import Verification
from train.tools import comparison


def write_comparison(folder: Path) -> Path:
    """The committed comparison of losses, as a page and as text."""
    folder.mkdir()
    stored = json.loads((ROOT / "bench/results/losses.json").read_text())
    sets = []
    for name, values in stored["sets"].items():
        images = comparison.ImageSet(name, [], values["epochs"], 1)
        images.about = {key: value for key, value in values.items() if key != "results"}
        for entry, results in values["results"].items():
            known = ({f.name: result[f.name] for f in fields(Verification)} for result in results)
            found = {seed: Verification(**result) for seed, result in enumerate(known)}
            images.rows[entry] = comparison.Row(found)
        sets.append(images)
    comparison.write_report(folder, sets, {"smoke": False, "seeds": stored["seeds"]})
    return folder / "report.html"
