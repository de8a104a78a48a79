"""The rules of the house: what makes the code pleasant to read, where a tool can see it."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import launch
from launch.cli import app

CHECKOUT = Path(launch.__file__).parent.parent
ROOMS = ("pretrain", "launch")

LINES_OF_A_FILE, LINES_OF_A_FUNCTION, FILES_OF_A_FOLDER = 350, 50, 12
FOLDERS_OF_MANY = {"launch/commands"}
"""One file a command there: as many as there are commands."""

SHARED_NAMES = {"log", "app", "main"}

LEANING = re.compile(
    "(about|after|among|and|as|at|because|before|besides?|between|but|by|during|for|from|here|if|in|inside|into|its?|like"
    "|no|nor|not|of|on|onto|or|out|outside|over|per|since|so|such|than|that|there|these|this|those|through|to|under"
    r"|unlike|unless|until|upon|when|where|while|with|within|without)(?![\w-])",
    re.IGNORECASE,
)
"""First words that lean on a sentence which the reader of a hover doesn't see."""


@pytest.fixture(scope="module")
def product() -> dict[str, ast.Module]:
    """Path in the checkout -> its tree, of each file of the product."""
    paths = sorted(path for room in ROOMS for path in (CHECKOUT / room).rglob("*.py"))
    return {path.relative_to(CHECKOUT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def say(offenders: list[str]) -> str:
    return "\n".join([f"{len(offenders)} break a rule of the house:", *offenders])


def test_a_file_is_read_in_one_sitting(product):
    lengths = {path: len((CHECKOUT / path).read_text(encoding="utf-8").splitlines()) for path in product}
    long = [f"{path}: {length} lines" for path, length in lengths.items() if length > LINES_OF_A_FILE]
    assert not long, say(long)


def test_a_function_is_seen_at_a_glance(product):
    lengths = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in product.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = [f"{where}: {length} lines" for where, length in lengths.items() if length > LINES_OF_A_FUNCTION]
    assert not long, say(long)


def test_a_folder_is_looked_over_at_once(product):
    numbers: dict[str, int] = defaultdict(int)
    for path in product:
        numbers[path.rpartition("/")[0]] += not path.endswith("/__init__.py")
    crowded = [
        f"{folder}: {number} files"
        for folder, number in numbers.items()
        if number > FILES_OF_A_FOLDER and folder not in FOLDERS_OF_MANY
    ]
    assert not crowded, say(crowded)


def commands(group: typer.Typer) -> Iterator[tuple[str, str]]:
    """Module and name of each function that is a command."""
    for command in group.registered_commands:
        yield command.callback.__module__, command.callback.__name__
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance)


def top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def test_a_public_name_means_one_thing(product):
    places: dict[str, list[str]] = defaultdict(list)
    named_for_users = set(commands(app))
    for path, tree in product.items():
        module = path.removesuffix(".py").replace("/", ".")
        for name in set(top_level_names(tree)) - SHARED_NAMES:
            if not name.startswith("_") and (module, name) not in named_for_users:
                places[name].append(path)
    several = [f"{name}: {', '.join(paths)}" for name, paths in sorted(places.items()) if len(paths) > 1]
    assert not several, say(several)


def docstrings(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Line and text of what stands under functions, classes, fields and constants."""
    for before, node in zip([None, *body], body, strict=False):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if text := ast.get_docstring(node):
                    yield node.lineno, text
                yield from docstrings(node.body)
            case ast.Expr(value=ast.Constant(value=str(text))) if isinstance(before, ast.Assign | ast.AnnAssign):
                yield node.lineno, text


def test_a_docstring_is_understood_alone(product):
    leaning = [
        f"{path}:{line} {text.splitlines()[0]}"
        for path, tree in product.items()
        for line, text in docstrings(tree.body)
        if LEANING.match(text.lstrip())
    ]
    assert not leaning, say(leaning)
