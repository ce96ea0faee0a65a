"""The report as one HTML file that fetches nothing: structure, style and script are put together from the files beside this one."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
from collections.abc import Sequence

import jinja2

from forwardgrad.lab.report.blocks.kinds import Judged, Section, pictures_of
from forwardgrad.lab.report.figures import FURTHER, LOOKS, PAGE, variable

LONG = 16  # rows above which a table is folded
GROUND = {  # of the page itself: name, on light, on dark; the colours of figures come beside these
    "page": ("#f6f7f9", "#12161b"),
    "line": ("#dce1e6", "#333d47"),
    "group": ("#eef1f4", "#252d36"),
    "link": ("#00568a", "#84c7f7"),
    "warn": ("#854700", "#ffc879"),
    "warn-back": ("#fff0d9", "#3b2c13"),
    "good": ("#0b6142", "#7ee0b5"),
    "good-back": ("#dff5ea", "#12372a"),
    "bad": ("#9b2222", "#ffaba3"),
    "bad-back": ("#fde8e6", "#45201d"),
    "tip": ("#ffffff", "#2a333d"),
}


def html(title: str, verdict: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page. What is stored is text to it: nothing stored can run, and nothing at all can be fetched."""
    script = _read("page.js")
    return _template().render(
        title=title,
        verdict=verdict,
        sections=sections,
        prefixes={picture.name: f"f{place}" for place, picture in enumerate(pictures_of(sections))},
        style=_read("page.css"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        light=_colours(0),
        dark=_colours(1),
        dots={kind: variable(look["color"]) for kind, look in (LOOKS | FURTHER).items()},
        ids={section.id for section in sections},
        long=LONG,
    )


@functools.cache
def _template() -> jinja2.Template:
    """Compiled once a process: that takes longer than filling it in."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kept"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")  # no line begins with a percent sign
    environment.tests["judged"] = lambda item: isinstance(item, Judged)
    return environment.from_string(_read("page.html.jinja"))


def _colours(theme: int) -> str:
    found = {name: both[theme] for name, both in GROUND.items()} | {name: (light, dark)[theme] for name, light, dark in PAGE.values()}
    return " ".join(f"--{name}: {colour};" for name, colour in found.items())


def _read(name: str) -> str:
    return importlib.resources.files("forwardgrad.lab.report.blocks").joinpath(name).read_text(encoding="utf-8")
