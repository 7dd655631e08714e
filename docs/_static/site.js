// Equations and tables wider than their column are set smaller, down to SMALLEST; what is still too wide scrolls. Long tables show their first rows.
const SMALLEST = 0.5, ROWS = 5, LONG = 14;

function fit() {
  for (const box of document.querySelectorAll("div.math mjx-container, main table.dataframe")) {
    const room = box.matches("table") ? box.parentElement : box;
    box.dataset.size ||= box.matches("table") ? 100 : parseFloat(box.style.fontSize) || 100;
    box.style.fontSize = box.matches("table") ? "" : `${box.dataset.size}%`;
    const ratio = room.clientWidth / room.scrollWidth;
    if (ratio < 1) box.style.fontSize = box.matches("table") ? `${0.8 * Math.max(0.8, 0.97 * ratio)}rem` : `${box.dataset.size * Math.max(SMALLEST, 0.96 * ratio)}%`;
  }
}

function foldTables() {
  for (const table of document.querySelectorAll("main table")) {
    const rows = [...table.querySelectorAll("tbody > tr")];
    if (rows.length <= LONG || table.closest(".planner, .genindextable, .indextable") || table.querySelector(".verdict")) continue;
    const button = Object.assign(document.createElement("button"), { className: "more", textContent: `Show all ${rows.length} rows` });
    const fold = (hidden) => rows.slice(ROWS).forEach((row) => (row.hidden = hidden));
    button.onclick = () => { fold(false); button.remove(); };
    fold(true);
    (table.closest(".pst-scrollable-table-container") || table).after(button);
  }
}

window.addEventListener("load", () => {
  foldTables();
  fit();
  window.MathJax?.startup?.promise.then(fit);
  window.addEventListener("resize", fit);
  // a formula in a closed block has no width before it is opened
  document.addEventListener("toggle", fit, true);
});
