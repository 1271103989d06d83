"""What an adapter's folder says of the positions that it was trained for: `lemo_positions.json` next to PEFT's files.

An adapter of linearly stretched rotary positions fits only a model whose positions are stretched in the same way. PEFT
records nothing of this, and `run.json` stays behind when the adapter is copied out of its run folder: on the model as
it is, the adapter would be measured without a word, and wrongly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemo.storage import content_digest, with_digest

POSITIONS_FILE = "lemo_positions.json"
_FORMAT = 1


@dataclass(frozen=True)
class Positions:
    """context: of the run. longest, rope: max_position_embeddings and rope_parameters of the model that it trained."""

    context: int
    longest: int
    rope: dict[str, Any]

    @classmethod
    def of(cls, config: Any, context: int) -> Positions | None:
        """Those of a model that is trained in windows of `context` tokens; None unless they are stretched linearly."""
        rope, longest = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
        if not isinstance(rope, dict) or longest is None or not _stretched(rope):
            return None
        return cls(context, int(longest), json.loads(json.dumps(rope)))

    def to_json(self) -> dict[str, Any]:
        """By the names that a configuration of transformers gives them."""
        return {"context": self.context, "max_position_embeddings": self.longest, "rope_parameters": self.rope}

    def write(self, folder: Path) -> None:
        """Into an adapter's folder that is about to be published."""
        (folder / POSITIONS_FILE).write_text(with_digest({"format": _FORMAT, **self.to_json()}))


def _stretched(rope: dict[str, Any]) -> bool:
    """rope: of all layers, or by kind of layer."""
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return any(part.get("rope_type") == "linear" for part in kinds)


def read_positions(folder: Path | str) -> Positions | None:
    """What an adapter's folder says; None if it says nothing. Raises ValueError if that is damaged."""
    path = Path(folder) / POSITIONS_FILE
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise ValueError(_damaged(path, "it is not JSON")) from None
    if not isinstance(values, dict) or values.get("digest") != content_digest(values):
        raise ValueError(_damaged(path, "it is not what was written (its own digest differs)"))
    if values.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: written by another version of lemo (format {values.get('format')}, this one reads {_FORMAT})"
        )
    return Positions(values["context"], values["max_position_embeddings"], values["rope_parameters"])


def _damaged(path: Path, how: str) -> str:
    return (
        f"{path} is damaged: {how}. It says how the positions were stretched for which the adapter was trained: copy "
        "it again from the adapter's run"
    )


def check_positions(folder: Path | str, config: Any) -> None:
    """Raises ValueError if an adapter was trained for stretched positions that a model of this configuration has not.
    What else the configuration says of its positions does not count: other versions of transformers add names."""
    recorded = read_positions(folder)
    rope = getattr(config, "rope_parameters", None)
    if recorded is not None and not _holds(rope, recorded.rope):
        raise ValueError(
            f"{folder}: trained for positions that were stretched to {recorded.longest} tokens, with rope_parameters "
            f"{recorded.rope} ({POSITIONS_FILE}), but those of the model are {rope}: measure it on the model that it "
            "was trained on, with these in its configuration"
        )


def _holds(values: Any, wanted: Any) -> bool:
    """Whether values are the wanted ones, and perhaps have more names."""
    if isinstance(wanted, dict):
        return isinstance(values, dict) and all(_holds(values.get(name), value) for name, value in wanted.items())
    return bool(values == wanted)
