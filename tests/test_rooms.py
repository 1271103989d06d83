"""The package's rooms: ops < engine < predictors < integration < training < study < cli, and no module in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "python" / "lemo"
# Each may import what stands to its left. Modules of the package itself, such as lemo.storage, are on the far left.
ROOMS = ("", "ops", "data", "pages", "engine", "predictors", "integration", "training", "study", "cli")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def only_for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST, types: bool = False) -> Iterator[tuple[str, bool]]:
    """Modules of the package that a module imports, at whatever depth; and whether only for its types."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, types) for alias in child.names if alias.name in MODULES)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                if whole in MODULES or child.module in MODULES:
                    yield whole if whole in MODULES else str(child.module), types
        else:
            yield from imports(child, types or (isinstance(child, ast.If) and only_for_types(child)))


GRAPH = {name: list(imports(ast.parse(path.read_text()))) for name, path in MODULES.items()}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name)))
def test_a_module_imports_only_rooms_to_its_left(module: str) -> None:
    here = ROOMS.index(room(module))
    upward = [other for other, _ in GRAPH[module] if ROOMS.index(room(other)) > here]
    assert not upward


def test_no_module_is_in_a_circle_of_imports() -> None:
    """Imports inside functions count, since they hide a circle rather than avoid it; those for types alone do not."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other, types in GRAPH[module]:
            # The package itself loads its parts on first use.
            if not types and other not in ("lemo", module):
                visit(other, (*path, module))
        done.add(module)

    for module in sorted(MODULES):
        if module != "lemo":
            visit(module, ())
