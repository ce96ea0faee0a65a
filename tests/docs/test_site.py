"""The site: built without a warning, complete, and read and searched as files, wide and on a phone, without another host."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import forwardgrad as fg
from forwardgrad import lab

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
THERE = all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo"))
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not THERE, reason="no generator of the site here: pip install -e '.[docs]'"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--quiet",
        "--fail-on-warning",
        "--doctree-dir",
        str(out / "trees"),
        "docs",
        str(out / "html"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return out / "html"


def words(page: Path) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))).split())


def test_the_reference_has_every_public_name_with_the_words_of_the_object_itself(site: Path) -> None:
    for package, file in ((fg, "library"), (lab, "laboratory")):
        page = site / "api" / f"{file}.html"
        ids, text = re.findall(r'id="(forwardgrad[\w.]*)"', page.read_text(encoding="utf-8")), words(page)
        for name in package.__all__:
            if callable(found := getattr(package, name)):
                assert f"{package.__name__}.{name}" in ids
                first = re.split(r"[`*]", (inspect.getdoc(found) or "").splitlines()[0])[0].strip()
                assert first in text, name


def test_no_page_asks_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(script|img|link|iframe)\b[^>]*\b(src|href)="(https?:)?//', text), page.name


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no chromium here: install the package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1360, "dark")])
def test_no_page_is_wider_than_its_window_and_nothing_fails(site: Path, browser: Any, width: int, scheme: str) -> None:
    page, wrong = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
    for file in sorted(site.rglob("*.html")):
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), file.name
    shown = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shown)[:3])) < 200) == (scheme == "dark")
    assert wrong == []
    page.close()


def test_a_search_needs_no_server(site: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto((site / "start.html").as_uri())
    page.fill("input[name=q]", "Rademacher")
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("ul.search li a")
    assert "forwardgrad.Rademacher" in [link.inner_text() for link in page.query_selector_all("ul.search li a")]
    page.close()
