"""The record of a fit: what is written, line by line, and read again."""

import json
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from party_threads import Classifier, ValidatedClassifier, data, fit_parties, quiet_trainer
from run_records import done, start

from pellm_lightning import FederatedAveraging
from pellm_lightning.report.record import (
    EventHeader,
    Round,
    RunRecord,
    Validation,
    events,
    parse,
    parse_event,
)
from pellm_lightning.tensors.deviation import Deviation


def fit(folder: Path, parties: int = 2, **arguments: Any) -> list[FederatedAveraging]:
    callbacks: list[Any] = [None] * parties

    def one(party: int, federated: Any) -> None:
        callbacks[party] = federated(every_n_steps=2, **arguments)
        train, val = data(8 * (party + 1), seed=party), data(8, seed=9)
        logger = CSVLogger(folder / "csv")
        trainer = quiet_trainer(folder, [callbacks[party]], max_steps=5, logger=logger)
        trainer.fit(ValidatedClassifier(seed=party), train, val)

    fit_parties(parties, one)
    return callbacks


def test_each_party_writes_what_its_rounds_did(tmp_path: Path) -> None:
    callbacks = fit(tmp_path)
    for party, callback in enumerate(callbacks):
        first, *middle, last = events(tmp_path / f"party-{party}" / "rounds.jsonl")
        assert (first["event"], last["event"], last["failed"]) == ("start", "end", None)
        assert (first["party"], first["name"], first["parties"]) == (party, str(party), ["0", "1"])
        assert (first["leaving"], first["parameters"]) == (51, 195)
        assert first["versions"]["torch"] == version("torch")
        assert first["settings"]["every_n_steps"] == 2
        assert first["settings"]["exchange"] == "Plain()"
        rounds = [event for event in middle if event["event"] == "round"]
        assert [event["round"] for event in rounds] == [report.round for report in callback.rounds]
        assert rounds[0]["parties"] == [0, 1]
        assert len(rounds) >= 3
        clock = [event["elapsed_seconds"] for event in (first, *middle, last)]
        assert clock == sorted(clock)
        assert [event["seconds"] for event in rounds] == [report.seconds for report in callback.rounds]
        for event, report in zip(rounds, callback.rounds, strict=True):
            assert event["weights"] == list(report.weights)
            assert event["update_norm"] == report.update_norm
            assert event["losses"] == list(report.losses)
            assert event["losses"][party] == report.local_loss
    # What one party did is what the other was told of it in the next round.
    of_zero, of_one = (callback.rounds for callback in callbacks)
    for before, after in zip(of_one, of_zero[1:], strict=False):
        assert after.distances[1] == pytest.approx(before.distance, rel=1e-12)


def test_validations_are_those_of_this_party_and_of_all(tmp_path: Path) -> None:
    fit(tmp_path)
    found = []
    for party in range(2):
        validations = [
            event
            for event in events(tmp_path / f"party-{party}" / "rounds.jsonl")
            if event["event"] == "validation"
        ]
        assert validations
        found.append(validations[-1])
    # Both hold the same parameters and the same validation data, so the mean is what each has.
    local, mean = found[0]["local"]["val_loss"], found[0]["mean"]["val_loss"]
    assert found[0]["mean"] == found[1]["mean"]
    assert local == pytest.approx(mean, rel=1e-6)


def test_nothing_is_written_if_told_so(tmp_path: Path) -> None:
    fit(tmp_path, record=False)
    assert not list(tmp_path.rglob("rounds.jsonl"))


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (RuntimeError("the lights went out"), "RuntimeError: the lights went out"),
        (MemoryError(), "MemoryError"),
    ],
    ids=["with words", "without"],
)
def test_a_failure_is_the_last_word(failure: Exception, told: str, tmp_path: Path) -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 3:
                raise failure
            return super().training_step(batch, batch_idx)

    def one(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=2)], max_steps=5)
        with pytest.raises(type(failure)):
            trainer.fit(Broken(), data(16, seed=0))

    fit_parties(1, one)
    *_, last = events(tmp_path / "rounds.jsonl")
    assert last["failed"] == told


def test_a_resumed_fit_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for _ in range(2):
        fit(tmp_path, parties=1)
    starts = [event for event in events(tmp_path / "rounds.jsonl") if event["event"] == "start"]
    assert len(starts) == 2


def test_what_is_no_number_is_null_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "deep" / "rounds.jsonl")
    record.validation(Validation({"a": math.nan, "b": 1.5}, {}, round=-1, step=1, epoch=0))
    record.end(None)
    with record.path.open("a") as file:
        file.write('{"event": "rou')
    first, last = events(record.path)
    assert first["local"] == {"a": None, "b": 1.5}
    assert last["event"] == "end"
    with record.path.open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="line 3 is no event"):
        list(events(record.path))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "rounds.jsonl")
    report = done(3, [0, 2], deviation=Deviation(0.5, 0.75, "q_proj"), update_norm=math.inf, loss=None)
    validation = Validation({"a": 1.5}, {}, round=3, step=7, epoch=0)
    start(record, 0, ["a", "b", "c"], round=3)
    record.round(report, step=7, epoch=0)
    record.validation(validation)
    record.end("why")
    (_, first), (header, second), (_, third), (_, last) = map(parse_event, events(record.path))
    assert (first.parties, first.settings["exchange"]) == (("a", "b", "c"), "Plain()")
    assert isinstance(header, EventHeader)
    assert isinstance(second, Round)
    assert second.training_seconds == 0  # the round stood still for longer than since the start
    assert math.isnan(second.update_norm)  # JSON has no infinity
    assert {**vars(second), "update_norm": math.inf}.items() >= vars(report).items()
    assert third == validation
    assert last.failed == "why"


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Validation, {"local": {}, "mean": {}, "round": 0, "step": 1}, "'epoch' is missing"),
        (Validation, {"local": {"m": "x"}, "mean": {}, "round": 0, "step": 1, "epoch": 0}, "'m' is 'x'"),
        (tuple[int, ...], [1, 2.5], "2.5, expected int"),
        (tuple[int, ...], {"a": 1}, "expected tuple"),
        (int, True, "True, expected int"),
        (str | None, 3, "3, expected str"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused(kind: Any, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(kind, value)


def test_an_event_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="event is 'stop', expected one of start, round, validation, end"):
        parse_event({"event": "stop", "run": "a", "time": "", "elapsed_seconds": 0})


def test_a_fit_that_goes_on_after_a_torn_line_loses_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    RunRecord(path).end(None)
    with path.open("a") as file:
        file.write('{"event": "rou')
    start(RunRecord(path), 0, ["a"])
    RunRecord(path).end("again")
    assert [event["event"] for event in events(path)] == ["end", "start", "end"]
    with path.open("ab") as file:
        file.write(b'{"event": "rou\xff\x00')  # what a disk may leave when its host went down
    assert len(list(events(path))) == 3


def test_a_full_disk_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "pellm_lightning")
    (tmp_path / "rounds.jsonl").mkdir()  # where a file should be
    (callback,) = fit(tmp_path, parties=1)
    assert len(callback.rounds) >= 2
    warned = [r.getMessage() for r in caplog.records if "rounds.jsonl" in r.getMessage()]
    assert len(warned) == 1
    assert "Training continues" in warned[0]


def test_a_folder_that_is_no_local_one_is_told_and_not_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "pellm_lightning")
    monkeypatch.chdir(tmp_path)
    start(RunRecord("s3://bucket/runs/rounds.jsonl"), 0, ["a"])
    assert not list(tmp_path.iterdir())
    assert "s3://bucket/runs/rounds.jsonl is in no local folder" in caplog.text


def test_lines_are_json(tmp_path: Path) -> None:
    fit(tmp_path, parties=1)
    for line in (tmp_path / "rounds.jsonl").read_text().splitlines():
        assert json.loads(line)["time"].endswith("+00:00")
