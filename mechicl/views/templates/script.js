"use strict";
(() => {
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const media = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const PAPER = { width: 940, height: 1220 }; // the room for a figure on A4, its words below it, in CSS pixels at the page's print zoom
  let printing = false; // paper is white and as wide as it is, whatever the screen is
  const dark = () => !printing && (root.dataset.theme ? root.dataset.theme === "dark" : media.matches);
  const remember = (value) => { try { localStorage.setItem("mechicl-theme", value); } catch (_) { /* private window: forget */ } };
  try { const kept = localStorage.getItem("mechicl-theme"); if (kept === "dark" || kept === "light") root.dataset.theme = kept; } catch (_) { /* as above */ }

  // ---- figures: drawn when their panel is visible, redrawn in the other theme when it changes
  const specs = new Map();
  document.querySelectorAll("script[data-for]").forEach((s) => specs.set(s.dataset.for, JSON.parse(s.textContent)));
  const layoutOf = (spec) => {
    const layout = structuredClone(spec.layout);
    layout.template = themes[dark() ? "dark" : "light"];
    layout.autosize = true;
    if (printing) { layout.width = PAPER.width; layout.height = Math.min(layout.height || PAPER.height, PAPER.height); }
    const scale = layout.meta && themes.scales[layout.meta.scale];
    if (scale) for (const key of Object.keys(layout)) if (/^coloraxis\d*$/.test(key)) layout[key].colorscale = scale[dark() ? 1 : 0];
    return layout;
  };
  const draw = (id) => {
    const spec = specs.get(id);
    const config = { responsive: true, displaylogo: false, showTips: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d", "sendChartToCloud", "editInChartStudio"],
      toImageButtonOptions: { format: "svg", filename: "mechicl_" + id } };
    return Plotly.newPlot(id, structuredClone(spec.data), layoutOf(spec), config).then(reach); // anew: a legend keeps its old lines when only the width changes
  };

  // ---- figures by keyboard, which plotly leaves to the mouse: Tab stops once at the slider, the legend and the tools; arrow keys move inside, Enter or space presses
  const moved = (e, k, n) => { const to = { ArrowRight: k + 1, ArrowDown: k + 1, ArrowLeft: k - 1, ArrowUp: k - 1, Home: 0, End: n - 1 }[e.key]; return to === undefined ? to : (to + n) % n; };
  const parts = (gd) => ({ entries: [...gd.querySelectorAll(".legendtoggle")], tools: [...gd.querySelectorAll(".modebar-btn")] });
  const stopOnce = (items) => { const at = Math.max(0, items.indexOf(document.activeElement)); items.forEach((item, k) => item.setAttribute("tabindex", k === at ? "0" : "-1")); };
  const name = (gd) => {
    const { entries, tools } = parts(gd), grip = gd.querySelector(".slider-container"), slider = (gd.layout.sliders || [])[0];
    const bar = gd.querySelector(".modebar");
    if (bar) { bar.setAttribute("role", "toolbar"); bar.setAttribute("aria-label", "Tools of the figure"); }
    entries.forEach((entry) => { entry.setAttribute("role", "button"); entry.setAttribute("aria-label", "Show or hide " + entry.parentNode.textContent.trim()); });
    stopOnce(entries);
    stopOnce(tools);
    if (grip && slider) {
      const at = gd._fullLayout.sliders[0].active;
      for (const [key, value] of Object.entries({ tabindex: 0, role: "slider", "aria-label": slider.currentvalue.prefix.replace(/[: ]+$/, ""), "aria-valuemin": 0, "aria-valuemax": slider.steps.length - 1, "aria-valuenow": at, "aria-valuetext": slider.steps[at].label })) grip.setAttribute(key, value);
    }
  };
  const press = (gd, entry) => {
    const k = parts(gd).entries.indexOf(entry);
    for (const kind of ["mousedown", "mouseup"]) entry.dispatchEvent(new MouseEvent(kind, { bubbles: true, button: 0, view: window }));
    gd.once("plotly_afterplot", () => { const again = parts(gd).entries[k]; if (again) again.focus(); }); // plotly may draw the legend anew
  };
  const slide = (gd, to) => {
    const slider = gd.layout.sliders[0], [data, layout, which] = structuredClone(slider.steps[to].args);
    return Plotly.update(gd, data, { ...layout, "sliders[0].active": to }, which);
  };
  const reach = (gd) => {
    name(gd);
    gd.on("plotly_afterplot", () => name(gd)); // drawn anew, a figure forgets its listeners; its element keeps the one below
    if (gd.dataset.reached) return;
    gd.dataset.reached = "true";
    gd.addEventListener("keydown", (e) => {
      const { entries, tools } = parts(gd), item = e.target;
      if (item.matches(".slider-container")) {
        const n = gd.layout.sliders[0].steps.length, at = gd._fullLayout.sliders[0].active;
        const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + 5, PageDown: at - 5, Home: 0, End: n - 1 }[e.key];
        if (to !== undefined) { e.preventDefault(); slide(gd, Math.min(n - 1, Math.max(0, to))); }
        return;
      }
      const list = entries.includes(item) ? entries : tools.includes(item) ? tools : [];
      const to = moved(e, list.indexOf(item), list.length);
      if (list.length && to !== undefined) { e.preventDefault(); list[to].focus(); stopOnce(list); }
      else if (list === entries && (e.key === "Enter" || e.key === " ")) { e.preventDefault(); press(gd, item); }
    });
  };
  const visible = (id) => document.getElementById(id).offsetParent !== null;
  const drawn = new Set();
  const drawVisible = () => specs.forEach((_, id) => { if (!drawn.has(id) && visible(id)) { drawn.add(id); draw(id); } });
  const redraw = () => drawn.forEach((id) => draw(id));
  document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; remember(root.dataset.theme); redraw(); });
  media.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => {
    printing = true;
    redraw();
    document.querySelectorAll('[role="tabpanel"]').forEach((p) => { p.dataset.was = p.hidden ? "1" : ""; p.hidden = false; });
    drawVisible();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    document.querySelectorAll('[role="tabpanel"]').forEach((p) => { p.hidden = p.dataset.was === "1"; });
    redraw();
  });

  // ---- tabs, with the arrow keys
  document.querySelectorAll("[data-tabs]").forEach((box) => {
    const tabs = [...box.querySelectorAll('[role="tab"]')];
    const show = (tab, focus) => {
      tabs.forEach((t) => {
        const on = t === tab;
        t.setAttribute("aria-selected", String(on));
        t.tabIndex = on ? 0 : -1;
        document.getElementById(t.getAttribute("aria-controls")).hidden = !on;
      });
      if (focus) tab.focus();
      drawVisible();
    };
    tabs.forEach((tab, k) => {
      tab.addEventListener("click", () => show(tab, false));
      tab.addEventListener("keydown", (e) => {
        const to = { ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: tabs.length - 1 }[e.key];
        if (to !== undefined) { e.preventDefault(); show(tabs[(to + tabs.length) % tabs.length], true); }
      });
    });
  });

  // ---- the prompt: attention of any token, onto tokens and patches
  const unpack = (text) => { const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); return new Uint16Array(bytes.buffer); };
  const percent = (x) => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %";
  document.querySelectorAll("[data-strip]").forEach((box) => {
    const data = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
    const cells = [...box.querySelectorAll("[data-p]")].sort((a, b) => a.dataset.p - b.dataset.p);
    const said = box.querySelector(".said");
    const rows = {};
    let head = "", dest = data.n - 1;
    const row = () => {
      const kept = data.heads[head];
      rows[head] = rows[head] || unpack(kept.rows);
      const at = kept.n === data.n ? dest : 0;
      return Array.from(rows[head].subarray(at * data.n, (at + 1) * data.n), (v) => v / 65535);
    };
    const word = (p) => "token " + p + " \u201c" + data.tokens[p].replace(/\n/g, "\u21b5") + "\u201d (" + (data.kinds[p] === "glue" ? "template" : data.kinds[p]) + ")";
    const paint = () => {
      box.classList.toggle("lit", head !== "");
      cells.forEach((c) => c.classList.toggle("dest", head !== "" && +c.dataset.p === dest));
      if (head === "") { said.textContent = "Colours show what each token is for."; cells.forEach((c) => c.style.removeProperty("--a")); return; }
      const now = row();
      const top = Math.max(...now.slice(1), 1e-9);
      cells.forEach((c) => c.style.setProperty("--a", Math.min(1, now[c.dataset.p] / top).toFixed(3)));
      const sums = {};
      now.forEach((v, p) => { const k = p === 0 ? "first token" : data.kinds[p]; sums[k] = (sums[k] || 0) + v; });
      const parts = Object.entries(sums).sort((a, b) => b[1] - a[1]).slice(0, 5).map(([k, v]) => percent(v) + " on " + (k === "glue" ? "the template" : k));
      said.textContent = "Head " + head + " reads from " + word(dest) + (dest === data.n - 1 ? ", which predicts the answer" : "") + ": " + parts.join(", ") + ". Darkest: " + percent(top) + (now[0] > top ? "; the first token, with more, is shown as dark" : "") + ".";
    };
    box.querySelectorAll("[data-head]").forEach((b) => b.addEventListener("click", () => {
      head = b.dataset.head;
      box.querySelectorAll("[data-head]").forEach((o) => o.setAttribute("aria-pressed", String(o === b)));
      if (head !== "" && data.heads[head].n !== data.n) dest = data.n - 1;
      paint();
    }));
    const tip = (c) => { const p = +c.dataset.p; return word(p) + (head === "" ? "" : ": " + percent(row()[p]) + " of head " + head); };
    const choose = (c) => { if (head !== "" && data.heads[head].n === data.n) { dest = +c.dataset.p; paint(); } };
    const cards = [...box.querySelectorAll(".card")]; // up and down: the example before and after
    const beside = (c, way) => { const card = cards[cards.indexOf(c.closest(".card")) + way]; return cells.findIndex((o) => card && card.contains(o)); };
    if (cells.length) cells[0].tabIndex = 0;
    cells.forEach((c, k) => {
      const hint = () => {
        if (c instanceof SVGElement) { let t = c.querySelector("title"); if (!t) { t = document.createElementNS("http://www.w3.org/2000/svg", "title"); c.append(t); } t.textContent = tip(c); }
        else c.title = tip(c);
      };
      c.addEventListener("mouseenter", hint);
      c.addEventListener("focus", () => { hint(); c.setAttribute("aria-label", tip(c)); });
      c.addEventListener("click", () => choose(c));
      c.addEventListener("keydown", (e) => {
        if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(c); }
        const to = { ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: cells.length - 1, ArrowDown: beside(c, 1), ArrowUp: beside(c, -1) }[e.key];
        if (to !== undefined && cells[to]) { e.preventDefault(); c.tabIndex = -1; cells[to].tabIndex = 0; cells[to].focus(); }
      });
    });
  });

  // ---- circuitsvis' grid of heads takes clicks only: its small maps (the ones under a border) become buttons
  const heads = (view) => view.querySelectorAll("h4").forEach((title) => {
    const box = title.parentElement;
    if (box.hasAttribute("tabindex") || box.style.borderStyle !== "solid") return;
    for (const [key, value] of Object.entries({ tabindex: 0, role: "button", "aria-label": "Head " + title.textContent })) box.setAttribute(key, value);
    box.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); box.click(); } });
  });
  document.querySelectorAll(".circuitsvis").forEach((view) => { heads(view); new MutationObserver(() => heads(view)).observe(view, { childList: true, subtree: true }); });

  // ---- where the reader is
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => entries.forEach((e) => {
      if (!e.isIntersecting) return;
      links.forEach((a, id) => { if (id === e.target.id) a.setAttribute("aria-current", "true"); else a.removeAttribute("aria-current"); });
    }), { rootMargin: "-10% 0px -75% 0px" });
    document.querySelectorAll("main > section").forEach((s) => seen.observe(s));
  }
  drawVisible();
  root.dataset.ready = "true";
})();
