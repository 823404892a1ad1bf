// Puts the theme's colours into the figures, draws those that can be seen, and sorts tables.
(() => {
  "use strict";
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const box of document.querySelectorAll(".plot")) {
      if (box.dataset.drawn || !box.offsetWidth) continue;
      box.dataset.drawn = "yes";
      const spec = box.nextElementSibling.textContent.replace(
        /var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
      vegaEmbed(box, JSON.parse(spec), {
        renderer: "svg", ast: true, downloadFileName: box.dataset.name,
        actions: { export: true, source: false, compiled: false, editor: false },
      });

    }
  };
  const again = () => {
    for (const box of document.querySelectorAll(".plot")) delete box.dataset.drawn;
    draw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  document.addEventListener("toggle", draw, true);
  draw();

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0], start = [...body.rows], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => {
      const order = at ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const next = order[(order.indexOf(head.ariaSort) + 1) % 3];
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = next;
      const sign = next === "descending" ? -1 : 1;
      const key = (row) => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
      body.append(...(next === "none" ? start : start.toSorted((a, b) => {
        const [u, v] = [key(a), key(b)];
        if (u === "" || v === "") return (u === "") - (v === "");
        return sign * (at ? u - v : u.localeCompare(v));
      })));
    }));
  }
})();
