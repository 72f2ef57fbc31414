// The text: its words with what they receive; long texts section by section.
const levelOf = (x) => page.levels.filter((edge) => x >= edge).length;
const layerSelect = byId("layer");

// One text with its words; `at` is the part of the ids of its elements.
function Words(source, at) {
  const words = source.words, place = byId("words" + at), readout = byId("word-readout" + at);
  if (!place) return;
  const packed = {};
  for (const name of ["all", "shuffled", "place", "random", "share"]) packed[name] = floats(words[name]);
  const layers = words.layers ? floats(words.layers) : null;
  const value = (i) =>
    layerSelect.value === "all" ? packed.all[i] : layers && layers.length > Number(layerSelect.value) * words.text.length + i
      ? layers[Number(layerSelect.value) * words.text.length + i] : NaN;
  let items = [], first = 0, last = null;
  function tell(item, n) {
    last = [item, n];
    const i = first + n;
    const where = layerSelect.value === "all" ? "mean of all layers" : layerSelect.selectedOptions[0].textContent;
    readout.textContent = "“" + words.text[i] + "” (word " + (i + 1) + "): " + times(value(i)) +
      " its even share (" + where + "). Controls, mean of all layers: words shuffled " +
      times(packed.shuffled[i]) + " (what stands in its place then " + times(packed.place[i]) + "), random weights " + times(packed.random[i]) + ".";
  }
  function paint() {
    items.forEach((item, n) => {
      const x = value(first + n);
      for (let k = 0; k <= page.levels.length; k++) item.classList.toggle("l" + k, k === levelOf(x));
      item.querySelector("sub").textContent = times(x);
    });
    if (last) tell(last[0], last[1]);
  }
  function ready() {
    items = Array.from(place.querySelectorAll(".word"));
    last = null;
    roving(items, tell, 1);
    paint();
  }
  // A section of a long text: its words are made when it is asked for.
  function show(section) {
    first = section.start;
    place.replaceChildren();
    for (let i = section.start; i < section.stop; i++) {
      const word = make("span", { class: "word" + (words.special.includes(i) ? " special" : "") }, make("bdi", {}, words.text[i]), make("sub", {}));
      place.append(word, words.gap[i] === undefined ? " " : words.gap[i]);
    }
    ready();
  }
  const buttons = Array.from(document.querySelectorAll("#sections" + at + " button"));
  buttons.forEach((button, n) => button.addEventListener("click", () => {
    buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    show(words.sections[n]);
  }));
  roving(buttons, () => {}, 1);
  if (words.sections.length) {
    const most = words.sections.reduce((best, one, n) => (one.most > words.sections[best].most ? n : best), 0);
    if (buttons[most]) buttons[most].click();
  } else ready();
  layerSelect.addEventListener("change", paint);
  byId("numbers").addEventListener("change", (event) => place.classList.toggle("numbers", event.target.checked));
}
runs.forEach((one, n) => Words(one, n ? "-b" : ""));

// The words that receive most, with both controls: three shapes on one logarithmic axis.
function ranked() {
  const words = run.words, all = floats(words.all);
  const controls = [all, floats(words.shuffled), floats(words.random)];
  const label = (i) => {
    const text = words.text[i].replace(/\s+/g, " ");
    return (text.length > 18 ? text.slice(0, 17) + "…" : text) + " (" + (i + 1) + ")";
  };
  const order = Array.from(all.keys()).sort((a, b) => all[b] - all[a]).slice(0, 15);
  const values = [];
  for (const k of [2, 1, 0])
    for (const i of order)
      if (controls[k][i] > 0)
        values.push({ word: label(i), times: controls[k][i], which: WHICH[k], says: label(i) + ", " + WHICH[k].toLowerCase() + ": " + controls[k][i].toFixed(2) + " times the even share" });
  const spec = {
    title: "Words that receive most attention", width: "container", height: Math.max(3, order.length) * 20,
    layer: [
      { data: { values: [{ times: 1 }] }, mark: { type: "rule", strokeDash: [4, 3], color: "#888888", aria: false }, encoding: { x: { field: "times", type: "quantitative" } } },
      { data: { values }, mark: { type: "point", size: 80, filled: true, opacity: 0.95 },
        encoding: Object.assign({
          x: { field: "times", type: "quantitative", scale: { type: "log", nice: false, padding: 12 }, axis: { title: "times the even share (log scale)", format: ".3~r", tickCount: 5 } },
          y: { field: "word", type: "nominal", sort: order.map(label), axis: { title: null, grid: true, ticks: false, domain: false } },
          tooltip: { field: "says", title: "received attention" }, description: { field: "says" },
        }, marked(WHICH, { columns: 3 })) },
    ],
  };
  const readout = byId("ranked-readout");
  return draw(document.querySelector("[data-chart='ranked']"), spec, (marks) =>
    roving(marks, (mark) => { readout.textContent = mark.getAttribute("aria-label"); }, 1));
}
