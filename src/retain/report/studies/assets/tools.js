// Tool tips, keyboard, legend and downloads.
const TIP = byId("tip");
function showTip(node) {
  const box = node.getBoundingClientRect();
  TIP.replaceChildren();
  node.tip.split("\n").forEach((line, i) => html(i ? "span" : "b", {}, TIP, line));
  TIP.hidden = false;
  TIP.of = node;
  const w = TIP.offsetWidth, h = TIP.offsetHeight, wide = document.documentElement.clientWidth;
  let top = box.top - h - 8;
  if (top < 4) top = box.bottom + 8;
  const left = Math.min(Math.max(4, box.left + box.width / 2 - w / 2), wide - w - 4);
  TIP.style.left = `${left}px`;
  TIP.style.top = `${top}px`;
}
const hideTip = () => { TIP.hidden = true; TIP.of = null; };
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("scroll", () => { // the keyboard may scroll to the mark it goes to
  const node = document.activeElement;
  if (!TIP.hidden && node.tip) showTip(node);
  else hideTip();
}, { passive: true, capture: true });
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest?.(".spot")) hideTip();
});

// Makes a node tell `text` to pointer, touch, keyboard and screen reader.
function spot(node, text) {
  node.tip = text;
  node.classList.add("spot");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", text.replaceAll("\n", ", "));
  node.setAttribute("tabindex", "-1");
  node.addEventListener("pointerenter", () => showTip(node));
  node.addEventListener("pointerleave", (event) => {
    const kept = TIP.of !== node || document.activeElement === node;
    if (event.pointerType === "mouse" && !kept) hideTip();
  });
  node.addEventListener("click", () => { node.focus({ preventScroll: true }); showTip(node); });
  node.addEventListener("focus", () => showTip(node));
  node.addEventListener("blur", () => { if (TIP.of === node) hideTip(); });
  return node;
}
// One stop of the tab key a figure; the arrow keys go from mark to mark, `across` a row.
function rove(svg, across = 0) {
  const nodes = [...svg.querySelectorAll(".spot")];
  if (nodes.length) nodes[0].setAttribute("tabindex", "0");
  svg.addEventListener("keydown", (event) => {
    const at = nodes.indexOf(document.activeElement);
    const step = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: across || 1, ArrowUp: -(across || 1),
    }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    const next = nodes[Math.min(nodes.length - 1, Math.max(0, at + step))];
    nodes[at].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}

function legend(node) {
  node.replaceChildren();
  const g = group(), seen = new Set();
  for (const cell of g.cells) {
    if (seen.has(cell.series)) continue;
    seen.add(cell.series);
    const on = !STATE.hidden.has(cell.series);
    const button = html("button", { type: "button", "aria-pressed": String(on) }, node);
    const icon = el("svg", { width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" },
      button);
    mark(icon, cell, 8, 8, 5);
    html("span", {}, button, cell.series + (cell.stores ? " (stores data)" : ""));
    button.addEventListener("click", () => {
      if (!STATE.hidden.delete(cell.series)) STATE.hidden.add(cell.series);
      const place = [...node.children].indexOf(button);
      redraw();
      node.children[place].focus();
    });
  }
}

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = html("a", { href: url, download: name }, document.body);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
function csv(head, rows) {
  const cell = (v) => {
    const text = v === null || v === undefined ? "" : String(v);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}
// The drawing with its styles written out, so that it looks the same outside the page.
function standalone(svg) {
  const copy = svg.cloneNode(true);
  const keep = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size",
    "font-weight", "font-family", "text-anchor", "paint-order", "stroke-linejoin"];
  const from = [svg, ...svg.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of keep) to[i].setAttribute(name, style.getPropertyValue(name));
    if (node.tip) el("title", {}, to[i], node.tip);
    for (const name of ["class", "tabindex", "role"]) to[i].removeAttribute(name);
  });
  for (const node of to) if (node.getAttribute("fill") === "rgba(0, 0, 0, 0)") node.remove();
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.prepend(el("rect", { width: "100%", height: "100%", fill: colour("--card") }));
  return new XMLSerializer().serializeToString(copy) + "\n";
}
function figure(id, draw, withLegend = true) {
  const node = byId(id);
  if (!node) return;
  const get = node.querySelector(".get"), made = {};
  const name = (end) => `${id}-${group().id}.${end}`;
  const button = (text, act) => {
    html("button", { type: "button" }, get, text).addEventListener("click", act);
  };
  button("Numbers (CSV)", () => save(name("csv"), "text/csv", csv(made.head, made.rows)));
  button("Picture (SVG)", () => save(name("svg"), "image/svg+xml", standalone(made.svg)));
  FIGURES.push(() => {
    const plot = node.querySelector(".plot");
    node.hidden = false; // a hidden plot has no width
    const out = draw(plot);
    node.hidden = out === null;
    plot.replaceChildren(...(out ? [out.svg] : []));
    if (out) Object.assign(made, out);
    const box = node.querySelector(".legend");
    if (box && withLegend) legend(box);
  });
}
