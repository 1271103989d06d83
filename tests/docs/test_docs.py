"""README and docs: links lead somewhere, commands and code are what lemo takes, generated parts are current."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from lemo.cli import build_parser
from lemo.engine.config import POLICIES
from lemo.engine.families import FAMILIES
from lemo.training.settings import parse_stages

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def of_site(name: str) -> ModuleType:
    """A module of docs/site, which is not a package: mkdocs loads it by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


links, c_reference = of_site("links"), of_site("c_reference")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fenced(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def commands(page: Path) -> list[str]:
    """Lines of code that call lemo, continued lines joined; placeholders and options stay as they are."""
    indented = re.findall(r"(?:^ {4,}.*\n)+", FENCE.sub("", page.read_text()), re.MULTILINE)
    blocks = [*indented, *fenced(page, ""), *fenced(page, "bash"), *fenced(page, "console")]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"lemo [a-z]", line)]


def test_the_pages_are_found() -> None:
    names = {name_of(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/c-api.md", "docs/howto/trainer.md"} <= names
    assert len(commands(ROOT / "docs" / "howto" / "command-line.md")) >= 8


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links.local_links(page.read_text()):
        file, anchor = links.resolve(link.target, page)
        assert file.exists(), f"{link.target} leads nowhere"
        assert file.is_relative_to(ROOT), f"{link.target} leads out of the repository"
        if anchor:
            assert anchor in links.anchors(file.read_text()), f"{link.target}: {file.name} has no such heading"


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
def test_commands_are_accepted(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    for command in commands(page):
        words = shlex.split(command, comments=True)
        try:
            args = parser.parse_args(words[1:])
        except SystemExit as stopped:
            assert stopped.code == 0, f"{command}: {capsys.readouterr().err}"
        else:
            if getattr(args, "schedule", None):
                parse_stages(args.schedule)


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    return next(a.choices for a in actions if isinstance(a, argparse._SubParsersAction))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_in_prose_exist(page: Path) -> None:
    known = subcommands()
    options = {option for parser in known.values() for option in parser._option_string_actions}
    text = FENCE.sub("", page.read_text())
    for span in re.findall(r"`(lemo [a-z][^`]*)`", text):
        words = span.split()
        assert words[1] in known, span
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= set(known[words[1]]._option_string_actions), span
    if page.parts[-2] in ("guide", "howto") or (page.name == "README.md" and page.parent == ROOT):
        for option in re.findall(r"`(--[a-z][a-z-]*)[^`]*`", text):
            assert option in options, f"{option} is not an option of any command"
    for schedule in re.findall(r"`--schedule ([^`]+)`", text):
        parse_stages(schedule)


def has(module: str, name: str) -> bool:
    """Whether `from module import name` works."""
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p, "python")], ids=name_of)
def test_python_is_python_and_names_exist(page: Path) -> None:
    for code in fenced(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lemo":
                for name in node.names:
                    assert has(str(node.module), name.name), f"{node.module} has no {name.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lemo":
                assert has("lemo", node.attr), f"lemo has no {node.attr}"


def test_operators_example_runs() -> None:
    (code,) = fenced(ROOT / "docs" / "howto" / "operators.md", "python")
    values: dict[str, object] = {}
    exec(compile(code, "docs/howto/operators.md", "exec"), values)
    assert values["kept"].num_rows == 2048 and values["out"].shape == (2048, 16, 64)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", [p for p in PAGES if "\n::: " in p.read_text()], ids=name_of)
def test_python_reference_names_exist(page: Path) -> None:
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, f"{name} has no docstring"


def test_every_operator_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "python-ops.md").read_text()
    listed = set(re.findall(r"^::: lemo\.ops\.(?:\w+\.)?(\w+)$", page, re.MULTILINE))
    ops = importlib.import_module("lemo.ops")
    assert listed == set(ops.__all__)


def test_c_reference_is_complete() -> None:
    folder = ROOT / "cpp" / "include" / "lemo"
    page = c_reference.page(folder)
    for header in folder.glob("*.h"):
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        names = re.findall(r"^LEMO_API [^;(]*?(\w+)\(", text, re.MULTILINE) + re.findall(
            r"typedef (?:struct|enum) (\w+)", text
        )
        names += re.findall(r"^ +(?:int\d+_t|uint\d+_t|float|lemo_\w+)\*? (\w+)(?:,|;|\[)", text, re.MULTILINE)
        names += re.findall(r"^ +(LEMO_\w+) =", text, re.MULTILINE)
        assert names or "LEMO_API " not in text, "found nothing to look for"
        missing = [name for name in names if not re.search(rf"\b{name}\b", page)]
        assert not missing, f"{header.name}: {missing} are not in the reference"


def test_c_comments_become_markdown() -> None:
    lines = ("@brief What it is, a * b.", "", "  y = a * x", "", " - an item", "   of two lines", "", "The end.")
    comment = c_reference.strip_comment("/** " + "\n * ".join(lines) + " */")
    assert c_reference.to_markdown(comment) == (
        "What it is, a \\* b.\n\n```text\n  y = a * x\n```\n\n- an item\n   of two lines\n\nThe end."
    )


def test_an_unknown_declaration_is_an_error(tmp_path: Path) -> None:
    header = tmp_path / "odd.h"
    header.write_text("/* What it is for. */\nstatic inline int odd(void) { return 1; }\n")
    with pytest.raises(ValueError, match=r"odd\.h:2: not a declaration"):
        c_reference.read_header(header)


@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p, "cpp") or fenced(p, "c")], ids=name_of)
def test_c_examples_use_declared_names(page: Path) -> None:
    """Argument structs have the fields that the examples set, and functions and constants exist."""
    folder = ROOT / "cpp" / "include" / "lemo"
    items = {item.name: item for name in c_reference.HEADERS for item in c_reference.read_header(folder / name).items}
    values = {field[0] for item in items.values() if item.kind == "enum" for field in item.fields}
    constants = values | {item.name for item in items.values() if item.kind == "constant"}
    for code in fenced(page, "cpp") + fenced(page, "c"):
        for name in re.findall(r"\bLEMO_\w+", code):
            assert name in constants, name
        for name in re.findall(r"\b(lemo_\w+)\b(?!\.h)", code):
            assert name in items, name
        made = re.findall(r"(\w+) = lemo::make<(\w+)>|(lemo_\w+) (\w+) = \{", code)
        for variable, kind in [(a or d, b or c) for a, b, c, d in made]:
            fields = {name.strip().split("[")[0] for field in items[kind].fields for name in field[0].split(",")}
            used = set(re.findall(rf"(?<![\w.]){variable}\.(\w+) ?=[^=]", code))
            assert used <= fields, f"{kind}: {sorted(used - fields)}"


def test_paths_in_the_architecture_and_recipes_exist() -> None:
    for page in (ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"):
        for span in re.findall(r"`([\w./-]+)`", page.read_text()):
            if span.split("/")[0] in ("python", "cpp", "cuda", "tests", "benchmarks", "docs", "examples", ".ci"):
                assert (ROOT / span).exists(), f"{page.name}: {span} does not exist"


def test_where_do_i_find() -> None:
    """Each row's words are in one of the row's files."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("## Where do I find ...")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 15
    for question, files, words in rows:
        paths = [ROOT / path for path in re.findall(r"`([^`]+)`", files)]
        assert paths, question
        content = "\n".join(path.read_text() for path in paths if path.is_file())
        for word in re.findall(r"`([^`]+)`", words):
            assert word in content, f"{question.strip()}: {word!r} is not in {files.strip()}"


def test_every_policy_is_in_the_guide() -> None:
    table = (ROOT / "docs" / "guide" / "policies.md").read_text().split("\n\n")
    rows = next(part for part in table if part.startswith("| policy |"))
    assert set(re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)) == set(POLICIES)


def test_every_family_is_in_the_readme() -> None:
    limits = (ROOT / "README.md").read_text().split("## Limits")[1]
    for family in FAMILIES:
        name = family.model_class.removesuffix("ForCausalLM")
        assert re.search(rf"\b{name}\b", limits), f"README.md, Limits: {name} is missing"


def test_make_targets_in_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE) for name in line.split()}
    for page in PAGES:
        for target in re.findall(r"(?:`|^ {4})make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{name_of(page)}: make {target}"


def test_scripts_in_the_pages_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"python ((?:benchmarks|examples|demo|docs|\.ci)/[\w/]+\.py)", page.read_text()):
            assert (ROOT / script).exists(), f"{name_of(page)}: {script}"


def test_picture_is_what_its_script_draws() -> None:
    script = ROOT / "docs" / "images" / "flow.py"
    run = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
