// Equations and tables wider than their column are set smaller, down to SMALLEST; what is still too wide scrolls. Long tables show their best rows, or their first where none is best.
const SMALLEST = 0.5, ROWS = 5, LONG = 14;
const BEST = { loss: ["of lowest loss", (x) => x], r: ["of strongest correlation r", (x) => -Math.abs(x)], r2: ["of highest r2", (x) => -x] };  // column -> what its best rows are, and a number that is lowest there

function fit() {
  for (const box of document.querySelectorAll("div.math mjx-container, main table.numbers")) {
    const room = box.matches("table") ? box.parentElement : box;
    box.dataset.size ||= box.matches("table") ? 100 : parseFloat(box.style.fontSize) || 100;
    box.style.fontSize = box.matches("table") ? "" : `${box.dataset.size}%`;
    const ratio = room.clientWidth / room.scrollWidth;
    if (ratio < 1) box.style.fontSize = box.matches("table") ? `${0.8 * Math.max(0.8, 0.97 * ratio)}rem` : `${box.dataset.size * Math.max(SMALLEST, 0.96 * ratio)}%`;
  }
}

// On a phone short cells keep to one line, and cells with many words a width at which they can be read: the table scrolls.
function markWords() {
  for (const cell of document.querySelectorAll("main table:not(.numbers, .genindextable, .indextable) tbody td")) {
    const length = cell.textContent.trim().length;
    if (length > 24) cell.classList.add("words");
    if (length > 70) cell.classList.add("long");
  }
}

// The rows that a folded table keeps, and words for them.
function best(table, rows) {
  const names = [...table.querySelectorAll("thead tr:last-child > *")].map((cell) => cell.textContent.trim());
  const column = table.querySelector("tbody [rowspan]") ? -1 : names.findIndex((name) => name in BEST);
  if (column < 0) return [rows.slice(0, ROWS), "first"];
  const [words, rank] = BEST[names[column]];
  const number = (row) => parseFloat(row.cells[column].textContent.replaceAll(",", "").replace("−", "-"));
  const value = (row) => (Number.isNaN(number(row)) ? Infinity : rank(number(row)));
  return [rows.toSorted((a, b) => value(a) - value(b)).slice(0, ROWS), words];
}

function foldTables() {
  for (const table of document.querySelectorAll("main table")) {
    const rows = [...table.querySelectorAll("tbody > tr")];
    if (rows.length <= LONG || table.closest(".planner, .genindextable, .indextable") || table.querySelector(".verdict")) continue;
    const [kept, words] = best(table, rows);
    const label = words == "first" ? `The first ${ROWS} rows` : `The ${ROWS} rows ${words}`;
    const button = Object.assign(document.createElement("button"), { className: "more", textContent: `${label}; show all ${rows.length}` });
    const fold = (hidden) => rows.forEach((row) => (row.hidden = hidden && !kept.includes(row)));
    button.onclick = () => { fold(false); button.remove(); };
    fold(true);
    (table.closest(".pst-scrollable-table-container") || table).after(button);
  }
}

window.addEventListener("load", () => {
  markWords();
  foldTables();
  fit();
  window.MathJax?.startup?.promise.then(fit);
  window.addEventListener("resize", fit);
  // a formula in a closed block has no width before it is opened
  document.addEventListener("toggle", fit, true);
});
