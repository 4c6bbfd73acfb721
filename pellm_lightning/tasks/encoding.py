"""Tokenization of documents, prompts and conversations, equal in training, evaluation and prediction."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pellm_lightning.tasks.columns import shown
from pellm_lightning.tasks.formats import Message, Record, strings_in

Tokens = tuple[list[int], list[bool]]
"""Tokens, and which of them are learned."""
_Segment = tuple[str | list[int], bool]
"""A text, or the tokens of one, and whether it is learned."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_UNSHOWN = ("role", "name", "id", "type", "tool_call_id", "weight")
"""Keys of a message that a template need not show."""


class Encoder:
    """Tokenizer wrapper for records with their special tokens.

    What ``tokenizer("some text")`` begins with (for many models a beginning-of-sequence token), every
    document and prompt begins with. Documents and completions end with the end-of-sequence token, also where
    the tokenizer does not add it. With a chat template a prompt is a conversation, whose special tokens are
    the template's alone, as in ``apply_chat_template``; learned is what the assistant says.

    Args:
        tokenizer: Has an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.before, self.after = special_tokens(tokenizer)
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default", "")
        self.has_template = bool(template)
        self.marks_answers = bool(_GENERATION.search(template or ""))

    def encode(self, records: Sequence[Record]) -> list[Tokens]:
        """Tokenize records. Segments are tokenized separately, so that no token spans prompt and answer.

        Raises:
            ValueError: If the chat template does not render them as they are. Names file and line.
        """
        return self._joined([self._segments(record) for record in records])

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Tokenize prompts without what follows, or texts to continue."""
        return [tokens for tokens, _ in self._joined([self._prompt(record) for record in records])]

    def _joined(self, records: Sequence[Sequence[_Segment]]) -> list[Tokens]:
        texts = [part for segments in records for part, _ in segments if isinstance(part, str)]
        tokenized = iter(tokenize(texts, self.tokenizer))
        joined = []
        for segments in records:
            parts = [(next(tokenized) if isinstance(p, str) else p, learned) for p, learned in segments]
            tokens = [token for part, _ in parts for token in part]
            joined.append((tokens, [learned for part, learned in parts for _ in part]))
        return joined

    def _segments(self, record: Record) -> list[_Segment]:
        if not record.messages:
            return [(self.before, True), (record.text, True), (self.after, True)]
        if not self.has_template:
            prompt, answer = self._plain(record), record.messages[-1]["content"]
            return [(self.before, False), (prompt, False), (answer, True), (self.after, True)]
        return self._marked(record) if self.marks_answers else self._by_prefix(record)

    def _prompt(self, record: Record) -> list[_Segment]:
        if not record.messages:
            return [(self.before, False), (record.text.rstrip(), False)]
        if not self.has_template:
            return [(self.before, False), (self._plain(record), False)]
        messages = list(record.messages)
        while messages and messages[-1]["role"] == "assistant":  # what would be the answer
            messages.pop()
        whole = self._checked(record, messages, add_generation_prompt=True)
        if self.marks_answers:
            return [(whole, False)]
        segments, length = self._turns(record, messages, whole)
        return [*segments, (whole[length:], False)]

    def _plain(self, record: Record) -> str:
        """Return the prompt without a template: a line of its own, unless blanks already part it."""
        if record.is_chat:
            raise ValueError(
                f"{record.where}: is a conversation, and the tokenizer has no chat template to write it by."
                " Give one by --data.chat_template (a template, or the path of a .jinja file), or take the"
                " tokenizer of an instruction-tuned model."
            )
        system = [m["content"] for m in record.messages if m["role"] == "system"]
        prompt = next(m["content"] for m in record.messages if m["role"] == "user")
        answer = record.messages[-1]["content"] if record.messages[-1]["role"] == "assistant" else ""
        parted = prompt[-1:].isspace() or answer[:1].isspace()
        return "\n\n".join([*system, prompt]) + ("" if parted else "\n")

    # ---- by a chat template

    def _by_prefix(self, record: Record) -> list[_Segment]:
        """Tell the assistant's turns apart by rendering the conversation up to each."""
        messages = list(record.messages)
        whole = self._checked(record, messages)
        segments, length = self._turns(record, messages, whole)
        return [*segments, (whole[length:], False)] if whole[length:] else segments

    def _turns(self, record: Record, messages: list[Message], whole: str) -> tuple[list[_Segment], int]:
        """Return the segments up to the last answer, and their number of characters."""
        segments, text = list[_Segment](), ""
        for index, message in enumerate(messages):
            if not record.is_learned(index):
                continue
            answered = self._rendered(record, messages[: index + 1])
            prompt = self._before_answer(record, messages[:index], answered)
            if not (prompt.startswith(text) and answered.startswith(prompt) and whole.startswith(answered)):
                raise ValueError(
                    f"{record.where}: the tokenizer's chat template renders a prompt differently once an"
                    f" answer follows (message {index + 1}), so the two cannot be distinguished. Mark the"
                    f" answers by {{% generation %}} in the template. {_REMEDY}"
                )
            _check_shown(record, [message], answered[len(prompt) :])
            segments += [(prompt[len(text) :], False), (answered[len(prompt) :], True)]
            text = answered
        return segments, len(text)

    def _before_answer(self, record: Record, messages: list[Message], answered: str) -> str:
        """Render what is before an answer: the messages, and how the template begins an answer."""
        if messages:
            return str(self._rendered(record, messages, add_generation_prompt=True))
        # Nothing is rendered of no messages: what begins an answer is what follows any other message.
        other: list[Message] = [{"role": "user", "content": "a"}]
        without = self._rendered(record, other)
        opening = self._rendered(record, other, add_generation_prompt=True)[len(without) :]
        return answered[: answered.find(opening) + len(opening)] if opening in answered else ""

    def _marked(self, record: Record) -> list[_Segment]:
        """Tell the assistant's turns apart by the template's generation marks."""
        messages = list(record.messages)
        self._checked(record, messages)
        tokens, marks = self._masked(record, messages)
        learned, marked = list(marks), [position for position, is_marked in enumerate(marks) if is_marked]
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and not record.is_learned(index):
                before = sum(self._masked(record, messages[:index])[1]) if index else 0
                for position in marked[before : sum(self._masked(record, messages[: index + 1])[1])]:
                    learned[position] = False
        if not any(learned):
            raise ValueError(
                f"{record.where}: the chat template's {{% generation %}} marks show no answer. They must"
                " enclose what the assistant says; a slow tokenizer cannot tell where."
            )
        return [([token], is_learned) for token, is_learned in zip(tokens, learned, strict=True)]

    def _masked(self, record: Record, messages: list[Message]) -> Tokens:
        found = self._rendered(
            record, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    def _checked(self, record: Record, messages: list[Message], **options: Any) -> str:
        """Render a conversation, and validate that messages and tools are all shown."""
        text: str = self._rendered(record, messages, **options)
        _check_shown(record, messages, text)
        names = [t.get("function", t).get("name", "") for t in record.tools if isinstance(t, dict)]
        missing = [name for name in names if name not in text]
        if missing:
            raise ValueError(
                f"{record.where}: the tokenizer's chat template does not show the tools {missing}. Give one"
                " that does by --data.chat_template, or leave them out by ignore_columns: [tools]."
            )
        return text

    def _rendered(self, record: Record, messages: list[Message], **options: Any) -> Any:
        from jinja2 import TemplateError  # transformers asks for it only where there is a template

        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=list(record.tools) or None, **{"tokenize": False, **options}
            )
        except (TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{record.where}: the tokenizer's chat template refuses messages of {roles}: {error}."
                f" {_REMEDY}"
            ) from error


_REMEDY = (
    "Give another template by --data.chat_template ('' is none); if it is about a system text, join that with"
    " the first message."
)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a text, always with an end of sequence."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    whole, is_added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    end = end_of(tokenizer)
    if 0 in is_added:
        start, stop = is_added.index(0), len(is_added) - is_added[::-1].index(0)
    else:  # the letter is no token of this tokenizer, so all that there is is special
        start = stop = whole.index(end) if end in whole else len(whole)
    before, after = whole[:start], whole[stop:]
    return before, after if end in after else [*after, end]


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize without special tokens, and without a warning that a document exceeds the model's context."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    token_ids: list[list[int]] = encoded["input_ids"]
    return token_ids


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the end-of-sequence token."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int)  # load_tokenizer saw to it
    return end


def _check_shown(record: Record, messages: Sequence[Message], text: str) -> None:
    """Validate that a template has shown all that messages say."""
    for message in messages:
        said = [("content", message["content"])]
        calls = message.get("tool_calls", [])
        rest = {k: v for k, v in message.items() if k not in (*_UNSHOWN, "content", "tool_calls")}
        # Arguments of a call are escaped in many ways; its name is not.
        called = [name for name in strings_in(calls) if name[0] == "name"]
        for key, content in [*said, *strings_in(rest), *called]:
            if content.strip() not in text:
                what = f"{message['role']} text" if key == "content" else f"{message['role']}'s {key}"
                what = f"call of the {message['role']}, its" if (key, content) in called else what
                raise ValueError(
                    f"{record.where}: the tokenizer's chat template does not show the {what}"
                    f" {shown(content)} as it is. {_REMEDY}"
                )
