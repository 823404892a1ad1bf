// Sorting, the choice of a group, and drawing again when something changes.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], start = [...body.rows];
  table.querySelectorAll("thead th button").forEach((button) => {
    const head = button.closest("th"), at = head.cellIndex;
    button.addEventListener("click", () => {
      const had = head.getAttribute("aria-sort");
      const first = head.dataset.first || "ascending";
      const next = had === "none" ? first : had === first
        ? (first === "ascending" ? "descending" : "ascending") : "none";
      for (const th of table.querySelectorAll("thead th")) th.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const key = (row) => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
      const rows = next === "none" ? start : start.toSorted((a, b) => {
        const [u, v] = [key(a), key(b)];
        if (u === "" || v === "") return (u === "") - (v === "");
        return sign * (at ? Number(u) - Number(v) : u.localeCompare(v));
      });
      body.append(...rows);
    });
  });
}
function redraw() {
  hideTip();
  const sections = document.querySelectorAll("section.figures");
  for (const section of sections) section.hidden = false;
  for (const draw of FIGURES) draw();
  legend(byId("legend-sequence"));
  for (const node of document.querySelectorAll("[data-group]"))
    node.hidden = node.dataset.group !== STATE.group;
  for (const section of sections)
    section.hidden = [...section.querySelectorAll("figure")].every((f) => f.hidden);
}
for (const select of document.querySelectorAll("select"))
  select.addEventListener("change", () => {
    if (select.id === "group") {
      STATE.group = select.value;
      STATE.hidden.clear();
      for (const other of document.querySelectorAll("select.of-group")) other.value = "";
    }
    redraw();
  });
let drawn = 0;
new ResizeObserver(() => {
  const width = document.documentElement.clientWidth;
  if (width !== drawn) { drawn = width; redraw(); }
}).observe(document.documentElement);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.documentElement.classList.add("ready");
redraw();
