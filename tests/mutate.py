"""`python -m tests.mutate ROOM [--number 20] [--seed 0]`: change one thing at a time, and see whether a test notices.

ROOM is a folder or a file of the product, such as `pretrain/data/stream`. Each mutation is tried in a copy of the
checkout, by the fast tests of its room; what no test notices is shown, for a person to judge: some mutations change
nothing that matters.
"""

import argparse
import ast
import difflib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    path: Path
    """In the checkout."""
    line: int
    kind: str
    before: str
    after: str
    """The whole text of the file."""

    @property
    def diff(self) -> str:
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), n=0, lineterm="")
        return "\n".join(f"    {line}" for line in list(lines)[3:])


def mutations(path: Path) -> list[Mutation]:
    """All that can be done to a file, in the order of its text."""
    text = path.read_text(encoding="utf-8")
    found = []
    for node, changed, kind in changes(ast.parse(text)):
        start, end = offset(text, node.lineno, node.col_offset), offset(text, node.end_lineno, node.end_col_offset)
        after = text[:start] + changed + text[end:]
        ast.parse(after)
        found.append(Mutation(path.relative_to(CHECKOUT), node.lineno, kind, text, after))
    return sorted(found, key=lambda mutation: (mutation.line, mutation.kind, mutation.after))


def offset(text: str, line: int, column: int) -> int:
    """Of a place that `ast` counts in bytes of a line from 1, in characters of the text."""
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())


def changes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """Node, its text after the change, and the kind of change; of what runs, not of annotations, messages and logs."""
    for node in code(tree):
        match node:
            case ast.Compare():
                for place, operator in enumerate(node.ops):
                    changed = deepcopy(node)
                    changed.ops[place] = COMPARISONS[type(operator)]()
                    yield node, ast.unparse(changed), "comparison"
            case ast.Constant(value=bool(value)):
                yield node, str(not value), "boolean"
            case ast.Constant(value=int(value) | float(value)):
                yield node, str(value + 1), "constant"
            case ast.UnaryOp(op=ast.Not()):
                yield node, f"({ast.unparse(node.operand)})", "boolean"
            case ast.BoolOp():
                operator = ast.Or() if isinstance(node.op, ast.And) else ast.And()
                yield node, f"({ast.unparse(ast.BoolOp(operator, node.values))})", "boolean"
            case ast.BinOp() if type(node.op) in OPERATORS:
                changed = ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
                yield node, f"({ast.unparse(changed)})", "operator"
            case ast.Call(keywords=keywords):
                for place, keyword in enumerate(keywords):
                    if keyword.arg is not None:
                        changed = ast.Call(node.func, node.args, keywords[:place] + keywords[place + 1 :])
                        yield node, ast.unparse(changed), "keyword dropped"
            case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
                yield node, "return None", "return value"
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Raise():
                yield node, "pass", "statement dropped"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield node, "pass", "statement dropped"


def code(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "exc", "cause"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not is_talk(child):
                yield from code(child)


def is_talk(node: ast.AST) -> bool:
    """Words for people; parts of f-strings besides have no place of their own in the text."""
    match node:
        case ast.JoinedStr():
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log")))):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def tests_of(room: Path) -> list[str]:
    """Test files of a room, a path in the checkout: of a folder with all below it, of a file those of its folder."""
    inside = Path(*room.parts[room.parts[0] == "pretrain" :])
    folder = CHECKOUT / "tests" / (inside.parent if room.suffix else inside)
    while not list(folder.rglob("test_*.py")):
        folder = folder.parent
    files = folder.glob("test_*.py") if room.suffix else folder.rglob("test_*.py")
    return [path.relative_to(CHECKOUT).as_posix() for path in sorted(files)]


class Copy:
    """A copy of the checkout, as it stands, in which tests are run."""

    def __init__(self, folder: Path, tests: list[str]) -> None:
        self.folder, self.tests = folder, tests
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(
            listed, cwd=CHECKOUT, capture_output=True, text=True, check=True
        ).stdout.splitlines():
            if (CHECKOUT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / name, folder / name)

    def notices(self, mutation: Mutation, timeout_s: float) -> str:
        """How: by a failing test, or as it takes too long; an empty word where no test notices."""
        path = self.folder / mutation.path
        path.write_text(mutation.after, encoding="utf-8")
        try:
            return self.run(timeout_s)
        finally:
            path.write_text(mutation.before, encoding="utf-8")

    def run(self, timeout_s: float) -> str:
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *self.tests],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"no end within {timeout_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode == 0:
            return ""
        failures = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return (failures or printed.splitlines()[-1:] or ["no word"])[0].partition(" - ")[0]


def draw(room: Path, number: int, seed: int) -> list[Mutation]:
    """Some of all mutations of a room."""
    paths = [CHECKOUT / room] if room.suffix else sorted((CHECKOUT / room).rglob("*.py"))
    possible = [mutation for path in paths for mutation in mutations(path)]
    return random.Random(seed).sample(possible, min(number, len(possible)))


def try_mutations(drawn: list[Mutation], tests: list[str]) -> Counter[str]:
    """Try one after the other, and print what becomes of it; counts "killed" and "survived"."""
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutations-", ignore_cleanup_errors=True) as folder:
        copy = Copy(Path(folder), tests)
        began = time.monotonic()
        if failed := copy.run(600):
            raise SystemExit(f"without any mutation: {failed}")
        timeout_s = 30 + 3 * (time.monotonic() - began)
        for mutation in drawn:
            how = copy.notices(mutation, timeout_s)
            end = "killed" if how else "survived"
            ends[end] += 1
            print(f"{end:8} {mutation.path}:{mutation.line} {mutation.kind} {how}\n{mutation.diff}", flush=True)
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", type=Path)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", help="instead of those of the room")
    arguments = parser.parse_args()
    room = (CHECKOUT / arguments.room).resolve().relative_to(CHECKOUT)
    if not (CHECKOUT / room).exists():
        parser.error(f"there is no {room}")
    tests = arguments.tests or tests_of(room)
    print(f"{arguments.number} mutations of {room}, tried by {' '.join(tests)}", flush=True)
    ends = try_mutations(draw(room, arguments.number, arguments.seed), tests)
    killed, tried = ends["killed"], ends.total()
    print(f"{killed} of {tried} killed ({killed / max(1, tried):.0%}), seed {arguments.seed}")


if __name__ == "__main__":
    main()
