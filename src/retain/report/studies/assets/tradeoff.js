// Learning against forgetting, and score against the share that is trained.
const value = (id, fallback) => byId(id)?.value || fallback;

function fill(select, keys, g) {
  const had = select.value, known = keys.filter((k) => g.has.includes(k));
  select.replaceChildren();
  for (const k of known) html("option", { value: k }, select, METRICS[k].name);
  if (known.includes(had)) select.value = had;
  select.parentElement.hidden = known.length < 2;
}

// Labels that fit: beside the mark, clear of marks and labels (`taken`) and if it can be of lines
// (`lines`); otherwise none. Each box is [x, y, w, h].
function place(wanted, taken, lines, frame) {
  const cut = (a, b) => a[0] < b[0] + b[2] && b[0] < a[0] + a[2] && a[1] < b[1] + b[3] &&
    b[1] < a[1] + a[3];
  const out = [];
  for (const { x, y, text, must } of wanted) {
    const w = 6.9 * text.length + 4, h = 15, spots = [];
    for (const far of must ? [9, 15, 24, 36] : [9, 15])
      for (const [a, b] of [[1, 0], [-1, 0], [0.75, -0.75], [0.75, 0.75], [-0.75, -0.75],
        [-0.75, 0.75], [0, -1], [0, 1]])
        spots.push([
          a > 0 ? x + a * far : a < 0 ? x + a * far - w : x - w / 2,
          b > 0 ? y + b * far : b < 0 ? y + b * far - h : y - h / 2, w, h,
        ]);
    const free = spots.filter((b) => b[0] >= frame.x && b[0] + w <= frame.x + frame.w &&
      b[1] >= frame.y - 4 && b[1] + h <= frame.y + frame.h && !taken.some((t) => cut(b, t)));
    const box = free.find((b) => !lines.some((t) => cut(b, t))) || free[0];
    if (!box) continue;
    taken.push(box);
    const near = [Math.min(Math.max(x, box[0]), box[0] + w), Math.min(Math.max(y, box[1]),
      box[1] + h)];
    out.push({ x: box[0] + w / 2, y: box[1] + 11.5, text,
      lead: Math.hypot(near[0] - x, near[1] - y) > 17 ? [x, y, ...near] : null });
  }
  return out;
}

function front(points, kx, ky) {
  const good = points.filter((p) => !p.cell.stores);
  const beats = (a, b) =>
    METRICS[kx].better * (a.e[0] - b.e[0]) >= 0 && METRICS[ky].better * (a.f[0] - b.f[0]) >= 0 &&
    (a.e[0] !== b.e[0] || a.f[0] !== b.f[0]);
  return good.filter((p) => !good.some((q) => beats(q, p))).sort((a, b) => a.e[0] - b.e[0]);
}

function whisker(svg, cell, x1, y1, x2, y2) {
  el("line", { class: "whisker", x1, y1, x2, y2, stroke: colour(tone(cell)) }, svg);
}

function scatter(plot, about, cells, kx, ky, options) {
  const all = group().cells.filter((c) => cells(c) && c.m[kx] && c.m[ky]);
  const points = all.filter((c) => !STATE.hidden.has(c.series))
    .map((cell) => ({ cell, e: cell.m[kx], f: cell.m[ky] }));
  if (!all.length) return null;
  const width = plot.clientWidth, height = Math.round(Math.min(460, Math.max(300, width * 0.5)));
  const svg = canvas(width, height, about);
  const frame = { x: 46, y: 30, w: width - 60, h: height - 76 };
  const ex = options.log ? logEnds(all.map((c) => c.m[kx][0])) : ends(all.map((c) => c.m[kx]));
  const ey = ends(all.map((c) => c.m[ky]), options.zero);
  const sx = options.log ? logScale(ex, frame) : scale(...ex.map((v) => v === null ? v :
    shown(kx, v)).slice(0, 2), frame.x + 6, frame.x + frame.w - 6);
  const sy = scale(shown(ky, ey[0]), shown(ky, ey[1]), frame.y + frame.h - 6, frame.y,
    ey[2] === null ? null : shown(ky, ey[2]));
  const X = (v) => sx(shown(kx, v)), Y = (v) => sy(shown(ky, v));
  const side = (k) => ({ 1: ", more is better", "-1": ", less is better", 0: "" })[METRICS[k].better];
  const title = (k) => `${METRICS[k].name} (${METRICS[k].unit})` + (width > 520 ? side(k) : "");
  axes(svg, frame, sx, sy, sx.ticks(58).map((v) => [v, tickText(v)]),
    sy.ticks(34).map((v) => [v, tickText(v)]), [title(kx), title(ky)]);
  const clip = `clip-${plot.parentElement.id}`;
  el("rect", { x: frame.x, y: frame.y - 4, width: frame.w, height: frame.h + 4 },
    el("clipPath", { id: clip }, el("defs", {}, svg)));
  const inside = el("g", { "clip-path": `url(#${clip})` }, svg);
  const best = options.front ? front(points, kx, ky) : [];
  // Where the front turns on its way from one point to the next, on the worse side of both.
  const corner = (a, b) => METRICS[kx].better < 0 ? [X(b.e[0]), Y(a.f[0])] :
    [X(a.e[0]), Y(b.f[0])];
  if (best.length > 1) {
    const steps = [];
    best.forEach((p, i) => {
      if (i) steps.push(corner(best[i - 1], p).join(","));
      steps.push(`${X(p.e[0])},${Y(p.f[0])}`);
    });
    el("polyline", { class: "front", points: steps.join(" ") }, inside);
  }
  for (const name of new Set(points.map((p) => p.cell.series))) {
    const line = points.filter((p) => p.cell.series === name);
    if (line.length > 1 && options.front)
      el("polyline", {
        class: "same", stroke: colour(tone(line[0].cell)),
        points: line.toSorted((a, b) => (a.cell.strength ?? 0) - (b.cell.strength ?? 0))
          .map((p) => `${X(p.e[0])},${Y(p.f[0])}`).join(" "),
      }, inside);
  }
  for (const { cell, e, f } of points) {
    if (e[1] !== null && !options.log) whisker(inside, cell, X(e[1]), Y(f[0]), X(e[2]), Y(f[0]));
    if (f[1] !== null) whisker(inside, cell, X(e[0]), Y(f[1]), X(e[0]), Y(f[2]));
  }
  const taken = [], lines = [];
  for (const { cell, e, f } of points) {
    const [x, y] = [X(e[0]), Y(f[0])], reach = cell.plain ? 11 : 7;
    taken.push([x - reach, y - reach, 2 * reach, 2 * reach]);
    if (e[1] !== null && !options.log) lines.push([X(e[1]), y - 1, X(e[2]) - X(e[1]), 2]);
    if (f[1] !== null) lines.push([x - 1, Y(f[2]), 2, Y(f[1]) - Y(f[2])]);
    const g = el("g", {}, svg);
    el("circle", { class: "hit", cx: x, cy: y, r: 13 }, g);
    if (cell.plain) el("circle", { class: "ring", cx: x, cy: y, r: 10,
      style: `stroke: ${colour("--lora")}` }, g);
    mark(g, cell, x, y, 6);
    spot(g, `${cell.name}${cell.stores ? " (stores data)" : ""}\n${METRICS[kx].name}: ` +
      `${sayAll(kx, e)}\n${METRICS[ky].name}: ${sayAll(ky, f)}\n${seeds(cell.n)}`);
  }
  const first = (p) => (p.cell.plain ? 0 : best.includes(p) || options.all ? 1 : 2);
  const wanted = points.toSorted((a, b) => first(a) - first(b))
    .filter((p) => width > 560 || first(p) < 2)
    .map((p) => ({ x: X(p.e[0]), y: Y(p.f[0]), text: p.cell.name, must: first(p) < 2 }));
  best.slice(1).forEach((p, i) => { // the steps of the front
    const from = best[i], [x, y] = corner(from, p), [ya, yb] = [Y(from.f[0]), Y(p.f[0])];
    lines.push([x - 1, Math.min(ya, yb), 2, Math.abs(ya - yb)],
      [X(from.e[0]), y - 1, X(p.e[0]) - X(from.e[0]), 2]);
  });
  for (const label of place(wanted, taken, lines, frame)) {
    if (label.lead) {
      const [x1, y1, x2, y2] = label.lead;
      svg.insertBefore(el("line", { class: "lead", x1, y1, x2, y2 }), inside);
    }
    el("text", { class: "label", x: label.x, y: label.y, "text-anchor": "middle" }, svg,
      label.text);
  }
  rove(svg);
  const three = (k) => [k, `${k}_low`, `${k}_high`];
  return {
    svg,
    head: ["name", "adapter", "method", "strength", "stores_data", "seeds", ...three(kx),
      ...three(ky)],
    rows: all.map((c) => [c.name, c.adapter, c.method, c.strength, c.stores, c.n,
      ...c.m[kx].slice(0, 3), ...c.m[ky].slice(0, 3)]),
  };
}

function logEnds(values) {
  const logs = values.filter((v) => v > 0).map((v) => Math.log10(100 * v));
  return [Math.floor(Math.min(...logs) * 2 - 0.2) / 2, Math.min(2.12,
    Math.ceil(Math.max(...logs) * 2 + 0.2) / 2)];
}
function logScale([lo, hi], frame) {
  const linear = scale(lo, hi, frame.x + 6, frame.x + frame.w - 6);
  const at = (v) => linear(Math.log10(v));
  at.ticks = (gap) => {
    const kept = [];
    for (const m of [1, 3])
      for (let k = Math.floor(lo); k <= Math.ceil(hi); k++) {
        const v = Number((m * 10 ** k).toPrecision(3)), l = Math.log10(v);
        if (l >= lo && l <= hi && kept.every((o) => Math.abs(at(o) - at(v)) >= gap)) kept.push(v);
      }
    return kept.sort((a, b) => a - b);
  };
  return at;
}

figure("tradeoff", (plot) => {
  const g = group();
  fill(byId("tradeoff-x"), [...new Set([g.learned, "learning", "average", "loss"])], g);
  fill(byId("tradeoff-y"), ["forgetting", "kl", "perplexity", "flips"], g);
  const kx = value("tradeoff-x"), ky = value("tradeoff-y");
  if (!kx || !ky) return null;
  return scatter(plot, `${METRICS[kx].name} against ${METRICS[ky].name}`, () => true, kx, ky,
    { front: true, zero: ky !== "perplexity" });
});
figure("share", (plot) => {
  const g = group(), bare = g.cells.filter((c) => !c.held && c.m.share && c.m.share[0] > 0);
  if (bare.length < 2) return null;
  fill(byId("share-y"), ["average", "learning", "kl", "forgetting"], g);
  const ky = value("share-y");
  if (!ky) return null;
  return scatter(plot, `${METRICS[ky].name} against the share of parameters that is trained`,
    (c) => !c.held && c.m.share?.[0] > 0, "share", ky, { log: true, all: true });
}, false);
