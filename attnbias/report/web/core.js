// What every part of the page uses: the numbers unpacked, words for them, moving by keyboard.
const page = JSON.parse(document.getElementById("data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const byId = (name) => document.getElementById(name);

function bytes(packed) {
  const text = atob(packed), found = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) found[n] = text.charCodeAt(n);
  return found;
}
const floats = (packed) => new Float32Array(bytes(packed).buffer);
const integers = (packed) => new Uint32Array(bytes(packed).buffer);
// Shares are kept as 65535 sqrt(share), rounded.
const shares = (packed) => Float32Array.from(new Uint16Array(bytes(packed).buffer), (x) => (x / 65535) ** 2);

const KINDS = ["values", "shuffled", "random", "low", "high"];
class Run {
  constructor(given) {
    Object.assign(this, given);
    this.grids = {};
    this.places = new Map(this.heads.map((head, n) => [head.join("/"), n]));
    for (const name of ["received", "near", "near_shuffled", "near_random"])
      if (this.profiles[name]) this.profiles[name] = shares(this.profiles[name]);
    if (this.profiles.top_share) {
      this.profiles.top_share = shares(this.profiles.top_share);
      this.profiles.top_place = integers(this.profiles.top_place);
    }
  }
  stat(key, tower) {
    return this.stats.find((s) => s.key === key && (tower === undefined || s.tower === tower));
  }
  // All heads of a statistic: {layer, head, values, shuffled, random, low, high, even}.
  cells(stat) {
    const name = stat.key + "/" + stat.tower;
    if (this.grids[name]) return this.grids[name];
    const packed = floats(stat.pack), size = stat.layers.length * stat.width, found = [];
    stat.layers.forEach((layer, row) => {
      for (let head = 0; head < stat.width; head++) {
        const cell = { layer, head, even: stat.even[row] };
        KINDS.forEach((kind, k) => { cell[kind] = packed[k * size + row * stat.width + head]; });
        if (!Number.isNaN(cell.values)) found.push(cell);
      }
    });
    return (this.grids[name] = found);
  }
  cell(stat, layer, head) {
    return this.cells(stat).find((c) => c.layer === layer && c.head === head);
  }
  // One head's row of a packed table of profiles, or null.
  row(name, head) {
    const at = this.places.get(head.join("/")), table = this.profiles[name];
    if (at === undefined || !table) return null;
    const width = table.length / this.heads.length;
    return Array.from(table.slice(at * width, (at + 1) * width));
  }
}
const runs = page.runs.map((run) => new Run(run));
const run = runs[0], other = runs[1] || null;

// Numbers in words ---------------------------------------------------------------------------
function number(x, unit) {
  if (x === null || x === undefined || Number.isNaN(x)) return "not measured";
  if (unit.startsWith("share")) return (100 * x).toFixed(1) + "%";
  if (unit === "yes or no") return x === 1 ? "yes" : x === 0 ? "no" : Math.round(100 * x) + "% yes";
  const size = Math.abs(x);
  const digits = size === 0 ? 0 : Math.max(0, Math.min(5, 2 - Math.floor(Math.log10(size))));
  return x.toFixed(digits) + (unit === "value" ? "" : " " + unit);
}
// The same without the unit, where a row or a column names it.
const bare = (x, unit) => (unit.startsWith("share") || unit === "yes or no" ? number(x, unit) : number(x, "value"));
const times = (x) => (x === null || Number.isNaN(x) ? "not measured" : (x < 0.095 ? x.toFixed(2) : x.toFixed(1)) + "×");
const between = (cell, unit) =>
  Number.isNaN(cell.low) ? "" : bare(cell.low, unit) + " to " + bare(cell.high, unit);
const towerOf = (name) => (run.towers.length > 1 ? " (" + name + ")" : "");
const headName = (head) => "Layer " + head[1] + ", head " + head[2] + towerOf(head[0]);
const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th");

// One tab stop for each group; arrow keys move inside it, Home and End to its ends, Enter chooses.
function roving(items, tell, columns, choose) {
  items.forEach((item, i) => {
    item.setAttribute("tabindex", i ? "-1" : "0");
    item.addEventListener("focus", () => {
      items.forEach((one) => one.setAttribute("tabindex", one === item ? "0" : "-1"));
      tell(item, i);
    });
    item.addEventListener("mouseenter", () => tell(item, i));
    if (choose) item.addEventListener("click", () => choose(item, i));
    item.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
      let to = null;
      if (event.key in steps) to = i + steps[event.key];
      if (event.key === "Home") to = 0;
      if (event.key === "End") to = items.length - 1;
      if (choose && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        choose(item, i);
      }
      if (to === null || !items[to]) return;
      event.preventDefault();
      items[to].focus();
    });
  });
}

// Elements are made with text only: no string of a model or a text is ever read as HTML.
function make(tag, attributes, ...inside) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) found.setAttribute(name, value);
  found.append(...inside);
  return found;
}
