"""Text and conversations -> token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lemo.data.documents import DataError, compact
from lemo.data.long_text import encode_long
from lemo.data.records import Chat, Pair, Tokens

SPECIAL_TOKENS_IN_TEXT = ("auto", "parse", "plain")
# A document with more characters is tokenized in pieces: tokenizers need about 150 bytes for each character at once.
LONG_TEXT = 1 << 19


@dataclass
class Notes:
    """What happened to the documents and should be said: counts, and a name for one of them."""

    rendered: int = 0
    plain: dict[str, int] = field(default_factory=dict)
    doubled_bos: int = 0
    ended: int = 0
    still_special: int = 0
    in_messages: int = 0

    def lines(self, tokenizer: Any) -> Iterator[str]:
        if self.rendered:
            yield (
                f"documents that begin with the text of a special token, as chat templates write it: {self.rendered}; "
                "special tokens in their text are read as tokens (--special-tokens-in-text plain: as ordinary text)"
            )
        if self.doubled_bos:
            yield (
                f"documents that begin with {tokenizer.bos_token}, which the tokenizer adds as well: "
                f"{self.doubled_bos}; one is kept"
            )
        if self.ended:
            yield f"documents that end with the text {tokenizer.eos_token}: {self.ended}; it is read as the token"
        if self.plain:
            shown = ", ".join(f"{name} in {count}" for name, count in list(self.plain.items())[:4])
            yield (
                f"documents that hold the text of a special token: {shown}; it is read as ordinary text "
                "(--special-tokens-in-text parse: as the token)"
            )
        if self.still_special:
            yield (
                f"{tokenizer.eos_token} inside a text is the token all the same in {self.still_special} of these: the "
                "tokenizer cannot tell one from the other"
            )
        if self.in_messages:
            yield (
                f"conversations that hold the text of a special token inside a message: {self.in_messages}; the chat "
                "template makes it the token"
            )


class TextEncoder:
    """Token ids of texts, with the tokenizer's own special tokens around each.

    Special tokens that stand in the text as text (`special`):
      plain   are ordinary text: a manual may write <|endoftext|> without ending
      parse   become the tokens
      auto    become the tokens in texts that begin with one, as those that a chat template rendered do, and are
              ordinary text in all others; the end-of-text token at a text's very end is always the token
    """

    def __init__(self, tokenizer: Any, special: str = "auto") -> None:
        if special not in SPECIAL_TOKENS_IN_TEXT:
            raise DataError(f"special tokens in text: {special!r}, expected {', '.join(SPECIAL_TOKENS_IN_TEXT)}")
        self.tokenizer, self.special, self.notes = tokenizer, special, Notes()
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._added = _added(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        names = {t.content for t in added.values() if t.special} | set(tokenizer.all_special_tokens)
        names.discard("")
        # One substring search for each beginning, rather than for each of the hundreds of reserved tokens.
        self._beginnings = sorted({n[:2] for n in names})
        self._names = re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) or r"(?!)")
        self.adds_bos = self.bos is not None and self._added is not None and self.bos in self._added[0]
        # A text may begin with a hole or with a separator; what else it begins with, a template wrote.
        never = {tokenizer.unk_token, tokenizer.pad_token, tokenizer.mask_token, tokenizer.eos_token}
        never -= {tokenizer.bos_token} if self.adds_bos else set()
        self._openers = tuple(sorted(names - never))

    def find_special(self, text: str) -> list[str]:
        """The special tokens that stand in the text as text, each once."""
        if not any(b in text for b in self._beginnings):
            return []
        return list(dict.fromkeys(self._names.findall(text)))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of every text, ended by the tokenizer's end-of-text token, if any; none for a blank text."""
        texts = list(texts)
        plain = [self._prepare(texts, i) for i in range(len(texts))]
        long = {i for i, t in enumerate(texts) if len(t) > LONG_TEXT and self._added is not None}
        out: dict[int, np.ndarray] = {i: np.zeros(0, np.int32) for i, t in enumerate(texts) if not t.strip()}
        for split in (False, True):
            chosen = [i for i, p in enumerate(plain) if p == split and i not in out and i not in long]
            for i, ids in zip(chosen, self._call([texts[i] for i in chosen], split), strict=True):
                out[i] = np.asarray(ids, dtype=np.int32)
        for i in long - out.keys():
            out[i] = self._surround(encode_long(self.tokenizer, texts[i], split_special_tokens=plain[i]))
        return [self._finish(out[i], plain[i])[0] for i in range(len(texts))]

    def _prepare(self, texts: list[str], i: int) -> bool:
        """Whether special tokens in text i are ordinary text; cuts off what would come twice."""
        found = self.find_special(texts[i])
        if not found or self.special == "parse":
            return False
        if self.special == "auto":
            start = texts[i].lstrip()
            if start.startswith(self._openers):
                self.notes.rendered += 1
                texts[i] = start
                return False
            end = texts[i].rstrip()
            if self.eos is not None and end.endswith(self.tokenizer.eos_token):
                self.notes.ended += 1
                texts[i] = end[: -len(self.tokenizer.eos_token)]
                found = self.find_special(texts[i])
                if not found:
                    return False
        for name in found:
            self.notes.plain[name] = self.notes.plain.get(name, 0) + 1
        return True

    def _call(self, texts: list[str], split: bool) -> list[list[int]]:
        if not texts:
            return []
        # Given only if it matters: a custom tokenizer may not know the argument.
        options = {"split_special_tokens": True} if split else {}
        return self.tokenizer(texts, verbose=False, **options)["input_ids"]

    def _surround(self, body: np.ndarray) -> np.ndarray:
        assert self._added is not None
        prefix, suffix = self._added
        return np.concatenate([prefix, body, suffix]).astype(np.int32)

    def _finish(self, ids: np.ndarray, plain: bool) -> tuple[np.ndarray, int]:
        """(ids with one BOS and one end-of-text token at most around them, tokens dropped at the start)."""
        n = 0
        if not len(ids):
            return ids, n
        if self.adds_bos:
            while n + 1 < len(ids) and ids[n] == ids[n + 1] == self.bos:
                n += 1
            self.notes.doubled_bos += n > 0
        ids = ids[n:]
        if self.eos is not None:
            if plain and (ids[1:-1] == self.eos).any():
                self.notes.still_special += 1
            if ids[-1] != self.eos:
                ids = np.append(ids, np.int32(self.eos))
        return compact(ids), n

    def encode_pair(self, pair: Pair, where: str) -> Tokens:
        """A prompt and its completion, labelled on the completion and the end-of-text token after it."""
        if self._added is None:
            raise DataError(f"{where}: --answers-only cannot tell what this tokenizer adds to a text")
        texts = [pair.prompt + pair.completion]
        stripped = len(texts[0]) - len(texts[0].lstrip())
        plain = self._prepare(texts, 0)
        # Text in front of a rendered conversation is cut off if it is blank.
        begin = len(pair.prompt) - (0 if (pair.prompt + pair.completion).startswith(texts[0]) else stripped)
        body, places = spans_of(self.tokenizer, texts[0], where, plain)
        ids, dropped = self._finish(self._surround(body), plain)
        trained = np.ones(len(ids), dtype=bool)
        first = len(self._added[0]) - dropped
        trained[: max(first, 0)] = False
        answers = places[:, 1] > begin
        trained[max(first, 0) : first + len(body)] = answers[max(-first, 0) :]
        return Tokens(ids, trained)


def _added(tokenizer: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """The special tokens that the tokenizer puts before and after a text; None if that cannot be determined."""
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    full = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return np.asarray(full[:start], np.int32), np.asarray(full[start + len(bare) :], np.int32)
    return None


def _require_places(tokenizer: Any, where: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{where}: --answers-only needs a tokenizer that knows each token's place in the text (a fast one)"
        )


def spans_of(tokenizer: Any, text: str, where: str, split: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids [n], first and last + 1 character of every token [n, 2]), without added special tokens. Raises DataError."""
    _require_places(tokenizer, where)
    options = {"split_special_tokens": True} if split else {}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    return ids, np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)


# ---- conversations ---------------------------------------------------------------------------------------------------


class ChatEncoder:
    """Token ids of conversations, through the tokenizer's chat template; nothing is added to what it writes."""

    def __init__(self, text: TextEncoder, answers_only: bool) -> None:
        self.text, self.tokenizer, self.answers_only = text, text.tokenizer, answers_only

    def encode(self, chat: Chat, where: str) -> Tokens:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{where}: a conversation needs a chat template and the tokenizer has none; name an instruction-tuned "
                "model's tokenizer with --tokenizer, or the field of rendered text with --text-field"
            )
        if not chat.messages:
            return Tokens(np.zeros(0, np.int32))
        if any(isinstance(m.get("content"), str) and self.text.find_special(m["content"]) for m in chat.messages):
            self.text.notes.in_messages += 1
        if not self.answers_only:
            return Tokens(compact(np.asarray(self._apply(chat, where)["input_ids"], dtype=np.int32)))
        _require_places(self.tokenizer, where)
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", self._template(chat))
        return self._by_marks(chat, where) if marked and not chat.first_answer else self._by_prefixes(chat, where)

    def _template(self, chat: Chat) -> str:
        return self.tokenizer.get_chat_template(None, chat.tools)

    def _apply(self, chat: Chat, where: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                chat.messages if messages is None else messages,
                tools=chat.tools,
                **{"tokenize": True, "return_dict": True, **options},
            )
        except ImportError:
            raise
        except Exception as error:  # templates raise what they like
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{where}: the chat template refuses the conversation ({line})") from error

    def _by_marks(self, chat: Chat, where: str) -> Tokens:
        out = self._apply(chat, where, return_assistant_tokens_mask=True)
        trained = np.asarray(out["assistant_masks"], dtype=bool)
        return Tokens(compact(np.asarray(out["input_ids"], dtype=np.int32)), trained)

    def _by_prefixes(self, chat: Chat, where: str) -> Tokens:
        """An answer is what the rendered text gains from it, beyond the header that asks for it."""
        whole = self._apply(chat, where, tokenize=False)
        spans = []
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant" or i < chat.first_answer:
                continue
            before = self._render(chat, where, chat.messages[:i], ask=True) if i else ""
            upto = self._render(chat, where, chat.messages[: i + 1], ask=False)
            if not upto.startswith(before) or not whole.startswith(upto):
                raise DataError(
                    f"{where}, message {i + 1}: --answers-only cannot tell this answer from the rest, because the "
                    "chat template renders what is before it differently once more follows; use a template with "
                    "{% generation %} markers around the answers"
                )
            spans.append((len(before), len(upto)))
        ids, places = spans_of(self.tokenizer, whole, where)
        trained = np.zeros(len(ids), dtype=bool)
        for start, stop in spans:
            trained |= (places[:, 1] > start) & (places[:, 0] < stop) & (places[:, 1] > places[:, 0])
        return Tokens(compact(ids), trained)

    def _render(self, chat: Chat, where: str, messages: list[dict[str, Any]], ask: bool) -> str:
        return self._apply(chat, where, messages, tokenize=False, add_generation_prompt=ask)
