/* The page "Which context length?": shows answers that `ctxnb advise` computed beforehand on a grid of data sizes.

   A page holds <div class="planner"> with a <script type="application/json"> in it: title -> {unit, simulated, per_token, measured, cells, answers}. */
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg", FACTORS = { k: 1e3, m: 1e6, g: 1e9, b: 1e9 };
  const tokens = (text) => {
    const found = /^\s*([\d.]+(?:e[+-]?\d+)?)\s*([kmgb]?)\s*$/i.exec(text.replaceAll(",", ""));
    return found ? Number(found[1]) * (FACTORS[found[2].toLowerCase()] ?? 1) : NaN;
  };

  function draw(tag, attributes, text) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function plot(svg, pilots, answer) {
    const W = 640, H = 340, box = { left: 72, right: 16, top: 14, bottom: 46 };
    const sizes = [...new Set(pilots.cells.map((c) => c[0]))], curve = answer.curve ?? [];
    const nearest = sizes.reduce((a, b) => (Math.abs(Math.log(b / answer.D)) < Math.abs(Math.log(a / answer.D)) ? b : a));
    const dots = pilots.cells.filter((c) => c[0] === nearest).map((c) => [c[1], c[2]]), all = [...curve, ...dots];
    const first = Math.min(...all.map((p) => p[0])), last = Math.max(...all.map((p) => p[0]));
    const low = Math.min(...all.map((p) => p[1])), high = Math.max(...all.map((p) => p[1]));
    const x = (l) => box.left + (Math.log(l / first) / Math.log(last / first)) * (W - box.left - box.right);
    const y = (v) => H - box.bottom - ((v - low) / (high - low)) * (H - box.top - box.bottom);
    svg.replaceChildren(draw("title", {}, `Loss against context length: pilots at ${nearest.toLocaleString("en")} and, where a law holds, its prediction`));
    if (answer.interval) {
      const ends = answer.interval.map((l) => x(Math.min(last, Math.max(first, l ?? last))));
      svg.append(draw("rect", { class: "strip", x: ends[0], y: box.top, width: Math.max(1, ends[1] - ends[0]), height: H - box.top - box.bottom }));
    }
    for (let k = Math.ceil(Math.log2(first)); k <= Math.log2(last); k++) {
      svg.append(draw("line", { class: "grid", x1: x(2 ** k), x2: x(2 ** k), y1: box.top, y2: H - box.bottom }));
      svg.append(draw("text", { x: x(2 ** k), y: H - box.bottom + 18, "text-anchor": "middle" }, 2 ** k));
    }
    for (let i = 0; i <= 4; i++) svg.append(draw("text", { x: box.left - 6, y: y(low + (i / 4) * (high - low)) + 4, "text-anchor": "end" }, (low + (i / 4) * (high - low)).toFixed(2)));
    svg.append(draw("path", { class: "total", d: curve.map(([l, v], i) => `${i ? "L" : "M"}${x(l).toFixed(1)},${y(v).toFixed(1)}`).join("") }));
    for (const [l, v] of dots) svg.append(draw("circle", { class: "pilot", cx: x(l), cy: y(v), r: 4 }));
    svg.append(draw("text", { x: (W + box.left) / 2, y: H - 8, "text-anchor": "middle" }, `context length (visible ${pilots.unit}s)`));
    svg.append(draw("text", { transform: `translate(13 ${H / 2}) rotate(-90)`, "text-anchor": "middle" }, `loss (nats per ${pilots.unit})`));
  }

  /* The answer's text; its table of lengths keeps its lines, and scrolls where the screen is narrow. */
  function setWords(pre, text) {
    const lines = text.split("\n"), first = lines.findIndex((line) => line.startsWith("context "));
    if (first < 0) return void (pre.textContent = text);
    let last = first;
    while (/^ *\d/.test(lines[last + 1] ?? "")) last++;
    const table = document.createElement("span");
    table.style.cssText = "display: block; white-space: pre; overflow-x: auto";
    table.textContent = lines.slice(first, last + 1).join("\n");
    pre.replaceChildren(lines.slice(0, first).join("\n"), table, lines.slice(last + 1).join("\n"));
  }

  function start(root) {
    const tables = JSON.parse(root.querySelector("script").textContent), panel = document.createElement("form");
    panel.innerHTML = `<label><span>pilots</span><select name="fit">${Object.keys(tables).map((name) => `<option>${name}</option>`).join("")}</select></label>`
      + '<label><span>training data D</span><input name="exact" inputmode="text" autocomplete="off"><output></output></label>'
      + '<label><span>counted in</span><select name="unit"></select></label>';
    const [fit, exact, unit] = ["select[name=fit]", "input", "select[name=unit]"].map((name) => panel.querySelector(name));
    const headline = document.createElement("p"), svg = draw("svg", { viewBox: "0 0 640 340", role: "img" }), words = document.createElement("pre"), key = document.createElement("p");
    headline.className = "headline";
    headline.setAttribute("aria-live", "polite");
    key.className = "key";
    key.innerHTML = '<i class="total"></i> predicted loss <i class="strip"></i> 95 % interval of the best length <i class="pilot"></i> pilots at the nearest size';
    root.append(panel, headline, svg, key, words);

    function show() {
      const pilots = tables[fit.value], inTokens = unit.value !== `${pilots.unit}s`, asked = tokens(exact.value) * (inTokens ? pilots.per_token : 1);
      if (!(asked > 1)) {
        headline.textContent = "D is a number such as 128000, 300k or 50M.";
        return;
      }
      const answer = pilots.answers.reduce((a, b) => (Math.abs(Math.log(b.D / asked)) < Math.abs(Math.log(a.D / asked)) ? b : a));
      exact.nextElementSibling.textContent = `${inTokens ? `= ${Math.round(asked).toLocaleString("en")} ` : ""}${pilots.unit}s; shown: ${answer.D.toLocaleString("en")}`;
      headline.textContent = answer.headline;
      if (answer.refused) headline.insertAdjacentHTML("beforeend", '<a href="#what-to-do">What to do</a>');
      if (pilots.simulated) headline.insertAdjacentHTML("afterbegin", '<span class="badge">simulated</span> ');
      setWords(words, answer.text);
      plot(svg, pilots, answer);
    }
    function reset() {
      const pilots = tables[fit.value];
      unit.innerHTML = [`${pilots.unit}s`, ...(pilots.per_token ? [`GPT-2 tokens, ${pilots.per_token.toFixed(2)} bytes each`] : [])].map((name) => `<option>${name}</option>`).join("");
      exact.value = String(Math.max(...pilots.cells.map((c) => c[0])));
      show();
    }
    panel.addEventListener("submit", (event) => event.preventDefault());
    fit.addEventListener("change", reset);
    exact.addEventListener("input", show);
    unit.addEventListener("change", show);
    reset();
  }
  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("div.planner").forEach(start));
})();
