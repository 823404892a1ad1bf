// Along the sequence of tasks: mean score so far, KL, and the score of each task.
function chosen(g) {
  const how = value("strength", "best"), kept = [];
  const lines = new Map();
  for (const c of visible(g)) {
    if (!lines.has(c.series)) lines.set(c.series, []);
    lines.get(c.series).push(c);
  }
  for (const cells of lines.values()) {
    if (how === "all") { kept.push(...cells); continue; }
    const known = cells.filter((c) => c.m.average || c.m.kl);
    const rank = { best: (c) => c.m.average?.[0] ?? -Infinity, weak: (c) => -(c.strength ?? 0),
      strong: (c) => c.strength ?? 0 }[how];
    if (known.length) kept.push(known.reduce((a, b) => (rank(b) > rank(a) ? b : a)));
  }
  return kept;
}

// Draws one panel: a line a cell through its estimates, `from` the place of the first on x.
function panel(svg, frame, g, cells, pick, from, key, names, options = {}) {
  const known = cells.flatMap((c) => pick(c).filter((e) => e));
  const limits = options.limits || ends(known, options.zero);
  const last = g.tasks.length, first = from;
  const sx = scale(first, Math.max(last, first + 1), frame.x + 8, frame.x + frame.w - 8);
  const sy = scale(shown(key, limits[0]), shown(key, limits[1]), frame.y + frame.h - 4, frame.y,
    limits[2] == null ? null : shown(key, limits[2]));
  const every = Math.ceil((last - first + 1) / Math.max(2, Math.floor(frame.w / 30)));
  const xs = [];
  for (let i = last; i >= first; i -= every) xs.push([i, i === 0 ? "0" : String(i)]);
  const gap = frame.h < 150 ? 26 : 34;
  axes(svg, frame, sx, sy, xs, sy.ticks(gap).map((v) => [v, tickText(v)]), names);
  if (options.learned)
    el("line", { class: "learned", x1: sx(options.learned), x2: sx(options.learned), y1: frame.y,
      y2: frame.y + frame.h }, svg);
  const inside = el("g", { class: "lines" }, svg);
  for (const cell of cells) {
    const dots = pick(cell).map((e, i) => e && { e, at: from + i, x: sx(from + i),
      y: sy(shown(key, e[0])) }).filter((d) => d);
    if (!dots.length) continue;
    const line = el("g", { class: "line" }, inside);
    const stroke = colour(tone(cell));
    for (const d of dots)
      if (d.e[1] !== null) {
        const clamp = (v) => Math.min(frame.y + frame.h, Math.max(frame.y - 4, sy(shown(key, v))));
        el("line", { class: "whisker quiet", x1: d.x, x2: d.x, y1: clamp(d.e[1]),
          y2: clamp(d.e[2]), stroke }, line);
      }
    el("polyline", { class: cell.stores ? "run stored" : cell.plain ? "run heavy" : "run",
      style: `stroke: ${stroke}`,
      points: dots.map((d) => `${d.x.toFixed(1)},${d.y.toFixed(1)}`).join(" ") }, line);
    for (const d of dots) {
      const node = el("g", {}, line);
      el("circle", { class: "hit", cx: d.x, cy: d.y, r: 11 }, node);
      mark(node, cell, d.x, d.y, options.small ? 2.6 : 4);
      const when = d.at === 0 ? "before learning" : `after ${g.tasks[d.at - 1]} (task ${d.at})`;
      spot(node, `${cell.name}\n${options.what || METRICS[key].name}: ${sayAll(key, d.e)}\n` +
        `${when}, ${seeds(d.e[3])}`);
    }
  }
}
function along(what, key, pick, zero) {
  return (plot) => {
    const g = group();
    if (g.pooled || g.tasks.length < 2) return null;
    const cells = chosen(g).filter((c) => pick(c).some((e) => e));
    if (!g.cells.some((c) => pick(c).some((e) => e))) return null;
    const width = plot.clientWidth, height = 300;
    const svg = canvas(width, height, what);
    const frame = { x: 46, y: 30, w: width - 54, h: height - 76 };
    const names = ["tasks learned", METRICS[key].unit];
    if (cells.length) panel(svg, frame, g, cells, pick, 1, key, names, { zero, what });
    rove(svg);
    const rows = g.cells.flatMap((c) => pick(c).map((e, i) => e && [c.name, i + 1, g.tasks[i],
      ...e]).filter((row) => row));
    return { svg, head: ["name", "tasks_learned", "after", "mean", "low", "high", "seeds"], rows };
  };
}
figure("seen", along("Mean score of the tasks so far", "average", (c) => c.seen, false), false);
figure("kl", along("KL to the base", "kl", (c) => c.kl, true), false);

figure("tasks", (plot) => {
  const g = group();
  if (g.pooled || g.tasks.length < 2 || !g.cells.some((c) => c.matrix.length)) return null;
  const cells = chosen(g).filter((c) => c.matrix.length);
  const width = plot.clientWidth, count = g.tasks.length;
  const columns = Math.min(count, Math.max(1, Math.floor(width / 250)));
  const w = width / columns, h = 215, rows = Math.ceil(count / columns);
  const svg = canvas(width, rows * h - 6, "Score of each task along the sequence");
  const pick = (j) => (c) => c.matrix.map((row) => row[j]);
  const range = (j) => {
    const means = cells.flatMap((c) => pick(j)(c)).filter((e) => e).map((e) => e[0]);
    return means.length ? [Math.min(...means), Math.max(...means)] : [0, 0];
  };
  const span = 1.12 * Math.max(0.02, ...g.tasks.map((_, j) => range(j)[1] - range(j)[0]));
  const limits = (j) => {
    const low = (range(j)[0] + range(j)[1] - span) / 2;
    const bottom = range(j)[0] < 0 ? low : Math.max(0, low);  // no axis below a score of 0
    return [bottom, bottom + span];
  };
  g.tasks.forEach((task, j) => {
    const left = (j % columns) * w, top = Math.floor(j / columns) * h;
    const box = el("g", { transform: `translate(${left.toFixed(1)} ${top})` }, svg);
    const frame = { x: 34, y: 28, w: w - 44, h: h - 60 };
    panel(box, frame, g, cells, pick(j), 0, "average", ["", `${j + 1}. ${task}`],
      { limits: limits(j), learned: j + 1, small: true, what: task });
  });
  rove(svg);
  const out = g.cells.flatMap((c) => c.matrix.flatMap((row, i) => row.map((e, j) => e && [c.name,
    i, g.tasks[j], ...e]).filter((r) => r)));
  return { svg, head: ["name", "tasks_learned", "task", "mean", "low", "high", "seeds"], rows: out };
});
