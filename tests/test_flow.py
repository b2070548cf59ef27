"""One way only: no module imports a later stage, nothing imports in a circle, and ``import rush`` is light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rush

SOURCE = Path(rush.__file__).parent

# From the first to the last; a module may import from its own level and from those before. The longest prefix counts.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "choices", "runtime", "recipe"),
    ("data", "statistics"),
    ("models", "smoothing.base", "smoothing.noise", "smoothing.discrete", "smoothing.splitting"),
    ("smoothing", "models.storage"),  # saved models are smoothed classifiers
    ("training",),
    ("certification",),
    ("attacks",),
    ("evaluation",),
    ("auditing",),
    ("records",),
    ("reporting",),
    ("exporting",),
    ("pipeline",),
    ("commands",),
    ("__main__",),
)
# Methods that hand the object on to a later stage, as the hub's conventions have it; imported when they are called.
HANDED_ON = {"smoothing.classifier": {"exporting.hub", "models.storage"}}
TEST_ORACLES = ("torchvision", "timm", "kornia", "foolbox", "pytorch_metric_learning", "art", "statsmodels", "pytest")


def module_name(path: Path) -> str:
    """Name below ``rush``, e.g. ``engine.loop``; a package is named as its folder, ``rush`` itself is empty."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}


def imported(code: str, late: bool = True) -> set[str]:
    """Full names of what ``code`` imports, wherever it does; without ``late`` only what is imported at once."""
    tree = ast.parse(code)
    found = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the flow"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(code: str, late: bool = True) -> set[str]:
    """Modules of this package that ``code`` imports, by their names below ``rush``."""
    found = set()
    for name in imported(code, late):
        parts = name.split(".")
        if parts[0] != "rush":
            continue
        below = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        found.add(next((name for name in below if name in MODULES), ""))
    return found - {""}


def flow_of(module: str) -> set[str]:
    """What a module imports, without what it hands its objects on to."""
    code = MODULES[module]
    return own_imports(code) - (HANDED_ON.get(module, set()) - own_imports(code, late=False))


def level(module: str) -> int:
    matches = [
        (len(prefix), number)
        for number, prefixes in enumerate(LEVELS)
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    assert matches, f"rush.{module} has no place in the flow; give it one in LEVELS"
    return max(matches)[1]


def test_the_reader_of_imports_sees_every_form() -> None:
    code = """
import rush.training.loop
from rush.data import images, views
from rush.commands import app
def later():
    from rush.pipeline.stages import run_stage
    import torch.nn as nn
if TYPE_CHECKING:
    from rush.smoothing.classifier import ABSTAIN
"""
    found = {"training.loop", "data.images", "data.views", "commands.app", "pipeline.stages", "smoothing.classifier"}
    assert own_imports(code) == found
    assert "torch.nn" in imported(code)
    assert own_imports(code, late=False) == {"training.loop", "data.images", "data.views", "commands.app"}
    assert [level(name) for name in ("models.resnet", "models.storage", "commands.app")] == [2, 3, 13]


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_no_module_imports_a_later_stage(module: str) -> None:
    found = flow_of(module)
    later = sorted(name for name in found if level(name) > level(module))
    assert not later, f"rush.{module} imports {', '.join(later)} of a later stage"


def test_nothing_imports_in_a_circle() -> None:
    graph = {name: flow_of(name) for name in MODULES if name}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_reporting_reads_records_and_runs_no_model() -> None:
    allowed = {"errors", "choices", "statistics", "auditing.report", "auditing.findings"}
    allowed |= {"runtime.files", "runtime.lines", "runtime.numbers"}
    allowed |= {f"certification.{name}" for name in ("bounds", "certificates", "rule", "sequential")}
    for module, code in MODULES.items():
        if module.startswith("reporting."):
            foreign = {name for name in own_imports(code) if not name.startswith(("reporting", "records"))} - allowed
            assert not foreign, f"rush.{module} imports {foreign}"


@pytest.mark.parametrize("room", ["records", "reporting"])
def test_a_room_that_reads_files_needs_no_torch(room: str) -> None:
    """A fresh interpreter imports every module of the room; no module loads torch, not even indirectly."""
    modules = [f"rush.{name}" for name in MODULES if name.startswith(f"{room}.")]
    assert len(modules) > 5
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_no_module_needs_what_is_no_dependency(module: str) -> None:
    found = {name.split(".")[0] for name in imported(MODULES[module])}
    assert not found & set(TEST_ORACLES)


def calls(module: str) -> list[ast.Call]:
    tree = ast.parse(MODULES[module])
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def writes(call: ast.Call) -> bool:
    """Whether ``call`` opens a file to write, other than the temporary ``target`` that ``files`` hands out."""
    name = ast.unparse(call.func)
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    opened = [*map(ast.unparse, call.args), name][0].split(".")[0] if name == "open" else name.split(".")[0]
    to_write = name.split(".")[-1] == "open" and any(isinstance(m, str) and set("wax+") & set(m) for m in modes)
    methods = (".write_text", ".write_bytes", ".symlink_to", "os.truncate", ".touch", "shutil.copy", "shutil.move")
    return (to_write or name.endswith(methods)) and opened != "target"


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("runtime.files", "data.readers.download")])
def test_files_are_written_by_one_module(module: str) -> None:
    """``data.readers.download`` fills the cache of archives, which is no run folder."""
    found = [ast.unparse(call) for call in calls(module) if writes(call)]
    assert not found, f"rush.{module} writes by itself: {found}; use rush.runtime.files"


@pytest.mark.parametrize("module", MODULES)
def test_lines_end_at_a_line_feed_alone(module: str) -> None:
    found = [ast.unparse(call) for call in calls(module) if ast.unparse(call.func).endswith(".splitlines")]
    assert not found, f"rush.{module}: {found} also splits at U+2028, U+0085 and U+001C; split at a line feed"


def test_what_is_printed_is_printed_by_one_module() -> None:
    printers = {
        name
        for name in MODULES
        if {"rich.table", "rich.console"} & {found.rsplit(".", 1)[0] for found in imported(MODULES[name])}
    }
    bars = {"runtime.progress", "data.readers.download"}  # of names that the library gives
    assert printers == {"commands.terminal"} | bars


def test_importing_rush_loads_neither_torch_nor_numpy() -> None:
    heavy = "print(*sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    code = f"import sys, rush, rush.commands.app, rush.recipe.load; {heavy}"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_every_public_name_is_there() -> None:
    assert len(rush.__all__) == len(set(rush.__all__))
    assert set(rush.__all__) <= set(dir(rush))
    for name in rush.__all__:
        assert getattr(rush, name) is not None
    assert rush.load.__module__ == "rush.models.storage"
    assert rush.ABSTAIN == -1
    with pytest.raises(AttributeError, match=r"no attribute 'certfy'; public names: ABSTAIN, "):
        rush.certfy  # noqa: B018
