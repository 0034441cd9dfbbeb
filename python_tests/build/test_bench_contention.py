"""``python -m bench.contention`` on tiny shapes: results are complete, the neighbor is gone."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from support.helpers import ROOT
from support.ranks import forkserver

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import contention
from bench.implementations import implementations


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    forkserver()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.extended
def test_results_of_every_state_and_implementation(tmp_path: Path, monkeypatch) -> None:
    started = []
    made = contention.Neighbor.__init__

    def kept(self, *arguments: int) -> None:
        made(self, *arguments)
        started.append(self._process.pid)

    monkeypatch.setattr(contention.Neighbor, "__init__", kept)
    names = ("small", "class-50k")
    out = ("--quick", "--seconds", "0", "--threads", "1", "--out", str(tmp_path))
    contention.main([*names, *out])
    (pid,) = started
    assert not _alive(pid)
    results = json.loads((tmp_path / "contention.json").read_text())
    assert results["neighbor"] == {"threads": 1, "niceness": 10}
    assert {"processor", "threads", "torch"} <= results["machine"].keys()
    assert results["command"].startswith("python -m bench.contention small class-50k")
    assert tuple(results["workloads"]) == names
    for result in results["workloads"].values():
        for state in contention.STATES:
            rows = result[state]
            assert tuple(rows) == contention.DEFAULT_IMPLEMENTATIONS
            for name, row in rows.items():
                low, high = row["spread_s"]
                assert 0.0 < low <= row["median_s"] <= high
                assert row["samples"] >= contention.LEAST_ROUNDS
                assert ("speedup" in row) == (name != "native")
            low, high = rows["eager"]["speedup_quartiles"]
            assert 0.0 < low <= rows["eager"]["speedup"] <= high
    page = (tmp_path / "contention.md").read_text()
    assert page == contention.page(results)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(names) * len(contention.DEFAULT_IMPLEMENTATIONS)
    assert {line.count("|") for line in rows} == {7}


def test_a_failure_is_a_row_and_the_neighbor_only_works_when_busy() -> None:
    """Workloads that cannot run are reported; a stopped process does not use the processor."""
    neighbor = contention.Neighbor(1, 10)
    pid = neighbor._process.pid
    try:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists():
            pytest.skip("no /proc")

        def becomes(stopped: bool) -> bool:
            """A signal takes effect when the kernel comes to it."""
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                if (state.read_text().rsplit(")", 1)[1].split()[0] == "T") == stopped:
                    return True
                time.sleep(0.01)
            return False

        with neighbor.during("idle"):
            assert becomes(stopped=True)
        with neighbor.during("busy"):
            assert becomes(stopped=False)
            assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
        assert becomes(stopped=True)
        missing = contention.measure(
            contention.CHOICE["small"], ("native", "absent"), neighbor, 0.0
        )
        assert "absent" in missing["failed"]
        results = {"command": "", "machine": {}, "neighbor": {"threads": 1, "niceness": 10}}
        assert "failed: " in contention.page({**results, "workloads": {"small": missing}})
    finally:
        neighbor.close()
    assert not _alive(pid)


@pytest.mark.parametrize(
    "arguments", [["absent"], ["small", "--implementations", "absent"], ["--quick"]]
)
def test_what_it_cannot_measure_is_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        contention.main(arguments)
    assert "absent" in capsys.readouterr().err or "--quick" in arguments


def test_the_default_workloads_have_the_default_implementations() -> None:
    for name in contention.DEFAULT:
        known = implementations(contention.CHOICE[name])
        assert set(contention.DEFAULT_IMPLEMENTATIONS) <= known.keys()
