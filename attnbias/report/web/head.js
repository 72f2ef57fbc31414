// The chosen head: its statistics beside controls and other heads, what it attends to, its map.
let head = page.first;

function chooseHead(to, move) {
  head = to;
  document.querySelectorAll("#maps .chart").forEach(mark);
  const done = drawHead();
  if (move) byId("head-title").focus();
  return done;
}
document.querySelectorAll("button[data-head]").forEach((button) =>
  button.addEventListener("click", () => {
    if (button.dataset.statistic) {
      const at = run.stats.findIndex((s) => s.key === button.dataset.statistic);
      if (at >= 0 && String(at) !== statSelect.value) {
        statSelect.value = String(at);
        statSelect.dispatchEvent(new Event("change"));
      }
    }
    chooseHead(page.heads[Number(button.dataset.head)], true);
    byId("head").scrollIntoView({ behavior: "auto", block: "start" });
  }));
["layer", "head"].forEach((which, n) =>
  byId("choose-" + which).addEventListener("change", (event) => {
    const to = head.slice(), most = Number(event.target.max);
    to[n + 1] = Math.max(0, Math.min(most, Math.round(Number(event.target.value)) || 0));
    if (run.places.size === 0 || run.places.has(to.join("/"))) chooseHead(to);
    else event.target.value = head[n + 1];
  }));

function drawHead() {
  const stats = run.stats.filter((s) => s.tower === head[0]), name = headName(head);
  byId("head-title").textContent = name;
  byId("choose-layer").value = head[1];
  byId("choose-head").value = head[2];
  const found = page.findings[head.join("/")] || [];
  byId("head-says").textContent = found.length
    ? "This head stands out for: " + found.join(", ") + "."
    : "This head passes none of the thresholds looked for.";
  fillStatistics(stats);
  fillTop();
  document.querySelectorAll("#head .figure").forEach((figure) => { figure.dataset.name = name + " " + figure.dataset.kind; });
  tokensFigure(name);
  const jobs = [besideFigure(stats, name), positionFigure(name), nearFigure(name)];
  return Promise.all(jobs.filter(Boolean));
}

function rank(stat, cell) {
  const all = run.cells(stat), above = all.filter((c) => c.values > cell.values).length;
  return ordinal(above + 1) + " of " + all.length;
}

function fillStatistics(stats) {
  const body = byId("head-table").tBodies[0];
  body.replaceChildren();
  for (const stat of stats) {
    const cell = run.cell(stat, head[1], head[2]);
    if (!cell) continue;
    const twin = other && other.stat(stat.key) && other.cell(other.stat(stat.key), head[1], head[2]);
    const texts = [bare(cell.values, stat.unit), between(cell, stat.unit), ...(other ? [twin ? bare(twin.values, stat.unit) : "not measured"] : []),
      bare(cell.shuffled, stat.unit), bare(cell.random, stat.unit), bare(cell.even, stat.unit), rank(stat, cell)];
    const unit = stat.unit === "value" || stat.unit.startsWith("share") || stat.unit === "yes or no" ? "" : " (" + stat.unit + ")";
    const title = make("th", { scope: "row", class: "text", title: stat.meaning }, stat.title + unit);
    body.append(make("tr", { "data-statistic": stat.key }, title, ...texts.map((text) => make("td", {}, text))));
  }
}

function fillTop() {
  const list = byId("head-top");
  if (!list) return;
  const value = run.row("top_share", head), place = run.row("top_place", head);
  list.replaceChildren();
  if (!value) return;
  value.forEach((share, n) => {
    if (share < 5e-5) return;
    const token = run.top_tokens[place[n]];
    list.append(make("li", {}, make("bdi", { class: "token" }, token === undefined ? "token" : token), " ",
      make("span", { class: "soft" }, "(" + place[n] + ") "), (100 * share).toFixed(1) + "%"));
  });
}

// Where this head lies among all heads, from the lowest to the highest, for each statistic.
function besideFigure(stats, name) {
  const values = [], order = [];
  for (const stat of stats) {
    const all = run.cells(stat).map((c) => c.values), low = Math.min(...all), high = Math.max(...all);
    const cell = run.cell(stat, head[1], head[2]);
    if (!cell || !(high > low)) continue;
    order.push(stat.title);
    const step = Math.max(1, Math.ceil(all.length / 200));
    all.forEach((x, n) => { if (n % step === 0) values.push({ title: stat.title, at: (x - low) / (high - low), which: "Other heads" }); });
    values.push({ title: stat.title, at: (cell.values - low) / (high - low), which: "This head", says: stat.title + ": " + number(cell.values, stat.unit) + ", lowest head " + number(low, stat.unit) + ", highest " + number(high, stat.unit) });
  }
  const y = { field: "title", type: "nominal", sort: order, axis: { title: null, ticks: false, domain: false, grid: false, labelLimit: 220 } };
  const x = { field: "at", type: "quantitative", scale: { domain: [-0.03, 1.03], nice: false }, axis: { title: "lowest head → highest head", values: [], grid: false } };
  return draw(document.querySelector("[data-chart='beside']"), {
    title: name + " among all heads", width: "container", height: Math.max(2, order.length) * 22, data: { values },
    layer: [
      { transform: [{ filter: "datum.which === 'Other heads'" }], mark: { type: "tick", color: GREY, opacity: 0.45, aria: false, thickness: 1, size: 12 }, encoding: { x, y } },
      { transform: [{ filter: "datum.which === 'This head'" }], mark: { type: "point", filled: true, size: 110, color: BLUE, opacity: 1 }, encoding: { x, y, tooltip: { field: "says", title: name }, description: { field: "says" } } },
    ],
  });
}

function positionFigure(name) {
  const own = run.row("received", head), place = document.querySelector("[data-chart='position']");
  if (!own || !place) return null;
  const even = run.even_received[run.layers.findIndex((l) => l[0] === head[0] && l[1] === head[1])];
  const step = run.bins.length > 1 ? run.bins[1] - run.bins[0] : 1, long = step > 1;
  const label = (n) => (long ? "tokens " + run.bins[n] + " to " + (run.bins[n] + step - 1) : "token " + n + (run.bin_tokens ? " “" + run.bin_tokens[n] + "”" : ""));
  const values = own.map((share, n) => ({ at: run.bins[n], to: run.bins[n] + step, share, says: label(n) + ": " + number(share, "share") }));
  const layer = [
    { data: { values }, mark: { type: "bar", color: BLUE, aria: false },
      encoding: { x: { field: "at", type: "quantitative", axis: { title: long ? "token position (bins of " + step + ")" : "token position", grid: false, format: "d", tickMinStep: 1 }, scale: { nice: false } }, x2: { field: "to" }, y2: { datum: 0 },
        y: { field: "share", type: "quantitative", scale: { type: "sqrt" }, axis: { title: "share received (square-root scale)", format: ".3~p", tickCount: 4 } }, tooltip: { field: "says", title: name } } },
  ];
  if (even) layer.push({ data: { values: even.map((share, n) => ({ at: run.bins[n] + step / 2, share })) }, mark: { type: "line", color: ORANGE, strokeWidth: 2, aria: false, strokeDash: [4, 3] }, encoding: { x: { field: "at", type: "quantitative" }, y: { field: "share", type: "quantitative" } } });
  const theirs = other && other.row("received", head);
  if (theirs) layer.push({ data: { values: theirs.map((share, n) => ({ at: other.bins[n], share })) }, mark: { type: "line", interpolate: "step-after", color: "#cc79a7", strokeWidth: 1.5, aria: false }, encoding: { x: { field: "at", type: "quantitative" }, y: { field: "share", type: "quantitative" } } });
  return draw(place, { title: name + ": attention received by position", width: "container", height: 170, layer });
}

function gapName(low, high) {
  if (low === 0 && high === 0) return "itself";
  const [a, b] = low > 0 ? [low, high] : [-high, -low];
  return (a === b ? a : a + "–" + b) + (low > 0 ? " back" : " ahead");
}
function nearFigure(name) {
  const own = run.row("near", head), place = document.querySelector("[data-chart='near']");
  if (!own || !place) return null;
  const even = run.even_near[run.layers.findIndex((l) => l[0] === head[0] && l[1] === head[1])];
  const names = run.gaps.map(([low, high]) => gapName(low, high)), series = [["This text", own]];
  const theirs = other && other.row("near", head);
  if (other) series[0][0] = "A";
  if (theirs && other.gaps.length === run.gaps.length) series.push(["B", theirs]);
  else series.push(["Words shuffled", run.row("near_shuffled", head)]);
  series.push(["Random weights", run.row("near_random", head)]);
  if (even) series.push(["Even attention", even]);
  const values = [];
  for (const [which, row] of series.slice().reverse())
    (row || []).forEach((share, n) => {
      if (run.causal && run.gaps[n][1] < 0) return;
      values.push({ gap: names[n], share, which, says: names[n] + ", " + which.toLowerCase() + ": " + number(share, "share") });
    });
  const shown = names.filter((_, n) => !(run.causal && run.gaps[n][1] < 0)), compared = marked(series.map((s) => s[0]));
  return draw(place, {
    title: name + ": attention by distance", width: "container", height: 200, data: { values },
    encoding: {
      x: { field: "gap", type: "ordinal", sort: shown, axis: { title: "tokens from the one that looks", labelAngle: -50, grid: true } },
      y: { field: "share", type: "quantitative", axis: { title: "share of attention", format: ".3~p", tickCount: 4 } },
    },
    layer: [
      { mark: { type: "line", opacity: 0.35, strokeWidth: 1.5, aria: false }, encoding: { color: compared.color } },
      { mark: { type: "point", filled: true, size: 55, opacity: 0.9 }, encoding: Object.assign({ tooltip: { field: "says", title: name }, description: { field: "says" } }, compared) },
    ],
  });
}

// Thousands of squares are drawn when the reader comes near them, and before printing.
const waiting = new Map();
function drawWaiting(place) {
  const job = waiting.get(place);
  waiting.delete(place);
  if (job) job();
}
const near = new IntersectionObserver((entries) => {
  entries.filter((one) => one.isIntersecting).forEach((one) => drawWaiting(one.target));
}, { rootMargin: "400px" });
function whenNear(place, job) {
  waiting.set(place, job);
  near.unobserve(place);
  near.observe(place);
}
window.addEventListener("beforeprint", () => Array.from(waiting.keys()).forEach(drawWaiting));

// The map over the tokens of a short text: who looks (down) at whom (across).
function tokensFigure(name) {
  const figure = document.querySelector("[data-chart='tokens']"), at = run.places.get(head.join("/"));
  if (figure && at !== undefined && run.maps[at]) whenNear(figure, () => drawTokens(figure, at, name));
}
function drawTokens(figure, at, name) {
  const size = run.tokens.length, weights = bytes(run.maps[at]), values = [];
  const label = (n) => n + " " + run.tokens[n];
  for (let i = 0; i < size; i++)
    for (let j = 0; j < size; j++)
      if (!run.causal || j <= i) values.push({ from: i, to: j, weight: (weights[i * size + j] / 255) ** 2 });
  const cell = Math.max(5, Math.min(22, Math.floor(560 / size)));
  const axis = (title, orient, angle) => ({ title, orient, labelAngle: angle, ticks: false, domain: false, grid: false, labelExpr: "datum.label", labelLimit: 90, labelFontSize: cell >= 9 ? 10 : 8, labelOverlap: true });
  const names = run.tokens.map((_, n) => label(n));
  values.forEach((v) => { v.says = "“" + run.tokens[v.from] + "” (" + v.from + ") looks at “" + run.tokens[v.to] + "” (" + v.to + "): about " + Math.round(100 * v.weight) + "%"; v.x = names[v.to]; v.y = names[v.from]; });
  return draw(figure, {
    title: name + ": its map over the tokens", width: size * cell, height: size * cell, data: { values },
    mark: { type: "rect", aria: false },
    encoding: {
      x: { field: "x", type: "ordinal", sort: names, axis: axis("token looked at", "top", -90) },
      y: { field: "y", type: "ordinal", sort: names, axis: axis("token that looks", "left", 0) },
      color: { field: "weight", type: "quantitative", scale: { scheme: "viridis", domain: [0, 1], type: "sqrt" }, legend: { title: "weight", format: ".0%", orient: "bottom", gradientLength: 180, tickCount: 4 } },
      tooltip: { field: "says", title: name },
    },
  }, null, values.length);
}
