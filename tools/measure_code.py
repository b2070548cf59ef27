"""Measure how the code reads, so that two checkouts can be compared.

    python tools/measure_code.py [ROOT]

Prints one markdown table for the checkout ROOT, by default the one of this script: lines, functions, docstrings,
imports between rooms, and the calls between a command and the function that does its work. A room is a folder directly
below src/rush that holds modules. Lines are counted in src/rush and in tests, everything else in src/rush alone.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from types import FrameType

PACKAGE, TOP = "rush", "(top)"
MANY_PARAMETERS = 8
OPENINGS = ("How", "Of", "So", "What", "Where", "Which", "Within")
KINDS = ("code", "docstring", "comment", "blank")
PRAGMA = re.compile(r"#\s*(noqa|fmt:|type:)")
ARGS = re.compile(r"^\s*Args:\s*$", re.MULTILINE)
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
NOT_CALLS = ("<module>", "<listcomp>", "<setcomp>", "<dictcomp>")  # comprehensions have no frame from Python 3.12 on

# Patterns of "module:qualified name" for the function that does the work of a command. They are tried in turn.
TARGETS = {
    "certify": ("rush.*:certify_votes", "rush.*:certify_counts"),
    "attack": ("rush.*:loss_and_gradient",),
    "run": ("rush.*:_simclr_step.<locals>.step", "rush.*:simclr_step.<locals>.step"),
}

Rows = Iterator[tuple[str, object]]
Function = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


@dataclass(frozen=True)
class Module:
    """Hold one parsed file, the numbers of its code lines, its lines by kind and its comments without pragmas."""

    place: tuple[str, ...]
    nodes: list[ast.AST]
    code: set[int]
    lines: Counter[str]
    comments: int

    @classmethod
    def read(cls, path: Path, folder: Path) -> "Module":
        """Parse ``path`` within ``folder`` and count each line once, as code where it holds any."""
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
        starts: set[tuple[int, int]] = set()
        found: dict[str, set[int]] = {kind: set() for kind in KINDS}
        for node in nodes:
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                text = node.body[0]
                starts.add((text.lineno, text.col_offset))
                found["docstring"] |= line_numbers(text)
        comments = 0
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type == tokenize.COMMENT:
                    found["comment"].add(token.start[0])
                    comments += PRAGMA.match(token.string) is None
                elif token.type not in LAYOUT and token.start not in starts:
                    found["code"].update(range(token.start[0], token.end[0] + 1))
        found["blank"] = set(range(1, len(path.read_text("utf-8").splitlines()) + 1))
        for place, kind in enumerate(KINDS):
            found[kind] -= {line for above in KINDS[:place] for line in found[above]}
        lines = Counter({kind: len(found[kind]) for kind in KINDS})
        return cls(path.relative_to(folder).parts, nodes, found["code"], lines, comments)

    @property
    def room(self) -> str:
        """Return the top-level folder of the module."""
        return self.place[0] if len(self.place) > 1 else TOP

    def imports(self) -> Iterator[tuple[str, ...]]:
        """Yield the dotted names that are imported anywhere in this module of the package."""
        package = (PACKAGE, *self.place[:-1])
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (tuple(alias.name.split(".")) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                named = tuple(node.module.split(".")) if node.module else ()
                yield from ((*above, *named, alias.name) for alias in node.names)


def line_numbers(node: ast.stmt) -> set[int]:
    """Return the numbers of all lines of ``node``."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def parameters(function: Function) -> int:
    """Count the parameters of ``function`` without ``self`` and ``cls``."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if one]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def nesting(node: ast.AST) -> int:
    """Count the blocks that lie within each other below ``node``, outside nested functions and classes."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, DOCUMENTED):
            is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child.col_offset == node.col_offset
            deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def p90(values: Iterable[int]) -> str:
    """Return the 90th percentile of ``values`` as text."""
    return f"{quantiles(values, n=10, method='inclusive')[-1]:g}"


def line_row(name: str, modules: list[Module]) -> tuple[str, object]:
    """Return the lines of ``modules`` by kind."""
    lines = sum((module.lines for module in modules), Counter[str]())
    split = ", ".join(f"{lines[kind]:,} {kind}" for kind in KINDS)
    return f"lines, {name}", f"{lines.total():,}: {split}; {len(modules)} files"


def code_rows(modules: list[Module]) -> Rows:
    """Yield the measures of functions, docstrings and comments."""
    nodes = [(module, node) for module in modules for node in module.nodes]
    measured = [
        (len(module.code & line_numbers(node)), node, module.place[-1])
        for module, node in nodes
        if isinstance(node, Function)
    ]
    lengths, functions, _ = zip(*measured, strict=True)
    longest, function, file = max(measured, key=lambda one: one[0])
    depths = [nesting(own) for own in functions]
    wide = sum(parameters(own) > MANY_PARAMETERS for own in functions)
    yield "functions", f"{len(functions):,}"
    yield "code lines of a function, median / p90", f"{median(lengths):g} / {p90(lengths)}"
    yield "longest function, code lines", f"{longest}: `{function.name}` in {file}"
    yield f"functions with more than {MANY_PARAMETERS} parameters", wide
    yield "deepest nesting of a function, p90 / largest", f"{p90(depths)} / {max(depths)}"
    texts = [text for _, node in nodes if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node))]
    words, code = sum(len(text.split()) for text in texts), sum(len(module.code) for module in modules)
    first = Counter(text.split()[0].strip(",:`") for text in texts)
    opened = ", ".join(f"{word} {first[word]}" for word in OPENINGS if first[word])
    yield "docstrings", f"{len(texts):,}, {words:,} words"
    yield f"docstrings that open with {'/'.join(OPENINGS)}", f"{sum(map(first.__getitem__, OPENINGS))}: {opened or '-'}"
    yield "semicolons per 1,000 words of docstrings", f"{1000 * sum(text.count(';') for text in texts) / words:.1f}"
    yield "docstrings with an `Args:` section", sum(ARGS.search(text) is not None for text in texts)
    yield "comments per 100 code lines", f"{100 * sum(module.comments for module in modules) / code:.2f}"


def room_rows(modules: list[Module]) -> Rows:
    """Yield the number of loose modules, of rooms, and of ordered pairs of rooms where the first imports the second."""
    rooms = {module.room for module in modules} - {TOP}
    used = {(one.room, name[1] if name[1:] else TOP) for one in modules for name in one.imports() if name[0] == PACKAGE}
    arrows = {(room, other if other in rooms else TOP) for room, other in used if room != other}
    between, all_arrows = sum(TOP not in pair for pair in arrows), len(arrows - {(TOP, TOP)})
    yield "modules loose at the top", sum(one.room == TOP and one.place[0] != "__init__.py" for one in modules)
    yield "rooms", len(rooms)
    yield "import arrows between rooms", f"{between}; {all_arrows} with {TOP} as a room"


def hop_rows(root: Path) -> Rows:
    """Yield the calls between each command and its target, measured in a process of its own."""
    paths = os.pathsep.join((str(root / "src"), str(root / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(root), "--hops"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for name, (target, *stack) in json.loads(done.stdout.splitlines()[-1]).items():
        calls = f"{len(stack)}: {' > '.join(stack)}" if stack else "-"
        yield f"calls from `rush {name}` to `{target}`", calls


def measure_hops(source: Path) -> dict[str, list[str]]:
    """Return for each command its target and the functions of the package on the stack when it was called.

    They go from ``main``, the outermost, to the caller of the target. Of several stacks the most frequent one is taken.
    Calls in other threads are not seen.
    """
    start, write_tiny = import_module(f"{PACKAGE}.__main__").main, import_module("tiny").write_tiny
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe, run, other = write_tiny(Path(folder)), Path(folder, "run"), Path(folder, "other")
        commands = [("pretrain", recipe, "--out", run), ("finetune", run), ("certify", run), ("attack", run)]
        for name, *words in (*commands, ("run", recipe, "--out", other)):
            targets, seen = TARGETS.get(str(name), ()), Counter[tuple[str, ...]]()
            sys.argv = [PACKAGE, str(name), *map(str, words)]
            sys.setprofile(recorder(f"{source}{os.sep}", targets, seen))
            try:
                start()
            except SystemExit as end:
                if end.code:
                    raise
            sys.setprofile(None)
            if targets:
                usual = min(seen, key=lambda one: (targets.index(one[0]), -seen[one]), default=("", "no known target"))
                found[str(name)] = list(usual[1:])
    return found


def recorder(inside: str, targets: Sequence[str], seen: Counter[tuple[str, ...]]) -> Callable[..., None]:
    """Return a function for ``sys.setprofile`` that counts in ``seen`` each pattern, its match and the stack above."""

    @cache
    def pattern(name: str) -> str | None:
        return next((target for target in targets if fnmatchcase(name, target)), None)

    def record(frame: FrameType | None, event: str, _: object) -> None:
        if frame is None or event != "call" or not frame.f_code.co_filename.startswith(inside):
            return
        name, stack = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}", []
        if (matched := pattern(name)) is None:
            return
        while frame := frame.f_back:
            if frame.f_code.co_filename.startswith(inside) and frame.f_code.co_name not in NOT_CALLS:
                stack.append(frame.f_code.co_qualname.replace("<locals>.", ""))
        seen[matched, name, *reversed(stack)] += 1

    return record


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="a checkout")
    parser.add_argument("--hops", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = given.root.resolve()
    source = root / "src" / PACKAGE
    if given.hops:
        print(json.dumps(measure_hops(source)))
        return
    modules = [Module.read(path, source) for path in sorted(source.rglob("*.py"))]
    tests = [Module.read(path, root) for path in sorted((root / "tests").rglob("*.py"))]
    rooms = [(room, [one for one in modules if one.room == room]) for room in sorted({one.room for one in modules})]
    lines = [line_row(*named) for named in (*rooms, ("src/rush", modules), ("tests", tests))]
    print("| measure | value |\n| --- | --- |")
    for name, value in chain(lines, code_rows(modules), room_rows(modules), hop_rows(root)):
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
