"""The driver of `benchmarks/peers`: its bookkeeping, with contenders that need no own environment."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_server import python
from paths import BENCHMARKS

_PEERS = BENCHMARKS / "peers"
_NAMES = ("shapes", "payload", "memory", "environments", "round_times", "round_times_report")
_NAMES += ("training_report",)


@pytest.fixture(scope="module")
def peers() -> Any:
    """The driver's modules, which find one another by bare names, as scripts do."""
    places = [str(_PEERS), str(_PEERS.parent)]
    sys.path[:0] = places
    yield {name: importlib.import_module(name) for name in _NAMES}
    for place in places:
        sys.path.remove(place)
    for name in _NAMES:
        del sys.modules[name]


def session_of(peers: Any, folder: Path, **changes: Any) -> Any:
    given = {
        "case": "tiny",
        "parties": 2,
        "rounds": 1,
        "weighted": True,
        "variant": "",
        "ports": (),
    } | changes
    return peers["payload"].Session(str(folder), **given)


def arrays_of(session: Any) -> list[np.ndarray]:
    return [np.empty(shape, np.float32) for shape in session.shapes]


class TestParty:
    def test_the_error_of_a_result_is_its_distance_from_the_weighted_mean(
        self, peers: Any, tmp_path: Path
    ) -> None:
        session = session_of(peers, tmp_path)
        parties = [peers["payload"].Party(session, index) for index in range(2)]
        own = [arrays_of(session) for _ in parties]
        for party, arrays in zip(parties, own, strict=True):
            party.fill_(arrays, 0)
        # Weights 1 and 2.
        mean = [(a.astype(np.float64) + 2.0 * b) / 3 for a, b in zip(*own, strict=True)]
        plain = [(a + b) / 2 for a, b in zip(*own, strict=True)]
        parties[0].have(0, mean)
        parties[1].have(0, plain)
        errors = [session.events(party, "have")[0]["error"] for party in range(2)]
        # plain - mean = (a - b) / 6: of independent values of variance 1 that has 2/36, the mean 5/9.
        assert errors[0] == 0
        assert errors[1] == pytest.approx((2 / 36 / (5 / 9)) ** 0.5, rel=0.1)

    def test_values_differ_by_party_round_and_array(self, peers: Any, tmp_path: Path) -> None:
        session = session_of(peers, tmp_path, rounds=2)
        seen = set()
        for party in range(2):
            for round in range(2):
                arrays = arrays_of(session)
                peers["payload"].Party(session, party).fill_(arrays, round)
                seen |= {array.tobytes()[:64] for array in arrays}
        assert len(seen) == 2 * 2 * len(session.shapes)

    def test_a_party_waits_for_all_before_it_is_ready(
        self, peers: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(peers["payload"], "_MEETING_S", 0.05)
        session = session_of(peers, tmp_path)
        parties = [peers["payload"].Party(session, index) for index in range(2)]
        with pytest.raises(TimeoutError, match=r"Party 0 waited .* for 0-1 \(round-party\)"):
            parties[0].ready(0)
        parties[1].ready(0)
        parties[0].ready(0)
        assert session.events(0, "ready")[0]["at"] > session.events(1, "ready")[0]["at"]
        assert not session.finished()


class TestWatch:
    def test_it_knows_a_role_s_memory_and_ends_what_is_left(self, peers: Any, tmp_path: Path) -> None:
        watch = peers["memory"].Watch(json.dumps(str(tmp_path)))
        watch.start()
        script = "import time; held = b'1' * 50_000_000; time.sleep(60)"
        marked = os.environ | session_of(peers, tmp_path).to_env() | {"PEERS_ROLE": "party-1"}
        started = subprocess.Popen([sys.executable, "-S", "-c", script], env=marked)
        unmarked = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        try:
            end = time.monotonic() + 20
            while watch.peaks.get("party-1", 0) < 50e6 and time.monotonic() < end:
                time.sleep(0.05)
            watch.stop()
            watch.end_what_is_left()
            assert started.wait(5) < 0
            assert unmarked.poll() is None
        finally:
            for process in (started, unmarked):
                process.kill()
                process.wait()
        assert set(watch.peaks) == {"party-1"}
        assert 50e6 < watch.peaks["party-1"] < 90e6


class TestDriver:
    def row(self, peers: Any, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
        (contender,) = (c for c in peers["round_times"].CONTENDERS if c.name == name)
        contender = replace(contender, **changes)
        return peers["round_times"].row(contender, python(), "tiny", 2, folder)

    @pytest.mark.torchrun
    def test_each_gives_the_mean_and_its_figures(self, peers: Any, tmp_path: Path) -> None:
        names = ["raw all-reduce", "ours", "PeriodicModelAverager"]
        rows = [self.row(peers, tmp_path, name) for name in names]
        for row in rows:
            assert row["failure"] is None, row
            assert len(row["seconds"]) == 2  # of three rounds the first does not count
            assert all(0 < seconds < 10 for seconds in row["seconds"])
            assert 0 < row["error"] < 1e-6
        assert [row["weighted"] for row in rows] == [True, True, False]
        table = peers["round_times_report"].times(rows, "raw all-reduce").splitlines()
        assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == names
        assert ", 1x" in table[2]

    @pytest.mark.torchrun
    def test_another_mean_than_the_right_one_is_told(self, peers: Any, tmp_path: Path) -> None:
        row = self.row(peers, tmp_path, "PeriodicModelAverager", weighted=True)
        assert "its mean is off by" in row["failure"]
        assert (tmp_path / "failed" / "party-0.jsonl").exists()
        assert peers["round_times_report"].seconds_of([row], row["contender"], (row["megabytes"], 2)) == []

    def test_a_process_that_fails_is_told(self, peers: Any, tmp_path: Path) -> None:
        row = self.row(peers, tmp_path, "ours", script="is_not_there.py")
        assert row["failure"].startswith("a process of it ended with")

    def test_a_peer_that_does_not_install_is_skipped_with_the_reason(
        self, peers: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
    ) -> None:
        def refuse(name: str, folder: Path) -> str:
            raise peers["environments"].NotInstalled("ERROR: no such wheel")

        monkeypatch.setattr(peers["round_times"], "python_of", refuse)
        contenders = peers["round_times"].chosen(["Flower"])
        assert peers["round_times"].installed(contenders, tmp_path) == {}
        assert "Flower, deployment is skipped" in capsys.readouterr().out

    def test_ratios_are_of_medians(self, peers: Any) -> None:
        assert peers["round_times_report"].time_of([0.2, 0.4, 0.6], [0.1]) == "400 ms (200 to 600), 4x"
        assert peers["round_times_report"].time_of([12.0], [0.1]) == "12 s (12 to 12), 120x"
        assert peers["round_times_report"].time_of([], [0.1]) == ""

    def test_memory_in_adapters_leaves_out_the_programs(self, peers: Any) -> None:
        common = {"contender": "ours", "parties": 2, "failure": None, "server_bytes": 0}
        small = common | {"megabytes": 2.0, "party_bytes": 300e6}
        large = common | {"megabytes": 162.0, "party_bytes": 620e6}
        # (620 - 300) / (162 - 2)
        assert peers["round_times_report"].in_adapters([small, large], "ours") == "2.0"


def run_of(who: str, seed: int, accuracy: list[float], wall_s: float) -> dict[str, Any]:
    """A run of two rounds that took 18 and 12 seconds."""
    found = {"who": who, "optimizer": "adamw", "rule": "mean", "seed": seed, "accuracy": accuracy}
    found |= {"loss": [1.0, 0.7, 0.5 + seed], "apart": None, "wall_s": wall_s, "rounds_s": [18.0, 12.0]}
    return found | {"sent_bytes": 2e6, "server_bytes": 0}


class TestTraining:
    def test_runs_that_differ_in_their_seed_are_one_line(self, peers: Any) -> None:
        rows = [run_of("ours", 0, [0.3, 0.4, 0.5], 40), run_of("Flower", 0, [0.3, 0.3, 0.4], 50)]
        rows += [run_of("ours", 1, [0.4, 0.6, 0.8], 44)]
        _, _, ours, flower = (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in peers["training_report"].table(rows).splitlines()
        )
        assert ours[3:8] == ["35.0", "50.0", "65.0", "50.0, 80.0", "1.0000"]
        assert ours[9:12] == ["42", "12.0", "2.0"]  # the first round does not count
        assert flower[3:8] == ["30.0", "30.0", "40.0", "40.0, 40.0", "0.5000"]
        by_round, by_time = peers["training_report"].draw(rows).axes
        assert len(by_round.lines) == 5  # three runs, and the means of two
        assert list(by_time.lines[0].get_xdata()) == [12, 30, 42]
