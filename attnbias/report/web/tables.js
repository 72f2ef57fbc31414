// Tables that sort by a click on the head of a column, and the first drawing of the page.
function sortable(table) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const keyOf = (cell) => {
    const value = cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent.trim();
    const found = value === "" ? NaN : Number(value);
    return Number.isNaN(found) ? (cell.dataset.value === "" ? -Infinity : value.toLowerCase()) : found;
  };
  heads.forEach((cell, n) => {
    const button = cell.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "descending";
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", down ? "ascending" : "descending");
      const rows = Array.from(table.tBodies[0].rows).map((row) => [keyOf(row.cells[n]), row]);
      const sign = down ? 1 : -1;
      rows.sort((a, b) => sign * (typeof a[0] === typeof b[0] ? (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0) : typeof a[0] === "number" ? 1 : -1));
      table.tBodies[0].append(...rows.map((row) => row[1]));
    });
  });
}
document.querySelectorAll("table.sortable").forEach(sortable);

const exact = (x) => (Number.isNaN(x) ? "" : String(Number(x.toPrecision(7))));
const headsTable = byId("heads-table");
const ROWS_AT_ONCE = 600;
function fillHeads(all) {
  const stat = chosen(), body = headsTable.tBodies[0], cells = run.cells(stat);
  headsTable.caption.textContent = stat.title + towerOf(stat.tower) + ". " + stat.meaning + " Unit: " + stat.unit + ".";
  const shown = all ? cells : cells.slice().sort((a, b) => b.values - a.values).slice(0, ROWS_AT_ONCE).sort((a, b) => a.layer - b.layer || a.head - b.head);
  body.replaceChildren(...shown.map((c) => {
    const row = make("tr", {}, make("td", {}, String(c.layer)), make("td", {}, String(c.head)));
    ["values", "low", "high", "shuffled", "random", "even"].forEach((kind) =>
      row.append(make("td", { "data-value": exact(c[kind]) }, Number.isNaN(c[kind]) ? "" : Math.abs(c[kind]) < 1e-6 ? "0" : String(Number(c[kind].toPrecision(4))))));
    return row;
  }));
  headsTable.tHead.querySelectorAll("[aria-sort]").forEach((one) => one.removeAttribute("aria-sort"));
  const more = byId("heads-more");
  more.hidden = shown.length === cells.length;
  more.textContent = "Show all " + cells.length + " heads (the " + shown.length + " highest are shown)";
}
headsTable.addEventListener("refill", () => fillHeads(false));
byId("heads-more").addEventListener("click", () => fillHeads(true));
fillHeads(false);

// First what the first screen shows, then the head.
ranked().then(drawMaps).then(drawHead).then(() => {
  document.documentElement.setAttribute("data-drawn", String(drawn.size));
  document.documentElement.setAttribute("data-seconds", (performance.now() / 1000).toFixed(3));
});
