// Accuracy matrices as heat maps.
function mix(a, b, share) {
  const part = (text, i) => parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
  const rgb = [0, 1, 2].map((i) => Math.round(part(a, i) + share * (part(b, i) - part(a, i))));
  return `#${rgb.map((v) => v.toString(16).padStart(2, "0")).join("")}`;
}
function light(hex) {
  const part = [0, 1, 2].map((i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16) / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
}
function heat(which) {
  return (plot) => {
    const g = group(), known = g.cells.filter((c) => c.matrix.length);
    if (g.pooled || g.tasks.length < 2 || !known.length) return null;
    const select = byId(`matrix-${which}-cell`), had = select.value;
    select.replaceChildren();
    for (const c of known) html("option", { value: c.name }, select, c.name);
    const best = known.filter((c) => !c.plain && !c.stores)
      .reduce((a, b) => ((b.m.average?.[0] ?? 0) > (a?.m.average?.[0] ?? -1) ? b : a), null);
    const usual = which === "a" ? known.find((c) => c.plain) : best;
    const cell = known.find((c) => c.name === had) || usual || known[0];
    select.value = cell.name;

    plot.closest(".pair").classList.toggle("stacked", g.tasks.length > 7);
    const count = g.tasks.length, room = plot.clientWidth, most = room < 480 ? 11 : 15;
    const cut = (text) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
    const longest = 6.7 * Math.max(...g.tasks.map((t) => cut(t).length));
    const left = longest + 36;
    const flat = Math.min(96, (room - left - 2) / count), tilt = longest > flat - 4;
    const top = tilt ? 0.67 * longest + 20 : 26, overhang = tilt ? 0.74 * longest + 6 : 0;
    const fits = tilt ? (room - left - overhang) / (count - 0.5) : flat;
    const w = Math.max(count > 6 ? 31 : 40, Math.min(96, fits));
    const h = Math.min(40, Math.max(26, w * 0.62));
    const width = Math.max(left + w * count + Math.max(2, overhang - w / 2), 10);
    const svg = canvas(width, top + h * (count + 1) + 8, `Accuracy matrix of ${cell.name}`);
    svg.classList.add("fixed");
    const all = known.flatMap((c) => c.matrix.flat()).filter((e) => e).map((e) => e[0]);
    const lo = Math.min(...all), hi = Math.max(...all);
    const [cold, hot] = [colour("--cold"), colour("--hot")];
    g.tasks.forEach((task, j) => {
      const x = left + w * (j + 0.5), y = top - 8;
      const name = cut(task);
      el("text", tilt
        ? { class: "tick", transform: `translate(${x} ${y}) rotate(-42)` }
        : { class: "tick", x, y, "text-anchor": "middle" }, svg, name);
    });
    cell.matrix.forEach((row, i) => {
      const y = top + h * i + (i ? 6 : 0);
      const task = i ? g.tasks[i - 1] : "";
      const name = i ? cut(task) : "before";
      el("text", { class: i ? "tick" : "tick before", x: left - 8, y: y + h / 2 + 4,
        "text-anchor": "end" }, svg, i ? `${i}. ${name}` : name);
      row.forEach((e, j) => {
        const x = left + w * j, node = el("g", {}, svg);
        const paint = e ? mix(cold, hot, (e[0] - lo) / (hi - lo || 1)) : colour("--head");
        el("rect", { x: x + 1, y: y + 1, width: w - 2, height: h - 2, rx: 3, fill: paint }, node);
        const dark = light(paint) > 0.2;
        if (i === j + 1)
          el("rect", { class: "diagonal", x: x + 2, y: y + 2, width: w - 4, height: h - 4, rx: 2,
            stroke: dark ? "#10151c" : "#ffffff" }, node);
        el("text", { class: "score", x: x + w / 2, y: y + h / 2 + 4, "text-anchor": "middle",
          style: `fill: ${e ? (dark ? "#10151c" : "#ffffff") : colour("--muted")}` }, node,
          e ? (100 * e[0]).toFixed(w < 40 ? 0 : 1) : "—");
        const learned = cell.matrix[j + 1]?.[j];
        const change = e && learned && i > j + 1
          ? `\n${say("average", e[0] - learned[0])} points since it was learned` : "";
        spot(node, `${g.tasks[j]}: ${sayAll("average", e)}\n` +
          `${i ? `after ${task} (task ${i})` : "before learning"}${change}`);
      });
    });
    rove(svg, count);
    const rows = cell.matrix.flatMap((row, i) => row.map((e, j) => [cell.name, i, i ?
      g.tasks[i - 1] : "", g.tasks[j], ...(e || [null, null, null, 0])]));
    return { svg, rows, head: ["name", "tasks_learned", "after", "task", "mean", "low", "high",
      "seeds"] };
  };
}
figure("matrix-a", heat("a"), false);
figure("matrix-b", heat("b"), false);
