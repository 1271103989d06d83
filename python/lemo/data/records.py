"""What a record of a data set holds: text, tokens, a conversation, or a prompt and its completion."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lemo.data.documents import DataError, compact
from lemo.data.tokens import TokenFormat, check_vocabulary, without_padding

IGNORE_INDEX = -100
CHAT_FIELDS = ("messages", "conversations")
_MASKS = ("assistant_masks", "completion_mask")
# ShareGPT's names.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Tokens:
    """A document that is tokenized already. trained: bool mask of its labels, or None. padding: tokens left out."""

    ids: np.ndarray
    trained: np.ndarray | None = None
    padding: int = 0


@dataclass(frozen=True)
class Chat:
    """A conversation. first_answer: index of the first message that may be an answer."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_answer: int = 0


@dataclass(frozen=True)
class Pair:
    """A prompt and the text that completes it."""

    prompt: str
    completion: str


Content = str | Tokens | Chat | Pair


@dataclass(frozen=True)
class RecordOptions:
    """text_field: the field to use, or None to choose.  answers_only: labels are wanted on the answers alone."""

    text_field: str | None
    answers_only: bool
    tokens: TokenFormat


def choose_fields(names: Iterable[str], options: RecordOptions) -> list[str]:
    """The fields of a record that are used; empty if there is none. The first is the one that decides.

    Tokens go before text, as whoever made them meant them to be used, and text before conversations, except where
    labels are wanted on the answers alone.
    """
    found = set(names)
    also = [n for n in ("labels", "attention_mask", *_MASKS, "tools") if n in found]
    if options.text_field is not None:
        return [options.text_field, *also] if options.text_field in found else []
    chats = [n for n in CHAT_FIELDS if n in found]
    if "prompt" in found and "completion" in found:
        chats.append("prompt")
    texts = ["text"] if "text" in found else []
    order = [*chats, *texts] if options.answers_only else [*texts, *chats]
    first = next(iter((["input_ids"] if "input_ids" in found else []) + order), None)
    if first is None:
        return []
    return [first, *(["completion"] if first == "prompt" else []), *also]


def content_of(record: Any, where: str, options: RecordOptions) -> Content:
    """What the record holds. Raises DataError, naming the record and the field."""
    fields = choose_fields(record, options) if isinstance(record, dict) else []
    if not fields:
        found = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
        wanted = f"'{options.text_field or 'text'}'"
        if options.text_field is None:
            wanted += ", 'input_ids', 'messages' or 'prompt' and 'completion'"
        raise DataError(f"{where}: no field {wanted} (found: {found}); name the text's field with --text-field")
    name = fields[0]
    value = record[name]
    if "completion" in fields:
        return _completed(value, record["completion"], record.get("tools"), where)
    if value is None:
        return ""
    if isinstance(value, str) and name in CHAT_FIELDS and options.text_field is None:
        value = _parsed_messages(value, name, where)
        record = {**record, name: value}
    if isinstance(value, str) and name != "input_ids":
        return _encodable(value, f"{where}, field '{name}'")
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return Chat(_messages(value, f"{where}, field '{name}'"), _tools(record.get("tools"), where))
    if isinstance(value, np.ndarray | list) and _are_integers(value):
        return _tokens(record, name, where, options)
    raise DataError(
        f"{where}: field '{name}' is {_kind(value)}, expected a string, a list of token ids or a list of messages"
    )


def _are_integers(value: Any) -> bool:
    try:
        return len(value) == 0 or np.asarray(value).dtype.kind in "iu"
    except ValueError:  # lists of unequal lengths
        return False


def _encodable(text: str, where: str) -> str:
    """The text. Raises DataError for half of a surrogate pair, which JSON can hold and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is half of a surrogate pair (\\u{ord(text[error.start]):04x}), not "
            "text; remove it where the file is made (it is often an emoji that was cut in two)"
        ) from None
    return text


def _parsed_messages(text: str, name: str, where: str) -> Any:
    """Messages that a table without lists (CSV, for one) holds as JSON."""
    try:
        value = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        value = text
    if value is not None and not isinstance(value, list):
        raise DataError(
            f"{where}: field '{name}' is a string and not the JSON of a list of messages; if it is text to learn as "
            f"it stands, say so with --text-field {name}"
        )
    return [] if value is None else value


def _kind(value: Any) -> str:
    return f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__


def _completed(prompt: Any, completion: Any, tools: Any, where: str) -> Content:
    if isinstance(prompt, str) and isinstance(completion, str):
        return Pair(
            _encodable(prompt, f"{where}, field 'prompt'"), _encodable(completion, f"{where}, field 'completion'")
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages([*prompt, *completion], where)
        return Chat(messages, _tools(tools, where), first_answer=len(prompt))
    raise DataError(
        f"{where}: 'prompt' is {_kind(prompt)} and 'completion' is {_kind(completion)}; expected two strings or two "
        "lists of messages"
    )


def _messages(values: list[Any], where: str) -> list[dict[str, Any]]:
    messages = []
    for i, value in enumerate(values):
        if isinstance(value, dict) and "from" in value and "value" in value:
            role = str(value["from"])
            value = {"role": _ROLES.get(role, role), "content": value["value"]}
        if not isinstance(value, dict) or not isinstance(value.get("role"), str):
            raise DataError(f"{where}, message {i + 1}: expected an object with 'role' and 'content'")
        place = f"{where}, message {i + 1}"
        # A table has every key in every row.
        message = {k: v for k, v in value.items() if v is not None}
        if isinstance(message.get("content"), list):
            message["content"] = _joined_parts(message["content"], place)
        if isinstance(message.get("content"), str):
            _encodable(message["content"], place)
        messages.append(message)
    return messages


def _joined_parts(parts: list[Any], where: str) -> str:
    """The text of content given in parts; most chat templates would write such a list out as Python does."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise DataError(f"{where}: its content has a part of type {kind}, and only text can be learned")
    return "".join(part["text"] for part in parts)


def _tools(value: Any, where: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: field 'tools' is not JSON ({error.msg})") from None
    return list(value) if value else None


def _tokens(record: dict[str, Any], name: str, where: str, options: RecordOptions) -> Tokens:
    def column(field: str) -> np.ndarray | None:
        values = record.get(field)
        if values is None:
            return None
        array = np.asarray(values)
        if (len(array) and array.dtype.kind not in "iub") or array.shape != (len(ids),):
            raise DataError(f"{where}: field '{field}' must hold one integer for each of the {len(ids)} tokens")
        return array

    ids = np.asarray(record[name], dtype=np.int64)
    if ids.ndim != 1:
        raise DataError(f"{where}: field '{name}' has {ids.ndim} dimensions, expected one list of token ids")
    check_vocabulary(ids, options.tokens.vocab_size, f"{where}, field '{name}'")
    trained: np.ndarray | None = None
    labels = column("labels")
    if labels is not None:
        trained = labels != IGNORE_INDEX
        wrong = trained & (labels != ids)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{where}: label {int(labels[at])} at position {at} is neither {IGNORE_INDEX} nor the token there, "
                f"{int(ids[at])}; labels are expected unshifted, one for the token at the same place"
            )
    if options.answers_only and labels is None:
        mask = next((column(m) for m in _MASKS if record.get(m) is not None), None)
        if mask is None:
            raise DataError(
                f"{where}: --answers-only needs to know the answers among these tokens, and there is no field "
                f"'labels', '{_MASKS[0]}' or '{_MASKS[1]}'"
            )
        trained = mask != 0
    attended = column("attention_mask")
    if attended is not None:
        kept = attended != 0
    else:
        kept = np.arange(len(ids)) < without_padding(ids, options.tokens)
    padding = len(ids) - int(kept.sum())
    if trained is not None and trained.all():
        trained = None
    return Tokens(compact(ids[kept]), None if trained is None else trained[kept], padding)
