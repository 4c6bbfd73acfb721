import pytest
from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pellm_lightning.tasks.encoding import Encoder, special_tokens
from pellm_lightning.tasks.formats import Record


def exchange(prompt: str, answer: str | None = None, system: str | None = None, where: str = "") -> Record:
    said = {"system": system, "user": prompt, "assistant": answer}
    messages = tuple({"role": role, "content": text} for role, text in said.items() if text is not None)
    return Record(messages=messages, learned=1 + (system is not None), where=where)


def halves(encoder: Encoder, record: Record) -> tuple[list[int], list[int]]:
    """The tokens that are not learned, and those that are."""
    ((tokens, learned),) = encoder.encode([record])
    kinds = [
        [t for t, is_learned in zip(tokens, learned, strict=True) if is_learned == k] for k in (False, True)
    ]
    return kinds[0], kinds[1]


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
    assert encoder.encode([Record("w1 w2")])[0][0] == [*before, 3, 4, *after]
    assert tokenizer("w1 w2")["input_ids"] in ([*before, 3, 4], [*before, 3, 4, *after])
    assert halves(encoder, exchange("w1", "w7")) == ([*before, 3], [9, *after])
    assert encoder.prompts([exchange("w1", "w7"), Record("w1 w2 ")]) == [[*before, 3], [*before, 3, 4]]


def test_a_template_brings_its_own_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = adding(tokenizer, "<unk> $A")
    tokenizer.chat_template = (
        "<unk> {% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    encoder = Encoder(tokenizer)
    # <unk> user : w1 <eos> assistant : | w7 <eos>
    assert halves(encoder, exchange("w1", "w7")) == ([1, 32, 34, 3, 0, 33, 34], [9, 0])
    assert encoder.prompts([exchange("w1", system="w5")])[0][:5] == [1, 1, 34, 7, 0]  # "system" is no word


def test_a_system_text_comes_first_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Encoder(tokenizer).prompts([exchange("w1", "w7", "w5")]) == [[7, 3]]


def test_a_template_that_drops_or_refuses_the_system_text_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }} <eos> {% endfor %}"
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*does not show the system text 'w5'"):
        Encoder(tokenizer).encode([exchange("w1", "w7", "w5", "a.jsonl:3")])
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*refuses messages of system, user: no system"):
        Encoder(tokenizer).prompts([exchange("w1", "w7", "w5", "a.jsonl:3")])


# ---- conversations

CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} <eos>{% endgeneration %}{% else %}{{ m.content }} <eos>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TURNS = (("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5"), ("user", "w6"))


def conversation(*turns: tuple[str, str], learned: int = 0, **more: object) -> Record:
    messages = tuple({"role": role, "content": text} for role, text in turns)
    return Record(messages=messages, learned=learned, is_chat=True, where="c.jsonl:2", **more)


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["by prefix", "by generation marks"])
@pytest.mark.parametrize("learned", [0, 2])
def test_only_the_assistant_s_turns_are_learned(
    template: str, learned: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    ((tokens, marks),) = Encoder(tokenizer).encode([conversation(*TURNS, learned=learned)])
    whole = tokenizer.apply_chat_template(conversation(*TURNS).messages, tokenize=True, return_dict=True)
    assert tokens == whole["input_ids"]
    # user : w1 <eos> assistant : [w2 w3 <eos>] user : w4 <eos> assistant : [w5 <eos>] user : w6 <eos>
    first, second = [4, 5, 0], [7, 0]
    assert [t for t, mark in zip(tokens, marks, strict=True) if mark] == (
        second if learned else first + second
    )
    assert marks[6:9] == [not learned] * 3
    assert marks[15:17] == [True, True]


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["by prefix", "by generation marks"])
def test_a_prompt_is_tokenized_as_in_training(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    encoder, record = Encoder(tokenizer), conversation(*TURNS[:4])
    ((tokens, marks),) = encoder.encode([record])
    # The last answer, w5 <eos>, is what would be predicted.
    assert encoder.prompts([record]) == [tokens[:-2]]
    assert marks[-3:] == [False, True, True]


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["by prefix", "by generation marks"])
def test_the_assistant_may_speak_first_and_in_turns_of_weight_0(
    template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    greeting = conversation(*TURNS[1:4])
    middle = conversation(*TURNS[:2], ("assistant", "w8"), *TURNS[2:4])
    middle.messages[2]["weight"] = 0
    learned = [
        [token for token, is_learned in zip(*tokens, strict=True) if is_learned]
        for tokens in Encoder(tokenizer).encode([greeting, middle])
    ]
    answers = [4, 5, 0], [7, 0]  # w2 w3 <eos>; w5 <eos>
    assert learned == [answers[0] + answers[1]] * 2


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if loop.last %}<eos>{% endif %}{% endfor %}"
    )
    encoder = Encoder(tokenizer)
    with pytest.raises(ValueError, match=r"c\.jsonl:2: .*renders a prompt differently .*\(message 2\)"):
        encoder.encode([conversation(*TURNS)])


def test_a_conversation_needs_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"c\.jsonl:2: is a conversation, .*--data\.chat_template"):
        Encoder(tokenizer).encode([conversation(*TURNS)])


def test_tools_and_what_else_a_message_says_must_be_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "w9", "parameters": {}}}
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match=r"does not show the tools \['w9'\]"):
        Encoder(tokenizer).encode([conversation(*TURNS[:2], tools=(tool,))])
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + CHAT
    ((tokens, _),) = Encoder(tokenizer).encode([conversation(*TURNS[:2], tools=(tool,))])
    assert tokens[:3] == [11, 32, 34]  # w9 user :
    thinks = conversation(*TURNS[:2])
    thinks.messages[1]["reasoning_content"] = "w20"
    with pytest.raises(ValueError, match=r"does not show the assistant's reasoning_content 'w20'"):
        Encoder(tokenizer).encode([thinks])


@pytest.mark.parametrize(("prompt", "answer"), [("w1 ", "w2"), ("w1", " w2"), ("w1", "w2")])
def test_a_prompt_without_a_template_is_a_line_unless_blanks_part_it(prompt: str, answer: str) -> None:
    letters = models.WordLevel({"<eos>": 0, "w": 1, "1": 2, "2": 3, " ": 4, "\n": 5}, unk_token="<eos>")
    backend = Tokenizer(letters)
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))
    ((tokens, _),) = encoder.encode([exchange(prompt, answer)])
    between = 4 if " " in prompt + answer else 5
    assert tokens == [1, 2, between, 1, 3, 0]
