/* The planner in a browser: the arithmetic of ctxnb.theory.planner (advise_from), on fits that the page carries.

   A page holds <div class="planner"> with a <script type="application/json"> in it: title -> what Pilots.to_json gave,
   or {"refusal": reason}. The numbers are those of `ctxnb advise` on the same table; a test compares them. */
"use strict";
(() => {
  // --- the laws of ctxnb.stats.fitting: approximation loss over A, as ln; p holds gamma, alpha and the third shape parameter
  const RATE = {
    constant: (p, l, D) => -p[4] * D,
    amplitude: (p, l, D) => p[5] * l - p[4] * D,
    exponent: (p, l, D) => -p[4] * Math.exp(-p[5] * l) * D,
    dimension: (p, l, D) => -p[4] * D / (1 - p[5] * Math.exp(-p[3] * l)),
  };
  const risk = (p, l) => p[0] + p[1] * Math.exp(-p[3] * l); // l and D are logarithms throughout
  const loss = (form, p, l, D) => risk(p, l) + p[2] * Math.exp(RATE[form](p, l, D));

  function optimum(form, p, D, shortest, longest, rules) {
    const start = Math.log(shortest), step = (Math.log(rules.FAR * longest) - start) / (rules.STEPS - 1);
    const values = Array.from({ length: rules.STEPS }, (_, i) => loss(form, p, start + i * step, D));
    const least = Math.min(...values) + rules.FLAT;
    let k = values.length - 1;
    while (values[k] > least) k--;
    if (k === values.length - 1) return Infinity;
    if (k === 0) return shortest;
    const [left, mid, right] = values.slice(k - 1, k + 2), bend = left - 2 * mid + right;
    const shift = bend > 0 ? 0.5 * (left - right) / bend : 0;
    return Math.exp(start + k * step + Math.max(-1, Math.min(1, shift)) * step);
  }

  function interval(samples, level) { // as percentile_interval
    const sorted = Float64Array.from(samples).sort(), n = sorted.length;
    return [0.5 - level / 2, 0.5 + level / 2].map((q) => {
      if (!Number.isFinite(sorted[n - 1])) {
        const at = n * q - 1, low = Math.floor(at);
        return sorted[Math.max(0, at === low ? low : low + 1)];
      }
      const at = (n - 1) * q, low = Math.floor(at), t = at - low, a = sorted[low], b = sorted[Math.min(n - 1, low + 1)];
      return t >= 0.5 ? b - (b - a) * (1 - t) : a + (b - a) * t;
    });
  }

  function unpack(pilots) {
    pilots.lengths = [...new Set(pilots.cells.map((c) => c[1]))].sort((a, b) => a - b);
    pilots.sizes = [...new Set(pilots.cells.map((c) => c[0]))].sort((a, b) => a - b);
    pilots.rows = Object.entries(pilots.draws).flatMap(([form, text]) => {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), width = pilots.parameters[form].length;
      const numbers = new Float64Array(bytes.buffer);
      return Array.from({ length: numbers.length / width }, (_, i) => [form, numbers.slice(i * width, (i + 1) * width)]);
    });
  }

  // gamma and dim are factors on the fitted exponent and dimension; the rate alpha is a constant over the dimension
  const bent = (p, what) => { const q = Float64Array.from(p); q[3] *= what.gamma; q[4] /= what.dim; return q; };

  class Refusal extends Error {}

  function advise(pilots, tokens, what) {
    const { rules, lengths, sizes } = pilots, D = Math.log(tokens);
    const shortest = lengths[0], longest = lengths.at(-1), most = sizes.at(-1), least = sizes[0];
    const best = bent(pilots.parameters[pilots.best], what), rows = pilots.rows.map(([form, p]) => [form, bent(p, what)]);
    const find = (form, p) => optimum(form, p, D, shortest, longest, rules);
    const point = find(pilots.best, best), unbounded = !Number.isFinite(point);
    const optima = rows.map(([form, p]) => find(form, p)), [low, high] = interval(optima, rules.LEVEL);
    const share = optima.filter((o) => !Number.isFinite(o)).length / optima.length;
    const pick = unbounded ? longest : Math.max(1, Math.round(point));
    const told = { tokens, pick, point, low, high, unbounded, share, best, form: pilots.best, loss: loss(pilots.best, best, Math.log(pick), D) };
    told.bracketed = !unbounded && shortest < low && high < longest;
    const refuse = (why) => { told.refusal = why; return told; };

    if (tokens > rules.MAX_DATA_REACH * most)
      return refuse(`${g(tokens, 3)} tokens are ${g(tokens / most, 3)} times the largest pilot (${g(most, 3)}); the planner extrapolates at most a factor of ${g(rules.MAX_DATA_REACH, 6)}: add larger pilots`);
    if (tokens < least / rules.MAX_DATA_REACH)
      return refuse(`${g(tokens, 3)} tokens are less than a tenth of the smallest pilot (${g(least, 3)}): add smaller pilots`);
    if (!Number.isFinite(high) && low < longest)
      return refuse(`the data do not tell whether an optimum exists: in ${percent(share, 0)} of the resamples longer is always better, in the others the optimum begins at ${low.toFixed(0)} tokens; add longer contexts or more seeds`);
    if (Number.isFinite(high) && high > rules.MAX_WIDTH * low)
      return refuse(`the 95 % interval of the optimum reaches from ${low.toFixed(0)} to ${high.toFixed(0)} tokens, more than a factor of ${g(rules.MAX_WIDTH, 6)}: add seeds or a wider grid`);
    if (!unbounded && point > rules.MAX_LENGTH_REACH * longest)
      return refuse(`the fitted optimum, ${point.toFixed(0)} tokens, lies more than ${g(rules.MAX_LENGTH_REACH, 6)} times beyond the longest pilot context (${longest.toFixed(0)}): add longer pilots`);
    if (told.loss <= 0)
      return refuse(`the best law (${told.form}) predicts a loss of ${g(told.loss, 3)} nats at ${g(tokens, 3)} tokens, and no cross-entropy is below zero: it does not hold so far out; add larger pilots`);

    const asked = [...new Set([...lengths, pick])].sort((a, b) => a - b);
    const reference = (optimal) => (unbounded ? longest : Math.min(optimal, rules.FAR * longest));
    const lack = (form, p, l, optimal) => loss(form, p, Math.log(l), D) - loss(form, p, Math.log(reference(optimal)), D);
    told.regret = asked.map((l) => [l, lack(told.form, best, l, point), ...interval(rows.map(([form, p], i) => lack(form, p, l, optima[i])), rules.LEVEL)]);
    told.notes = [];
    if (unbounded)
      told.notes.push(`unbounded: by the best law longer is always better at this data size; the advice is the longest pilot context, ${longest.toFixed(0)} tokens`);
    else if (!told.bracketed)
      told.notes.push(`not bracketed: the interval is not inside the measured context lengths (${shortest.toFixed(0)} to ${longest.toFixed(0)} tokens)`);
    if (share && Number.isFinite(high)) told.notes.push(`in ${percent(share, 1)} of the resamples longer is always better`);
    if (unbounded && pilots.best_seen < longest)
      told.notes.push(`the largest pilots themselves (${g(most, 3)} tokens) are best at ${g(pilots.best_seen, 6)} tokens of context, though not measurably so`);
    if (pilots.status !== "ok") told.notes.push(`best law: ${pilots.status}`);
    if (tokens > most) told.notes.push(`an extrapolation by a factor of ${g(tokens / most, 3)} in the data`);
    return told;
  }

  // --- numbers as Python writes them
  function g(x, digits) {
    let [mantissa, power] = x.toExponential(digits - 1).split("e").map(Number);
    const [exact, scale] = x.toExponential(20).split("e");
    if (/^50*$/.test(exact.replace(/[-.]/g, "").slice(digits))) { // halfway: to the even digit
      mantissa = Number(exact.slice(0, digits + 1 + exact.startsWith("-")));
      if (Number(exact.replace(/[-.]/g, "")[digits - 1]) % 2) [mantissa, power] = x.toExponential(digits - 1).split("e").map(Number);
      else power = Number(scale);
    }
    if (power >= -4 && power < digits) return String(Number(`${mantissa}e${power}`));
    return `${mantissa}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  const percent = (share, digits) => `${(100 * share).toFixed(digits)}%`;

  function describe(told, law) { // as ctxnb.theory.planner.describe
    if (told.refusal) return `Refused: ${told.refusal}`;
    const low = Number.isFinite(told.low) ? told.low : told.pick, high = Number.isFinite(told.high) ? told.high.toFixed(0) : "unbounded";
    return [
      `For ${g(told.tokens, 3)} training tokens: context length ${told.pick} (95 % interval of the optimum ${low.toFixed(0)} to ${high} tokens; ${told.bracketed ? "bracketed" : "not bracketed"}).`,
      `Predicted loss ${told.loss.toFixed(4)} nats by ${law}.`,
      ...told.notes.map((note) => `Note: ${note}.`),
      "",
      "context   regret (nats)   95 % interval",
      ...told.regret.map(([l, mean, low, high]) => `${String(l).padStart(7)}   ${mean.toFixed(4).padStart(13)}   ${low.toFixed(4)} to ${high.toFixed(4)}`),
    ].join("\n");
  }

  // --- drawing
  const SVG = "http://www.w3.org/2000/svg";
  function draw(tag, attributes, text) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function plot(svg, pilots, told) {
    const W = 640, H = 340, box = { left: 56, right: 12, top: 14, bottom: 46 };
    const first = pilots.lengths[0], last = Math.max(pilots.lengths.at(-1), Number.isFinite(told.point) ? Math.min(2 * told.point, 64 * pilots.lengths.at(-1)) : 0);
    const at = (i) => first * (last / first) ** (i / 160), D = Math.log(told.tokens);
    const total = [], floor = [];
    for (let i = 0; i <= 160; i++) {
      total.push([at(i), loss(told.form, told.best, Math.log(at(i)), D)]);
      floor.push([at(i), risk(told.best, Math.log(at(i)))]);
    }
    const nearest = pilots.sizes.reduce((a, b) => (Math.abs(Math.log(b) - D) < Math.abs(Math.log(a) - D) ? b : a));
    const dots = pilots.cells.filter(([size]) => size === nearest && told.tokens < 1.05 * size && told.tokens > size / 1.05);
    const every = [...total, ...floor].map((p) => p[1]).concat(dots.map((d) => d[2]));
    const low = Math.min(...every), high = Math.min(Math.max(...every), low + 3 * (total[0][1] - low) + 1);
    const x = (l) => box.left + (Math.log(l / first) / Math.log(last / first)) * (W - box.left - box.right);
    const y = (v) => H - box.bottom - ((v - low) / (high - low)) * (H - box.top - box.bottom);
    const line = (points) => points.map(([l, v], i) => `${i ? "L" : "M"}${x(l).toFixed(1)},${y(Math.min(v, high)).toFixed(1)}`).join("");
    svg.replaceChildren();
    const title = `Predicted loss against context length for ${g(told.tokens, 3)} training tokens` + (told.unbounded ? ", falling to the longest length" : `, smallest at ${g(told.point, 3)} tokens`);
    svg.append(draw("title", {}, title));
    const ends = [Number.isFinite(told.low) ? told.low : last, Number.isFinite(told.high) ? told.high : last].map((l) => x(Math.max(first, Math.min(last, l))));
    svg.append(draw("rect", { class: "strip", x: ends[0], y: box.top, width: Math.max(1, ends[1] - ends[0]), height: H - box.top - box.bottom }));
    svg.append(draw("path", { class: "approximation", d: line(total) + line(floor.slice().reverse()).replace("M", "L") + "Z" }));
    for (let k = Math.ceil(Math.log2(first)); k <= Math.log2(last); k++) {
      svg.append(draw("line", { class: "grid", x1: x(2 ** k), x2: x(2 ** k), y1: box.top, y2: H - box.bottom }));
      svg.append(draw("text", { x: x(2 ** k), y: H - box.bottom + 18, "text-anchor": "middle" }, 2 ** k));
    }
    for (let i = 0; i <= 4; i++) {
      const v = low + (i / 4) * (high - low);
      svg.append(draw("line", { class: "grid", x1: box.left, x2: W - box.right, y1: y(v), y2: y(v) }));
      svg.append(draw("text", { x: box.left - 6, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(2)));
    }
    svg.append(draw("path", { class: "risk", d: line(floor) }), draw("path", { class: "total", d: line(total) }));
    for (const [, l, v] of dots) svg.append(draw("circle", { class: "pilot", cx: x(l), cy: y(Math.min(v, high)), r: 4 }));
    if (!told.unbounded && told.point <= last) svg.append(draw("circle", { class: "best", cx: x(told.point), cy: y(loss(told.form, told.best, Math.log(told.point), D)), r: 6 }));
    svg.append(draw("text", { x: (W + box.left) / 2, y: H - 8, "text-anchor": "middle" }, "context length (visible tokens)"));
    svg.append(draw("text", { transform: `translate(13 ${H / 2}) rotate(-90)`, "text-anchor": "middle" }, "loss (nats per token)"));
  }

  // --- the page
  function slider(panel, name, label, least, most, step, value) {
    const row = document.createElement("label");
    row.innerHTML = `<span>${label}</span><input type="range" name="${name}" min="${least}" max="${most}" step="${step}" value="${value}"><output></output>`;
    panel.append(row);
    return row.querySelector("input");
  }

  function start(root) {
    const fits = JSON.parse(root.querySelector("script").textContent);
    Object.values(fits).filter((f) => !f.refusal).forEach(unpack);
    const panel = document.createElement("form");
    panel.innerHTML = `<label><span>pilots</span><select name="fit">${Object.keys(fits).map((name) => `<option>${name}</option>`).join("")}</select></label>`;
    const fit = panel.querySelector("select");
    const size = slider(panel, "tokens", "training tokens D", 3, 10, "any", 5), gamma = slider(panel, "gamma", "&gamma;, of the risk", 0.25, 2, "any", 1);
    const dim = slider(panel, "dim", "dimension, &times; fitted", 0.5, 2, "any", 1);
    const exact = document.createElement("label");
    exact.innerHTML = '<span>D, exactly</span><input type="number" name="exact" min="2" step="any"><button type="button">back to the fit</button>';
    panel.append(exact);
    const number = exact.querySelector("input"), svg = draw("svg", { viewBox: "0 0 640 340", role: "img" });
    const headline = document.createElement("p"), words = document.createElement("pre"), key = document.createElement("p");
    headline.className = "headline";
    headline.setAttribute("aria-live", "polite");
    key.className = "key";
    key.innerHTML = '<i class="total"></i> loss L(l, D) <i class="risk"></i> risk R(l); between them the approximation loss <i class="strip"></i> 95 % interval of l* <i class="pilot"></i> pilots of this size';
    root.append(panel, headline, svg, key, words);

    function show() {
      const pilots = fits[fit.value];
      for (const input of [size, gamma, dim, number, exact.querySelector("button")]) input.disabled = Boolean(pilots.refusal);
      svg.style.display = key.style.display = pilots.refusal ? "none" : "";
      if (pilots.refusal) {
        headline.textContent = "No advice from these pilots.";
        words.textContent = `Refused: ${pilots.refusal}`;
        return;
      }
      const tokens = Number(number.value), what = { gamma: Number(gamma.value), dim: Number(dim.value) };
      if (!(tokens > 1 && Number.isFinite(tokens))) {
        headline.textContent = "D is a number of tokens above 1.";
        words.textContent = "";
        return;
      }
      const told = advise(pilots, tokens, what), asFitted = what.gamma === 1 && what.dim === 1;
      size.nextElementSibling.textContent = tokens.toLocaleString("en", { maximumSignificantDigits: 3 });
      gamma.nextElementSibling.textContent = g(told.best[3], 3);
      dim.nextElementSibling.textContent = g(what.dim, 3);
      headline.textContent = told.refusal ? "No advice. The curve is what the law says there, not what the pilots support."
        : `${told.pick} tokens of context` + (told.unbounded ? ", the longest measured: by the law longer is always better." : told.bracketed ? "." : ", not bracketed by the pilots.");
      plot(svg, pilots, told);
      words.textContent = (asFitted ? "" : "What if: not the fitted law.\n") + describe(told, asFitted ? pilots.law : `the law with gamma = ${g(told.best[3], 4)} and alpha = ${g(told.best[4], 4)}`);
    }
    function reset() {
      const pilots = fits[fit.value];
      if (!pilots.refusal) {
        number.value = pilots.sizes.at(-1);
        size.min = Math.log10(pilots.sizes[0]) - 1;
        size.max = Math.log10(pilots.sizes.at(-1)) + 2; // past the planner's reach, so that the refusal is seen
        size.value = Math.log10(number.value);
        gamma.value = dim.value = 1;
      }
      show();
    }
    panel.addEventListener("submit", (event) => event.preventDefault());
    fit.addEventListener("change", reset);
    exact.querySelector("button").addEventListener("click", reset);
    size.addEventListener("input", () => { number.value = Number((10 ** size.value).toPrecision(3)); show(); });
    number.addEventListener("input", () => { size.value = Math.log10(number.value); show(); });
    gamma.addEventListener("input", show);
    dim.addEventListener("input", show);
    reset();
  }
  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("div.planner").forEach(start));
})();
