"""Every public object can be pickled and copied: Trainers are sent to spawned processes, sweeps and jobs."""

import copy
import importlib
import inspect
import pickle
import pkgutil
import threading
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from certificates import tls_of
from lightning.pytorch import Callback, Trainer
from party_threads import Classifier, ValidatedClassifier, data, quiet_trainer
from peft import LoraConfig
from secure_exchange import masked
from torch import Tensor, nn

import pellm_lightning
from pellm_lightning import (
    Aggregator,
    FederatedAveraging,
    FederatedCLI,
    FederatedLoop,
    Federation,
    Overlap,
    RoundReport,
    Simulation,
)
from pellm_lightning.aggregation import Deviation, LoraModule, LowRankMean
from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.callbacks.drift import SCAFFOLD, FedDyn, FedNova, FedProx
from pellm_lightning.comm import TLS, ElasticFederation, Membership, QuorumResult, Version
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.engine.optim import OptimizerConfig, Yogi
from pellm_lightning.exchange import Quantized, SecureAggregation, TopK
from pellm_lightning.privacy import AdaptiveClipping, GaussianMechanism, Noise
from pellm_lightning.report.bar import FederationProgressBar
from pellm_lightning.report.record import RunRecord
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.tasks import CausalLM, ClassificationDataModule, TextClassification, TextDataModule


def round_trip(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize("copied", [round_trip, copy.deepcopy], ids=["pickle", "deepcopy"])


def same(first: Any, second: Any) -> bool:
    """Tell whether two objects hold the same, all the way down."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return same(list(first), list(second)) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, threading.Event):
        return first.is_set() == second.is_set()
    if first == second or first is second:
        return True
    return hasattr(first, "__dict__") and same(vars(first), vars(second))


def plain(thing: Any) -> Any:
    """Return what an object holds, without what is only kept to save time."""
    if isinstance(thing, torch.optim.Optimizer):
        return thing.state_dict()
    if not hasattr(thing, "__dict__"):
        return thing
    cached = {name for name, value in vars(type(thing)).items() if isinstance(value, cached_property)}
    return {name: value for name, value in vars(thing).items() if name not in cached}


# ---- the public names

# What the documentation lets people import from modules that list no names.
ALSO = {
    "pellm_lightning.engine.optim": ("OptimizerConfig", "Yogi"),
    "pellm_lightning.engine.outer_optimizer": ("sgd_one",),
    "pellm_lightning.report.bar": ("FederationProgressBar",),
    "pellm_lightning.report.record": ("RunRecord",),
    "pellm_lightning.report.run_summary": ("RunSummary",),
    "pellm_lightning.loop.schedule": ("schedule",),
    "pellm_lightning.comm.topology": ("Topology",),
    "pellm_lightning.comm.elastic.separate_jobs": ("SeparateJobs",),
}


def public() -> dict[str, Any]:
    """Every name that a package of ours lists, by its dotted name."""
    walked = pkgutil.walk_packages(pellm_lightning.__path__, "pellm_lightning.")
    packages = ["pellm_lightning", *(info.name for info in walked if info.ispkg)]
    listed = {name: getattr(importlib.import_module(name), "__all__", ()) for name in packages}
    return {
        f"{module}.{name}".removeprefix("pellm_lightning."): getattr(importlib.import_module(module), name)
        for module, names in (listed | ALSO).items()
        for name in names
    }


def is_made(thing: Any) -> bool:
    """Tell whether users make objects of it."""
    return inspect.isclass(thing) and not inspect.isabstract(thing) and thing is not FederatedCLI


PUBLIC = public()
MADE = {name: thing for name, thing in PUBLIC.items() if is_made(thing)}
# Connections of this process, and what holds them.
LIVE = {
    name: thing
    for name, thing in MADE.items()
    if issubclass(thing, Federation | ElasticFederation | Aggregator)
}
OF_A_MODULE = {name for name, thing in MADE.items() if thing is FederatedLoop}
"""As good as the module that they hold."""


def federation() -> Federation:
    return Federation(dist.HashStore(), 0, 1)


def report() -> RoundReport:
    deviation = Deviation(0.5, 0.75, "q_proj.default")
    parameters = inspect.signature(RoundReport).parameters.values()
    needed = {p.name: index for index, p in enumerate(parameters) if p.default is p.empty}
    return RoundReport(**needed | {"parties": (0, 1), "excluded": (1,), "deviation": deviation})


EXAMPLES: dict[Any, Callable[[], Any]] = {
    RunSummary: lambda: RunSummary(["a", "b"], {"exchange": "Plain()"}),
    CausalLM: lambda: CausalLM("folder", LoraConfig(r=2)),
    ClassificationDataModule: lambda: ClassificationDataModule("*.jsonl", "folder", ["a", "b"]),
    Deviation: lambda: Deviation(0.5, 0.75, "q_proj.default"),
    FederatedAveraging: lambda: FederatedAveraging(
        every_n_steps=4,
        overlap=Overlap(2),
        aggregation=LowRankMean(),
        exchange=Quantized(),
        outer_optimizer=partial(torch.optim.SGD, lr=0.7),
        jobs=SeparateJobs("tcp://127.0.0.1:1", "a", ["a", "b"], tls=tls_of("a"), membership=Membership()),
    ),
    FedDyn: lambda: FedDyn(0.1),
    FedProx: lambda: FedProx(0.1),
    GaussianMechanism: lambda: GaussianMechanism(1.0, 0.5, adaptive=AdaptiveClipping()),
    SeparateJobs: lambda: SeparateJobs("tcp://127.0.0.1:1", "a", ("a", "b"), tls=tls_of("a")),
    Simulation: lambda: Simulation(num_parties=9, sampled=0.5),
    LoraModule: lambda: LoraModule(2.0, torch.ones(2, 3)),
    SecureAggregation: masked,
    OptimizerConfig: lambda: OptimizerConfig("torch.optim.Adam", {"lr": 0.5}),
    Overlap: lambda: Overlap(delay_steps=3, mix=0.25),
    QuorumResult: lambda: QuorumResult({"a": {"round": 1}}),
    RunRecord: lambda: RunRecord("rounds.jsonl"),
    DPSGD: lambda: DPSGD(1.0, 1.0),
    RoundReport: report,
    TLS: lambda: tls_of("a"),
    TextClassification: lambda: TextClassification("folder", 3, LoraConfig(r=2)),
    TextDataModule: lambda: TextDataModule("*.txt", "folder"),
    TopK: lambda: TopK(k=4),
    Version: lambda: Version("l", 1, 2),
    Yogi: lambda: Yogi([nn.Parameter(torch.ones(2))]),
}


def example(made: Any) -> Any:
    """Return an object of a public class: an example of ours, or one of all defaults."""
    if issubclass(made, BaseException):
        return made("party 2 left")
    if made in EXAMPLES:
        return EXAMPLES[made]()
    try:
        return made()
    except TypeError as error:
        pytest.fail(f"{made.__name__} is public but not tried here: add one to EXAMPLES ({error}).")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_found_again(name: str) -> None:
    """As pickle does: by module and name, or, if it is an object, by what it is made of."""
    assert same(round_trip(PUBLIC[name]), PUBLIC[name])


@COPIES
@pytest.mark.parametrize("name", sorted(MADE.keys() - LIVE.keys() - OF_A_MODULE))
def test_public_objects(name: str, copied: Callable[[Any], Any]) -> None:
    made = example(MADE[name])
    again = copied(made)
    assert type(again) is type(made)
    assert same(plain(again), plain(made))
    if type(made).__repr__ is not object.__repr__ and " at 0x" not in repr(made):
        assert repr(again) == repr(made)


@pytest.mark.parametrize("name", PUBLIC)
def test_no_default_is_nameless(name: str) -> None:
    """A lambda can neither be pickled nor compared."""
    if not callable(PUBLIC[name]):
        return
    try:
        parameters = inspect.signature(PUBLIC[name]).parameters.values()
    except ValueError:  # built in
        return
    for parameter in parameters:
        if parameter.default is not parameter.empty:
            assert getattr(parameter.default, "__name__", "") != "<lambda>", parameter
            assert same(round_trip(parameter.default), parameter.default), parameter


@COPIES
@pytest.mark.parametrize("name", sorted(LIVE))
def test_connections_say_why_they_cannot_be_sent(name: str, copied: Callable[[Any], Any]) -> None:
    if issubclass(LIVE[name], ElasticFederation):
        live: Any = ElasticFederation.__new__(ElasticFederation)
    else:
        joined = federation()
        live = joined if LIVE[name] is Federation else Aggregator(joined, {"w": torch.ones(2)})
    with pytest.raises(
        TypeError, match=r"A joined federation cannot be pickled or copied.*connect"
    ) as caught:
        copied(live)
    assert type(caught.value) is TypeError


# ---- before, in and after a fit


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "federated": list,
    "scaffold": lambda: [SCAFFOLD()],
    "feddyn": lambda: [FedDyn(0.1)],
    "fednova": lambda: [FedNova()],
    "fedprox": lambda: [FedProx(0.1)],
    "record level": lambda: [DPSGD(1.0, 1.0)],
}


@COPIES
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus
@pytest.mark.parametrize("others", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks_after_a_fit(tmp_path: Path, others: Any, copied: Callable[[Any], Any]) -> None:
    """The copy has the state of the fit, and its own fit is that of the original."""
    weighting: Any = "uniform" if others is CALLBACKS["record level"] else "samples"
    callbacks = [FederatedAveraging(weighting=weighting), *others()]
    quiet_trainer(tmp_path, callbacks).fit(Classifier(seed=1), data(8, seed=1))
    for callback in callbacks:
        again = copied(callback)
        assert same(again.state_dict(), callback.state_dict())
        assert len(again.rounds) == 2 if isinstance(again, FederatedAveraging) else True
        assert "Classifier" not in str(pickle.dumps(callback)), "the module is not the callback's"


@COPIES
def test_a_copied_callback_trains_alike(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    callback = FederatedAveraging(every_n_steps=1, outer_optimizer=partial(torch.optim.SGD, lr=0.5))
    modules = [Classifier(seed=1), Classifier(seed=1), Classifier(seed=1)]
    for module, used in zip(modules, (copied(callback), callback, copied(callback)), strict=True):
        quiet_trainer(tmp_path, [used]).fit(module, data(8, seed=1))
    assert all(torch.equal(module.vector(), modules[0].vector()) for module in modules)


def test_a_callback_may_be_copied_in_the_middle_of_a_fit_and_after_one_that_failed(tmp_path: Path) -> None:
    """What belongs to this process stays here: connections, threads, the module."""
    copies: list[Any] = []

    class Copying(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            for callback in trainer.callbacks[:2]:
                copies.extend([round_trip(callback), copy.deepcopy(callback)])
            raise ZeroDivisionError

    callbacks = [FederatedAveraging(), SCAFFOLD(), Copying()]
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(tmp_path, callbacks).fit(Classifier(), data(8, seed=1))
    copies.append(round_trip(callbacks[0]))
    for used in copies:
        if isinstance(used, FederatedAveraging):
            module = Classifier()
            quiet_trainer(tmp_path, [used], max_epochs=1).fit(module, data(8, seed=1))
            assert len(used.rounds) == 1


@COPIES
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning's own, as it copies the CombinedLoader
def test_a_trainer_before_and_after_its_fit(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    trainer = quiet_trainer(
        tmp_path, [FederatedAveraging(), FederationProgressBar()], enable_progress_bar=True
    )
    copied(trainer)
    trainer.fit(ValidatedClassifier(seed=1), data(8, seed=1), data(4, seed=2))
    again = copied(trainer)
    (callback,) = [c for c in again.callbacks if isinstance(c, FederatedAveraging)]
    assert len(callback.rounds) == 2


def test_certificates_are_read_anew(tmp_path: Path) -> None:
    """Contexts of TLS cannot be sent; the files can be read where the copy arrives."""
    tls = tls_of("a")
    assert tls.name == "a"  # the contexts are there now
    again = round_trip(tls)
    assert again == tls
    assert again.name == "a"
    assert again.client_context is not tls.client_context


def test_noise_of_copies_differs() -> None:
    """Copies are sent to parties, whose noise must not be the same."""
    noise = Noise()
    drawn = [round_trip(noise).add_(torch.zeros(4), 1.0) for _ in range(2)]
    assert not torch.equal(*drawn)
