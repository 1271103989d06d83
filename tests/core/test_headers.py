"""What the public headers say is so: every comment that can be checked against the library is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lemo import _native
from ops.test_torch import SOME, select_everywhere
from support import attention_cases, cases
from support.cases import name_of

HEADERS = Path(__file__).parents[2] / "cpp" / "include" / "lemo"
TEXT = {path.name: path.read_text() for path in HEADERS.glob("*.h")}
_STRUCT = re.compile(r"typedef struct (\w+) \{(.*?)\n\}", re.DOTALL)
_FIELD = re.compile(r"^  (?:\w+ \*?|\w+\* )(\w+)(?:\[\w+\])?;(?: */\*\*<(.*?)\*/)?", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"/\*\*.*?\*/", re.DOTALL)
_ENUMERATOR = re.compile(r"\b(LEMO_\w+) = (\d+)")

# {struct: {field: comment}}
STRUCTS = {
    name: {field: " ".join(comment.replace("*", " ").split()) for field, comment in _FIELD.findall(body)}
    for text in TEXT.values()
    for name, body in _STRUCT.findall(text)
}
OPERATIONS = list(_native.core().fields)


def tensors(operation: str) -> Iterator[tuple[str, str, str]]:
    """(field, role, comment) of the tensors outside of lemo_blocks."""
    kinds = dict(_native.core().structs[operation])
    for field, role in _native.fields(operation).items():
        if kinds.get(field) == "lemo_tensor":
            yield field, role, STRUCTS[f"lemo_{operation}_args"][field]


def test_every_struct_was_found() -> None:
    assert {f"lemo_{name}_args" for name in OPERATIONS} | {"lemo_exec", "lemo_blocks", "lemo_tensor"} == set(STRUCTS)
    for name, kinds in _native.core().structs.items():
        assert list(STRUCTS[f"lemo_{name}_args"]) == ["struct_size", *(field for field, _ in kinds)]


def test_every_field_has_a_comment() -> None:
    bare = {f"{name}.{field}" for name, fields in STRUCTS.items() for field, comment in fields.items() if not comment}
    assert {name for name in bare if not name.endswith(".struct_size")} == {"lemo_tensor.data"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_comments_begin_with_the_role(operation: str) -> None:
    begins = {"optional": "optional:", "optional_output": "optional out:", "output": "out:", "inout": "inout:"}
    for field, role, comment in tensors(operation):
        known = [name for name, begin in begins.items() if comment.startswith(begin)]
        known += ["companion"] if comment.startswith("with `") else []
        assert known == ([] if role == "input" else [role]), f"{field}: {comment}"
        assert re.search(r"float|int32|int64|uint8|\[d\]|as in the forward pass", comment), f"{field}: {comment}"


@pytest.mark.parametrize("name", TEXT)
def test_names_in_comments_exist(name: str) -> None:
    """Fields stand in backticks or before an index; all else of the interface begins with lemo_ or LEMO_."""
    own = {field for struct, _ in _STRUCT.findall(TEXT[name]) for field in STRUCTS[struct]}
    own |= {field for struct in ("lemo_exec", "lemo_blocks", "lemo_tensor") for field in STRUCTS[struct]}
    own |= set(re.findall(r"\(\*(\w+)\)\(", TEXT["types.h"]))  # function pointers
    code = re.sub(r"/\*.*?\*/", "", "".join(TEXT.values()), flags=re.DOTALL)
    declared = set(re.findall(r"\b(?:lemo|LEMO)_\w+\b", code))
    for comment in _COMMENT.findall(TEXT[name]):
        if name == "operations.h":
            continue  # about macros and roles
        used = re.findall(r"`(\w+)`", comment) + re.findall(r"\b([a-z]\w+)\[\w", comment)
        assert [word for word in used if word not in own] == []
        names = re.findall(r"\b((?:lemo|LEMO)_\w+)\b(?!\.h)", comment)
        assert [word for word in names if word not in declared and "_X_" not in word and word[-1] != "_"] == []


def test_enumerators_are_those_of_the_python_module() -> None:
    written = {name: int(value) for text in TEXT.values() for name, value in _ENUMERATOR.findall(text)}
    defined = {f"LEMO_{name}": _native.constant(f"LEMO_{name}") for name in ("MAX_DIMS", "TILE_ROWS")}
    assert all(f"#define {name} {value}\n" in "".join(TEXT.values()) for name, value in defined.items())
    assert _native.core().constants == written | defined


# --- what may be absent -----------------------------------------------------------------------------------------------


def calls_of(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Any], bool]]:
    """The calls of the C interface that `run` makes, with copies of their tensors."""
    found = []
    launch = _native.run

    def recorded(name: str, device: torch.device, values: Any, deterministic: bool = False) -> None:
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
        found.append((name, copies, deterministic))
        launch(name, device, values, deterministic)

    with monkeypatch.context() as patch:
        patch.setattr(_native, "run", recorded)
        run()
    assert found
    return found


def refused(operation: str, arguments: dict[str, Any]) -> str | None:
    """The message if the library refuses these arguments."""
    try:
        _native.run(operation, torch.device("cpu"), [arguments[name] for name in _native.fields(operation)])
    except ValueError as error:
        return str(error)
    return None


def without(operation: str, arguments: dict[str, Any], field: str) -> dict[str, Any]:
    """Without the field, and without those that go with it or need it."""
    gone = [name for name, _, comment in tensors(operation) if re.search(rf"(with|and|needs) `{field}`", comment)]
    return arguments | dict.fromkeys([field, *gone])


# In their absence the identity takes their place, which has other sizes; places of separate key rows have no default.
MAPS = ("rows", "rows_k", "cu_seqlens_k", "places")
CASES = [
    *SOME,
    cases.Norm("documents", 24, residual=True, bias=True),
    attention_cases.Attention("all_64", 4, 2, 16, lists=True),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_required_tensors_are_required_and_optional_ones_are_not(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_presence(calls_of(lambda: case.run(case.inputs("cpu", torch.float32)), monkeypatch))


def test_presence_for_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    check_presence(calls_of(select_everywhere, monkeypatch))


def check_presence(calls: list[tuple[str, list[Any], bool]]) -> None:
    for operation, values, _ in calls:
        arguments = dict(zip(_native.fields(operation), values, strict=True))
        assert refused(operation, arguments) is None
        for field, role, _ in tensors(operation):
            if arguments[field] is None:
                continue
            alone = refused(operation, arguments | {field: None})
            if role in ("input", "output", "inout", "companion"):
                assert alone is not None and field in alone
            elif field not in MAPS:
                assert refused(operation, without(operation, arguments, field)) is None
