"""Encode conversations by the tokenizer's own chat template, and mark the targets: what the assistant says.

A template with ``{% generation %}`` marks says itself what the assistant's tokens are. For any other the text decides,
by the difference of prefixes. With ``R(m)`` the rendering of messages, and ``G(m)`` the same with the prompt that asks
for an answer (``add_generation_prompt``), turn ``i`` of the assistant lies in ``R(all)`` from the end of ``G(m[:i])``
to the end of ``R(m[:i+1])``: what follows the header, up to and with what the template writes behind a turn. The
completion of a pair lies behind ``G(prompt)``. A token is a target if it holds a letter of such a span. A conversation
is refused if one of these is no prefix of the whole, if the text of a turn does not lie in its span, or that of another
message not between the spans, and if a header lies in a span.

Pairs of strings do not go through the template: their text is prompt, completion, and an end-of-sequence token.

Worker processes import this module, so it must not import torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.conversations import COMPLETION, PROMPT, TOOLS, RowFormat
from secateur.data.documents import BadRow, Document
from secateur.errors import UserError, first_line
from secateur.progress import notify

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedDocument", "begins_with_bos", "check_format", "encode_conversation"]

#: reasons of a ``BadRow``, as the count of skipped documents names them
REFUSED, WITHOUT_TARGETS = "refused by the chat template", "without an assistant turn"

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REFORMATTED = ("assistant", "tool", "function", "ipython")  # roles whose content templates write in another form
_LETTERS = 200  # of a template's message, at most

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # letters of a text


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of a document, and which of them are targets of a loss."""

    ids: NDArray[np.int64]  #: [tokens]
    targets: NDArray[np.bool_] | None = None  #: [tokens]; None where all are


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins each text with BOS."""
    ids: Sequence[int] = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot encode conversations.

    Raises:
        UserError: if it has no chat template, or does not tell where in the text its tokens lie.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "`format`: the tokenizer has no chat template; put the model's chat_template.jinja beside its "
            "tokenizer.json, or name another `tokenizer`"
        )
    if not tokenizer.is_fast:
        raise UserError("`format`: the tokenizer does not tell where its tokens lie; save it as tokenizer.json")


def check_format(tokenizer: PreTrainedTokenizerBase, format: RowFormat | None) -> None:
    """Check that a tokenizer can encode rows of a format, and print what it adds to the template's text.

    Raises:
        UserError: as :func:`require_template`; pairs of strings need no template.
    """
    if format in (None, "text"):
        return
    if format == "messages":
        require_template(tokenizer)
    templates = tokenizer.chat_template
    sources = templates.values() if isinstance(templates, Mapping) else [templates or ""]
    writes_bos = any("bos_token" in source or str(tokenizer.bos_token) in source for source in sources)
    if templates and not writes_bos and begins_with_bos(tokenizer):
        notify(f"the chat template writes no {tokenizer.bos_token}, with which the tokenizer begins texts: it is added")


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, document: Document, *, targets: bool = True
) -> EncodedDocument:
    """Encode a document whose text is the JSON of a conversation or of a pair.

    It begins with BOS once if the tokenizer begins texts with BOS, whether or not the template writes it.

    Args:
        targets: whether to mark the targets. Without them a conversation need not have any, and one that ends with the
            user's turn gets the prompt that asks for an answer.

    Raises:
        BadRow: if the template refuses the conversation or leaves a message out, or nothing is a target.
        UserError: if the tokenizer has no template, or its template renders a prefix in another way than the whole.
    """
    content = json.loads(document.text)
    if isinstance(content.get(PROMPT), str):
        ids, mask = _encode_pair(tokenizer, content[PROMPT], content[COMPLETION])
    else:
        template = _Template(tokenizer, document.id, content.get(TOOLS))
        if PROMPT in content:
            ids, mask = template.encode_completion(content[PROMPT], content[COMPLETION])
        elif targets:
            ids, mask = template.encode_turns(content["messages"])
        else:
            ids, mask = template.encode(content["messages"])
    ids, mask = _with_one_bos(tokenizer, ids, mask)
    if not targets:
        return EncodedDocument(ids)
    mask[:1] = False  # nothing precedes the first token
    if not mask.any():
        raise BadRow(WITHOUT_TARGETS, f"{document.id}: no token is the assistant's; give a turn of the role assistant")
    return EncodedDocument(ids, mask)


class _Template:
    """The chat template of a tokenizer, applied to one document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, tools: list[Any] | None) -> None:
        require_template(tokenizer)
        self.tokenizer, self.name, self.tools = tokenizer, name, tools

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """The text of the messages; ``prompt``: with the header of the next answer."""
        return self._apply(messages, tokenize=False, add_generation_prompt=prompt)

    def encode(self, messages: Messages) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids of a conversation without targets, ready to be answered if the user's turn is the last."""
        text = self.render(messages, prompt=messages[-1]["role"] == "user")
        self._check(messages, text)
        return _tokenize(self.tokenizer, text, ())

    def encode_completion(self, before: Messages, after: Messages) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids of prompt and completion, and a mask of the latter."""
        messages = [*before, *after]
        text, start = self.render(messages), self.render(before, prompt=True)
        self._check(messages, text)
        self._require_prefix(start, text, len(before))
        return _tokenize(self.tokenizer, text, [(len(start), len(text))])

    def encode_turns(self, messages: Messages) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids of a conversation, and a mask of the assistant's turns."""
        text = self.render(messages)
        self._check(messages, text)
        if _MARK.search(self.tokenizer.get_chat_template(None, self.tools)):
            return _tokenize(self.tokenizer, text, self._marked(messages))
        spans = self._turns(messages, text)
        self._check_spans(messages, text, spans)
        return _tokenize(self.tokenizer, text, spans)

    def _marked(self, messages: Messages) -> list[Span]:
        """The spans that the template marks.

        They are taken from the text. The tokenizer's own mask of them goes on to the end of the conversation where it
        cannot tell the token of a span's last letter.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {
            "conversations": [list(messages)],
            "tools": self.tools,
            "chat_template": self.tokenizer.get_chat_template(None, self.tools),
            "return_assistant_tokens_mask": True,
            **self.tokenizer.special_tokens_map,
        }
        _, spans = self._guard(lambda: render_jinja_template(**options))
        return spans[0]

    def _turns(self, messages: Messages, text: str) -> list[Span]:
        """The spans of the assistant's turns, by the difference of prefixes."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise BadRow(
                    REFUSED,
                    f"{self.name}: the conversation begins with the assistant; where its turn begins is known for a "
                    "template with {% generation %} marks alone",
                )
            start = self.render(messages[:number], prompt=True)
            self._require_prefix(start, text, number)
            last = number + 1 == len(messages)
            end = text if last else self.render(messages[: number + 1])
            self._require_prefix(end, text, number + 1)
            spans.append((len(start), len(end)))
        return spans

    def _check_spans(self, messages: Messages, text: str, spans: Sequence[Span]) -> None:
        """Refuse spans that are not those of the turns, by the text of each message.

        White space is left out of the comparison, since templates change it.
        """
        at, pending = 0, list(spans)
        for number, message in enumerate(messages):
            answers = message["role"] == "assistant"
            start, end = pending.pop(0) if answers else (at, pending[0][0] if pending else len(text))
            if start < at or end < start:
                raise self._unlocated(number)
            parts = [_packed(part) for part in _texts(message)]
            part = _packed(text[start:end])
            if (answers or message["role"] not in _REFORMATTED) and any(words not in part for words in parts):
                raise BadRow(
                    REFUSED,
                    f"{self.name}: the chat template leaves out a part of message {number} (role {message['role']!r}), "
                    "or writes it elsewhere, so that the assistant's turns cannot be located; change the message, or "
                    "put {% generation %} marks around the turns in the template",
                )
            if answers:
                self._check_header(messages[:number], part, parts[0] if parts else "")
                at = end

    def _check_header(self, before: Messages, span: str, content: str) -> None:
        """Refuse a header that the template writes before an answer, but not when it asks for one."""
        header = span.partition(content)[0] if content else ""
        if header and self.render(before) == self.render(before, prompt=True):
            raise UserError(
                f"{self.name}: the chat template writes {header[:_LETTERS]!r} before an answer, but not for "
                "add_generation_prompt, so that the header would be a target; let it write the header if "
                "add_generation_prompt is set, or put {% generation %} marks around the assistant's turns"
            )

    def _require_prefix(self, part: str, text: str, count: int) -> None:
        if not text.startswith(part):
            raise self._unlocated(count)

    def _unlocated(self, count: int) -> UserError:
        return UserError(
            f"{self.name}: the chat template renders the first {count} of its messages in another way than within "
            "the whole conversation, so that the assistant's turns cannot be located; put {% generation %} marks "
            "around them in the template"
        )

    def _check(self, messages: Messages, text: str) -> None:
        """Refuse a conversation of which the template leaves a message out, or writes parts as they stand."""
        for number, message in enumerate(messages):
            content, role = message.get("content") or "", message["role"]
            if isinstance(content, list) and content and str(content) in text:
                raise BadRow(REFUSED, f"{self.name}: the chat template takes text alone; give `content` as one string")
            if role not in _REFORMATTED and any(part.strip() not in text for part in _texts(message)):
                raise BadRow(
                    REFUSED, f"{self.name}: the chat template leaves out message {number} (role {role!r}); change it"
                )

    def _apply(self, messages: Messages, **options: Any) -> Any:
        return self._guard(
            lambda: self.tokenizer.apply_chat_template(list(messages), tools=self.tools, **options)  # type: ignore[arg-type]
        )

    def _guard(self, render: Callable[[], Any]) -> Any:
        try:
            return render()
        except Exception as error:  # templates raise any class
            reason = first_line(error)[:_LETTERS]
            raise BadRow(REFUSED, f"{self.name}: the chat template refuses it: {reason}") from None


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The text of a message, or of each of its parts."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part.get("text") or "" for part in content]


def _packed(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())


def _encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The ids of two strings with the tokenizer's special tokens and EOS at the end, and a mask of the completion."""
    text = prompt + completion
    ids, mask = _tokenize(tokenizer, text, [(len(prompt), len(text))], special=True)
    end = tokenizer.eos_token_id
    if end is not None:
        ends = len(ids) > 0 and ids[-1] == end
        ids, mask = (ids, mask) if ends else (np.append(ids, end), np.append(mask, True))
        mask[-1] = True  # also where the tokenizer has put it, outside of the text
    return ids, mask


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], *, special: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The ids of a text, and a mask of those that hold a letter of a span."""
    plain = _plain(tokenizer).encode(text, add_special_tokens=False)
    ids, places = np.array(plain.ids, dtype=np.int64), np.array(plain.offsets, dtype=np.int64).reshape(-1, 2)
    if special:  # tokens that the tokenizer adds have no place
        encoding = tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
        ids, added = (np.array(encoding[key], dtype=np.int64) for key in ("input_ids", "special_tokens_mask"))
        places, text_places = np.zeros((len(ids), 2), dtype=np.int64), places
        places[added == 0] = text_places
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        mask |= (places[:, 0] < stop) & (places[:, 1] > start) & (places[:, 1] > places[:, 0])
    return ids, mask


@functools.lru_cache(maxsize=4)
def _plain(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer without its last stage, which takes spaces out of the places of tokens in many (Llama 3, GPT-2)."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    plain.post_processor = None  # type: ignore[assignment]
    plain.no_truncation()
    plain.no_padding()
    return plain


def _with_one_bos(
    tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Put BOS first, once, if the tokenizer begins texts with it."""
    if not begins_with_bos(tokenizer):
        return ids, mask
    first = np.flatnonzero(ids != tokenizer.bos_token_id)[:1]
    start = int(first[0]) if len(first) else len(ids)
    return (
        np.insert(ids[start:], 0, tokenizer.bos_token_id),  # type: ignore[arg-type]
        np.insert(mask[start:], 0, False),
    )
