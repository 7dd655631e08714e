// Equations wider than their column are set smaller, down to SMALLEST; what is still too wide scrolls. Long tables show their first rows.
const SMALLEST = 0.62, ROWS = 5, LONG = 14;

function fitEquations() {
  for (const box of document.querySelectorAll("div.math mjx-container")) {
    box.dataset.size ||= parseFloat(box.style.fontSize) || 100;
    box.style.fontSize = `${box.dataset.size}%`;
    const ratio = box.clientWidth / box.scrollWidth;
    if (ratio < 1) box.style.fontSize = `${box.dataset.size * Math.max(SMALLEST, 0.98 * ratio)}%`;
  }
}

function foldTables() {
  for (const table of document.querySelectorAll("main table")) {
    const rows = [...table.querySelectorAll("tbody > tr")];
    if (rows.length <= LONG || table.closest(".planner, .genindextable, .indextable")) continue;
    const button = Object.assign(document.createElement("button"), { className: "more", textContent: `Show all ${rows.length} rows` });
    const fold = (hidden) => rows.slice(ROWS).forEach((row) => (row.hidden = hidden));
    button.onclick = () => { fold(false); button.remove(); };
    fold(true);
    (table.closest(".pst-scrollable-table-container") || table).after(button);
  }
}

window.addEventListener("load", () => {
  foldTables();
  window.MathJax?.startup?.promise.then(fitEquations);
  window.addEventListener("resize", fitEquations);
  // a formula in a closed block has no width before it is opened
  document.addEventListener("toggle", fitEquations, true);
});
