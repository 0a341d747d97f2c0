"use strict";
// Draws one plot for each metric, with a line for each run.

unpack(document.getElementById("data").textContent).then((metrics) => {
  const place = document.getElementById("charts");
  for (const [name, runs] of Object.entries(metrics)) {
    const iterations = [...new Set(runs.flatMap((run) => run.values.map(([iteration]) => iteration)))].sort((a, b) => a - b);
    const lines = runs.map((run) => {
      const known = new Map(run.values);
      return { label: run.run, values: iterations.map((iteration) => known.get(iteration) ?? null) };
    });
    plot(place, name.replaceAll("_", " "), "iteration", "", iterations, lines, { whole: true });
  }
  document.documentElement.dataset.ready = "yes";
});
