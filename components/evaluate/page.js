"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  // Text from models and data sets enters the page as text nodes only, never as markup.
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // The same rules as charts.number.
  const number = (value, form) => {
    if (form === "percent") return (value * 100).toFixed(1) + "\u202f%";
    if (form === "seconds") return duration(value);
    if (form === "count") return Math.round(value).toLocaleString("en-US");
    if (form === "tokens") return value >= 100 ? Math.round(value).toLocaleString("en-US") : value.toFixed(1);
    const size = Math.abs(value);
    if (value === 0 || (size >= 0.001 && size < 1000)) return value.toFixed(size < 10 ? 3 : 1);
    if (size >= 0.00001 && size < 0.001) return value.toFixed(5);
    return size >= 1000 && size < 1e7 ? Math.round(value).toLocaleString("en-US") : value.toExponential(1);
  };
  const interval = (low, high, form) => `${form === "percent" ? (low * 100).toFixed(1) : number(low, form)}\u2013${number(high, form)}`;
  const pad = (count) => String(count).padStart(2, "0");
  const duration = (seconds) => {
    const whole = Math.floor(seconds);
    if (seconds < 60) return seconds.toFixed(1) + "\u202fs";
    if (seconds < 3600) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
    return `${Math.floor(whole / 3600)} h ${pad(Math.floor((whole % 3600) / 60))} min`;
  };

  // Curves: one cursor for all panels.
  const panels = [];
  for (const chart of data.charts) {
    const figure = document.querySelector(`[data-chart="${chart.key}"]`);
    if (!figure) continue;
    const plot = figure.querySelector(".plot");
    const { first, last, half } = plot.dataset;
    panels.push({
      chart, figure, canvas: figure.querySelector(".canvas"), cursor: figure.querySelector(".cursor"),
      at: figure.querySelector("[data-at]"), rest: figure.querySelector("[data-at]").textContent,
      values: [...figure.querySelectorAll("[data-value]")], bands: [...figure.querySelectorAll("[data-band]")],
      of: [...figure.querySelectorAll("[data-of]")].map((part) => ({ part, rest: part.textContent })),
      first: +first, last: +last, half: +half,
    });
  }
  const position = (panel, x) => {
    const span = panel.last - panel.first + 2 * panel.half;
    return span === 0 ? 0.5 : (x - panel.first + panel.half) / span;
  };
  const show = (x) => {
    for (const panel of panels) {
      panel.cursor.hidden = x === null;
      if (x !== null) panel.cursor.style.left = `${position(panel, x) * 100}%`;
      panel.at.textContent = x === null ? panel.rest : `after update ${x}`;
      for (const { part, rest } of panel.of) part.textContent = x === null ? rest : "";
      panel.chart.lines.forEach((line, i) => {
        const at = x === null ? line.points.at(-1)[0] : x;
        const point = line.points.find((candidate) => candidate[0] === at);
        panel.values[i].textContent = point ? number(point[1], panel.chart.form) : "\u2013";
        const banded = point && line.low[at] !== undefined && line.high[at] !== undefined;
        panel.bands[i].textContent = banded ? interval(line.low[at], line.high[at], panel.chart.form) : "";
      });
    }
  };
  let current = null;
  for (const panel of panels) {
    const point = (event) => {
      const box = panel.canvas.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const span = panel.last - panel.first + 2 * panel.half;
      const x = Math.round(panel.first - panel.half + share * span);
      current = Math.min(panel.last, Math.max(panel.first, x));
      show(current);
    };
    panel.canvas.addEventListener("pointermove", point);
    panel.canvas.addEventListener("pointerdown", point);
    panel.canvas.addEventListener("pointerleave", () => show((current = null)));
    panel.figure.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") show((current = null));
      if (!step) return;
      event.preventDefault();
      current = current === null ? panel.last : Math.min(panel.last, Math.max(panel.first, current + step));
      show(current);
    });
    panel.figure.addEventListener("blur", () => show((current = null)));
  }

  // Completions.
  const rows = data.samples;
  const option = (select, value, text) => {
    const choice = make("option", "", text);
    choice.value = value;
    select.append(choice);
  };
  const splits = { eval: "held-out", train: "training" };
  for (const split of new Set(rows.map((row) => row.split))) option(byId("split"), split, splits[split]);
  for (const policy of [...new Set(rows.map((row) => row.iteration))].sort((a, b) => a - b)) option(byId("policy"), policy, `after update ${policy}`);

  const outcome = (row) => row.error ? "error" : row.right ? "right" : row.truncated ? "truncated" : "wrong";
  const score = (row) => row.reward === null ? -Infinity : row.reward;
  const place = (a, b) => a.split.localeCompare(b.split) || b.iteration - a.iteration || a.order - b.order;
  const size = (row) => row.advantage === null ? -1 : Math.abs(row.advantage);
  const orders = {
    best: (a, b) => score(b) - score(a) || (b.advantage ?? 0) - (a.advantage ?? 0) || place(a, b),
    worst: (a, b) => score(a) - score(b) || (a.advantage ?? 0) - (b.advantage ?? 0) || place(a, b),
    surprise: (a, b) => size(b) - size(a) || place(a, b),
    longest: (a, b) => b.length - a.length || place(a, b),
    prompt: (a, b) => (a.prompt < b.prompt ? -1 : a.prompt > b.prompt ? 1 : 0) || a.iteration - b.iteration || a.order - b.order,
  };
  rows.forEach((row, i) => { row.order = i; row.text = `${row.prompt}\n${row.completion}`.toLowerCase(); });

  const signed = (value) => (value > 0 ? "+" : value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(2);
  const meter = (value) => {
    const cell = make("span", "advantage");
    cell.append(make("span", "", value === null ? "\u2013" : signed(value)));
    const bar = make("span", "meter");
    bar.setAttribute("aria-hidden", "true");
    if (value) {
      const fill = make("i", value > 0 ? "up" : "down");
      fill.style.width = `${Math.min(50, Math.abs(value) * 20)}%`;
      bar.append(fill);
    }
    cell.append(bar);
    return cell;
  };
  const oneLine = (text) => text.trim().replace(/\s*\n\s*/g, " \u23ce ");
  const block = (title, text) => {
    const part = make("div");
    const body = make("pre", "", text === "" ? "(empty)" : text);
    body.tabIndex = 0;
    body.setAttribute("aria-label", title);
    part.append(make("h4", "", title), body);
    return part;
  };
  const facts = (pairs) => {
    const table = make("table");
    for (const [name, value] of pairs) {
      const line = make("tr");
      const head = make("th", "", name);
      head.scope = "row";
      line.append(head, make("td", "", value));
      table.append(line);
    }
    return table;
  };
  const detail = (row) => {
    const box = make("div", "detail");
    const texts = make("div");
    texts.append(block("Prompt", row.prompt), block("Completion", row.completion));
    for (const [name, value] of Object.entries(row.truth)) texts.append(block(`Data set: ${name}`, value));
    if (row.error) texts.append(block("Error", row.error));
    const side = make("div");
    const shown = (value) => value === null ? "not applied" : number(value);
    side.append(make("h4", "", "Figures"), facts([
      ["reward", shown(row.reward)],
      ...Object.entries(row.rewards).map(([name, value]) => [name, shown(value)]),
      ["advantage in its group", row.advantage === null ? "\u2013" : signed(row.advantage)],
      ["answer as counted", row.answer], ["tokens", String(row.length)], ["ended by", row.finish],
      ["prompts", splits[row.split]], ["policy", `after update ${row.iteration}`], ["prompt id", row.prompt_id], ["sample", String(row.sample_index)],
    ]));
    box.append(texts, side);
    return box;
  };
  const entry = (row) => {
    const item = make("details");
    const line = make("summary");
    line.append(
      make("span", `badge ${outcome(row)}`, outcome(row)), make("span", "right-aligned", row.reward === null ? "\u2013" : row.reward.toFixed(2)), meter(row.advantage),
      make("span", "clip prompt", oneLine(row.prompt)), make("span", "clip", oneLine(row.completion)), make("span", "right-aligned soft tokens", row.length.toLocaleString("en-US")),
    );
    item.append(line);
    item.addEventListener("toggle", () => { if (item.open && item.children.length === 1) item.append(detail(row)); });
    return item;
  };

  const page = 25;
  let found = [];
  let shown = 0;
  const extend = () => {
    const list = byId("rows");
    for (const row of found.slice(shown, shown + page)) list.append(entry(row));
    shown = Math.min(found.length, shown + page);
    byId("more").hidden = shown >= found.length;
    byId("count").textContent = found.length ? `${found.length} of ${rows.length} completions` : rows.length ? "No completion matches; widen the filter." : "No completions were kept.";
  };
  const refresh = () => {
    const text = byId("search").value.trim().toLowerCase();
    const [split, policy, wanted] = ["split", "policy", "outcome"].map((id) => byId(id).value);
    const fits = (row) => !wanted || outcome(row) === wanted || (wanted === "truncated" && row.truncated) || (wanted === "wrong" && !row.right);
    found = rows.filter((row) => (!split || row.split === split) && (!policy || row.iteration === +policy) && fits(row) && (!text || row.text.includes(text)));
    found.sort(orders[byId("order").value]);
    shown = 0;
    const head = make("div", "head");
    head.setAttribute("aria-hidden", "true");
    for (const name of ["Outcome", "Reward", "Advantage", "Prompt", "Completion", "Tokens"]) head.append(make("span", "", name));
    byId("rows").replaceChildren(...(found.length ? [head] : []));
    extend();
  };
  byId("controls").addEventListener("input", refresh);
  byId("more").addEventListener("click", () => {
    const next = byId("rows").children.length;
    extend();
    byId("rows").children[next]?.querySelector("summary").focus();
  });
  refresh();

  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.style.colorScheme ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.style.colorScheme = dark ? "light" : "dark";
  });
  document.documentElement.dataset.ready = "true";
})();
