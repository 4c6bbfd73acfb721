"""Every block of code in the documents does what the page says: run, or parsed by what would run it."""

import argparse
import json
import math
import os
import re
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from command_line import QUIET
from document_blocks import PAGES, ROOT, Block, blocks, commands_of, found_in, script_of, syntax_error
from jsonargparse import capture_parser
from lora_module import Tuned
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from party_threads import data, in_threads
from small_module import LittleData
from torch import nn
from torch.distributed.run import get_args_parser

from pellm_lightning import FederatedAveraging, FederatedCLI, Federation, __version__
from pellm_lightning.cli import commands, results, verify
from pellm_lightning.cli.main import MODULES as COMMANDS
from pellm_lightning.comm.rendezvous.server import RendezvousServer

pytestmark = [
    # Lightning calls jsonargparse in a way that has gone out of use.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # PEFT takes its own defaults, as jsonargparse gives them, for given.
    pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored:UserWarning"),
    # Of going on where an earlier fit has ended.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    # Of a script that asks for it at its first start, too.
    pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint'),
    # Of Opacus' hooks on a first layer, whose input needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = ("console", "bash")
KNOWN = (*SHELL, "python", "yaml", "diff", "json", "text")
DIRECTIVES = ("{eval-rst}", "{toctree}", "{figure}", "{image}", "{note}", "{list-table}", "{math}")
DIRECTIVES += ("{include}", "{literalinclude}")
"""Sphinx checks these: it builds the documents without a warning."""
ADDRESSES = ("host-a", "10.8.0.1", "10.8.0.2")
"""Hosts of the documents; in a test they are this one."""


def in_words(value: Any) -> str:
    return "\n".join(value)


# ---- what there is


def test_every_block_is_of_a_known_kind() -> None:
    assert len(BLOCKS) > 50
    unknown = [f"{block.name}: {block.language!r}" for block in BLOCKS if block.language not in KNOWN]
    unknown = [line for line in unknown if not any(repr(known) in line for known in DIRECTIVES)]
    assert not unknown, "give these a language whose blocks are tested:\n" + in_words(unknown)


def test_text_is_no_code_that_escapes() -> None:
    for block in BLOCKS:
        if block.language == "text":
            code = re.search(r"^(\$ |import |from \S+ import |python |torchrun )", block.text, re.MULTILINE)
            assert code is None, f"{block.name} is {code.group()!r} and not text"


def test_what_is_not_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody but a reader of this list knows whether these are right."""
    known = {"not run", "not fitted", "over", "parties", "rank", "at", "receives"}
    assert not [f"{block.name}: {block.marks}" for block in BLOCKS if block.marks.keys() - known]
    skipped = [block for block in BLOCKS if block.not_run is not None]
    assert not [block.name for block in skipped if len(block.not_run or "") < 10]
    with capsys.disabled():
        print(f"\n{len(skipped)} of {len(BLOCKS)} blocks of the documents are not run:")
        print(in_words(f"  {block.name}: {block.not_run}" for block in skipped))


# ---- pages


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator["Reader"]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = dict(os.environ)
    yield Reader(tmp_path / "home", monkeypatch, capsys)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_page(page: str, reader: "Reader") -> None:
    """A reader does all of a page, from top to bottom, in one folder and one Python."""
    for block in BLOCKS:
        if block.page == page:
            try:
                reader.follow(block)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block.name} is wrong: {type(error).__name__}: {error}") from error


class Reader:
    """Somebody with a model, data and a script of their own, who does what a page says."""

    def __init__(self, folder: Path, monkeypatch: Any, capsys: Any) -> None:
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["pellm_lightning"])  # Lightning warns of words beside its own
        for name in ("examples", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "run.yaml").write_text((ROOT / "examples/classification.yaml").read_text())
        (folder / "train.py").touch()
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.namespace = at_hand()
        self.ports: dict[str, str] = {}

    def follow(self, block: Block) -> None:
        getattr(self, f"follow_{block.language}", lambda block: None)(block)
        self.capsys.readouterr()

    def follow_python(self, block: Block) -> None:
        lines = "\n" * block.line  # so that errors name lines of the page
        code = compile(lines + self.local(block.text), block.page, "exec")
        if block.not_run is not None:
            return
        if "parties" in block.marks:
            self.as_parties(code, block.marks["parties"].split(", "))
        else:
            with launched(block.marks.get("rank")):
                exec(code, self.namespace)

    def as_parties(self, code: Any, names: list[str]) -> None:
        """Run the same code at each of several parties, which meet; ``name`` and ``party`` tell who."""
        failed: list[BaseException] = []
        store, here = dist.HashStore(), threading.local()
        made_by_page = {key: self.namespace[key] for key in self.namespace.keys() - at_hand().keys()}

        def from_env(**settings: Any) -> Federation:
            return Federation(store, here.party, len(names), **settings)

        def act(party: int, name: str) -> None:
            here.party = party
            try:
                exec(code, at_hand(party) | made_by_page | {"name": name})
            except BaseException as error:
                failed.append(error)

        addresses = [local for address, local in self.ports.items() if address.endswith(":29400")]
        port = int(addresses[0].rpartition(":")[2]) if addresses else free_port()
        with RendezvousServer("127.0.0.1", port), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Federation, "from_env", from_env)  # a thread has no environment of its own
            in_threads([partial(act, party, name) for party, name in enumerate(names)])
        if failed:
            raise failed[0]

    def local(self, text: str) -> str:
        """Put this host in place of the documents' hosts, and free ports in place of theirs."""
        for host in ADDRESSES:
            for address in set(re.findall(rf'{re.escape(host)}(?::|", )29\d\d\d', text)):
                if address not in self.ports:
                    self.ports[address] = address.replace(host, "127.0.0.1")[:-5] + str(free_port())
                text = text.replace(address, self.ports[address])
        return text

    def follow_yaml(self, block: Block) -> None:
        config = yaml.safe_load(block.text)
        assert isinstance(config, dict)
        if block.not_run is None:
            (self.folder / "block.yaml").write_text(block.text)
            if config.keys() & {"model", "data"}:
                self.build(block)
            else:
                self.fit(block, config)

    def build(self, block: Block) -> FederatedCLI:
        """Lay a block over an example and build all that it configures."""
        words = [] if "class_path" in yaml.safe_load(block.text).get("model", {}) else ["classification"]
        words = [f"--config={ROOT}/examples/{name}.yaml" for name in words]
        return FederatedCLI(auto_configure_optimizers=False, run=False, args=[*words, "--config=block.yaml"])

    def fit(self, block: Block, config: dict[str, Any]) -> None:
        """Lay a block over a little model and train it; the fit must have used the settings of the page."""
        federated = config.get("federated", {})
        short = ["--federated.every_n_steps=2"] if "every_n_steps" in federated else []
        if "every_n_seconds" in federated:
            short = ["--federated.every_n_seconds=1e-6"]
        if "overlap" in federated:
            short = ["--federated.every_n_steps=2", "--federated.overlap.delay_steps=1"]
        under = [f"--config={ROOT}/{block.marks['over']}"] if "over" in block.marks else []
        words = [*QUIET, *under, "--config=block.yaml", *short]
        cli = FederatedCLI(Validated, LittleData, run=False, args=words)
        (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, FederatedAveraging)]
        for key in ("exchange", "aggregation", "privacy"):
            given = federated.get(key)
            if given is not None:
                path = given if isinstance(given, str) else given["class_path"]
                assert type(getattr(callback, key)).__name__ == path.rpartition(".")[2]
        if "not fitted" in block.marks:
            return
        cli.trainer.fit(cli.model, cli.datamodule)
        state = callback.state_dict()["aggregator"]
        every = callback.every_n_steps
        every = 1 if callback.every_n_seconds else every  # each step takes longer than the second's millionth
        assert state["round"] == (math.ceil(cli.trainer.global_step / every) if every else 2)
        if "outer_optimizer" in federated:
            self.stepped_as(federated, state["fragments"][0], state["round"], cli.trainer.callback_metrics)

    def stepped_as(self, federated: dict[str, Any], state: dict[str, Any], rounds: int, metrics: Any) -> None:
        """Compare the settings of the outer optimizer and its schedule with those of the page."""
        given = federated["outer_optimizer"]
        assert state["outer_class"] == given["class_path"].rpartition(".")[2]
        (group,) = state["outer_optimizer"]["param_groups"]
        settings = dict(given["init_args"])
        lr = settings.pop("lr")
        assert {key: list(group[key]) if key == "betas" else group[key] for key in settings} == settings
        if "outer_scheduler" in federated:
            assert state["outer_scheduler"] == rounds
            arguments = federated["outer_scheduler"]["init_args"]
            low, part = arguments["eta_min"], (rounds - 1) / arguments["T_max"]
            lr = low + (lr - low) * (1 + math.cos(math.pi * part)) / 2
        assert float(metrics["federated/outer_lr"]) == pytest.approx(lr, rel=1e-6)

    def follow_console(self, block: Block) -> None:
        script = script_of(block)
        assert script.strip(), "a console without a line that begins with '$ '"
        error = syntax_error(script)
        assert error is None, error
        for words in commands_of(script, self.folder):
            self.type(words)

    follow_bash = follow_console

    def type(self, words: list[str]) -> None:
        """Check one command as far as it can be without what it starts."""
        program, *words = words
        if program == "make":
            assert set(words) <= targets(), words
        elif program == "pip":
            check_install(words)
        elif program == "srun":
            self.type(words)
        elif program == "pellm":
            self.our_command(words)
        elif program == "torchrun":
            parser = get_args_parser()
            if "--virtual-local-rank" not in parser.format_help():  # torch 2.7 does not have it
                words = [word for word in words if word != "--virtual-local-rank"]
            launch = parser.parse_args(words)
            rest = [launch.training_script, *launch.training_script_args]
            if launch.no_python:
                assert rest[:2] == ["bash", "-c"], rest
                for words in commands_of(rest[2], self.folder):
                    self.type(words)
            else:
                self.run_python(["-m", *rest] if launch.module else rest)
        else:
            self.run_python(words)

    def run_python(self, words: list[str]) -> None:
        if words[:2] == ["-m", "pip"]:
            check_install(words[2:])
        elif words[:2] == ["-m", "pellm_lightning"]:
            self.our_command(words[2:])
        else:
            script, *arguments = words
            assert (self.folder / script).exists(), f"there is no {script}"
            if script != "train.py":  # the reader's own
                parse_as(self.folder / script, arguments)

    def our_command(self, words: list[str]) -> None:
        if words[0] in ("certs", "keys"):
            commands.main(words)
        elif COMMANDS[words[0]] == "commands":
            with self.monkeypatch.context() as patch:
                patch.setattr(commands, "_auto_cli", lambda: parse_only)
                commands.main(words)
        elif words[0] == "verify":
            verify.parser().parse_args(words[1:])
        elif words[0] in ("export", "evaluate"):
            parser = {"export": results.export_parser, "evaluate": results.evaluate_parser}[words[0]]()
            _, rest = parser.parse_known_args(words[1:])
            if rest:
                parsed(("fit", *rest))
        else:
            parsed(tuple(words))

    def follow_diff(self, block: Block) -> None:
        plain, federated = (ROOT / f"examples/{name}.py" for name in ("finetune", "finetune_federated"))
        assert applied(block.text, plain.read_text()) == [
            line for line in federated.read_text().splitlines() if line
        ]

    def follow_json(self, block: Block) -> None:
        json.loads(block.text)


class Validated(Tuned):
    """What a configuration without a model is laid over."""

    def __init__(self) -> None:
        super().__init__(party=0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def at_hand(party: int = 0) -> dict[str, Any]:
    """What a reader of any page has: a module with LoRA, data, and a loop of their own."""
    module = Tuned(party)

    def train(model: nn.Module, samples: list[Any]) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for x, y in samples:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return {
        "__name__": "__main__",
        "module": module,
        "model": module.model,
        "data": data(8, seed=party),
        "train": train,
        "rounds": [list(data(8, seed=10 * party + number)) for number in range(2)],
        "party": party,
    }


@contextmanager
def launched(mark: str | None) -> Iterator[None]:
    """Make this process look like "<rank> of <number>" that torchrun has started."""
    with pytest.MonkeyPatch.context() as patch:
        if mark is not None:
            patch.setattr("pellm_lightning.comm.topology._hidden", {})
            rank, size = mark.split(" of ")
            values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
                patch.setenv(name, value)
        yield


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


# ---- commands


class ParsedError(Exception):
    """The words were understood."""


@cache
def parsed(words: tuple[str, ...]) -> None:
    """Parse the words of ``python -m pellm_lightning fit`` and the like, each only once."""
    if {"--help", "--print_config"} & set(words):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli_parser().parse_args(list(words))
    else:
        cli_parser().parse_args(list(words))


@cache
def cli_parser() -> Any:
    """Return the parser of ``python -m pellm_lightning``; to make it takes seconds."""
    caught: list[Any] = []

    class Caught(FederatedCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            caught.append(parser)
            raise ParsedError

    with pytest.raises(ParsedError):
        Caught(auto_configure_optimizers=False)
    return caught[0]


def parse_only(components: Any, args: list[str], **settings: Any) -> None:
    """Stand for jsonargparse's ``auto_cli``, and run nothing."""
    from jsonargparse import auto_cli

    parser = capture_parser(lambda: auto_cli(components, args=args, **settings))
    parser.instantiate_classes(parser.parse_args(args))


def parse_as(script: Path, words: list[str]) -> None:
    """Let a script of this repository parse its arguments, and stop it there."""
    if "ArgumentParser(" not in script.read_text():
        assert not words, f"{script} takes no arguments"
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse_args(self, *arguments)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [str(script), *words])
        patch.syspath_prepend(str(script.parent))
        with pytest.raises(ParsedError):
            runpy.run_path(str(script), run_name="__main__")


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):[^=]", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_install(words: list[str]) -> None:
    """Check that what a ``pip install`` asks for is well-formed, and that our extras exist."""
    assert words[0] == "install", words
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("\n\n")[0], re.MULTILINE))
    for word in words[1:]:
        if not word.startswith("-"):
            asked = Requirement(re.sub(r"^\.", "pellm-lightning", word))  # from a clone
            if asked.name == "pellm-lightning":
                assert asked.extras <= extras, f"there is no extra {asked.extras - extras}"


def applied(diff: str, text: str) -> list[str]:
    """Return the lines that are not empty of a text with a diff applied; " ..." stands for what is left out.

    Raises:
        ValueError: If a line that should be there is not there, or not in this order.
    """
    lines = [line for line in text.splitlines() if line]
    place, made = 0, list[str]()
    for change in diff.splitlines():
        sign, line = change[:1], change[1:]
        if not line:
            continue
        if sign == "+":
            made.append(line)
        elif line.strip() != "...":
            found = lines.index(line, place)
            made += lines[place:found] + [line] * (sign == " ")
            place = found + 1
    return made + lines[place:]


def test_a_diff_that_does_not_fit_is_noticed() -> None:
    assert applied(" a\n-b\n+c\n ...\n d\n", "a\nb\nx\nd\n") == ["a", "c", "x", "d"]
    with pytest.raises(ValueError, match="not in list"):
        applied("-a\n", "b\n")
    with pytest.raises(ValueError, match="not in list"):
        applied(" b\n-a\n", "a\nb\n")


WRONG = {
    "python": ["1 / 0\n", "from pellm_lightning import FederatedAverage\n", "FederatedAveraging(every=\n"],
    "yaml": [
        "federated: {evry_n_steps: 2}\n",
        "federated: {every_n_steps: 2, weighting: sample}\n",
        "model: {init_args: {pfet: null}}\n",
    ],
    "console": [
        "$ make everything\n",
        "$ for name in a b; do\n",
        "$ pyhton train.py\n",
        "$ pyhton train.py &\n",
        "$ python examples/finetune.py --txt a.txt\n",
        "$ python examples/finetuned.py\n",
        "$ python -m pellm_lightning fit --config run.yaml --federated.evry_n_steps 2\n",
        "$ python -m pellm_lightning rendezvous --listens 127.0.0.1:29400\n",
        "$ torchrun --nproc-per-nodes 3 train.py\n",
        "$ torchrun --nproc-per-node 3 -m pellm_lightning fit --config run.yaml --data.batch 3\n",
        "$ pip install 'pellm-lightning[everything]'\n",
        "make test\n",
    ],
    "diff": ["-import torhc\n", "+import os\n"],
    "json": ["{instruction: a}\n"],
}


@pytest.mark.parametrize(
    ("language", "text"), [(language, text) for language, texts in WRONG.items() for text in texts]
)
def test_what_is_wrong_is_noticed(language: str, text: str, reader: "Reader") -> None:
    with pytest.raises((Exception, SystemExit)):
        reader.follow(Block("page.md", 1, language, text, {}))


def test_bash_tells_what_would_run(tmp_path: Path) -> None:
    text = """
$ export PELLM_ROSTER=a,b
$ for name in a b; do
    python -m pellm_lightning fit --config \\
        'run it.yaml' --federated.jobs.name $name '' 'two
lines' > $name.log 2>&1 &
  done
what it answers
$ make test
"""
    block = Block("page.md", 1, "console", text, {})
    (tmp_path / "home").mkdir()
    found = commands_of(script_of(block), tmp_path / "home")
    fit = ["python", "-m", "pellm_lightning", "fit", "--config", "run it.yaml", "--federated.jobs.name"]
    fits = [[*fit, name, "", "two\nlines"] for name in "ab"]
    assert sorted(found) == [["make", "test"], *fits]


def test_marks_stand_right_before_their_block() -> None:
    page = MarkdownIt().parse("<!-- not run: a -->\n```python\nx\n```\n\n<!-- over: b -->\ntext\n\n    y\n")
    first, second = found_in(page, "page.md")
    assert (first.line, first.language, first.text, first.not_run) == (2, "python", "x\n", "a")
    assert (second.language, second.text, second.marks) == ("", "y\n", {})


def test_the_drawings_are_drawn() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/drawings.py"))["DRAWINGS"]
    for name, draw in drawn.items():
        assert (ROOT / f"docs/images/{name}.svg").read_text() == draw(), "python docs/drawings.py"


# ---- words

TEST = r"\btest_(?!(?:step|files)\b)\w+(?:\.py)?"  # a hook of Lightning, an argument of the data modules


def test_guides_are_short() -> None:
    """Proofs, measurements and long tables belong in docs/depth."""
    references = {"docs/architecture.md", "docs/glossary.md", "docs/reference.md"}
    guides = [page for page in PAGES if re.fullmatch(r"README\.md|docs/(howto/)?\w+\.md", page)]
    long = {page: len((ROOT / page).read_text().split()) for page in guides if page not in references}
    assert len(long) > 30
    assert not [page for page, words in long.items() if words >= 800]


def test_running_text_names_no_tests() -> None:
    """Tests stand as evidence in tables of the in-depth pages only."""
    for page in PAGES:
        for line in (ROOT / page).read_text().splitlines():
            named = re.search(TEST, line)
            evidence = page.startswith("docs/depth/") and line.startswith("|")
            assert not named or evidence or page in ("CHANGELOG.md", "CONTRIBUTING.md"), f"{page}: {line}"


def test_pages_speak_the_vocabulary_of_the_field() -> None:
    """docs/glossary.md has the terms; these words of our own have standard ones."""
    own = r"\b(mend(s|ed)?|beside|hand(s|ed)? over|thin lines?|in words|masked (sums?|exchange)|for ever)\b"
    for page in [page for page in PAGES if page != "CHANGELOG.md"]:
        prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        assert not (found := re.search(own, prose)), f"{page}: {found}"


def test_names_of_tests_and_files_are_true() -> None:
    """Documents give tests as evidence, and files to read; the changelog names those of its time."""
    tests = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in (path.name, *re.findall(r"def (test_\w+)", path.read_text()))
    }
    for page in [page for page in PAGES if page != "CHANGELOG.md"]:
        text = (ROOT / page).read_text()
        named = re.findall(TEST, text)
        assert not [name for name in named if name not in tests], page
        for path in re.findall(r"`((?:examples|benchmarks|tests|docs)/[\w./-]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_links_between_files_lead_somewhere() -> None:
    """Sphinx checks those of its own pages; this, what is read beside them."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:|#", link):
                assert ((ROOT / page).parent / link.partition("#")[0]).exists(), f"{page} links to {link}"


def test_the_citation_names_the_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_environment_variables_are_those_that_are_read() -> None:
    sources = [path.read_text() for path in (ROOT / "pellm_lightning").rglob("*.py")]
    read = {name for source in sources for name in re.findall(r"\bPELLM_[A-Z_]+\b", source)}
    for page in PAGES:
        named = set(re.findall(r"\bPELLM_[A-Z_]+\b", (ROOT / page).read_text()))
        assert named <= read, page


def test_every_outer_optimizer_has_its_recipe() -> None:
    page = [block for block in BLOCKS if block.page == "docs/outer_optimizers.md"]
    classes = [yaml.safe_load(block.text)["federated"]["outer_optimizer"]["class_path"] for block in page]
    sgd = ["torch.optim.SGD"] * 4
    assert sorted(classes) == [
        "pellm_lightning.engine.optim.Yogi", "torch.optim.Adagrad", "torch.optim.Adam", *sgd,
    ]  # fmt: skip
