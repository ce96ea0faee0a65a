"""docs/architecture.md is true: its table of rooms against the imports, its picture against the table, and what loads without what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "forwardgrad"
DOCUMENT = ROOT / "docs" / "architecture.md"
HEADER = "| room | what it is for | may import |"
FENCE = "```text\n"
WIDE = 118  # columns of the picture
CROWDED = 15  # modules in a room
LONGEST = 400  # lines of a file
IMPORTERS = ("import_module", "__import__", "need")  # functions that import what their first argument names
NAMES_ELSEWHERE = {  # modules that may import by a name that is no literal, and where those names can be read
    "forwardgrad._lazy": "the stub of a room",
    "forwardgrad.lab.data.extras": "the calls of need()",
    "forwardgrad.lab.studies.import_path": "the import paths that a user writes",
    "forwardgrad.lab.studies.study_file": "the user's file",
}


class Import(NamedTuple):
    """`from module import name`, in a file; a name that is a module of its own is the module, and has no name."""

    module: str
    name: str | None
    line: int


def module_of(path: Path) -> str:
    """The module that a file of the package is: estimators/__init__.py is forwardgrad.estimators."""
    return ".".join(["forwardgrad", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


PATHS = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in PATHS if name not in ("forwardgrad", "forwardgrad._lazy", "forwardgrad.__main__")]
PACKAGES = {name for name, path in PATHS.items() if path.name == "__init__.py"}


def room_of(module: str) -> str:
    """Where a module belongs: the folder it lies in, or itself beside the two faces. Rules of forward mode belong to forward mode."""
    inside = module if module in PACKAGES else module.rpartition(".")[0]
    found = module if inside in ("forwardgrad", "forwardgrad.lab") else inside
    return found.removeprefix("forwardgrad.").removesuffix(".rules")


def in_lab(module: str) -> bool:
    return f"{module}.".startswith("forwardgrad.lab.") or module == "forwardgrad.__main__"


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Everything a module imports: at the top, inside functions, under TYPE_CHECKING, through import_module."""
    return tuple(_imports(module))


def _imports(module: str) -> Iterator[Import]:
    path = PATHS[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(whole, None, node.lineno) if whole in PATHS else Import(str(node.module), alias.name, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            if isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), None, node.lineno)
            else:
                assert module in NAMES_ELSEWHERE, f"{path}:{node.lineno} imports a name that cannot be read"


@cache
def face(package: str) -> dict[str, str]:
    """The public names of a room and the modules that they come from."""
    stub = PATHS[package].with_suffix(".pyi")
    found = ast.parse(stub.read_text(encoding="utf-8")).body if stub.exists() else []
    return {alias.name: str(node.module) for node in found if isinstance(node, ast.ImportFrom) for alias in node.names}


def rooms_imported(module: str) -> set[str]:
    """The rooms that a module imports from, other than its own."""
    named = [one for one in imports(module) if one.module.startswith("forwardgrad.") and one.module != "forwardgrad._lazy"]
    homes = [face(one.module).get(str(one.name), one.module) if one.module in PACKAGES else one.module for one in named]
    return {room_of(home) for home in homes if home in PATHS and home != "forwardgrad.lab"} - {room_of(module)}


def imported_rooms() -> dict[str, set[str]]:
    """Every room and the rooms that it imports from."""
    found: dict[str, set[str]] = {}
    for module in MODULES:
        if module != "forwardgrad.lab":
            found.setdefault(room_of(module), set()).update(rooms_imported(module))
    return found


def table() -> dict[str, set[str]]:
    """Every row of the document: a room, and the rooms it may import; `library` stands for all rooms of that layer above the row."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert lines.count(HEADER) == 1, f"{DOCUMENT.name} holds one table, headed {HEADER}"
    rows: dict[str, set[str]] = {}
    for line in lines[lines.index(HEADER) + 2 :]:
        if not line.startswith("|"):
            break
        (room,), admitted = (re.findall(r"`([^`]+)`", line.split("|")[column]) for column in (1, 3))
        assert room not in rows, f"{room} has two rows"
        library = {name for name in rows if not name.startswith("lab.")}
        rows[room] = set().union(*(library if name == "library" else {name} for name in admitted))
        assert rows[room] <= set(rows), f"{room} may import only rooms of the rows above it, not {sorted(rows[room] - set(rows))}"
    return rows


def picture(rows: dict[str, set[str]]) -> str:
    """The rooms by how high they stand: each line imports from lines below it alone."""
    heights: dict[str, int] = {}
    for room, below in rows.items():
        heights[room] = 1 + max((heights[name] for name in below if name.startswith("lab.") == room.startswith("lab.")), default=0)
    lines: list[str] = []
    for title, lab in (("LABORATORY (forwardgrad.lab)", True), ("LIBRARY (forwardgrad)", False)):
        lines += [f" {title}"]
        mine = {room: height for room, height in heights.items() if room.startswith("lab.") == lab}
        for height in range(max(mine.values()), 0, -1):
            names = [room.removeprefix("lab.") for room, at in mine.items() if at == height]
            lines += [f" {height:>2} │ {'   '.join(names)}"]
    assert max(map(len, lines)) <= WIDE
    return "\n".join(lines) + "\n"


def distributions(group: str | None = None) -> set[str]:
    """What pyproject.toml asks for, as names to import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["optional-dependencies"][group] if group else project["dependencies"]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
    return {{"scikit-learn": "sklearn"}.get(name, name) for name in names}


def outside(module: str) -> set[str]:
    """Top-level packages that are neither forwardgrad nor the standard library."""
    return {one.module.split(".")[0] for one in imports(module)} - {"forwardgrad"} - sys.stdlib_module_names


def python(*arguments: str) -> None:
    """Run a fresh interpreter; its complaint is the assertion's."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_every_room_has_a_row_and_every_row_a_room() -> None:
    assert sorted(table()) == sorted(imported_rooms())


def test_a_room_imports_only_what_its_row_admits_and_a_row_admits_only_what_is_imported() -> None:
    rows, found = table(), imported_rooms()
    library = {room for room in rows if not room.startswith("lab.")}
    for room, admitted in rows.items():
        whole = library <= admitted  # 'library' is said as one word
        assert found[room] <= admitted, f"{room} imports {sorted(found[room] - admitted)}"
        assert whole or admitted <= found[room], f"{room} does not import {sorted(admitted - found[room])}"


def test_the_picture_is_that_of_the_table() -> None:
    drawn = DOCUMENT.read_text(encoding="utf-8").partition(FENCE)[2].partition("```")[0]
    assert drawn == picture(table())


@pytest.mark.parametrize("layer", ["library", "laboratory"])
def test_other_rooms_are_asked_at_their_face(layer: str) -> None:
    """`from forwardgrad.lab.store import Store`, not the module inside: so files can move within a room."""
    for module in (name for name in MODULES if in_lab(name) == (layer == "laboratory")):
        for one in imports(module):
            home = room_of(one.module) if one.module in PATHS else None
            if home is None or home == room_of(module) or one.module in PACKAGES or home == one.module.removeprefix("forwardgrad."):
                continue
            named = face(one.module.rpartition(".")[0]).get(one.module.rpartition(".")[2]) if one.name is None else None
            assert named, f"{PATHS[module]}:{one.line} imports {one.module}: ask its room, and list the name in the room's __init__.pyi"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_face_is_whole(package: str) -> None:
    """Every name of a stub is there, none is called like a module of the room that it is not, and the docstring says what for."""
    room = import_module(package)
    assert room.__doc__
    for name, home in face(package).items():
        value = getattr(room, name)
        is_module = f"{package}.{name}" in PATHS
        assert is_module == (home == package), f"{package}: {name} is the name of a module, too"
        assert is_module or value is getattr(import_module(home), name)
    assert set(face(package)) <= set(dir(room)) or not face(package)


def test_rooms_are_not_crowded() -> None:
    for package in PACKAGES - {"forwardgrad", "forwardgrad.lab"}:
        inside = [path.name for path in PATHS[package].parent.glob("*.py") if path.name != "__init__.py"]
        assert len(inside) <= CROWDED, f"{package} holds {len(inside)} modules: make a room of some"


def test_a_class_has_its_name_for_itself() -> None:
    """One word means one thing: no public class is called like another one."""
    found: dict[str, list[str]] = {}
    for module, path in PATHS.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def test_files_are_short() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in PATHS.items()}
    assert not {module: length for module, length in lengths.items() if length > LONGEST}


def test_the_library_stands_alone() -> None:
    for module in (name for name in PATHS if not in_lab(name)):
        assert not [one for one in imports(module) if one.module.startswith("forwardgrad.lab")], module
        optional = OPTIONAL.get(module.rpartition(".")[0], set())
        assert outside(module) - optional <= {"torch", "jaxtyping"} == distributions(), module


OPTIONAL = {
    "forwardgrad.integrations": {"accelerate", "lightning", "transformers"},
    "forwardgrad.lab": {"pynvml"},  # of lab.energy
    "forwardgrad.lab.tuning": {"optuna"},
    "forwardgrad.lab.execution": {"ray"},
    "forwardgrad.lab.training": {"tensorboard"},
    "forwardgrad.lab.finetuning": {"transformers", "peft", "safetensors"},
    "forwardgrad.lab.data": {"tokenizers"},
    "forwardgrad.lab.models": {"safetensors"},
}


def test_the_lab_imports_only_what_its_extras_install() -> None:
    for module in (name for name in PATHS if in_lab(name)):
        optional = OPTIONAL.get(module.rpartition(".")[0], set())
        assert outside(module) <= distributions() | distributions("lab") | optional, module


LIBRARY_ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = set(sys.argv[1:])
sys.meta_path.insert(0, Absent())

import forwardgrad as fg
for name in fg.__all__:
    getattr(fg, name)

import torch
model = torch.nn.Linear(3, 2)
x = torch.ones(5, 3)
for count in (1, 2):
    method = fg.ForwardGradient(tangents=count)
    step = fg.estimate_grad_(lambda m: m(x).square().mean(), model, method, generator=torch.Generator().manual_seed(0))
    assert step.loss.isfinite() and model.weight.grad.any()
assert not [name for name in sys.modules if name.startswith("forwardgrad.lab")]
"""


def test_the_library_works_without_the_packages_of_the_lab() -> None:
    python("-c", LIBRARY_ALONE, *sorted(distributions("lab") - {"numpy"}))  # torch itself takes numpy where it is there


WITHOUT_TORCH = """
import importlib, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def test_rooms_that_say_so_load_without_torch() -> None:
    """Every module of a room whose docstring says that it loads without torch, the command line and both faces; in one process for all."""
    saying = {package for package in PACKAGES - {"forwardgrad.lab"} if "oads without torch" in PATHS[package].read_text(encoding="utf-8")}
    assert {"forwardgrad.lab.studies", "forwardgrad.lab.store", "forwardgrad.lab.report"} <= saying
    free = [name for name in PATHS if name.rpartition(".")[0] in saying]
    python("-c", WITHOUT_TORCH, "forwardgrad", "forwardgrad.lab.cli", "forwardgrad.lab.tuning.campaign", *free)


if __name__ == "__main__":  # writes the picture anew
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(FENCE)
    DOCUMENT.write_text(f"{before}{FENCE}{picture(table())}```{rest.partition('```')[2]}", encoding="utf-8")
