// Figures: Vega-Lite specifications, drawn as SVG that follows light and dark, saved as PNG or SVG.
const BLUE = "#0072b2", ORANGE = "#e69f00", GREY = "#8c8c8c";
const WHICH = ["This text", "Words shuffled", "Random weights"];

function colours(isDark) {
  const ink = isDark ? "#e9ecef" : "#1b1f24", line = isDark ? "#3d454f" : "#dfe3e8";
  const text = { labelColor: ink, titleColor: ink };
  return {
    background: "transparent", view: { stroke: null },
    title: { color: ink, fontSize: 13, anchor: "start" },
    axis: Object.assign({ gridColor: line, tickColor: line, domainColor: line, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" }, text),
    legend: Object.assign({ labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" }, text),
    text: { color: ink },
  };
}

const drawn = new Map(); // place -> what is drawn in it
const SHORTEST_SVG = 3000; // more marks than that are drawn on a canvas

// Draw a figure in its place; `after` gets the marks that a reader can move over.
function draw(place, spec, after, marks) {
  drawn.set(place, { spec, after, marks });
  return redraw(place, dark.matches);
}
function redraw(place, isDark) {
  const { spec, after, marks } = drawn.get(place);
  const options = {
    actions: false, ast: true, config: colours(isDark), tooltip: { theme: isDark ? "dark" : "light" },
    renderer: (marks || 0) > SHORTEST_SVG ? "canvas" : "svg",
  };
  return vegaEmbed(place, spec, options).then((result) => {
    drawn.get(place).view = result.view;
    if (after) after(Array.from(place.querySelectorAll("svg [aria-roledescription='rect mark'], svg [aria-roledescription='point'], svg [aria-roledescription='bar']")));
  });
}
const redrawAll = (isDark) => Promise.all(Array.from(drawn.keys()).map((place) => redraw(place, isDark)));
dark.addEventListener("change", () => redrawAll(dark.matches));
window.addEventListener("beforeprint", () => redrawAll(false));
window.addEventListener("afterprint", () => redrawAll(dark.matches));

// The figure of a button as a file, in the colours of paper whatever the screen shows.
function save(place, kind, name) {
  if (waiting.has(place)) drawWaiting(place);
  if (!drawn.has(place)) return;
  const spec = Object.assign({}, drawn.get(place).spec);
  if (spec.width === "container") spec.width = Math.max(300, place.clientWidth - 120);
  const shelf = make("div", { class: "shelf" });
  document.body.append(shelf);
  const config = Object.assign(colours(false), { background: "white", padding: 12 });
  return vegaEmbed(shelf, spec, { actions: false, ast: true, renderer: "svg", config })
    .then((result) => result.view.toImageURL(kind, 2))
    .then((url) => {
      make("a", { href: url, download: name + "." + kind }).click();
      shelf.remove();
    });
}
document.querySelectorAll("[data-save]").forEach((button) => {
  button.addEventListener("click", () => {
    const figure = button.closest(".figure"), place = figure.querySelector(".chart");
    save(place, button.dataset.save, (figure.dataset.name || "figure").toLowerCase().replace(/[^a-z0-9]+/g, "-"));
  });
});

// Maps: layers downwards, heads to the right; the number stands in the cell where there is room.
const CELL = 26, PANEL = 320, NUMBERS_UP_TO = 16;
function heat(stat, cells, title, scale) {
  const layers = stat.layers, heads = stat.width;
  const numbers = Math.max(heads, layers.length) <= NUMBERS_UP_TO;
  const cell = numbers ? CELL : Math.max(3, Math.min(CELL, PANEL / heads));
  const share = stat.unit.startsWith("share"), small = Math.max(Math.abs(scale.low), scale.high) < 0.0995;
  const axis = (name, all) => ({
    labelAngle: 0, ticks: false, domain: false, grid: false, title: name,
    values: numbers ? undefined : all.filter((n) => n % Math.ceil(all.length / 12) === 0),
  });
  const values = cells.filter((c) => !Number.isNaN(c.value)).map((c) => ({
    layer: c.layer, head: c.head, value: c.value, light: scale.light(c.value),
    says: "Layer " + c.layer + ", head " + c.head + ": " + (scale.signed && c.value > 0 ? "+" : "") + number(c.value, stat.unit),
    short: short(c.value, stat.unit, small),
  }));
  const legend = {
    title: share ? "share" : stat.unit, orient: "bottom", gradientLength: Math.min(220, heads * cell), tickCount: 3, titleLimit: 300,
    format: share ? (small ? ".1%" : ".0%") : ".3~r",
  };
  if (stat.unit === "yes or no") Object.assign(legend, { values: scale.signed ? [-1, 0, 1] : [0, 1], format: ".0f" });
  const place = { x: { field: "head", type: "ordinal", axis: axis("head", Array.from({ length: heads }, (_, n) => n)) },
    y: { field: "layer", type: "ordinal", sort: "ascending", axis: axis("layer", layers) } };
  const layer = [{
    mark: { type: "rect", cursor: "pointer" },
    encoding: {
      color: { field: "value", type: "quantitative", scale: { scheme: scale.scheme, domain: [scale.low, scale.high] }, legend },
      tooltip: { field: "says", title: stat.title }, description: { field: "says" },
    },
  }];
  if (numbers)
    layer.push({
      mark: { type: "text", fontSize: 10, aria: false, tooltip: null },
      encoding: { text: { field: "short" }, color: { condition: { test: "datum.light", value: "black" }, value: "white" } },
    });
  return {
    title, data: { values }, encoding: place, layer,
    width: heads * cell, height: layers.length * (numbers ? cell : Math.min(cell, 12)),
  };
}
function short(x, unit, small) {
  if (unit.startsWith("share")) return (100 * x).toFixed(small ? 1 : 0);
  if (unit === "yes or no") return x.toFixed(0);
  return x.toFixed(Math.abs(x) < 9.95 ? 1 : 0);
}
// From 0 for what is never negative; black numbers on the bright half of viridis.
function upward(all, unit) {
  const known = all.filter((x) => !Number.isNaN(x));
  const high = unit === "yes or no" ? 1 : Math.max(1e-9, ...known), low = Math.min(0, ...known);
  return { low, high, scheme: "viridis", light: (x) => x - low > 0.42 * (high - low), signed: false };
}
function signed(all) {
  const most = Math.max(1e-9, ...all.filter((x) => !Number.isNaN(x)).map(Math.abs));
  return { low: -most, high: most, scheme: "purpleorange", light: (x) => Math.abs(x) < 0.62 * most, signed: true };
}

// Three things compared by shape and colour, in the order of `names`.
function marked(names, more) {
  return {
    shape: { field: "which", type: "nominal", scale: { domain: names, range: ["circle", "triangle-up", "square", "diamond"].slice(0, names.length) }, legend: Object.assign({ orient: "top", title: null, columns: 2, labelLimit: 240, symbolOpacity: 1 }, more) },
    color: { field: "which", type: "nominal", scale: { domain: names, range: [BLUE, ORANGE, GREY, "#cc79a7"].slice(0, names.length) }, legend: Object.assign({ orient: "top", title: null, columns: 2, labelLimit: 240, symbolOpacity: 1 }, more) },
  };
}
