"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // One tab stop for each group; arrow keys move inside it, Home and End to its ends.
  function roving(items, tell, columns) {
    if (!items.length) return;
    items.forEach((item, i) => {
      item.setAttribute("tabindex", i ? "-1" : "0");
      item.addEventListener("focus", () => {
        items.forEach((other) => other.setAttribute("tabindex", other === item ? "0" : "-1"));
        tell(item, i);
      });
      item.addEventListener("mouseenter", () => tell(item, i));
      item.addEventListener("keydown", (event) => {
        const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
        let to = null;
        if (event.key in steps) to = i + steps[event.key];
        if (event.key === "Home") to = 0;
        if (event.key === "End") to = items.length - 1;
        if (to === null || !items[to]) return;
        event.preventDefault();
        items[to].focus();
      });
    });
  }

  // Words ------------------------------------------------------------------------------------
  const words = Array.from(document.querySelectorAll("#words .word"));
  const select = document.getElementById("layer");
  const readout = document.getElementById("word-readout");
  const level = (x) => data.levels.filter((edge) => x >= edge).length;
  const times = (x) => (x === null ? "not measured" : x < 0.095 ? x.toFixed(2) : x.toFixed(1)) + "×";
  const value = (word) => (select.value === "all" ? word.all : word.layers[Number(select.value)]);
  let last = null;
  function tellWord(item, i) {
    last = [item, i];
    const word = data.words[i];
    const where = select.value === "all" ? "mean of all layers" : select.selectedOptions[0].textContent;
    readout.textContent = "“" + word.text + "” (word " + (i + 1) + "): " + times(value(word)) +
      " its even share (" + where + "). Controls, mean of all layers: words shuffled " +
      times(word.shuffled) + " (what stands in its place then " + times(word.place) + "), random weights " + times(word.random) + ".";
  }
  function paint() {
    words.forEach((item, i) => {
      const x = value(data.words[i]);
      for (let n = 0; n <= data.levels.length; n++) item.classList.toggle("l" + n, n === level(x));
      item.querySelector("sub").textContent = times(x);
    });
    if (last) tellWord(last[0], last[1]);
  }
  roving(words, tellWord, 1);
  select.addEventListener("change", paint);
  document.getElementById("numbers").addEventListener("change", (event) => {
    document.getElementById("words").classList.toggle("numbers", event.target.checked);
  });

  // Charts -----------------------------------------------------------------------------------
  function colours(isDark) {
    const ink = isDark ? "#e9ecef" : "#1b1f24", line = isDark ? "#3d454f" : "#dfe3e8";
    const text = { labelColor: ink, titleColor: ink };
    return {
      background: "transparent", view: { stroke: null }, title: { color: ink, fontSize: 13, anchor: "start" },
      axis: Object.assign({ gridColor: line, labelFontSize: 11, titleFontSize: 12 }, text),
      legend: Object.assign({ labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" }, text),
    };
  }
  function draw(isDark) {
    const jobs = Array.from(document.querySelectorAll(".chart")).map((place) =>
      vegaEmbed(place, data.charts[place.dataset.chart], {
        actions: false, renderer: "svg", ast: true, config: colours(isDark), tooltip: { theme: isDark ? "dark" : "light" },
      }).then(() => {
        const out = document.getElementById(place.dataset.readout);
        const cells = Array.from(place.querySelectorAll("svg [aria-roledescription='rect mark'], svg [aria-roledescription='point']"));
        const columns = Number(place.dataset.columns);
        const title = place.dataset.title;
        roving(cells, (cell) => {
          out.textContent = title + ". " + cell.getAttribute("aria-label");
        }, columns);
      }));
    return Promise.all(jobs).then(() => document.documentElement.setAttribute("data-drawn", String(jobs.length)));
  }
  draw(dark.matches);
  dark.addEventListener("change", () => draw(dark.matches));
  window.addEventListener("beforeprint", () => draw(false));
  window.addEventListener("afterprint", () => draw(dark.matches));
})();
