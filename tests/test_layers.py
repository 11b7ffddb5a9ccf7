"""The package's layers: imports point down only, anywhere in a module, functions included."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldm_jax"

# From the bottom up: a folder or file of the package imports those of lower floors only.
LAYERS = [
    ("diffusion", "errors"),
    ("models", "config", "runtime"),
    ("interop", "data", "run_folder", "command_line"),
    ("pipeline",),
    ("sampling",),
    ("training",),
    ("evaluation",),
    ("export", "job"),
    ("train", "sample", "evaluate", "convert", "demo"),
]
FLOOR = {part: number for number, parts in enumerate(LAYERS) for part in parts}


def module_name(path):
    """The dotted name of a file's module below the package: pipeline/load.py is pipeline.load."""
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source, package=()):
    """The names below ldm_jax that a module of `package` imports, as (line, dotted name of a module or its member)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["ldm_jax", *package][: len(package) + 2 - node.level] if node.level else []
            names = [[*above, *(node.module or "").split("."), alias.name] for alias in node.names]
        else:
            continue
        for top, *below in ([part for part in name if part] for name in names):
            if top == "ldm_jax":
                yield node.lineno, ".".join(below)


@cache
def imported(module):
    """Those of a module, as (line, module): a name that is no module belongs to the one above it."""
    path = MODULES[module]
    package = tuple(path.relative_to(PACKAGE).parts[:-1])
    found = imports(path.read_text(), package)
    return [(line, name if name in MODULES else name.rpartition(".")[0]) for line, name in found]


def part(module):
    """The folder, or file of the package's root, that a module belongs to."""
    return module.split(".")[0]


def test_imports_are_found_wherever_and_however_they_are_written():
    source = (
        "import ldm_jax.a.b\nfrom ldm_jax import c\ndef f():\n    from .d import e\n    from .. import g\nimport os\n"
    )
    assert [*imports(source, ("x",))] == [(1, "a.b"), (2, "c"), (4, "x.d.e"), (5, "g")]


def test_every_part_of_the_package_has_its_layer():
    assert {part(module) for module in MODULES if module} == set(FLOOR)
    assert len(LAYERS) <= 10


@pytest.mark.parametrize("folder", FLOOR)
def test_imports_point_down_only(folder):
    for module in (module for module in MODULES if part(module) == folder):
        for line, other in imported(module):
            below = part(other) == folder or FLOOR[part(other)] < FLOOR[folder]
            assert other and below, f"{MODULES[module].relative_to(PACKAGE.parent)}:{line} imports {other or 'ldm_jax'}"


def test_no_module_imports_itself_by_way_of_others():
    done = set()

    def visit(module, way):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for _, other in imported(module):
                visit(other, [*way, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_the_longest_chain_of_imports_has_at_most_ten_parts():
    below = {name: {part(o) for m in MODULES if part(m) == name for _, o in imported(m)} - {name} for name in FLOOR}

    @cache
    def chain(name):
        return 1 + max((chain(other) for other in below[name]), default=0)

    assert max(map(chain, FLOOR)) <= 10


def test_the_root_of_the_package_has_at_most_eight_files():
    assert len([*PACKAGE.glob("*.py")]) <= 8
