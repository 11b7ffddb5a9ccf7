"""Docstrings: every public class, function and method has one, and it names the shapes of arrays."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldm_jax"
ARRAYS = ("Array", "ndarray")
SCALARS = ("rng", "seed", "step")  # by these names: JAX's keys, and whole numbers
# [B, H, W, C], [3], "scalar", "elementwise", "any shape"; the interval [0, 1] is none.
SHAPE = re.compile(r"(?i)\[(?!-?\d[\d.]*, )[^\[\]\n]*\]|\bscalars?\b|\belementwise\b|\bany shape\b")


def definitions(tree, above=""):
    """The public classes, functions and methods of a module, as (dotted name, node)."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield above + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{node.name}.")


SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {file: [*definitions(ast.parse(source))] for file, source in SOURCES.items()}


def is_array(annotation):
    """Whether an annotation is an array, or arrays in a tuple; a dict of parameters has no single shape."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).split(".")[-1] != "tuple":
        return False
    if isinstance(annotation, ast.Name | ast.Attribute):
        return ast.unparse(annotation).split(".")[-1] in ARRAYS
    return any(map(is_array, ast.iter_child_nodes(annotation)))


def has_arrays(node):
    """Whether a function has arrays as arguments or results, or a class as fields."""
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        found = [field.annotation for field in fields if field.target.id not in SCALARS]
    else:
        of = node.args
        arguments = filter(None, [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg])
        found = [*(argument.annotation for argument in arguments if argument.arg not in SCALARS), node.returns]
    return any(is_array(annotation) for annotation in found if annotation)


def documentation(node, source):
    """A docstring; of a class with the comments at its fields."""
    fields = [field for field in node.body if isinstance(node, ast.ClassDef) and isinstance(field, ast.AnnAssign)]
    lines = source.splitlines()
    comments = [lines[field.end_lineno - 1].partition("#")[2] for field in fields]
    return "\n".join([ast.get_docstring(node) or "", *comments])


def names_shapes(text, classes=()):
    """Whether a docstring names a shape, or one of the classes."""
    return bool(SHAPE.search(text)) or any(name in classes for name in re.findall(r"\w+", text))


CLASSES = {
    node.name
    for file, found in FILES.items()
    for _, node in found
    if isinstance(node, ast.ClassDef) and names_shapes(documentation(node, SOURCES[file]))
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("int32 [B]", True), ("[3]", True), ("in [0, 1]", False), ("in [-1, 1]", False), ("A `Shape` of it.", True)],
)
def test_a_shape_is_told_from_an_interval(text, expected):
    assert names_shapes(text, {"Shape"}) == expected


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [("Array", True), ("np.ndarray | None", True), ("tuple[jax.Array, int]", True), ("dict[str, Array]", False)],
)
def test_an_array_is_seen_in_an_annotation(annotation, expected):
    assert is_array(ast.parse(annotation, mode="eval").body) == expected


def described(node, file):
    """Whether the documentation of a definition names shapes, or another class that does."""
    return names_shapes(documentation(node, SOURCES[file]), CLASSES - {node.name})


@pytest.mark.parametrize("file", FILES)
def test_docstrings_name_the_shapes_of_arrays(file):
    without = [name for name, node in FILES[file] if not ast.get_docstring(node)]
    assert not without, f"{file}: no docstring: {', '.join(without)}"
    unclear = [name for name, node in FILES[file] if has_arrays(node) and not described(node, file)]
    assert not unclear, f"{file}: no shapes such as [B, H, W, C] in the docstring of {', '.join(unclear)}"
