"use strict";
// One prompt with all its answers, and the same prompt in other iterations.

const MAX_REASONS = 6;

async function showGroup(place, samples, set, at, marked) {
  const turn = (place.turn = (place.turn || 0) + 1);
  let group;
  try {
    group = await samples.group(set, at);
  } catch (error) {
    if (turn === place.turn)
      place.replaceChildren(el("p", { class: "note" }, `The texts cannot be shown: ${error.message}.`));
    return;
  }
  if (turn !== place.turn) return;
  const scores = (answer) => answer.scores[0] ?? -Infinity;
  const ranked = [...group.answers].sort((a, b) => scores(b) - scores(a) || a.sample - b.sample);
  const tags = samples.data.prompts[group.prompt]?.[1] || [];
  const older = await history(samples, set, group);
  if (turn !== place.turn) return;
  place.replaceChildren(
    el("h3", {}, titleOf(set)),
    conversation(group),
    el(
      "p",
      { class: "note" },
      `prompt ${group.prompt}`,
      tags.map((tag) => el("span", { class: "tag" }, visible(tag))),
    ),
    ...pairReasons(set, group),
    ...ranked.map((answer) => card(samples, set, at, group, answer, answer.sample === marked)),
    ...(older ? [older] : []),
  );
  const below = matchMedia("(max-width: 760px)").matches; // the list, which fills half of a phone's screen
  place.scrollIntoView({ block: below ? "start" : "nearest" });
}

function conversation(group) {
  const turns = group.messages.map(([role, content]) =>
    el("div", { class: `turn ${role}` }, el("b", {}, role), textOf(content, "div")),
  );
  const known =
    group.answer === null
      ? null
      : el("div", { class: "turn" }, el("b", {}, "known answer"), textOf(group.answer, "div"));
  return el("div", { class: "conversation" }, turns, known);
}

/** Sentences on which answers became pairs, and why. */
function pairReasons(set, group) {
  if (!set.pairs) return [];
  if (!group.pairs.length) {
    const scores = group.answers.map((answer) => answer.scores[0]).filter((score) => score !== null);
    const why =
      new Set(scores).size < 2
        ? "their scores are all equal"
        : "no two of them fit the strategy and the margins";
    return [el("p", { class: "why" }, `No pair was made of these answers: ${why} (strategy ${set.pairs.strategy}).`)];
  }
  const name = set.scorers[0] || "score";
  const further = group.pairs.length - MAX_REASONS;
  const rest = further > 0 ? [el("p", { class: "note" }, `and ${further} further pairs, with smaller margins`)] : [];
  const largest = [...group.pairs].sort((a, b) => b.margin - a.margin).slice(0, MAX_REASONS);
  return largest
    .map((pair) =>
      el(
        "p",
        { class: "why" },
        `${rankOf(group, pair.chosen, name)} was chosen over ${lowerFirst(rankOf(group, pair.rejected, name))}: margin ${number(pair.margin)}, strategy ${set.pairs.strategy}.`,
      ),
    )
    .concat(rest);
}

function rankOf(group, sample, name) {
  const scores = group.answers.map((answer) => answer.scores[0]).filter((score) => score !== null);
  const score = group.answers.find((answer) => answer.sample === sample)?.scores[0] ?? null;
  if (score === null) return `Answer ${sample}`;
  const above = scores.filter((other) => other > score).length;
  const rank =
    above === 0
      ? "the highest"
      : scores.filter((other) => other < score).length === 0
        ? "the lowest"
        : `number ${above + 1}`;
  return `Answer ${sample} (${name} ${number(score)}, ${rank} of ${scores.length})`;
}

function lowerFirst(text) {
  return text[0].toLowerCase() + text.slice(1);
}

function card(samples, set, at, group, answer, marked) {
  const chosen = group.pairs.some((pair) => pair.chosen === answer.sample);
  const rejected = group.pairs.some((pair) => pair.rejected === answer.sample);
  const text = textOf(answer.text || "(empty)", "div");
  const body = el("div", { class: "answer-text" }, text);
  const toggle = el("button", { type: "button", "aria-pressed": "false" }, "token log-probs");
  toggle.addEventListener("click", async () => {
    const on = toggle.getAttribute("aria-pressed") !== "true";
    toggle.setAttribute("aria-pressed", String(on));
    if (!on) return body.replaceChildren(text);
    try {
      const place = group.answers.indexOf(answer);
      body.replaceChildren(tokens((await samples.tokens(set, at))[place]));
    } catch (error) {
      body.replaceChildren(
        text,
        el("p", { class: "note" }, `The log-probabilities cannot be shown: ${error.message}.`),
      );
    }
  });
  const scores = set.scorers.map((name, place) =>
    el("span", { class: "score" }, `${name} `, el("b", {}, number(answer.scores[place]))),
  );
  const head = el(
    "div",
    { class: "head" },
    el(
      "a",
      { href: fragment(set, group.prompt, answer.sample), title: "link to this answer" },
      `answer ${answer.sample}`,
    ),
    chosen ? el("span", { class: "badge chosen" }, "chosen") : null,
    rejected ? el("span", { class: "badge rejected" }, "rejected") : null,
    scores,
    el("span", { class: "score" }, `${answer.length} tokens`),
    answer.finish === "length" ? el("span", { class: "badge cut" }, "cut off") : null,
    toggle,
  );
  return el(
    "article",
    { class: `answer${chosen ? " chosen" : ""}${rejected ? " rejected" : ""}${marked ? " marked" : ""}` },
    head,
    body,
    answer.details ? scorerDetails(set, answer) : null,
  );
}

/** What scorers have reported in addition to their scores: parts of a score, an extracted answer, an explanation. */
function scorerDetails(set, answer) {
  const rows = set.scorers.flatMap((name, place) => {
    const [parts, extras] = answer.details[place] ?? [{}, {}];
    const numbers = Object.entries(parts).map(([part, value]) => [part, number(value)]);
    const texts = Object.entries(extras).map(([key, value]) => [
      key,
      typeof value === "string" ? value : JSON.stringify(value),
    ]);
    return [...numbers, ...texts].map(([key, value]) => [`${name} ${key}`, value]);
  });
  return el(
    "dl",
    { class: "scorer-details" },
    rows.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, textOf(value, "span"))]),
  );
}

/** The tokens of an answer; the less probable, the stronger the colour. */
function tokens(list) {
  const spans = list.map(({ text, logprob }) => {
    const strength = logprob === null ? 0 : Math.min(1, -logprob / 6);
    const title =
      logprob === null
        ? "log-probability unknown"
        : `log-probability ${logprob.toFixed(2)}, probability ${(100 * Math.exp(logprob)).toFixed(1)} %`;
    return el("span", { class: "token", style: `--strength:${strength.toFixed(2)}`, title }, visible(text));
  });
  const known = list.map((token) => token.logprob).filter((value) => value !== null);
  const sum = known.reduce((total, value) => total + value, 0);
  const note = known.length
    ? `sum ${sum.toFixed(2)} nats, mean ${(sum / known.length).toFixed(2)}; the stronger the colour, the less probable`
    : "unknown for these answers";
  return el("div", {}, el("div", { class: "model-text tokens", dir: "auto" }, spans), el("p", { class: "note" }, note));
}

/** The same prompt in all iterations that have it: one answer of each, as a difference from the previous one. */
async function history(samples, set, group) {
  const sets = samples.sets
    .filter((other) => other.iteration !== null && other.role === set.role && other.place.has(group.prompt))
    .sort((a, b) => a.iteration - b.iteration);
  if (sets.length < 2) return null;
  const pick = el(
    "select",
    { "aria-label": "Answer to compare" },
    [
      ["best", "best answer of each"],
      ["worst", "worst answer of each"],
      ["first", "first answer of each"],
    ].map(([value, title]) => el("option", { value }, title)),
  );
  const rows = el("div", {});
  const draw = async () => {
    const found = [];
    for (const other of sets) {
      try {
        found.push([other, await samples.group(other, other.place.get(group.prompt))]);
      } catch {
        found.push([other, null]);
      }
    }
    let before = null;
    rows.replaceChildren(
      ...found.map(([other, otherGroup]) => {
        if (otherGroup === null)
          return el("p", { class: "note" }, `${titleOf(other)}: the texts are missing next to this page.`);
        const answer = pickAnswer(otherGroup, pick.value);
        const shown = before === null ? textOf(answer.text, "div") : difference(before, answer.text);
        before = answer.text;
        const mean = other.columns.mean[other.place.get(group.prompt)];
        const facts = `score ${number(answer.scores[0])}, mean of all ${number(mean)}, ${answer.length} tokens`;
        return el(
          "article",
          { class: "answer" },
          el(
            "div",
            { class: "head" },
            el("a", { href: fragment(other, group.prompt, answer.sample) }, titleOf(other)),
            el("span", { class: "score" }, facts),
          ),
          shown,
        );
      }),
    );
  };
  pick.addEventListener("change", draw);
  await draw();
  return el(
    "div",
    { class: "history" },
    el("h3", {}, "The same prompt over the iterations"),
    el(
      "p",
      { class: "note" },
      pick,
      " New text is ",
      el("ins", {}, "marked"),
      ", removed text ",
      el("del", {}, "struck out"),
      ".",
    ),
    rows,
  );
}

function pickAnswer(group, which) {
  const scored = group.answers.filter((answer) => answer.scores[0] !== null && answer.scores[0] !== undefined);
  if (which === "first" || !scored.length) return group.answers[0];
  return scored.reduce((best, answer) =>
    (which === "best" ? answer.scores[0] > best.scores[0] : answer.scores[0] < best.scores[0]) ? answer : best,
  );
}

function difference(before, after) {
  const parts = Diff.diffWordsWithSpace(before, after, { maxEditLength: 2000 }) || [
    { value: before, removed: true },
    { value: after, added: true },
  ];
  return el(
    "div",
    { class: "model-text", dir: "auto" },
    parts.map((part) => el(part.added ? "ins" : part.removed ? "del" : "span", {}, visible(part.value))),
  );
}
