"use strict";
// Draws the curves of a report: of evaluations, of answers and pairs, and of trainings.

function drawCurves(place, data) {
  const rows = data.evaluations;
  const iterations = rows.map((row) => row.iteration);
  const column = (name) => rows.map((row) => row[name] ?? null);
  const banded = (label, name, tint) => {
    const mean = column(`${name}_mean`);
    const half = column(`${name}_ci95`);
    const edge = (sign) =>
      mean.map((value, at) => (value === null || half[at] === null ? null : value + sign * half[at]));
    return { label, values: mean, low: edge(-1), high: edge(1), colour: tint };
  };
  const simple = (title, y, name, options) =>
    plot(place, title, "iteration", y, iterations, [{ label: y, values: column(name) }], { whole: true, ...options });
  const perIteration = (title, y, role, lines, options) => {
    const sets = data.sets.filter((set) => set.role === role && set.iteration !== null);
    plot(
      place,
      title,
      "iteration",
      y,
      sets.map((set) => set.iteration),
      lines.map(([label, read, tint]) => ({ label, values: sets.map(read), colour: tint })),
      { whole: true, ...options },
    );
  };
  plot(place, "Reward of held-out answers", "iteration", "reward", iterations, [banded("reward", "reward")], {
    whole: true,
    note: "mean, with its 95 % interval",
  });
  plot(
    place,
    "Gold reward of held-out answers",
    "iteration",
    "gold reward",
    iterations,
    [banded("gold reward", "gold_reward", "--green")],
    { whole: true, note: "never seen by training" },
  );
  for (const name of Object.keys(rows[0] || {})) {
    if (name.endsWith("_mean") && !["reward_mean", "gold_reward_mean"].includes(name)) {
      const scorer = name.slice(0, -5).replaceAll("_", " ");
      simple(`Score of held-out answers: ${scorer}`, scorer, name);
    }
  }
  const own = data.own_evaluations;
  for (const name of new Set(own.flatMap((row) => Object.keys(row)))) {
    if (name === "iteration") continue;
    plot(
      place,
      visible(name),
      "iteration",
      "",
      own.map((row) => row.iteration),
      [{ label: visible(name), values: own.map((row) => row[name] ?? null), colour: "--violet" }],
      { whole: true, note: "an evaluation of your own" },
    );
  }
  const moved = rows
    .filter((row) => typeof row.kl === "number" && typeof row.reward_mean === "number")
    .sort((a, b) => a.kl - b.kl);
  if (moved.length > 1) {
    plot(
      place,
      "Reward against KL",
      "KL from the initial policy (nats per answer)",
      "reward",
      moved.map((row) => row.kl),
      [{ label: "reward", values: moved.map((row) => row.reward_mean), colour: "--violet" }],
      {
        note: "one point per iteration: the reward gained for each nat",
        xShort: "KL",
        hooks: labelled(moved.map((row) => String(row.iteration))),
      },
    );
  }
  scatter(place, data);
  simple("Length of held-out answers", "tokens", "response_length", { share: 0.3 });
  perIteration(
    "Length of chosen and rejected answers",
    "tokens",
    "generation",
    [
      ["chosen", (set) => set.pairs?.chosen_length, "--green"],
      ["rejected", (set) => set.pairs?.rejected_length, "--red"],
    ],
    { share: 0.3 },
  );
  perIteration("Score of chosen and rejected answers", "score", "generation", [
    ["chosen", (set) => set.pairs?.chosen_score, "--green"],
    ["rejected", (set) => set.pairs?.rejected_score, "--red"],
  ]);
  perIteration(
    "Does the reward go with length?",
    "correlation",
    "generation",
    [
      ["within prompts", (set) => set.correlation.within],
      ["over all answers", (set) => set.correlation.across],
    ],
    { note: "−1 to 1; from 0.3 on the reward prefers length", yRange: () => [-1.05, 1.05] },
  );
  perIteration(
    "Prompts that carry a gradient",
    "%",
    "generation",
    [["different scores", (set) => (set.groups_scored ? (100 * set.groups_with_gradient) / set.groups_scored : null)]],
    { note: "their answers do not all have the same score", yRange: () => [-4, 104] },
  );
  const cut = (set) => (set.samples ? (100 * set.truncated) / set.samples : null);
  perIteration("Answers to training prompts cut off", "%", "generation", [["cut off", cut, "--orange"]], {
    note: "by the token limit",
    yRange: fromZero,
  });
  perIteration("Answers to held-out prompts cut off", "%", "heldout/generation", [["cut off", cut, "--orange"]], {
    note: "by the token limit",
    yRange: fromZero,
  });
  perIteration("Engine against trainer", "nats per token", "generation", [["mean difference", (set) => set.gap]], {
    note: "of log-probabilities under the same weights",
  });
  const drift = data.facts.filter((fact) => fact.drift && typeof fact.drift.mean === "number");
  if (drift.length)
    plot(
      place,
      "Engine against trainer, as training saw it",
      "iteration",
      "nats per token",
      drift.map((fact) => fact.iteration),
      [{ label: "mean drift", values: drift.map((fact) => fact.drift.mean) }],
      { whole: true },
    );
  simple("Win rate against the initial policy", "win rate", "win_rate");
  for (const [stage, bins] of Object.entries(data.calibration))
    calibration(place, stage, bins, data.held_out_accuracy[stage]);
}

/** Reward against length of a sample of answers, of the first and the last iteration. */
function scatter(place, data) {
  const held = data.sets.filter((set) => set.role === "heldout/generation" && set.points.length);
  const sets = held.length
    ? [...new Set([held[0], held[held.length - 1]])]
    : data.sets.filter((set) => set.role === "generation" && set.points.length).slice(-1);
  if (!sets.length) return;
  const jitter = (at) => ((at * 0.618034) % 1) * 0.6 - 0.3;
  const points = sets
    .flatMap((set, line) => set.points.map(([length, score], at) => ({ x: length + jitter(at), score, line })))
    .sort((a, b) => a.x - b.x);
  const lines = sets.map((set, line) => ({
    label: set.iteration === 0 ? "initial policy" : `iteration ${set.iteration}`,
    values: points.map((point) => (point.line === line ? point.score : null)),
    points: true,
    colour: line ? "--orange" : "--blue",
  }));
  plot(
    place,
    "Reward against length",
    "tokens",
    "reward",
    points.map((point) => point.x),
    lines,
    { note: "some answers to held-out prompts" },
  );
}

function calibration(place, stage, bins, accuracy) {
  const known = bins.filter((bin) => bin.count);
  if (!known.length) return;
  const confidence = known.map((bin) => bin.confidence);
  const note =
    accuracy === undefined ? "held-out pairs" : `right about ${(100 * accuracy).toFixed(0)} % of held-out pairs`;
  plot(
    place,
    `Calibration of the reward model`,
    "confidence",
    "accuracy",
    confidence,
    [
      { label: "right", values: known.map((bin) => bin.accuracy) },
      { label: "if perfect", values: confidence, colour: "--grey", dash: [4, 4] },
    ],
    { note, xRange: () => [0.48, 1.02], yRange: () => [-0.03, 1.05] },
  );
}

/** Small plots of training logs: one for each metric, with a line for each iteration. */
function drawTraining(place, data) {
  const roles = [...new Set(data.training.map((one) => one.role))];
  const before = place.querySelector("select")?.value;
  place.replaceChildren();
  if (!roles.length) {
    place.append(el("p", { class: "note" }, "No training is published yet."));
    return;
  }
  const charts = el("div", { class: "charts" });
  const select = el(
    "select",
    { "aria-label": "Training", onchange: () => show(select.value) },
    roles.map((role) => el("option", { value: role }, role)),
  );
  const show = (role) => {
    charts.replaceChildren();
    const runs = data.training.filter((one) => one.role === role).slice(-6);
    const steps = [...new Set(runs.flatMap((one) => one.steps))].sort((a, b) => a - b);
    for (const name of [...new Set(runs.flatMap((one) => Object.keys(one.series)))].sort(bySeries)) {
      const lines = runs.map((one) => {
        const values = new Map(one.steps.map((step, at) => [step, one.series[name]?.[at] ?? null]));
        return {
          label: one.iteration === null ? one.stage : `iteration ${one.iteration}`,
          values: steps.map((step) => values.get(step) ?? null),
        };
      });
      plot(charts, name.replaceAll("_", " "), "step", "", steps, lines, { height: 170 });
    }
  };
  select.value = roles.includes(before) ? before : roles.includes("training") ? "training" : roles[0];
  place.append(el("label", {}, "Training: ", select), charts);
  show(select.value);
}

/** Order of metrics: loss, accuracy, margin, then the others by name. */
function bySeries(a, b) {
  const rank = (name) => ["loss", "accuracy", "margin"].indexOf(name) >>> 0;
  return rank(a) - rank(b) || a.localeCompare(b);
}
