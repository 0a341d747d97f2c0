"use strict";
// Draws plots with uPlot. Their colours come from the style sheet, so that they follow the light or dark mode.

const plots = new Set();
const COLOURS = ["--blue", "--orange", "--green", "--red", "--violet", "--grey"];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** An axis in the colours of the page. */
function axis(extra) {
  return {
    stroke: () => colour("--muted"),
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { stroke: () => colour("--line"), width: 1, size: 4 },
    font: "12px system-ui",
    labelFont: "12px system-ui",
    labelSize: 18,
    size: 50,
    values: (_, splits) => splits.map(short),
    ...extra,
  };
}

/** A number at an axis, with few digits regardless of its size. */
function short(value) {
  if (value === null) return "";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(0) : String(Number(value.toPrecision(4)));
}

/**
 * Draw a plot with a title and an optional note.
 * x: numbers; lines: [{label, values, low, high, colour, points, line}]; a line with `low` and `high` has a band.
 */
function plot(place, title, xLabel, yLabel, x, lines, options = {}) {
  const known = lines.filter((line) => line.values.some((value) => value !== null && value !== undefined));
  if (!known.length) return;
  const box = el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, title, options.note ? el("small", {}, options.note) : null),
  );
  const target = el("div", { class: "plot" });
  box.append(target);
  place.append(box);
  const series = [{ label: options.xShort || xLabel, value: (_, value) => (value === null ? "" : number(value)) }];
  const data = [x];
  const bands = [];
  known.forEach((line, at) => {
    const name = line.colour || COLOURS[at % COLOURS.length];
    const fewPoints = x.length <= 60;
    series.push({
      label: line.label,
      stroke: () => colour(name),
      width: line.points ? 0 : 2,
      paths: line.points ? () => null : undefined,
      points: {
        show: line.points || fewPoints,
        size: line.points ? 4 : 6,
        fill: () => colour(name),
        stroke: () => colour(name),
      },
      spanGaps: true,
      dash: line.dash,
      value: (_, value) => (value === null ? "" : number(value)),
    });
    data.push(line.values.map((value) => value ?? null));
    if (line.low) {
      const place = series.length;
      for (const values of [line.high, line.low]) {
        series.push({
          label: "",
          class: "hidden",
          stroke: "transparent",
          points: { show: false },
          width: 0,
          spanGaps: true,
        });
        data.push(values);
      }
      bands.push({ series: [place, place + 1], fill: () => colour(`${name}-soft`) });
    }
  });
  const made = new uPlot(
    {
      width: Math.max(240, target.clientWidth || 300),
      height: options.height || 210,
      scales: {
        x: { time: false, range: options.xRange || ((_, low, high) => padded(low, high)) },
        y: { range: options.yRange || ((_, low, high) => padded(low, high, options.share)) },
      },
      axes: [
        axis({
          label: xLabel,
          incrs: options.whole ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] : undefined,
          size: 32,
        }),
        axis({ label: yLabel }),
      ],
      series,
      bands,
      cursor: { drag: { x: true, y: false } },
      legend: { show: true, live: true },
      hooks: options.hooks || {},
    },
    data,
    target,
  );
  plots.add(made);
}

/** A range around values, at least `share` times their size wide, so that small changes look small. */
function padded(low, high, share = 0) {
  if (low === null || high === null) return [0, 1];
  const least = share * Math.max(Math.abs(low), Math.abs(high));
  const room = Math.max((high - low) * 0.08, (least - (high - low)) / 2) || Math.abs(high) * 0.1 || 0.5;
  return [low - room, high + room];
}

function fromZero(_, low, high) {
  return [0, Math.max(high || 0, 1) * 1.1];
}

/** uPlot hooks that write a text next to every point of the first line. */
function labelled(texts) {
  return {
    draw: [
      (made) => {
        const context = made.ctx;
        context.save();
        context.fillStyle = colour("--text");
        context.font = `${12 * devicePixelRatio}px system-ui`;
        made.data[0].forEach((x, at) => {
          const y = made.data[1][at];
          if (y !== null) context.fillText(texts[at], made.valToPos(x, "x", true) + 8, made.valToPos(y, "y", true) - 6);
        });
        context.restore();
      },
    ],
  };
}

addEventListener("resize", () =>
  plots.forEach((made) =>
    made.root.isConnected
      ? made.setSize({ width: Math.max(240, made.root.parentElement.clientWidth), height: made.height })
      : plots.delete(made),
  ),
);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  plots.forEach((made) => made.redraw(false, true)),
);
