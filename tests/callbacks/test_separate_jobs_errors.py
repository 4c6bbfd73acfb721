"""Bad input at one of several separate jobs: it is refused in words, at once, and the others go on."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from certificates import tls_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import Classifier, Connecting, Rounds, data, in_threads, linear, quiet_trainer

from pellm_lightning import Aggregator, FederatedAveraging, FederationError, Parameters, SeparateJobs
from pellm_lightning.comm import ElasticFederation, Membership, MismatchError
from pellm_lightning.comm.rendezvous.client import connect
from pellm_lightning.comm.rendezvous.server import RendezvousServer

ROSTER = ["a", "b", "c"]
# Far longer than any of these tests may take: nobody waits for a timeout.
WAIT_S = 30
SOON_S = 10


class Jobs:
    """Trainers as threads over one store, each a job of its own."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.store = dist.HashStore()
        self.results: dict[str, Any] = {}
        self.modules: dict[str, Any] = {}
        self.before: dict[str, torch.Tensor] = {}

    def fit(
        self,
        name: str,
        *,
        module: Any = None,
        loader: Any = None,
        roster: list[str] | None = None,
        membership: Mapping[str, Any] | None = None,
        tamper: Callable[[FederatedAveraging], None] = lambda callback: None,
        trainer: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        index = ord(name[0]) - ord("a")
        module = Classifier(seed=index) if module is None else module
        self.modules[name], self.before[name] = module, vector(module)
        roster = ROSTER if roster is None else roster
        patience = {"heartbeat_ttl_s": 0.6, "wait_s": WAIT_S, "round_timeout_s": WAIT_S} | dict(
            membership or {}
        )
        options = {"every_n_steps": 2} | options
        try:
            callback = Connecting(
                lambda: ElasticFederation(
                    lambda: self.store,
                    name,
                    roster,
                    quorum=options.get("quorum", "majority"),
                    membership=Membership(**patience),
                ),
                jobs=SeparateJobs("tcp://127.0.0.1:1", name, roster, state_dir=str(self.tmp_path / name)),
                **options,
            )
            tamper(callback)
            loader = data(16, seed=index) if loader is None else loader
            quiet_trainer(self.tmp_path, [callback], **{"max_epochs": 1, **(trainer or {})}).fit(
                module, loader
            )
            self.results[name] = module
        except BaseException as error:
            self.results[name] = error

    def run(self, roster: list[str] = ROSTER, **each: Mapping[str, Any]) -> None:
        """Fit all, each with its own options; it must be over soon."""
        started = time.monotonic()
        in_threads([partial(self.fit, name, **{"roster": roster, **each.get(name, {})}) for name in roster])
        assert time.monotonic() - started < SOON_S, f"somebody waited for a timeout: {self.results}"

    def refused(self, name: str) -> str:
        """Return the words by which a party was refused; nothing of its parameters has changed."""
        error = self.results[name]
        assert isinstance(error, MismatchError), repr(error)
        assert torch.equal(vector(self.modules[name]), self.before[name]), "a parameter changed"
        return str(error)

    def end_alike(self, *names: str) -> None:
        """These have finished, with the same parameters."""
        for name in names:
            assert not isinstance(self.results[name], BaseException), repr(self.results[name])
        vectors = [self.results[name].vector() for name in names]
        assert all(torch.equal(vectors[0], other) for other in vectors)
        assert all(not torch.equal(vectors[0], self.before[name][-vectors[0].numel() :]) for name in names)


def vector(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for p in module.parameters()]).clone()


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def wide() -> Classifier:
    module = Classifier()
    module.head = linear(16, 4, seed=0)
    return module


def half() -> Classifier:
    module = Classifier()
    module.head.to(torch.bfloat16)
    return module


def other_base() -> Classifier:
    module = Classifier()
    with torch.no_grad():
        module.base.weight[3, 2] += 1
    return module


# What differs, by what the odd one is given, and what must be said (b stands for any other party).
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"every_n_steps": 3}, "Party {} has every_n_steps=2, party {} has every_n_steps=3. Give all"),
    "epochs": (
        {"every_n_epochs": 2, "every_n_steps": None},
        "Party {} has every_n_epochs=None, party {} has every_n_epochs=2",
    ),
    "weighting": ({"weighting": 2.0}, "Party {} has weighting='samples', party {} has weighting='a number'"),
    "inner": (
        {"inner_optimizer_state": "reset"},
        "Party {} has inner_optimizer_state='keep', party {} has inner_optimizer_state='reset'",
    ),
    "nonfinite": (
        {"on_nonfinite": "raise"},
        "Party {} has on_nonfinite='exclude', party {} has on_nonfinite='raise'",
    ),
    "outer": (
        {"outer_optimizer": partial(torch.optim.Adam, lr=0.7)},
        "party {1} has outer_optimizer='Adam(",
    ),
    "include": (
        {"parameters": Parameters(include=["*.weight"])},
        "Party {0} trains parameter 'head.bias', party {1} does not (2 parameters at party {0}, 1 at party"
        " {1})",
    ),
    "exclude": (
        {"parameters": Parameters(exclude=["*.bias"])},
        "Party {} trains parameter 'head.bias', party {} does not",
    ),
    "base unchecked": (
        {"parameters": Parameters(check_frozen=False)},
        "Party {1} has check_frozen=False, the other has not",
    ),
    "shape": (
        {"module": wide},
        "Parameter 'head.bias' is float32 of shape [3] at party {} but float32 of shape [4] at party {}",
    ),
    "dtype": (
        {"module": half},
        "Parameter 'head.bias' is float32 of shape [3] at party {} but bfloat16 of shape [3] at party {}",
    ),
    "base": (
        {"module": other_base},
        "The frozen base model of party {1} is not that of party {0}: the first tensor that differs is"
        " 'base.weight'",
    ),
    "roster's order": (
        {"roster": ["c", "a", "b"]},
        "Party {} has roster='a, b, c', party {} has roster='c, a, b'",
    ),
    "roster's length": (
        {"roster": ["a", "b", "c", "d"]},
        "Party {} has roster='a, b, c', party {} has roster='a, b, c, d'",
    ),
    "quorum": ({"quorum": 3}, "Party {} has quorum=2, party {} has quorum=3"),
}


def made(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value() if key == "module" else value for key, value in options.items()}


@pytest.mark.parametrize("what", ODD)
def test_the_odd_one_is_refused_and_the_others_go_on(jobs: Jobs, what: str) -> None:
    options, message = ODD[what]
    jobs.run(c=made(options))
    said = jobs.refused("c")
    assert any(message.format(other, "c") in said for other in "ab"), said
    jobs.end_alike("a", "b")


@pytest.mark.parametrize("odd", ROSTER)
def test_whoever_it_is(jobs: Jobs, odd: str) -> None:
    jobs.run(**{odd: {"weighting": "uniform"}})
    said = jobs.refused(odd)
    others = [name for name in ROSTER if name != odd]
    message = "Party {} has weighting='samples', party {} has weighting='uniform'"
    assert any(message.format(other, odd) in said for other in others), said
    jobs.end_alike(*others)


@pytest.mark.parametrize("what", ["steps", "shape", "base", "roster's order"])
def test_two_that_differ_are_both_refused(jobs: Jobs, what: str) -> None:
    options = made(ODD[what][0])
    if "roster" in options:
        options["roster"] = ["b", "a"]
    jobs.run(["a", "b"], b=options)
    for name in "ab":
        said = jobs.refused(name)
        assert "party a" in said.lower(), said
        assert "party b" in said.lower(), said


def test_three_that_differ_are_all_refused(jobs: Jobs) -> None:
    jobs.run(b={"every_n_steps": 3}, c={"every_n_steps": 4})
    for name in ROSTER:
        assert f"arty {name} has every_n_steps=" in jobs.refused(name)


# ---- bad data


class Poisoned(Classifier):
    """Its head holds NaN after the first step."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.global_step == 0:
            with torch.no_grad():
                self.head.weight[1, 2] = float("nan")


def test_a_party_with_nan_is_left_out_and_healed(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    jobs.run(**{name: {"every_n_steps": 1} for name in "ab"}, c={"every_n_steps": 1, "module": Poisoned(2)})
    jobs.end_alike("a", "b", "c")
    assert torch.isfinite(jobs.results["a"].vector()).all()
    assert "Round 0: the parameters of party c hold NaN or infinity" in caplog.text


def test_nan_that_may_not_be_stops_all(jobs: Jobs) -> None:
    options = {"every_n_steps": 1, "on_nonfinite": "raise"}
    jobs.run(a=options, b=options, c=options | {"module": Poisoned(2)})
    for name in ROSTER:
        assert isinstance(jobs.results[name], FederationError)
        assert "the parameters of party c hold NaN or infinity" in str(jobs.results[name])
        assert "No parameter was changed" in str(jobs.results[name])


def test_no_weight_anywhere_stops_all(jobs: Jobs) -> None:
    jobs.run(**{name: {"weighting": 0.0} for name in ROSTER})
    for name in ROSTER:
        assert "No party has weight above 0 in round 0" in str(jobs.results[name])


def test_a_party_without_weight_follows(jobs: Jobs) -> None:
    jobs.run(**{name: {"weighting": float(name != "c")} for name in ROSTER})
    jobs.end_alike("a", "b", "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"parameters": Parameters(include=["lora"])},
            "The include pattern 'lora' matches none of the 2 trainable parameters",
        ),
        (
            {"module": lambda: Frozen().requires_grad_(False)},
            "No parameter of the module requires a gradient",
        ),
    ],
)
def test_a_party_with_nothing_to_share_is_told(jobs: Jobs, options: dict[str, Any], message: str) -> None:
    """It never comes to meet, so the others wait for it as for one that is starting up: here 1 s."""
    brief = {"membership": {"wait_s": 1.0}}
    jobs.run(a=brief, b=brief, c=brief | made(options))
    assert isinstance(jobs.results["c"], MisconfigurationException | ValueError)
    assert f"Party c: {message}" in str(jobs.results["c"])
    jobs.end_alike("a", "b")


class Frozen(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.skipif(
    not hasattr(dist.HashStore, "list_keys"), reason="the stores of this torch do not list their keys"
)
def test_of_two_parties_that_write_to_the_same_file_one_is_refused(jobs: Jobs) -> None:
    class Shared(Rounds):
        @property
        def log_dir(self) -> str:
            return str(jobs.tmp_path / "shared")

    # Whoever sees the other's passport leaves before it has come to meet: here the others wait 1 s for it.
    brief = {"membership": {"wait_s": 1.0}}
    others = [threading.Thread(target=partial(jobs.fit, name, **brief)) for name in "a"]
    first = threading.Thread(target=partial(jobs.fit, "b", trainer={"logger": Shared()}, **brief))
    for thread in (*others, first):
        thread.start()
    shown_by_b = soon(lambda: any(key.endswith("party_spec/@b") for key in jobs.store.list_keys()))
    jobs.fit("c", trainer={"logger": Shared()}, **brief)
    for thread in (*others, first):
        thread.join()
    assert shown_by_b
    assert "Parties b and c would both write to" in jobs.refused("c")
    jobs.end_alike("a", "b")


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


# ---- one name twice


def test_of_one_name_twice_at_the_same_time_the_second_is_refused(jobs: Jobs) -> None:
    started, over = threading.Event(), threading.Event()

    class Holds(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                started.set()
                assert over.wait(20)

    threads = [
        threading.Thread(target=partial(jobs.fit, name, module=Holds(index)))
        for index, name in enumerate(ROSTER)
    ]
    for thread in threads:
        thread.start()
    assert started.wait(20)
    twin = Jobs(jobs.tmp_path / "twin")
    twin.store = jobs.store
    twin.fit("b")
    over.set()
    for thread in threads:
        thread.join()
    assert "A process that runs as party b is there already" in str(twin.results["b"])
    jobs.end_alike("a", "b", "c")


def member(store: Any, name: str, roster: list[str] = ROSTER, **membership: Any) -> ElasticFederation:
    patience = {"heartbeat_ttl_s": 0.6, "wait_s": 5} | membership
    return ElasticFederation(lambda: store, name, roster, membership=Membership(**patience))


@pytest.mark.parametrize("before", ["nothing", "a farewell", "a dead one's sign"])
def test_of_one_name_twice_at_the_very_start_one_is_refused(before: str) -> None:
    """Whoever writes anything beside the one that goes on overwrites what that has said, for good."""
    store = AtOnce(dist.HashStore(), "at/@a")
    if before != "nothing":
        first = member(store, "a", ["a"])
        first.abort("it had to")
        if before == "a dead one's sign":
            store.set(f"{first._register.life}/at/@a", '{"incarnation":"of one that is gone"}')
    store.meet = threading.Barrier(2)
    came: list[Any] = []

    def start() -> None:
        try:
            came.append(member(store, "a", ["a"]))
        except FederationError as error:
            came.append(str(error))

    in_threads([start, start])
    words = [one for one in came if isinstance(one, str)]
    (left,) = (one for one in came if not isinstance(one, str))
    assert left.join_quorum("metadata", None, {}).members == ["a"]
    left.close()
    assert len(words) == 1
    assert "A process that runs as party a is there already" in words[0]


class AtOnce:
    """A store at which two ask for a key for the first time at the same time."""

    def __init__(self, store: Any, key: str) -> None:
        self._store, self._key, self.meet = store, key, threading.Barrier(1)
        self._came = threading.local()

    def compare_set(self, key: str, expected: str, desired: str) -> Any:
        found = self._store.compare_set(key, expected, desired)
        if key.endswith(self._key) and not getattr(self._came, "once", self.meet.parties == 1):
            self._came.once = True
            self.meet.wait(5)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_who_was_taken_for_dead_and_replaced_stops_when_it_wakes_up() -> None:
    """A process that was stopped for a while must not go on beside the one that was started in its place."""
    store = Sleeper(dist.HashStore())
    first = member(store, "a", ["a"])
    store.sleep()
    second = member(store.of_others, "a", ["a"])
    sign = store.of_others.get(f"{second._register.life}/at/@a")
    store.wake()
    with pytest.raises(FederationError, match="Another process has taken the place of party a"):
        first.join_quorum("metadata", None, {})
    first.abort("it was replaced")
    assert second.join_quorum("metadata", None, {}).members == ["a"]
    assert b"left" not in store.of_others.get(f"{second._register.life}/at/@a"), sign
    second.close()


class Sleeper:
    """A store as a process sees it that can be stopped."""

    def __init__(self, store: Any) -> None:
        self.of_others = store
        self._awake = threading.Event()
        self._awake.set()

    def sleep(self) -> None:
        self._awake.clear()
        time.sleep(0.3)

    def wake(self) -> None:
        self._awake.set()

    def __getattr__(self, name: str) -> Any:
        act = getattr(self.of_others, name)

        def acts(*arguments: Any) -> Any:
            self._awake.wait()
            return act(*arguments)

        return acts


@pytest.mark.parametrize("left", ["in order", "killed"])
def test_a_name_can_be_taken_again(left: str) -> None:
    store = Sleeper(dist.HashStore())
    first = member(store, "a", ["a"])
    if left == "killed":
        store.sleep()
    else:
        first.abort("done")
    started = time.monotonic()
    second = member(store.of_others, "a", ["a"])
    assert time.monotonic() - started < (1 if left == "killed" else 0.2)
    assert second.join_quorum("metadata", None, {}).members == ["a"]
    second.close()
    store.wake()
    first.abort("done")


# ---- the way to the others


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Something else listens: it says ``answer`` to whoever comes, or hangs up if that is None."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    with sock, contextlib.suppress(OSError):
                        if answer is not None:
                            sock.recv(100)
                            sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def refused_to_join(address: str, tls: Any = None) -> str:
    """Return why a party cannot join; nothing of it is left."""
    threads = set(threading.enumerate())
    connects = partial(connect, f"tcp://{address}", tls=tls, retry_s=0.5)
    with pytest.raises(FederationError) as caught:
        ElasticFederation(connects, "a", ["a", "b"], membership=Membership(wait_s=0.5), tls=tls)
    assert not set(threading.enumerate()) - threads, "a thread is left"
    return str(caught.value)


def test_something_else_listens() -> None:
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        said = refused_to_join(address)
    assert f"The server at {address} is not this federation's rendezvous" in said
    assert "Check the address" in said


def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with listening(None) as address:
        pass
    said = refused_to_join(address)
    assert "Party a could not join. The rendezvous at " + address in said
    assert "Connection refused" in said
    assert "[party a] waits for the rendezvous" in caplog.text


@pytest.mark.parametrize("encrypted", ["rendezvous", "party"])
def test_tls_at_one_end_only(encrypted: str) -> None:
    ours, theirs = (tls_of(name) if encrypted == which else None for which, name in ENDS.items())
    with RendezvousServer("127.0.0.1", 0, roster=["a", "b"], tls=theirs) as server:
        said = refused_to_join(server.address, ours)
    assert server.address in said
    assert "TLS" in said or "does not admit this party" in said


ENDS = {"party": "a", "rendezvous": "rendezvous"}


def test_a_certificate_of_a_foreign_authority() -> None:
    with RendezvousServer("127.0.0.1", 0, roster=["a", "b"], tls=tls_of("rendezvous")) as server:
        said = refused_to_join(server.address, tls_of("a", "foreign"))
    assert "its certificate is not accepted" in said
    assert "ca.pem" in said


def test_a_name_that_is_not_on_the_rendezvous_roster() -> None:
    with RendezvousServer("127.0.0.1", 0, roster=["b", "c"], tls=tls_of("rendezvous")) as server:
        said = refused_to_join(server.address, tls_of("a"))
    assert "does not admit this party (as 'a'" in said
    assert "name is on its roster" in said


# ---- versions and patience


def test_another_version_of_the_protocol(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    party_spec = Aggregator.party_spec

    def of_another_version(self: Aggregator) -> dict[str, Any]:
        return party_spec(self) | ({"protocol": 99} if self.federation.name == "c" else {})

    monkeypatch.setattr(Aggregator, "party_spec", of_another_version)
    jobs.run()
    assert "Party c speaks protocol version 99, party" in jobs.refused("c")
    jobs.end_alike("a", "b")


def test_patience_may_differ(jobs: Jobs) -> None:
    jobs.run(
        a={"membership": {"round_timeout_s": 5.0}},
        b={"membership": {"heartbeat_ttl_s": 1.0, "on_party_loss": "stop"}},
        c={"membership": {"wait_s": 9.0, "exchange_timeout_s": 7.0}},
    )
    jobs.end_alike("a", "b", "c")
