"""Tokenization of documents, prompts and responses, equal in training, evaluation and prediction."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pellm_lightning.tasks.columns import shown
from pellm_lightning.tasks.records import Record


class Encoder:
    """Tokenizer wrapper for documents, prompts and responses with their special tokens.

    What ``tokenizer("some text")`` begins with (for many models a beginning-of-sequence token), every
    document and prompt begins with. Documents and responses end with the end-of-sequence token, also where
    the tokenizer does not add it. With a chat template a prompt is a conversation, whose special tokens are
    the template's alone, as in ``apply_chat_template``.

    Args:
        tokenizer: Has an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.before, self.after = special_tokens(tokenizer)

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize whole documents."""
        return [[*self.before, *tokens, *self.after] for tokens in tokenize(texts, self.tokenizer)]

    def exchange(self, record: Record) -> tuple[list[int], list[int]]:
        """Tokenize a prompt and its response separately, so that no token spans both.

        Raises:
            ValueError: If the chat template does not render them as they are. Names file and line.
        """
        prompt = self._prompt_text(record)
        if not self.tokenizer.chat_template:
            response = [*tokenize([record.text], self.tokenizer)[0], *self.after]
            return self._prompt(prompt), response
        answered = [*_messages(record), {"role": "assistant", "content": record.text}]
        whole = self._chat(answered, record)
        if not whole.startswith(prompt):
            raise ValueError(
                f"{_at(record)}the tokenizer's chat template renders a prompt differently once its response"
                f" follows, so the two cannot be told apart. {_REMEDY}"
            )
        text = whole.removeprefix(prompt)
        _check_shown("response", record.text, text, record)
        return self._prompt(prompt), tokenize([text], self.tokenizer)[0]

    def prompt(self, record: Record) -> list[int]:
        """Tokenize a prompt without its response, or a text to continue."""
        if record.prompt is not None:
            return self._prompt(self._prompt_text(record))
        return [*self.before, *tokenize([record.text.rstrip()], self.tokenizer)[0]]

    def _prompt(self, text: str) -> list[int]:
        tokens = tokenize([text], self.tokenizer)[0]
        return tokens if self.tokenizer.chat_template else [*self.before, *tokens]

    def _prompt_text(self, record: Record) -> str:
        if not self.tokenizer.chat_template:
            above = f"{record.system}\n\n" if record.system else ""
            return f"{above}{record.prompt}\n"
        text = self._chat(_messages(record), record, add_generation_prompt=True)
        for message in _messages(record):
            _check_shown(f"{message['role']} text", message["content"], text, record)
        return text

    def _chat(
        self, messages: list[dict[str, str]], record: Record, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError  # transformers asks for it only where there is a template

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{_at(record)}the tokenizer's chat template refuses messages of {roles}: {error}. {_REMEDY}"
            ) from error
        assert isinstance(text, str)
        return text


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


_REMEDY = (
    "Change the template, or set it to None in the saved tokenizer; if it is about a system text, join that"
    " with the instruction."
)


def _messages(record: Record) -> list[dict[str, str]]:
    above = [{"role": "system", "content": record.system}] if record.system else []
    return [*above, {"role": "user", "content": record.prompt or ""}]


def _check_shown(what: str, content: str, text: str, record: Record) -> None:
    if content.strip() not in text:
        raise ValueError(
            f"{_at(record)}the tokenizer's chat template does not show the {what} {shown(content)} as it is."
            f" {_REMEDY}"
        )


def _at(record: Record) -> str:
    return f"{record.where}: " if record.where else ""
