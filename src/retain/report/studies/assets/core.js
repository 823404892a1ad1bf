"use strict";
// Data, state and the small tools that all figures share.
const DATA = JSON.parse(document.getElementById("data").textContent);
const METRICS = DATA.metrics;
const STATE = { group: DATA.groups[0].id, hidden: new Set() };
const FIGURES = []; // each: { node, draw() -> { svg, head, rows } or null, name }

const byId = (id) => document.getElementById(id);
const group = () => DATA.groups.find((g) => g.id === STATE.group);
const visible = (g) => g.cells.filter((c) => !STATE.hidden.has(c.series));

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
const tone = (cell) => (cell.plain ? "--lora" : `--s${cell.colour % 12}`);

// Numbers for people. An estimate is [mean, low, high, n]; low and high are null for one seed.
function plain(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  if (size < -4 || size >= 6) return value.toExponential(digits - 1);
  return value.toFixed(Math.max(0, digits - 1 - size));
}
function say(key, value) {
  if (value === null || value === undefined) return "—";
  const unit = METRICS[key].unit;
  const text =
    unit === "points" ? (100 * value).toFixed(1)
    : unit === "%" ? (100 * value).toFixed(value >= 0.1 ? 1 : 2)
    : plain(value);
  return text.replace("-", "−");
}
function sayAll(key, e) {
  if (!e) return "—";
  const unit = METRICS[key].unit;
  if (e[2] === null) return `${say(key, e[0])} ${unit}`;
  const half = e[2] - e[0], size = Math.max(Math.abs(e[0]), half);
  if (unit === "points" || unit === "%" || !(size >= 1e-4 && size < 1e6))
    return `${say(key, e[0])} ± ${say(key, half)} ${unit}`;
  let digits = Math.max(0, 2 - Math.floor(Math.log10(size)));
  if (half > 0) digits = Math.max(digits, Math.min(digits + 2, Math.ceil(-Math.log10(half))));
  return `${e[0].toFixed(digits).replace("-", "−")} ± ${half.toFixed(digits)} ${unit}`;
}
const seeds = (n) => `${n} seed${n === 1 ? "" : "s"}`;
const shown = (key, value) => // on an axis
  METRICS[key].unit === "points" || METRICS[key].unit === "%" ? 100 * value : value;

function el(name, attributes = {}, parent = null, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function html(name, attributes = {}, parent = null, text = null) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function canvas(width, height, about) {
  const svg = el("svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": about,
  });
  return svg;
}

// A linear axis or, with a bend, one that is linear near 0 and logarithmic beyond.
function scale(lo, hi, start, end, bend = null) {
  const warp = (v) => (bend === null ? v : Math.sign(v) * Math.log10(1 + Math.abs(v) / bend));
  const at = (v) => start + ((warp(v) - warp(lo)) / (warp(hi) - warp(lo))) * (end - start);
  at.lo = lo; at.hi = hi; at.start = start; at.end = end;
  at.ticks = (gap) => {
    if (bend === null) {
      const most = Math.max(2, Math.abs(end - start) / gap), raw = (hi - lo) / most;
      const unit = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw * 0.999);
      const out = [];
      for (let k = Math.ceil(lo / step - 1e-6); k <= Math.floor(hi / step + 1e-6); k++)
        out.push(Number((k * step).toPrecision(12)));
      return out;
    }
    const kept = [];
    const tens = [];
    for (let k = Math.floor(Math.log10(bend)); k <= Math.ceil(Math.log10(hi)); k++) tens.push(k);
    for (const m of [0, 1, 2, 5])
      for (const k of m ? tens : [0]) {
        const v = Number((m * 10 ** k).toPrecision(6));
        if (v >= lo && v <= hi && kept.every((o) => Math.abs(at(v) - at(o)) >= gap)) kept.push(v);
      }
    return kept.sort((a, b) => a - b);
  };
  return at;
}
// Ends that hold all means and, as far as they do not dwarf them, the intervals.
function ends(estimates, zero = false) {
  const means = estimates.map((e) => e[0]);
  let lo = Math.min(...means), hi = Math.max(...means);
  const room = hi - lo || Math.abs(hi) || 1;
  for (const e of estimates)
    if (e[1] !== null) {
      lo = Math.min(lo, Math.max(e[1], Math.min(...means) - 0.6 * room));
      hi = Math.max(hi, Math.min(e[2], Math.max(...means) + 0.6 * room));
    }
  const span = hi - lo || Math.abs(hi) || 1;
  const positive = means.filter((m) => m > 0);
  if (zero && Math.min(...means) >= 0) {
    const bent = positive.length > 1 && Math.max(...positive) / Math.min(...positive) > 12;
    const bend = bent ? Math.max(Math.min(...positive), Math.max(...positive) * 1e-3) : null;
    return [Math.min(0, lo), hi + (bent ? 0.15 : 0.06) * span, bent && lo >= 0 ? bend : null];
  }
  return [lo - 0.06 * span, hi + 0.06 * span, null];
}
function axes(svg, frame, x, y, xs, ys, names) {
  const low = frame.y + frame.h;
  for (const [v, text] of ys) {
    el("line", { class: "grid", x1: frame.x, x2: frame.x + frame.w, y1: y(v), y2: y(v) }, svg);
    el("text", { class: "tick", x: frame.x - 7, y: y(v) + 4, "text-anchor": "end" }, svg, text);
  }
  el("line", { class: "axis", x1: frame.x, x2: frame.x + frame.w, y1: low, y2: low }, svg);
  for (const [v, text] of xs) {
    el("line", { class: "axis", x1: x(v), x2: x(v), y1: low, y2: low + 4 }, svg);
    el("text", { class: "tick", x: x(v), y: low + 17, "text-anchor": "middle" }, svg, text);
  }
  el("text", { class: "name", x: 2, y: 13 }, svg, names[1]);
  el("text", { class: "name", x: frame.x + frame.w, y: low + 37, "text-anchor": "end" }, svg,
    names[0]);
}
const tickText = (v) => String(Number(v.toPrecision(6))).replace("-", "−");

// One shape a series, so that colour is not the only difference; hollow where data is stored.
function mark(parent, cell, x, y, r) {
  const shape = cell.plain ? 0 : cell.colour % 5;
  const c = colour(tone(cell)), ground = colour("--card");
  const paint = cell.stores
    ? { fill: ground, stroke: c, "stroke-width": 2 }
    : { fill: c, stroke: ground, "stroke-width": 1.2 };
  if (shape === 0) return el("circle", { cx: x, cy: y, r, ...paint }, parent);
  const k = [0, 0.88, 1.25, 1.15, 1.15][shape] * r;
  const points = {
    1: [[-k, -k], [k, -k], [k, k], [-k, k]],
    2: [[0, -k], [k, 0], [0, k], [-k, 0]],
    3: [[0, -k], [k, 0.8 * k], [-k, 0.8 * k]],
    4: [[0, k], [k, -0.8 * k], [-k, -0.8 * k]],
  }[shape].map(([dx, dy]) => `${(x + dx).toFixed(1)},${(y + dy).toFixed(1)}`).join(" ");
  return el("polygon", { points, ...paint }, parent);
}
