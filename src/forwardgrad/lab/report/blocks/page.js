// The page reads without this. It remembers a theme, shows one view of a figure at a time, and reads values off curves.
(() => {
  "use strict";
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];

  // Where a page is a local file, a browser may refuse to remember: the theme then lasts as long as the page.
  const memory = {
    read() { try { return localStorage.getItem("forwardgrad-theme"); } catch { return null; } },
    write(theme) { try { localStorage.setItem("forwardgrad-theme", theme); } catch { /* nothing to be done */ } },
  };

  function dress(theme) {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  }
  const remembered = memory.read();
  let theme = themes.includes(remembered) ? remembered : "auto";
  dress(theme);  // before anything is drawn

  function themeButton() {
    const button = document.getElementById("theme");
    const say = () => { button.textContent = `Theme: ${theme}`; };
    button.hidden = false;
    say();
    button.addEventListener("click", () => {
      theme = themes[(themes.indexOf(theme) + 1) % themes.length];
      dress(theme);
      memory.write(theme);
      say();
    });
  }

  // Views of one figure as tabs; without this script they stand one below another.
  function tabs(box) {
    const views = [...box.querySelectorAll(":scope > figure")];
    const list = box.querySelector("[role=tablist]");
    const buttons = [...list.querySelectorAll("button")];
    const show = (chosen, focus) => {
      views.forEach((view, i) => { view.hidden = i !== chosen; });
      buttons.forEach((button, i) => {
        button.setAttribute("aria-selected", String(i === chosen));
        button.tabIndex = i === chosen ? 0 : -1;
      });
      if (focus) buttons[chosen].focus();
    };
    buttons.forEach((button, i) => {
      button.addEventListener("click", () => show(i, false));
      button.addEventListener("keydown", (event) => {
        const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: buttons.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        show((to + buttons.length) % buttons.length, true);
      });
    });
    list.hidden = false;
    show(0, false);
  }

  const words = (value) => {
    if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e9)) return value.toExponential(3);
    const digits = Math.abs(value) >= 1e4 ? Math.round(value) : Number(value.toPrecision(4));
    return digits.toLocaleString("en", { maximumFractionDigits: 8 });
  };

  // A coordinate of the figure for a value, and whether it lies on the axis at all.
  function onAxis(axis, start, length, value) {
    const scale = axis.log ? Math.log : (x) => x;
    return start + length * (scale(value) - scale(axis.from)) / (scale(axis.to) - scale(axis.from));
  }
  const across = (panel, x) => onAxis(panel.x, panel.box[0], panel.box[2], x);
  const down = (panel, y) => onAxis(panel.y, panel.box[1] + panel.box[3], -panel.box[3], y);

  function nearest(panel, line, at) {
    let best = -1, least = Infinity;
    line.x.forEach((x, i) => {
      const away = Math.abs(across(panel, x) - at);
      if (line.y[i] !== null && away < least) { least = away; best = i; }
    });
    return best;
  }

  const NS = "http://www.w3.org/2000/svg";
  function mark(svg, name, attributes) {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    svg.append(element);
    return element;
  }

  // Reading values: a crosshair over one panel, and what every line has where it stands.
  function reader(figure) {
    const card = figure.querySelector(".card"), svg = card.querySelector("svg"), tip = figure.querySelector(".tip");
    const { x: xlabel, panels } = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const layer = mark(svg, "g", { class: "crosshair", "aria-hidden": "true" });
    let current = panels.findIndex((panel) => panel.lines.length), place = null;

    const places = (panel) => [...new Set(panel.lines.flatMap((line) => line.x))].sort((a, b) => a - b);

    function hide() {
      layer.replaceChildren();
      tip.hidden = true;
    }

    function show(panel, x) {
      const at = across(panel, x), gap = panel.box[2] / 200;
      const entries = panel.lines.map((line) => ({ line, i: nearest(panel, line, at) })).filter((entry) => entry.i >= 0);
      layer.replaceChildren();
      mark(layer, "line", { x1: at, x2: at, y1: panel.box[1], y2: panel.box[1] + panel.box[3] });
      tip.replaceChildren();
      const head = document.createElement("div");
      head.className = "tip-head";
      head.textContent = `${xlabel} ${words(x)}${panels.length > 1 && panel.title ? ` · ${panel.title}` : ""}`;
      const list = document.createElement("ul");
      entries.sort((a, b) => b.line.y[b.i] - a.line.y[a.i]);
      for (const { line, i } of entries) {
        const there = across(panel, line.x[i]);
        const height = Math.min(Math.max(down(panel, line.y[i]), panel.box[1]), panel.box[1] + panel.box[3]);
        mark(layer, "circle", { cx: there, cy: height, r: 4, style: `fill: ${line.colour}` });
        const item = document.createElement("li"), dot = document.createElement("i"), name = document.createElement("span");
        const value = document.createElement("b");
        dot.style.background = line.colour;
        name.textContent = line.name;
        value.textContent = words(line.y[i]);
        item.append(dot, name, value);
        const notes = [];
        if (line.low && line.low[i] !== null && line.low[i] !== line.high[i]) notes.push(`${words(line.low[i])} to ${words(line.high[i])}`);
        if (Math.abs(there - at) > gap) notes.push(`at ${words(line.x[i])}`);
        if (notes.length) {
          const note = document.createElement("small");
          note.textContent = notes.join(", ");
          item.append(note);
        }
        list.append(item);
      }
      tip.append(head, list);
      tip.hidden = false;
      put(at, panel);
      place = x;
    }

    // Beside the crosshair, on the side where there is room, and never out of sight.
    function put(at, panel) {
      const drawn = svg.getBoundingClientRect(), frame = figure.getBoundingClientRect();
      const scale = drawn.width / svg.viewBox.baseVal.width;
      const x = drawn.left - frame.left + at * scale, room = frame.width - tip.offsetWidth;
      const beside = x + 14 + tip.offsetWidth > frame.width ? x - 14 - tip.offsetWidth : x + 14;
      const narrow = frame.width < 560;  // there it would hide the curves, and stands below them
      tip.style.left = `${narrow ? 0 : Math.max(0, Math.min(beside, room))}px`;
      tip.style.top = `${drawn.top - frame.top + (narrow ? drawn.height + 10 : (panel.box[1] + 6) * scale)}px`;
    }

    function follow(event) {
      const drawn = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const x = (event.clientX - drawn.left) * view.width / drawn.width, y = (event.clientY - drawn.top) * view.height / drawn.height;
      const found = panels.findIndex(({ box, lines }) =>
        lines.length && x >= box[0] - 6 && x <= box[0] + box[2] + 6 && y >= box[1] && y <= box[1] + box[3]);
      if (found < 0) { hide(); return; }
      current = found;
      const panel = panels[found];
      show(panel, places(panel).reduce((a, b) => (Math.abs(across(panel, b) - x) < Math.abs(across(panel, a) - x) ? b : a)));
    }

    card.addEventListener("pointermove", follow);
    card.addEventListener("pointerdown", follow);
    card.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    card.addEventListener("blur", hide);
    card.addEventListener("keydown", (event) => {
      if (current < 0) return;
      const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
      const other = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") { hide(); return; }
      if (other) {
        const full = panels.map((_, i) => i).filter((i) => panels[i].lines.length);
        if (full.length < 2) return;
        current = full[(full.indexOf(current) + other + full.length) % full.length];
      } else if (steps === undefined) return;
      event.preventDefault();
      const all = places(panels[current]), near = place === null || tip.hidden ? -1 : all.findIndex((x) => x >= place);
      const start = near < 0 ? (steps < 0 ? all.length : -1) : near;
      show(panels[current], all[Math.min(all.length - 1, Math.max(0, other ? Math.max(0, near) : start + steps))]);
    });
  }

  // A link into a folded part unfolds it; the contents of a phone fold away once a part is chosen.
  function unfold() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    target.querySelector(":scope > details")?.setAttribute("open", "");
    for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    target.scrollIntoView();
  }

  function whereAmI() {
    const links = new Map([...document.querySelectorAll(".side a")].map((link) => [link.hash.slice(1), link]));
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) {
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "0px 0px -75% 0px" });
    document.querySelectorAll("main section[id], #verdict").forEach((section) => seen.observe(section));
  }

  document.addEventListener("DOMContentLoaded", () => {
    themeButton();
    document.querySelectorAll(".views").forEach(tabs);
    document.querySelectorAll("figure[data-read]").forEach(reader);
    document.querySelectorAll(".menu a").forEach((link) => link.addEventListener("click", () => { link.closest("details").open = false; }));
    addEventListener("hashchange", unfold);
    if (location.hash) unfold();
    whereAmI();
  });
})();
