"use strict";
// ---- The table of classes: click a header to sort, type to filter --------------------------
const table = document.getElementById("classes");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
function key(row, column) {
  const cell = row.cells[column];
  const value = cell.dataset.value;
  if (value === undefined) return cell.textContent;
  return value === "" ? null : Number(value);
}
heads.forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    const textual = body.rows.length > 0 && typeof key(body.rows[0], column) === "string";
    const up = now === null ? textual : now === "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // no number: last
      const order = typeof a === "string" ? a.localeCompare(b) : a - b;
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  });
});
document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const row of body.rows) {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  }
});

// ---- One class in the charts of curves and scores -------------------------------------------
const select = document.getElementById("pick");
if (select) {
  const drawn = JSON.parse(document.getElementById("curves").textContent);
  const show = () => {
    const chosen = drawn[Number(select.value)];
    chosen.curves.forEach((d, i) => document.getElementById(`curve${i}`).setAttribute("d", d));
    document.getElementById("negatives").setAttribute("d", chosen.negatives);
    document.getElementById("positives").setAttribute("d", chosen.positives);
    const cut = document.getElementById("cut");
    cut.classList.toggle("hidden", chosen.cut === null);
    if (chosen.cut !== null) cut.setAttribute("d", chosen.cut);
    document.getElementById("picked").textContent = chosen.words;
  };
  select.addEventListener("change", show);
  show(); // a browser may keep the choice when the page is loaded again
}
