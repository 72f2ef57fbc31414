// One statistic for every head: three maps on one scale, and the list to choose the statistic from.
const statSelect = byId("statistic");
const chosen = () => run.stats[Number(statSelect.value)];

// What the three maps show: controls of this text, or two runs and their difference.
function panels(stat) {
  const of = (source, kind) => (source ? source[0].cells(source[1]).map((c) => ({ layer: c.layer, head: c.head, value: c[kind] })) : []);
  if (!other) return ["values", "shuffled", "random"].map((kind, n) => ({ title: WHICH[n], cells: of([run, stat], kind) }));
  const twin = other.stat(stat.key, stat.tower) || other.stat(stat.key);
  const mine = of([run, stat], "values"), theirs = twin ? of([other, twin], "values") : [];
  const there = new Map(theirs.map((c) => [c.layer + "/" + c.head, c.value]));
  const difference = mine.filter((c) => there.has(c.layer + "/" + c.head))
    .map((c) => ({ layer: c.layer, head: c.head, value: there.get(c.layer + "/" + c.head) - c.value }));
  return [
    { title: "A: " + run.short, cells: mine },
    { title: "B: " + other.short, cells: theirs, stat: twin },
    { title: "B − A", cells: difference, signed: true },
  ];
}

function drawMaps() {
  const stat = chosen(), shown = panels(stat), readout = byId("map-readout");
  byId("map-title").textContent = stat.title + towerOf(stat.tower);
  byId("map-meaning").textContent = stat.meaning;
  const [low, high] = [Math.min(...stat.even), Math.max(...stat.even)];
  const close = number(low, stat.unit) === number(high, stat.unit);
  byId("map-even").textContent = "Even attention would give " + (close ? number(high, stat.unit) : number(low, stat.unit) + " to " + number(high, stat.unit)) + ".";
  const same = upward(shown.filter((p) => !p.signed).flatMap((p) => p.cells.map((c) => c.value)), stat.unit);
  const jobs = shown.map((panel, n) => {
    const place = document.querySelector("[data-chart='map" + n + "']");
    place.setAttribute("aria-label", stat.title + ", " + panel.title + ": layers by heads");
    place.closest(".figure").dataset.name = stat.title + " " + panel.title;
    const own = panel.stat || stat;
    const scale = panel.signed ? signed(panel.cells.map((c) => c.value)) : same;
    return draw(place, heat(own, panel.cells, panel.title, scale), (marks) => {
      roving(marks, (mark) => { readout.textContent = panel.title + ". " + mark.getAttribute("aria-label"); }, own.width, (mark) => {
        const [, layer, head] = mark.getAttribute("aria-label").match(/^Layer (\d+), head (\d+)/);
        chooseHead([stat.tower, Number(layer), Number(head)]);
      });
      mark(place);
    });
  });
  return Promise.all(jobs);
}

// The square of the chosen head is outlined in every map.
function mark(place) {
  const name = "Layer " + head[1] + ", head " + head[2] + ":";
  place.querySelectorAll("svg [aria-roledescription='rect mark']").forEach((square) =>
    square.classList.toggle("chosen", square.getAttribute("aria-label").startsWith(name)));
}
statSelect.addEventListener("change", () => {
  drawMaps();
  byId("heads-table").dispatchEvent(new Event("refill"));
});
