"""Messages of the parser, made short; system/test_mistakes.py has those of real command lines."""

from argparse import ArgumentParser

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from pellm_lightning.cli.federated_cli import CommandParser
from pellm_lightning.cli.usage import explained

UNION = """Parser key "federated.exchange":

  - Expected a path but Quantised either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'pellm_lightning.exchange.base.Exchange'>, <class 'NoneType'>]
  Errors:
    - Expected a dot import path string: Quantised
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: Quantised"""

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'small_module.LittleModule':
        Parser key "lr":
          Expected a <class 'float'>. Got value: abc
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='lr', val='abc')"""

ROSTER = """Does not validate against any of the Union subtypes
Subtypes: [<class 'pellm_lightning.comm.elastic.separate_jobs.SeparateJobs'>, <class 'NoneType'>]
Errors:
  - Party 'c' is not in the roster (a, b). Give all the same roster. Did you mean 'a'?
  - Expected a <class 'NoneType'>
Given value type: <class 'jsonargparse._namespace.Namespace'>
Given value: Namespace(rendezvous='tcp://h:1', name='c', roster=['a', 'b'], listen='127.0.0.1:0')"""


@pytest.mark.parametrize(
    ("message", "short"),
    [
        (UNION, "federated.exchange: there is no class Quantised. Did you mean 'Quantized'?"),
        (NESTED, "model.lr: small_module.LittleModule: expected float, got 'abc'."),
        (ROSTER, "Party 'c' is not in the roster (a, b). Give all the same roster. Did you mean 'a'?"),
        (
            "Parser key \"x\":\n  Expected a typing.Literal['keep', 'reset']. Got value: clear",
            "x: expected 'keep', 'reset', got 'clear'.",
        ),
        ("anything else", "anything else."),
    ],
)
def test_what_no_user_needs_is_left_out(message: str, short: str) -> None:
    import pellm_lightning.exchange  # noqa: F401 - where the class is that was meant

    assert explained(message) == short


def test_the_option_that_was_meant() -> None:
    parser = ArgumentParser()
    parser.add_argument("--rounds.every")
    for said, meant in (("--round.every=1", "--rounds.every"), ("--rounds.evry 1", "--rounds.every")):
        text = explained(f"unrecognized arguments: {said}", parser)
        assert text == f"unrecognized arguments: {said}. Did you mean {meant!r}?"
    assert "Did you mean" not in explained("unrecognized arguments: --zzz", parser)


def test_the_parser_tells_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser(prog="pellm fit")
    assert isinstance(parser, LightningArgumentParser)
    parser.add_argument("--rounds", type=int, default=1)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--rounds=many"])
    assert stopped.value.code == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error: rounds: expected int")
    assert last == "All options: pellm fit --help"
