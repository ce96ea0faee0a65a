"""docs/architecture.md is true: its table against the files and their imports, and the promises about what loads without what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "forwardgrad"
DOCUMENT = ROOT / "docs" / "architecture.md"
HEADER = "| file | what lives there | may import |"
IMPORTERS = ("import_module", "__import__", "need")  # functions that import what their first argument names
NAMES_ELSEWHERE = {  # files that may import by a name that is no literal, and where those names can be read
    "__init__.py": "its TYPE_CHECKING block",
    "lab/data.py": "the calls of need()",
    "lab/parts.py": "the import paths that a user writes",
    "lab/studyfile.py": "the user's file",
}
OPTIONAL = {"lab/adaptive.py": {"optuna"}, "lab/cluster.py": {"ray"}, "lab/tensorboard.py": {"tensorboard"}}  # extras of their own
TORCH_FREE = (
    "run",
    "study",
    "tuning",
    "studyfile",
    "recipes",
    "results",
    "tables",
    "findings",
    "sections",
    "bench_section",
    "quality_section",
    "comparison_section",
    "claims",
    "verdict",
    "report",
    "spec",
    "watch",
    "cli",
)


def in_lab(file: str) -> bool:
    """Whether a file belongs to the laboratory: `python -m forwardgrad` is its command."""
    return file.startswith("lab/") or file == "__main__.py"


def module_name(file: str) -> str:
    """The module that a file of the package is: estimators/__init__.py is forwardgrad.estimators."""
    return ".".join(["forwardgrad", *Path(file).with_suffix("").parts]).removesuffix(".__init__")


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FILE_OF = {module_name(file): file for file in FILES}


def read_table() -> dict[str, set[str]]:
    """Every row of the table: the file and the files it may import; `library` and `lab` are all files of that layer above the row."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert lines.count(HEADER) == 1, f"{DOCUMENT.name} holds one table, headed {HEADER}"
    table: dict[str, set[str]] = {}
    for line in lines[lines.index(HEADER) + 2 :]:
        if not line.startswith("|"):
            break
        (file,), admitted = (re.findall(r"`([^`]+)`", line.split("|")[column]) for column in (1, 3))
        assert file not in table, f"{file} has two rows"
        above = set(table)
        spelled_out = {"library": {f for f in above if not in_lab(f)}, "lab": {f for f in above if in_lab(f)}}
        table[file] = set().union(*(spelled_out.get(name, {name}) for name in admitted))
        assert table[file] <= above, f"{file} may import only files of the rows above it, not {sorted(table[file] - above)}"
    return table


def imported_names(file: str) -> Iterator[str]:
    """The dotted name of everything a file imports: at the top, inside functions, under TYPE_CHECKING, through import_module."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno} imports relatively"
            source = str(node.module)
            submodules = [f"{source}.{alias.name}" for alias in node.names]
            yield from (name if name in FILE_OF else source for name in submodules)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)
            else:
                assert file in NAMES_ELSEWHERE, f"{file}:{node.lineno} imports a name that cannot be read"


def own_imports(file: str) -> set[str]:
    return {FILE_OF[name] for name in imported_names(file) if name in FILE_OF}


def outside_imports(file: str) -> set[str]:
    """Top-level packages that are neither forwardgrad nor the standard library."""
    return {name.split(".")[0] for name in imported_names(file)} - {"forwardgrad"} - sys.stdlib_module_names


def distributions(group: str | None = None) -> set[str]:
    """What pyproject.toml asks for, as names to import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["optional-dependencies"][group] if group else project["dependencies"]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
    return {{"scikit-learn": "sklearn"}.get(name, name) for name in names}


def python(*arguments: str) -> None:
    """Run a fresh interpreter; its complaint is the assertion's."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_every_file_has_a_row_and_every_row_a_file() -> None:
    assert sorted(read_table()) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_row_admits(file: str) -> None:
    assert own_imports(file) <= read_table().get(file, set())


@pytest.mark.parametrize("file", [file for file in FILES if not in_lab(file)])
def test_the_library_stands_alone(file: str) -> None:
    assert not {name for name in imported_names(file) if name.startswith("forwardgrad.lab")}
    assert outside_imports(file) <= {"torch", "jaxtyping"} == distributions()


@pytest.mark.parametrize("file", [file for file in FILES if in_lab(file)])
def test_the_lab_imports_only_what_its_extra_installs(file: str) -> None:
    assert outside_imports(file) <= distributions() | distributions("lab") | OPTIONAL.get(file, set())


def test_imports_have_no_cycle() -> None:
    try:
        TopologicalSorter({file: own_imports(file) for file in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


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


def test_load_without_torch() -> None:
    """One process for all: what the first has loaded has not loaded torch either."""
    python("-c", WITHOUT_TORCH, "forwardgrad", *(f"forwardgrad.lab.{name}" for name in TORCH_FREE))
