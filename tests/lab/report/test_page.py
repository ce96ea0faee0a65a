"""The page in a real browser without a window: it fetches nothing, reads values rightly, follows the theme, fits a phone, takes keys."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from tests.lab.bench.test_measuring import arm, case, made
from tests.support.stored import fail, put, record, seeds

from forwardgrad.lab.recipes import paper
from forwardgrad.lab.report import document
from forwardgrad.lab.report.blocks.as_html import GROUND
from forwardgrad.lab.report.figures import style
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store.files import read_json, read_table, write_json
from forwardgrad.lab.store.store import Store

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: install the package chromium")
EVIL = "</script><script>window.stolen = 1</script>"
FORWARD = "forward gradient"
TABLE1 = paper.table1(rows=["1", "2"], epochs=1, seeds=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two studies: one with forward passes counted, a run that diverged and one that failed, and a label that tries to be code."""
    store = Store(tmp_path_factory.mktemp("page"))
    demo = paper.demo(1, seeds=2)
    for study in (TABLE1, demo):
        record(store, study)
        for place, member in enumerate(study.arms):
            for number, run in enumerate(seeds(member, 2)):
                if study is demo and (place, number) == (1, 0):
                    fail(store, run, "memory was exhausted")
                    continue
                lost = place == number == 1 and study is demo
                loss = 0.4 + 0.02 * number if place == 0 else 0.004
                put(store, run, loss, steps=400, diverged="the loss is not finite" if lost else None)
                path = store.folder(run.identity) / "result.json"
                write_json(path, {**(read_json(path) or {}), "forward_passes": 800})
    path = store.root / "studies" / "table1.json"
    stored = json.loads(path.read_text())
    stored["arms"][1]["label"] = EVIL
    write_json(path, stored)
    cases = [case(model, 64, arm("backprop", 0.004, 1.0), arm("forward", 0.006, 1.5)) for model in ("nn", "cnn", "cifar-cnn", "logistic")]
    write_json(store.root / "bench.json", made(*cases))
    document.write(store)
    return store


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """A page in a context of its own, and all that it complained of or asked for."""

    def __init__(self, browser: Any, store: Store, script: str = "", **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 1000}, "color_scheme": "light", **options})
        self.context.set_default_timeout(10_000)
        self.url, self.complaints, self.asked = (store.root / "report.html").as_uri(), [], []
        self.context.route("**/*", self._ask)
        if script:
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(self.url)

    def _ask(self, route: Any) -> None:
        if route.request.url.partition("#")[0] == self.url:
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.complaints == []
        assert self.asked == []


def place(page: Any, figure: str, panel: int, x: float, y: float) -> tuple[float, float]:
    """Where a value of a panel lies in the window, from the numbers of the figure and the box that the browser gives its SVG."""
    page.locator(f"#{figure} .card").scroll_into_view_if_needed()
    data = json.loads(page.locator(f"#{figure} script").text_content())
    box = data["panels"][panel]["box"]
    along, up = (share(data["panels"][panel][axis], value) for axis, value in (("x", x), ("y", y)))
    drawn = page.locator(f"#{figure} .card svg").bounding_box()
    scale = drawn["width"] / page.evaluate("id => document.querySelector(`#${id} .card svg`).viewBox.baseVal.width", figure)
    return drawn["x"] + (box[0] + along * box[2]) * scale, drawn["y"] + (box[1] + (1 - up) * box[3]) * scale


def share(axis: dict[str, Any], value: float) -> float:
    """How far along an axis a value lies."""
    low, high, at = (math.log(v) if axis["log"] else v for v in (axis["from"], axis["to"], value))
    return (at - low) / (high - low)


def evaluated(store: Store, column: str, step: int) -> list[float]:
    """A column of the forward arm's evaluations in the demonstration at one step, for each seed."""
    tables = [read_table(store.folder(run.identity) / "evaluations.csv") for run in seeds(paper.demo(1).arms[0], 2)]
    return [table[column][table["step"].index(step)] for table in tables]


def reading(page: Any, figure: str, name: str) -> str:
    """The value that the open tip of a figure gives a line."""
    item = page.locator(f"#{figure} .tip li", has=page.get_by_text(name, exact=True))
    return str(item.locator("b").text_content())


def test_hovering_reads_the_stored_values(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        losses = evaluated(store, "validation_loss", 200)
        mean = sum(losses) / 2
        page.mouse.move(*place(page, "demo-validation", 0, 203, mean))
        tip = page.locator("#demo-validation .tip")
        assert tip.is_visible()
        assert tip.locator(".tip-head").text_content() == "optimizer step 200"
        assert float(reading(page, "demo-validation", FORWARD)) == pytest.approx(mean, rel=2e-4)
        low, high = (float(word) for word in tip.locator("li small").first.text_content().split(" to "))
        assert (low, high) == pytest.approx((min(losses), max(losses)), rel=2e-4)
        circle = page.locator("#demo-validation .crosshair circle").first.bounding_box()
        at = place(page, "demo-validation", 0, 200, mean)
        assert (circle["x"] + circle["width"] / 2, circle["y"] + circle["height"] / 2) == pytest.approx(at, abs=1)
        page.mouse.move(5, 5)
        assert tip.is_hidden()


def test_every_view_has_its_own_axis_and_its_own_values(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        assert [page.locator(f"#demo-validation{end}").is_visible() for end in ("", "-seconds", "-passes")] == [True, False, False]
        page.get_by_role("tab", name="forward passes").last.click()
        assert [page.locator(f"#demo-validation{end}").is_visible() for end in ("", "-seconds", "-passes")] == [False, False, True]
        mean = sum(evaluated(store, "validation_loss", 100)) / 2
        page.mouse.move(*place(page, "demo-validation-passes", 0, 200, mean))  # 800 passes in 400 steps
        assert page.locator("#demo-validation-passes .tip-head").text_content() == "forward passes 200"
        assert float(reading(page, "demo-validation-passes", FORWARD)) == pytest.approx(mean, rel=2e-4)
        page.keyboard.press("ArrowLeft")
        assert page.locator("#demo-validation-seconds").is_visible()
        page.mouse.move(*place(page, "demo-validation-seconds", 0, 0.2, mean))  # a step takes 2 ms
        assert page.locator("#demo-validation-seconds .tip-head").text_content() == "training time (seconds) 0.2"


def test_a_logarithmic_axis_is_read_as_one(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        panel = json.loads(page.locator("#table1-figure-2 script").text_content())["panels"][0]
        assert panel["y"]["log"]
        line = panel["lines"][1]
        i = len(line["x"]) // 2
        at = place(page, "table1-figure-2", 0, line["x"][i], line["y"][i])
        page.mouse.move(*at)
        circles = [circle.bounding_box() for circle in page.locator("#table1-figure-2 .crosshair circle").all()]
        centres = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in circles]
        assert any(centre == pytest.approx(at, abs=1) for centre in centres)
        drawn = stats.binned([read_table(store.folder(r.identity) / "losses.csv.gz")["loss"] for r in seeds(TABLE1.arms[1], 2)], 150)
        assert float(reading(page, "table1-figure-2", EVIL)) == pytest.approx(drawn.mean[drawn.at.index(line["x"][i])], rel=2e-4)


def test_keys_walk_along_a_curve(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        page.locator("#demo-validation .card").focus()
        heads = []
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
            page.keyboard.press(key)
            heads.append(page.locator("#demo-validation .tip-head").text_content().split()[-1])
        assert heads == ["50", "100", "50", "400", "50"]
        page.keyboard.press("Escape")
        assert page.locator("#demo-validation .tip").is_hidden()
        page.locator("#table1-figure-2 .card").focus()  # the other panels have nothing to read
        page.keyboard.press("End")
        assert page.locator("#table1-figure-2 .tip").get_by_text(EVIL).is_visible()
        assert page.evaluate("window.stolen") is None


def test_a_finger_reads_values_too(store: Store, browser: Any) -> None:
    with Visit(browser, store, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as page:
        page.touchscreen.tap(*place(page, "demo-validation", 0, 100, 1.0))
        tip = page.locator("#demo-validation .tip")
        assert tip.is_visible()
        box = tip.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_it_is_chosen(store: Store, browser: Any, scheme: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('#demo-validation .card svg path')).fill"
    rgb = {theme: _rgb(GROUND["page"][place]) for place, theme in enumerate(("light", "dark"))}
    with Visit(browser, store, color_scheme=scheme) as page:
        assert page.evaluate(ground) == rgb[scheme]
        before = page.evaluate(ink)
        button = page.locator("#theme")
        seen = []
        for _ in range(3):
            button.click()
            seen.append((button.text_content(), page.evaluate(ground)))
        assert seen == [("Theme: light", rgb["light"]), ("Theme: dark", rgb["dark"]), ("Theme: auto", rgb[scheme])]
        other = {"light": "dark", "dark": "light"}[scheme]
        while button.text_content() != f"Theme: {other}":
            button.click()
        assert page.evaluate(ink) != before
        page.reload()
        assert (page.locator("#theme").text_content(), page.evaluate(ground)) == (f"Theme: {other}", rgb[other])


def _rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def test_a_browser_that_remembers_nothing_is_no_error(store: Store, browser: Any) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('denied', 'SecurityError'); } });"
    with Visit(browser, store, refuse) as page:
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "light"


CONTRAST = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  document.querySelectorAll('details').forEach((d) => { d.open = true; });
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    if (element.closest('svg, script, [hidden]')) continue;
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, element.className, element.textContent.slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(store: Store, browser: Any, scheme: str) -> None:
    with Visit(browser, store, color_scheme=scheme) as page:
        found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert found[0][0] >= 4.5, found[:3]


@pytest.mark.parametrize("theme", [0, 1])
def test_lines_and_words_of_figures_stand_out(theme: int) -> None:
    colours = {name: both[theme] for name, *both in style.PAGE.values()}
    assert min(_contrast(colours[name], colours["card"]) for name in ("ink", "quiet")) >= 4.5
    drawn = {look["color"].lower() for look in (style.LOOKS | style.FURTHER).values()} | {colour.lower() for colour in style.OTHERS}
    assert min(_contrast(colours[style.PAGE[colour][0]], colours["card"]) for colour in drawn) >= 3


def _contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_no_colour_of_a_figure_is_left_as_it_was_drawn(store: Store) -> None:
    page = (store.root / "report.html").read_text()
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawn) >= 5
    assert not [colour for svg in drawn for colour in re.findall(r"#[0-9a-fA-F]{3,8}\b", svg) if not colour.startswith("#f")]
    assert "var(--blue)" in "".join(drawn)
    exported = (store.root / "figures" / "demo-validation.svg").read_text()
    assert "var(" not in exported
    assert "#0072b2" in exported.lower()


def test_a_phone_needs_no_sideways_scrolling(store: Store, browser: Any) -> None:
    with Visit(browser, store, viewport={"width": 390, "height": 844}) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator(".side").is_hidden()
        page.locator(".menu a", has_text="Provenance").click()
        assert not page.evaluate("document.querySelector('.menu').open")


def test_a_row_leads_to_its_command_and_machine(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        assert page.locator("#provenance table").is_hidden()
        page.locator("#demo table a", has_text=FORWARD).first.click()
        row = page.locator("#provenance tr", has=page.locator("td:target"))
        assert row.is_visible()
        assert "forwardgrad reproduce demo" in row.text_content()
        assert "commit abc123def456" in row.text_content()


def test_lost_runs_are_shown_with_their_reasons(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        words = page.locator("#demo").text_content()
    assert "Diverged: 1 of 2 runs of backpropagation." in words
    assert "Failed: 1 of 2 runs of backpropagation." in words
    assert "failed (memory was exhausted)" in words
    assert "diverged at step 400 (the loss is not finite)" in words


def test_nothing_but_the_pages_own_script_runs(store: Store, browser: Any) -> None:
    visit = Visit(browser, store)
    visit.page.evaluate("""() => {
        const added = document.createElement('script');
        added.textContent = 'window.stolen = 1';
        document.body.append(added);
        document.body.insertAdjacentHTML('beforeend', '<img src="https://example.org/a.png" onerror="window.stolen = 2">');
    }""")
    visit.page.wait_for_timeout(200)
    assert visit.page.evaluate("window.stolen") is None
    assert visit.asked == []
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.context.close()


def test_every_picture_has_words(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        assert page.locator("img").count() == 0
        labels = page.evaluate("[...document.querySelectorAll('main figure svg')].map((s) => s.parentElement.getAttribute('aria-label'))")
        roles = page.evaluate("[...document.querySelectorAll('main figure svg')].map((s) => s.parentElement.getAttribute('role'))")
    assert len(labels) >= 5
    assert all(len(label) > 20 for label in labels)
    assert set(roles) == {"img"}


def test_without_scripts_everything_can_be_read(store: Store, browser: Any) -> None:
    with Visit(browser, store, java_script_enabled=False) as page:
        assert all(page.locator(f"#demo-validation{end}").is_visible() for end in ("", "-seconds", "-passes"))
        assert page.locator("#demo-validation-passes .view-title").is_visible()
        assert page.locator("#theme").is_hidden()
        assert page.locator("[role=tablist]").first.is_hidden()
        assert page.locator("#verdict p").first.is_visible()


def test_the_page_begins_with_the_verdict(store: Store, browser: Any) -> None:
    with Visit(browser, store) as page:
        first = page.locator("main p").first
        assert first.evaluate("e => e.parentElement.id") == "verdict"
        assert "ahead" in first.text_content()
        assert page.locator("main section").first.get_attribute("id") == "claims"
        assert page.locator(".claim .badge").count() == page.locator(".claim").count() > 20
