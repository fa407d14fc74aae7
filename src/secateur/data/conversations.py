"""Rows of chat data: conversations (``messages``) and pairs of a prompt and its completion.

A row becomes JSON text, ``{"messages": [...]}`` or ``{"prompt": ..., "completion": ...}``, with ``tools`` where the row
has some. Messages with the keys ``from`` and ``value`` (ShareGPT) get ``role`` and ``content`` there. Documents carry
this text: its hash decides their split and their order, as that of other text does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["COMPLETION", "PROMPT", "TOOLS", "RowFormat", "content_bytes", "conversation_text", "field_name"]

RowFormat = Literal["text", "messages", "prompt-completion"]

PROMPT, COMPLETION, TOOLS = "prompt", "completion", "tools"  #: fields of a row, and keys of its JSON text

#: names of roles in messages with the keys ``from`` and ``value``
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def field_name(format: RowFormat, text: str = "text") -> str:
    """The field that rows of a format have unless the user names another; ``text`` is that of rows of text."""
    return {"text": text, "messages": "messages", "prompt-completion": PROMPT}[format]


def conversation_text(row: Mapping[str, Any], field: str, format: RowFormat) -> str:
    """Return the JSON text of a row's conversation.

    Keys of messages whose value is null are left out. Lone surrogates, valid in JSON but not in UTF-8, become U+FFFD.

    Args:
        field: the field of the messages.
        format: ``messages`` or ``prompt-completion``.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    if format == "messages":
        content: dict[str, Any] = {"messages": _messages(row[field], field)}
    elif isinstance(row[PROMPT], str) and isinstance(row[COMPLETION], str):
        content = {PROMPT: row[PROMPT], COMPLETION: row[COMPLETION]}
        if not row[COMPLETION]:
            raise ValueError(f"the field {COMPLETION!r} is empty")
    else:
        content = {key: _messages(row[key], key) for key in (PROMPT, COMPLETION)}
    if tools := row.get(TOOLS):
        content[TOOLS] = _tools(tools)
    try:
        text = json.dumps(content, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its messages are no JSON: {error}") from None
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    """Check a list of messages; their roles and contents are the template's to judge."""
    if not isinstance(value, list):
        kind = "text, and that of its pair is not" if isinstance(value, str) and field != "messages" else None
        raise ValueError(f"the field {field!r} is {kind or type(value).__name__}, not a list of messages")
    if not value:
        raise ValueError(f"the field {field!r} has no messages")
    return [_message(message, f"message {number} of {field!r}") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, dict) and set(message) >= {"from", "value"} and not {"role", "content"} & set(message):
        role = _SHAREGPT.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise ValueError(f"{where} is from {message['from']!r}, not {', '.join(map(repr, _SHAREGPT))}")
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": role, "content": message["value"], **rest}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        keys = f", but {', '.join(map(repr, message))}" if isinstance(message, dict) and message else ""
        raise ValueError(f"{where} has no `role` and `content`{keys}")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise ValueError(f"{where}: its content is {type(content).__name__}, not text")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where} has a part of type {kind}, not text")
    return {key: value for key, value in message.items() if value is not None}


def _tools(value: Any) -> list[Any]:
    """The tools of a row: a list, or its JSON text, as data sets with one column for all rows have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"the field {TOOLS!r} is no JSON") from None
    if not isinstance(value, list):
        raise ValueError(f"the field {TOOLS!r} is {type(value).__name__}, not a list")
    return value


def content_bytes(content: Mapping[str, Any]) -> int:
    """Bytes of UTF-8 of the messages' contents in a conversation, given as the object of its JSON text."""
    total = 0
    for key, value in content.items():
        if key == TOOLS:
            continue
        messages = [{"content": value}] if isinstance(value, str) else value
        for message in messages:
            text = message.get("content") or ""
            parts = [text] if isinstance(text, str) else [part.get("text") or "" for part in text]
            total += sum(len(part.encode()) for part in parts)
    return total
