"""The site: `make docs`. Pages are Markdown; the reference is made of the docstrings of the objects themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx

import forwardgrad

project = "forwardgrad"
author = "The forwardgrad authors"
project_copyright = "The forwardgrad authors, Apache 2.0"
version = release = forwardgrad.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_static", "pictures"]
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = "hide"

smartquotes_action = "De"  # dashes and dots alone: combine="mean" is code, within a formula too

html_theme = "furo"
html_title = "forwardgrad"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it would fetch whole pages, which a page opened as a file may not
html_theme_options = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "default", "github-dark"

# The reference: `<!-- reference: PACKAGE -->` in a page stands for every public name of that package, `PACKAGE: NAME NAME` for these ------

ROOMS = {
    "gradient": "Estimate a gradient",
    "estimators": "Estimators",
    "perturbations": "What moves",
    "directions": "Laws of directions",
    "training_step": "Whole steps",
    "journal": "Logs of steps",
    "replaying": "Steps taken again",
    "diagnostics": "Look at an estimate",
    "optim": "What torch's optimizers lack",
    "ensemble": "Several replicas",
    "processes": "Several processes",
    "pipeline": "A pipeline of processes",
    "objective": "A loss and what it trains",
    "forward_mode": "Forward mode",
    "testing": "For authors of estimators",
}
# classes that are shown with their methods and fields
SHOWN = {
    "Estimator",
    "Law",
    "Perturbation",
    "Objective",
    "Entered",
    "Layer",
    "Check",
    "Explanation",
    "Quality",
    "Finding",
    "GradientSource",
    "ForwardAccelerator",
}


def _home(package: str, name: str) -> str:
    """The room that a public name lives in: the module's name behind that of the package."""
    module = str(getattr(getattr(import_module(package), name), "__module__", ""))
    return module.removeprefix("forwardgrad.").split(".")[0]


def _entry(package: str, name: str) -> Iterator[str]:
    found = getattr(import_module(package), name)
    kind = "autoclass" if inspect.isclass(found) else "autofunction"
    yield f".. {kind}:: {package}.{name}"
    if name in SHOWN:
        yield "   :members:"
    yield ""


def _reference(package: str, names: str | None) -> Iterator[str]:
    wanted = names.split() if names else import_module(package).__all__
    public = [name for name in wanted if callable(getattr(import_module(package), name))]
    homes = {name: _home(package, name) for name in public}
    groups = {} if names or package != "forwardgrad" else ROOMS
    for room in [*groups, *sorted(set(homes.values()) - groups.keys())]:
        names = [name for name in public if homes[name] == room]
        if names and groups:
            yield f"## {groups.get(room, room.replace('_', ' '))}\n"
        for name in names:
            yield "\n".join(["```{eval-rst}", *_entry(package, name), "```\n"])


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = re.sub(r"<!-- reference: ([\w.]+)(?:: ([\w ]+))? -->", lambda found: "\n".join(_reference(*found.groups())), source[0])


# Docstrings are written in Markdown's manner: what reStructuredText would misread is put into its own words ------------------------------

LABEL = re.compile(r"(Formula|Bias and variance|Bias|Variance|Cost|Limits|Why|Why unbiased|Power|False alarms|Layers|Source): ")
CODE = re.compile(r"(`[^`]+`)")


def _words(line: str) -> str:
    """A line of prose: `code` in two backticks, a public name as a link, and no letter that means something else."""
    parts = CODE.split(line)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = _code(part.strip("`"))
            if re.match(r"\w", parts[index + 1]):
                parts[index] += "\\ "  # markup ends where a space does, even one that is not shown
        else:
            parts[index] = re.sub(r"([\\*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", part))
    return "".join(parts)


def _code(text: str) -> str:
    known = text in forwardgrad.__all__ and callable(getattr(forwardgrad, text))
    return f":py:obj:`~forwardgrad.{text}`" if known else f"``{text}``"


def _prose(doc: list[str]) -> Iterator[str]:
    """Paragraphs, lists, indented code and samples; a list and a labelled line need an empty line before them."""
    before, code, sample, bullets = "", None, False, False
    for line in doc:
        indent = len(line) - len(line.lstrip())
        if code is not None and line.strip() and indent < code:
            code = None
        sample = line.startswith(">>>") or (sample and bool(line.strip()))
        if sample or code is not None:
            yield line
        elif line.startswith("    ") and not before.strip():
            code = indent
            yield from ("::", "", line)
        else:
            bullet = line.startswith("- ")
            label = LABEL.match(line)
            ends = bullets and not bullet and not line.startswith("  ")
            if before.strip() and (label or ends or (bullet and not bullets)):
                yield ""
            bullets = bullet or (bullets and not ends)
            yield f"**{label[1]}:** {_words(line[label.end() :])}" if label else _words(line)
        before = line


def _translate(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    at = lines.index("Args:") if "Args:" in lines else len(lines)
    after = next((index for index, line in enumerate(lines) if index > at and line and not line.startswith(" ")), len(lines))
    lines[:] = [*_prose(lines[:at]), *map(_words, lines[at:after]), *_prose(lines[after:])]


def _signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """A signature that Sphinx can parse: a default made by a factory is no Python."""
    if signature and "<factory>" in signature:
        return re.sub(r"~([\w]+\.)+", "", signature).replace("<factory>", "{}"), returns
    return None


def setup(app: Sphinx) -> None:
    """Three steps of our own: names of a page's reference, docstrings, and signatures."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _fill)
    app.connect("autodoc-process-docstring", _translate, priority=400)  # ahead of napoleon, which reads Args
