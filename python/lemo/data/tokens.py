"""Token files: reading *.bin and *.npy, writing *.bin.

A `.bin` file holds little-endian tokens, by themselves or after a header:

  lemo     16 bytes: b"LEMOTOK", version 1 (uint8), bytes per token 2 or 4 (uint32), 0 (uint32); then the number of
           tokens (uint64). `write_tokens` writes it.
  llm.c    256 int32: 20240520, 1, number of tokens (uint16) or 20240801, 7, number of tokens (uint32)

Without a header the caller states the width; uint16 is assumed only if the vocabulary fits.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemo.data.documents import DataError

TOKEN_DTYPES = ("uint16", "uint32")
_MAGIC = b"LEMOTOK\x01"
_HEADER = struct.Struct("<8sIIQ")
_LLMC_BYTES = 1024
_LLMC = {20240520: "<u2", 20240801: "<u4"}
# Fewer tokens are no evidence of the file's type.
_MIN_TO_JUDGE = 16


@dataclass(frozen=True)
class TokenFormat:
    """What is known of token files in addition to their bytes.

    dtype: "uint16" or "uint32" of files without a header, or None to go by the vocabulary.
    end_of_text: the token that ends a document.  begins: it begins documents too, as OPT's does.
    pad: a token that is nothing but padding.
    """

    vocab_size: int | None = None
    dtype: str | None = None
    end_of_text: int | None = None
    begins: bool = False
    pad: int | None = None


def write_tokens(path: Path | str, tokens: Any, dtype: str | None = None) -> None:
    """Write tokens (integers, one dimension) with a header of their width and number.

    dtype: "uint16" or "uint32"; by default the smaller one that holds them. Raises ValueError.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected integers in one dimension, got {array.dtype} {list(array.shape)}")
    low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
    if dtype is None:
        dtype = "uint16" if high < 1 << 16 else "uint32"
    if dtype not in TOKEN_DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected uint16 or uint32")
    if low < 0 or high > np.iinfo(dtype).max:
        raise ValueError(f"tokens from {low} to {high} do not fit {dtype}")
    width = np.dtype(dtype).itemsize
    with Path(path).open("wb") as f:
        f.write(_HEADER.pack(_MAGIC, width, 0, len(array)))
        f.write(np.ascontiguousarray(array, dtype=f"<u{width}").data)


def read_tokens(raw: bytes, path: str, suffix: str, known: TokenFormat) -> list[np.ndarray]:
    """The rows of a token file: one for *.bin, one for each row of a two-dimensional *.npy. Raises DataError."""
    rows = _read_npy(raw, path) if suffix == ".npy" else [_read_bin(raw, path, known)]
    for tokens in rows:
        check_vocabulary(tokens, known.vocab_size, path)
    return rows


def check_vocabulary(tokens: np.ndarray, vocab_size: int | None, where: str) -> None:
    """Raises DataError for tokens that the model does not have."""
    if not len(tokens):
        return
    wrong = tokens < 0 if int(tokens.min()) < 0 else None
    if wrong is None and vocab_size is not None and int(tokens.max()) >= vocab_size:
        wrong = tokens >= vocab_size
    if wrong is not None:
        at = int(np.argmax(wrong))
        raise DataError(
            f"{where}: token {int(tokens[at])} at position {at} lies outside the model's vocabulary"
            f"{'' if vocab_size is None else f' of {vocab_size}'}; the tokens were made with another tokenizer, or the "
            "file holds numbers of another width (--token-dtype)"
        )


def _read_bin(raw: bytes, path: str, known: TokenFormat) -> np.ndarray:
    if raw.startswith(_MAGIC):
        if len(raw) < _HEADER.size:
            raise DataError(f"{path}: its header is cut short; the file is truncated")
        _, width, reserved, count = _HEADER.unpack_from(raw)
        if width not in (2, 4) or reserved:
            raise DataError(f"{path}: its header names {width} bytes per token, expected 2 or 4; the file is damaged")
        return _body(raw, path, _HEADER.size, f"<u{width}", count)
    if raw.startswith(_MAGIC[:7]):
        raise DataError(f"{path}: version {raw[7]} of the header is not known to this version of lemo; expected 1")
    if len(raw) >= _LLMC_BYTES:
        magic, _, count = struct.unpack_from("<iii", raw)
        if magic in _LLMC:
            return _body(raw, path, _LLMC_BYTES, _LLMC[magic], count)
    return _read_headerless(raw, path, known)


def _body(raw: bytes, path: str, start: int, dtype: str, count: int) -> np.ndarray:
    width = np.dtype(dtype).itemsize
    if len(raw) - start != count * width:
        raise DataError(
            f"{path}: its header promises {count} tokens of {width} bytes and {len(raw) - start} bytes follow; the "
            "file is truncated or damaged"
        )
    return np.frombuffer(raw, dtype, offset=start)


def _read_headerless(raw: bytes, path: str, known: TokenFormat) -> np.ndarray:
    dtype = known.dtype
    if dtype is None:
        if known.vocab_size is not None and known.vocab_size > 1 << 16:
            raise DataError(
                f"{path}: has no header, and uint16 cannot hold a vocabulary of {known.vocab_size}; say what it holds "
                "with --token-dtype uint32 (or uint16), or write it with lemo.data.write_tokens"
            )
        dtype = "uint16"
    width = np.dtype(dtype).itemsize
    if len(raw) % width:
        raise DataError(
            f"{path}: {len(raw)} bytes are not a whole number of {dtype} tokens; the file is truncated or is not a "
            "token file"
        )
    tokens = np.frombuffer(raw, f"<u{width}")
    _check_width(tokens, path, known.vocab_size)
    return tokens


def _check_width(tokens: np.ndarray, path: str, vocab_size: int | None) -> None:
    """Raises DataError if the numbers show that they were written at another width."""
    width, count = tokens.itemsize, len(tokens)
    if count * width < 2 * _MIN_TO_JUDGE:
        return
    if width == 2 and count % 2 == 0 and tokens[::2].any() and not tokens[1::2].any():
        raise DataError(
            f"{path}: every second 16-bit number in it is 0, so it holds wider numbers than uint16; say --token-dtype "
            "uint32 (64-bit tokens: save them as *.npy, or with lemo.data.write_tokens)"
        )
    beyond = width == 4 and vocab_size is not None and int(tokens.max()) >= max(vocab_size, 1 << 16)
    if beyond and int(tokens.view("<u2").max()) < (vocab_size or 0):
        raise DataError(f"{path}: read as uint32, its tokens exceed the vocabulary; it seems to hold uint16")


def _read_npy(raw: bytes, path: str) -> list[np.ndarray]:
    try:
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        kind = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{path}: holds {kind}, expected integer tokens in one dimension or in rows")
    return list(array) if array.ndim == 2 else [array]


# ---- documents in a stream -------------------------------------------------------------------------------------------


def split_stream(tokens: np.ndarray, known: TokenFormat) -> tuple[list[np.ndarray], int]:
    """(documents, padding): the documents that end-of-text tokens end, and how many tokens were only padding.

    Rows padded to a length are full of end-of-text or of padding tokens. A run of them ends one document; what is
    beyond is dropped.
    """
    pads = 0
    parts = [tokens]
    if known.pad is not None and known.pad != known.end_of_text:
        parts, pads = _drop_runs(tokens, known.pad)
    documents = []
    for part in parts:
        if known.end_of_text is None:
            documents.append(part)
            continue
        is_end = part == known.end_of_text
        useless = is_end & np.concatenate([[True], is_end[:-1]])
        last = is_end & ~useless
        if known.begins:  # the last of a run belongs to what follows
            useless &= np.concatenate([is_end[1:], [True]])
        pads += int(useless.sum())
        kept = part[~useless] if useless.any() else part
        documents += np.split(kept, np.flatnonzero(last[~useless]) + 1)
    return [d for d in documents if len(d)], pads


def _drop_runs(tokens: np.ndarray, pad: int) -> tuple[list[np.ndarray], int]:
    """Cut at runs of at least two padding tokens, and how many tokens that dropped. A single one may be text."""
    is_pad = np.concatenate([[False], tokens == pad, [False]])
    edges = np.flatnonzero(is_pad[1:] != is_pad[:-1])
    starts, stops = edges[::2], edges[1::2]
    long = stops - starts >= 2
    starts, stops = starts[long], stops[long]
    kept = zip([0, *stops], [*starts, len(tokens)], strict=True)
    return [tokens[a:b] for a, b in kept if b > a], int((stops - starts).sum())


def without_padding(tokens: np.ndarray, known: TokenFormat) -> int:
    """Length of a row without the padding at its end: padding tokens, and all but one of its end-of-text tokens."""
    n = len(tokens)
    if known.pad is not None and known.pad != known.end_of_text:
        while n and tokens[n - 1] == known.pad:
            n -= 1
    if known.end_of_text is not None:
        while n > 1 and tokens[n - 1] == tokens[n - 2] == known.end_of_text:
            n -= 1
    return n
