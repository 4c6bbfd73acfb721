"""Records read together: which federations there were, who knows what, what a resumption replaces."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from party_threads import ValidatedClassifier, data, fit_parties, quiet_trainer
from run_records import Clocked, done, start

from pellm_lightning import FederatedAveraging
from pellm_lightning.report.record import Validation
from pellm_lightning.report.runs import find, read

NAMES = ["a", "b", "c"]


def record_of(folder: Path, party: int) -> Clocked:
    return Clocked(folder / f"party-{party}" / "rounds.jsonl")


def written(folder: Path, party: int, names: list[str], rounds: int = 2, loss: float = 1.0) -> Clocked:
    record = record_of(folder, party)
    start(record.at(0), party, names)
    for index in range(rounds):
        record.at(10.0 * (index + 1)).round(
            done(index, range(len(names)), loss=loss - index), step=5 * (index + 1), epoch=0
        )
    record.end(None)
    return record


# ---- of real fits


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[FederatedAveraging]]:
    """A federation of two, and the second party alone."""
    folder = tmp_path_factory.mktemp("runs")
    callbacks: list[Any] = [None] * 2

    def together(party: int, federated: Any) -> None:
        callbacks[party] = federated(every_n_steps=2)
        trainer = quiet_trainer(folder / "federated", [callbacks[party]], max_steps=5)
        trainer.fit(
            ValidatedClassifier(seed=party), data(8 * (party + 1), seed=party), data(8, seed=9 + party)
        )

    def alone(_: int, federated: Any) -> None:
        trainer = quiet_trainer(folder / "alone-1", [federated(every_n_steps=2)], max_steps=5)
        trainer.fit(ValidatedClassifier(), data(16, seed=1), data(8, seed=9))

    fit_parties(2, together)
    fit_parties(1, alone)
    return folder, callbacks


def test_the_parties_of_a_fit_are_found_and_who_trained_alone(real: Any) -> None:
    folder, _ = real
    findings = find(folder)
    assert findings.fit.names == ("0", "1")
    assert list(findings.fit.records) == [0, 1]
    assert [other.folder.name for other in findings.baselines] == ["alone-1"]
    assert findings.notes == ()
    assert all(record.outcome == "finished" for record in findings.fit.records.values())


def test_all_is_read_that_the_rounds_reported(real: Any) -> None:
    folder, callbacks = real
    fit = find(folder).fit
    for party, callback in enumerate(callbacks):
        reports = {report.round: report for report in callback.rounds}
        assert fit.losses(party) == {
            k: r.local_loss for k, r in reports.items() if r.local_loss is not None
        } | {k: r.losses[party] for k, r in reports.items() if r.losses[party] is not None}
        assert fit.weights(party) == {k: r.weight for k, r in reports.items()}
        assert fit.distances(party) == pytest.approx({k: r.distance for k, r in reports.items()})
        assert fit.own(party, "update_norm") == {k: r.update_norm for k, r in reports.items()}
        assert fit.shared("loss") == {k: r.loss for k, r in reports.items() if r.loss is not None}
        record = fit.records[party]
        spent = sum((r.training_seconds or 0) + r.stalled_seconds for r in record.rounds.values())
        assert 0 < spent <= record.seconds
    assert list(fit.means()) == ["val_loss"]
    # 8 validation samples each: the mean over the parties is the plain mean.
    zero, one = (fit.local(party)["val_loss"][-1][1] for party in range(2))
    assert fit.means()["val_loss"][-1][1] == pytest.approx((zero + one) / 2, rel=1e-6)


def test_one_record_knows_what_its_party_was_told(real: Any, tmp_path: Path) -> None:
    folder, callbacks = real
    path = tmp_path / "party-1" / "rounds.jsonl"
    path.parent.mkdir()
    path.write_bytes((folder / "federated" / "party-1" / "rounds.jsonl").read_bytes())
    fit = find(tmp_path).fit
    assert fit.names == ("0", "1")
    assert list(fit.records) == [1]
    other = callbacks[0].rounds
    assert fit.weights(0) == {r.round: r.weight for r in other}
    # Of the last round nobody is told the distance any more.
    assert fit.distances(0) == pytest.approx({r.round: r.distance for r in other[:-1]})
    assert fit.own(0, "update_norm") == {}
    assert fit.local(0) == {}


# ---- of records made by hand


def test_a_resumption_replaces_what_came_after_its_round(tmp_path: Path) -> None:
    record = written(tmp_path, 0, NAMES, rounds=4)
    record.validation(Validation({"m": 9.0}, {"m": 9.0}, round=3, step=20, epoch=0))
    start(record.at(0), 0, NAMES, round=2, step=10)
    record.at(7).round(done(2, range(3), loss=0.5), step=15, epoch=0)
    record.validation(Validation({"m": 1.0}, {"m": 1.0}, round=2, step=15, epoch=0))
    fit = find(tmp_path).fit
    assert list(fit.rounds) == [0, 1, 2]
    assert fit.shared("loss") == {0: 1.0, 1: 0.0, 2: 0.5}
    assert fit.own(0, "step") == {0: 5, 1: 10, 2: 15}
    # 7 s since the start, of which the round stood still for 1.5.
    assert fit.rounds[2].training_seconds == pytest.approx(5.5, abs=0.7)
    assert [(v.round, value) for v, value in fit.means()["m"]] == [(2, 1.0)]
    assert len(fit.records[0].starts) == 2
    assert fit.records[0].outcome == "none recorded"
    assert fit.records[0].seconds == pytest.approx(40 + 7, abs=1)


def test_who_comes_back_without_a_checkpoint_goes_on_counting_steps(tmp_path: Path) -> None:
    record = written(tmp_path, 0, NAMES, rounds=3)
    start(record.at(0), 0, NAMES, round=5, step=0)
    record.at(4).round(done(5, range(3)), step=5, epoch=0)
    assert find(tmp_path).fit.own(0, "step") == {0: 5, 1: 10, 2: 15, 5: 20}


def test_a_fit_that_begins_anew_is_another(tmp_path: Path) -> None:
    written(tmp_path, 0, NAMES, rounds=4)
    written(tmp_path, 0, NAMES, rounds=2)
    findings = find(tmp_path)
    assert list(findings.fit.rounds) == [0, 1]
    assert len(findings.fit.records[0].starts) == 1
    assert findings.notes == ("The same files also hold 1 earlier fit, which began anew: not shown.",)


def test_distances_of_fragments_belong_to_the_round_of_the_same_fragment(tmp_path: Path) -> None:
    record = record_of(tmp_path, 0)
    start(record, 0, NAMES[:2], settings={"fragments": 2})
    for index in range(4):
        told = (None, None) if index < 2 else (3.0, 10.0 + index)
        record.round(done(index, [0, 1], distances=told), step=index, epoch=0)
    assert find(tmp_path).fit.distances(1) == {0: 12.0, 1: 13.0}


def test_what_became_of_each_party_in_a_round(tmp_path: Path) -> None:
    record = record_of(tmp_path, 0)
    start(record, 0, ["a", "b", "c", "d"])
    record.round(done(0, [0, 1, 3], excluded=(1,), weights=(2.0, 0.0, 0.0)), step=1, epoch=0)
    record.round(done(1, [0, 1], weights=(), losses=(), distances=(), weight=2.0), step=2, epoch=0)
    fit = find(tmp_path).fit
    assert [fit.state(party, 0) for party in range(4)] == ["counted", "left out", "absent", "weight 0"]
    # A masked exchange hides all weights but one's own.
    assert [fit.state(party, 1) for party in range(3)] == ["counted", "took part", "absent"]


def test_shares_are_what_a_robust_rule_made_of_the_weights(tmp_path: Path) -> None:
    record = record_of(tmp_path, 0)
    start(record, 0, ["a", "b", "c"])
    told = {"weights": (3.0, 1.0), "weight": 3.0, "total_weight": 4.0}
    record.round(done(0, [0, 2], **told, influence=(0.5, 0.25)), step=1, epoch=0)
    record.round(done(1, [0, 2], **told), step=2, epoch=0)
    record.round(done(2, [0, 2], **told | {"weights": ()}), step=3, epoch=0)  # of c unknown
    assert find(tmp_path).fit.shares() == {0: [0.5, 0.0, 0.25], 1: [0.75, 0.0, 0.25]}


def test_a_round_after_an_absence_does_not_call_all_of_it_training(tmp_path: Path) -> None:
    record = record_of(tmp_path, 0)
    start(record.at(0), 0, NAMES)
    record.at(10).round(done(0, range(3)), step=1, epoch=0)
    record.at(900).round(done(7, range(3)), step=2, epoch=0)
    rounds = find(tmp_path).fit.rounds
    assert rounds[0].training_seconds == pytest.approx(8.5, abs=0.7)
    assert rounds[7].training_seconds is None


def test_what_was_no_number_is_unknown(tmp_path: Path) -> None:
    record = record_of(tmp_path, 0)
    start(record, 0, NAMES[:2])
    record.round(done(0, [0, 1], update_norm=math.inf, loss=None, losses=(math.nan, 2.0)), step=1, epoch=0)
    fit = find(tmp_path).fit
    assert fit.own(0, "update_norm") == {}
    assert fit.shared("loss") == {}
    assert fit.losses(1) == {0: 2.0}


def test_records_gathered_from_several_institutions_are_one_federation(tmp_path: Path) -> None:
    for party, name in enumerate(NAMES):
        written(tmp_path / name / "runs", party, NAMES)
    assert list(find(tmp_path).fit.records) == [0, 1, 2]


def test_federations_of_different_folders_are_not_mixed(tmp_path: Path) -> None:
    for folder, loss in (("first", 1.0), ("second", 2.0)):
        for party in range(2):
            written(tmp_path / folder, party, NAMES[:2], loss=loss)
    with pytest.raises(ValueError, match=r"several federations. Name the folder of one:\n.*first: 2 parties"):
        find(tmp_path)
    assert find(tmp_path / "second").fit.shared("loss") == {0: 2.0, 1: 1.0}


def test_lines_of_another_process_are_counted_and_not_shown(tmp_path: Path) -> None:
    first = written(tmp_path, 0, NAMES, rounds=1)
    second = written(tmp_path, 0, NAMES, rounds=1, loss=5.0)
    # The first goes on beside it, then fails.
    first.round(done(0, range(3), loss=9.0), step=99, epoch=0)
    first.end("RuntimeError: too late")
    second.round(done(1, range(3), loss=4.0), step=10, epoch=0)
    findings = find(tmp_path)
    assert findings.fit.shared("loss") == {0: 5.0, 1: 4.0}
    assert findings.fit.records[0].failed is None
    assert findings.notes[1].startswith(
        "Another process wrote into the same files after this fit had begun: 2 lines of party-0/rounds.jsonl"
    )
    # Whoever resumes here has a record of its own.
    start(record_of(tmp_path, 0), 0, NAMES, round=2, step=10)
    assert find(tmp_path).notes == findings.notes[:1]


def test_who_never_met_is_brought_together_by_who_met_both(tmp_path: Path) -> None:
    """Of institutions of their own: the first was there for rounds 0 and 1, the second for 2 and 3."""
    for party, here in ((0, (0, 1)), (1, (2, 3)), (2, range(4))):
        record = Clocked(tmp_path / f"from-{NAMES[party]}" / "rounds.jsonl")
        start(record, party, NAMES)
        for index in here:
            record.round(done(index, [index // 2, 2], loss=1.0 / (index + 1)), step=index, epoch=0)
        record.end(None)
    assert list(find(tmp_path).fit.records) == [0, 1, 2]


def test_a_distance_that_is_told_after_an_absence_is_of_no_round_that_was_missed(tmp_path: Path) -> None:
    record = record_of(tmp_path, 0)
    start(record, 0, NAMES[:2])
    for index, here in enumerate(([0, 1], [0], [0, 1], [0, 1])):
        told = {"distances": (None, 10.0 + index)[: len(here)], "losses": (1.0, 1.0)[: len(here)]}
        record.round(done(index, here, weights=(1.0, 1.0)[: len(here)], **told), step=index, epoch=0)
    # What was told in round 2 is not of round 1, in which party 1 was away.
    assert find(tmp_path).fit.distances(1) == {2: 13.0}


def test_means_are_those_of_whoever_validates(tmp_path: Path) -> None:
    written(tmp_path, 0, NAMES[:2])
    record = record_of(tmp_path, 1)
    start(record, 1, NAMES[:2])
    record.round(done(0, [0, 1]), step=1, epoch=0)
    record.validation(Validation({"m": 1.0}, {"m": 3.0}, round=0, step=1, epoch=0))
    assert [value for _, value in find(tmp_path).fit.means()["m"]] == [3.0]


def test_a_mean_of_some_of_the_parties_is_none_of_all(tmp_path: Path) -> None:
    """Party 2 is away in round 1, which takes nothing from the mean; after round 2 party 1 is for itself."""
    for party in range(3):
        record = record_of(tmp_path, party)
        start(record, party, NAMES)
        for index in range(4):
            here = [0, 1] if index == 1 else [0, 1, 2]
            if party in here:
                record.round(done(index, here), step=index, epoch=0)
                mean = {"m": 9.0 if (index, party) == (2, 1) else 5.0 - index}
                record.validation(
                    Validation({"m": 1.0}, mean, round=index, step=10 * index + 3 * party, epoch=0)
                )
    fit = find(tmp_path).fit
    found = [(v.round, v.step, value) for v, value in fit.means()["m"]]
    # Parties 0, 1 and 2 stood 3 steps apart; in round 1 only 0 and 1.
    assert found == [(0, 3.0, 5.0), (1, 11.5, 4.0), (3, 33.0, 2.0)]
    assert len(fit.local(1)["m"]) == 4


def test_validations_that_a_resumption_repeats_are_there_once(tmp_path: Path) -> None:
    """In the middle of round 1 there is a checkpoint at step 7, and a validation at step 8."""
    record = record_of(tmp_path, 0)
    start(record, 0, NAMES)
    record.round(done(0, range(3)), step=5, epoch=0)
    for at in (6, 8):
        record.validation(Validation({"m": at}, {"m": at}, round=0, step=at, epoch=0))
    start(record, 0, NAMES, round=1, step=7)
    record.validation(Validation({"m": 80}, {"m": 80}, round=0, step=8, epoch=0))
    assert [value for _, value in find(tmp_path).fit.means()["m"]] == [6, 80]


def test_what_an_older_larger_federation_left_is_named_and_not_shown(tmp_path: Path) -> None:
    written(tmp_path, 2, NAMES)
    old = tmp_path / "party-2" / "rounds.jsonl"
    old.write_text(old.read_text().replace('"time": "20', '"time": "19'))
    for party in range(2):
        written(tmp_path, party, NAMES[:2])
    findings = find(tmp_path)
    assert findings.fit.names == ("a", "b")
    (note,) = findings.notes
    assert note.startswith("party-2/rounds.jsonl is of another fit, last written 19")


def test_fits_of_one_party_each_need_something_to_be_compared_with(tmp_path: Path) -> None:
    for place in ("one", "two"):
        start(Clocked(tmp_path / place / "rounds.jsonl"), 0, ["0"])
    with pytest.raises(ValueError, match="fits of one party each and no federation"):
        find(tmp_path)
    assert find(tmp_path / "one").fit.names == ("0",)


def test_a_folder_without_records_says_what_makes_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"no rounds\.jsonl in .*FederatedAveraging\(record=True\)"):
            find(folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"event": "end", "failed": None}, r"event 3 is not as a fit writes it \('run' is missing\)"),
        ({"event": "round", "time": "", "round": 1}, r"event 3 .* move it away"),
        ({"event": "round", "time": "", "round": 1, "loss": "low"}, r"event 3 "),
    ],
)
def test_a_record_that_was_edited_is_refused_by_name(
    tmp_path: Path, line: dict[str, Any], words: str
) -> None:
    record = record_of(tmp_path, 0)
    start(record, 0, NAMES)
    record.round(done(0, range(3)), step=1, epoch=0)
    with record.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=words):
        read(record.path)


def test_a_record_without_its_beginning_is_refused(tmp_path: Path) -> None:
    record = record_of(tmp_path, 0)
    record.round(done(0, range(3)), step=1, epoch=0)
    with pytest.raises(ValueError, match="event 1 is not as a fit writes it"):
        read(record.path)
    record.path.write_text("")
    with pytest.raises(ValueError, match="does not begin with the start of a fit"):
        read(record.path)
