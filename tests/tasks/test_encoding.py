import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pellm_lightning.tasks.encoding import Encoder, special_tokens
from pellm_lightning.tasks.records import Record

TEMPLATES = {"<unk> $A": ([1], [0]), "<unk> $A <eos>": ([1], [0]), "$A <eos>": ([], [0]), "$A": ([], [0])}


def adding(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """<unk>, which has the index 1, stands in for a token that begins a sequence; <eos> is 0."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<unk>", 1), ("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_are_the_tokenizer_s_and_an_end(
    template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert special_tokens(adding(tokenizer, template)) == TEMPLATES[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_training_evaluation_and_prediction_begin_alike(
    template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = adding(tokenizer, template)
    encoder, (before, after) = Encoder(tokenizer), TEMPLATES[template]
    assert encoder.documents(["w1 w2"]) == [[*before, 3, 4, *after]]
    assert tokenizer("w1 w2")["input_ids"] in ([*before, 3, 4], [*before, 3, 4, *after])
    assert encoder.exchange(Record("w7", "w1")) == ([*before, 3], [9, *after])
    assert encoder.prompt(Record("w7", "w1")) == [*before, 3]
    assert encoder.prompt(Record("w1 w2 ")) == [*before, 3, 4]


def test_a_template_brings_its_own_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = adding(tokenizer, "<unk> $A")
    tokenizer.chat_template = (
        "<unk> {% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    encoder = Encoder(tokenizer)
    # <unk> user : w1 <eos> assistant : | w7 <eos>
    assert encoder.exchange(Record("w7", "w1")) == ([1, 32, 34, 3, 0, 33, 34], [9, 0])
    assert encoder.prompt(Record("", "w1", "w5"))[:5] == [1, 1, 34, 7, 0]  # "system" is no word of it


def test_a_system_text_comes_first_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Encoder(tokenizer).prompt(Record("w7", "w1", "w5")) == [7, 3]


def test_a_template_that_drops_or_refuses_the_system_text_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }} <eos> {% endfor %}"
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*does not show the system text 'w5'"):
        Encoder(tokenizer).exchange(Record("w7", "w1", "w5", where="a.jsonl:3"))
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*refuses messages of system, user: no system"):
        Encoder(tokenizer).prompt(Record("w7", "w1", "w5", where="a.jsonl:3"))
