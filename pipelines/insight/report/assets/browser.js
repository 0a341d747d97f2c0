"use strict";
// The list of prompts: which set, which order, which filters.

const PAGE = 50;
const ORDERS = {
  margin: ["largest margin", (set, at) => set.columns.margin[at], -1],
  "margin-up": ["smallest margin", (set, at) => set.columns.margin[at], 1],
  best: ["highest score", (set, at) => set.columns.best[at], -1],
  worst: ["lowest score", (set, at) => set.columns.worst[at], 1],
  spread: ["most different scores", (set, at) => spread(set, at), -1],
  mean: ["highest mean score", (set, at) => set.columns.mean[at], -1],
  long: ["longest answer", (set, at) => set.columns.longest[at], -1],
  short: ["shortest answers", (set, at) => set.columns.length[at], 1],
  gained: ["gained most over iterations", null, -1],
  lost: ["lost most over iterations", null, 1],
  file: ["as sampled", (set, at) => at, 1],
};

class Browser {
  constructor(place, samples) {
    this.samples = samples;
    this.shown = PAGE;
    this.matches = [];
    this.build(place);
    addEventListener("hashchange", () => this.follow());
  }

  build(place) {
    const change = () => {
      this.shown = PAGE;
      this.refresh();
    };
    const field = (name, attributes) =>
      el("input", { ...attributes, "aria-label": name, placeholder: name, oninput: change });
    this.set = el("select", { "aria-label": "Answers of", onchange: change }, this.options());
    this.order = el(
      "select",
      { "aria-label": "Order", onchange: change },
      Object.entries(ORDERS).map(([key, [title]]) => el("option", { value: key }, title)),
    );
    this.finish = el(
      "select",
      { "aria-label": "Finish reason", onchange: change },
      [
        ["", "any ending"],
        ["length", "some cut off"],
        ["stop", "none cut off"],
      ].map(([value, title]) => el("option", { value }, title)),
    );
    this.tag = el("select", { "aria-label": "Tag", onchange: change });
    this.text = field("search texts", { type: "search", class: "wide" });
    this.limits = {
      minScore: field("score from", { type: "number", step: "any" }),
      maxScore: field("score to", { type: "number", step: "any" }),
      minLength: field("length from", { type: "number" }),
      maxLength: field("length to", { type: "number" }),
      minMargin: field("margin from", { type: "number", step: "any" }),
    };
    this.count = el("p", { class: "note", role: "status" });
    this.list = el("ol", { class: "prompts" });
    this.more = el(
      "button",
      {
        type: "button",
        onclick: () => {
          this.shown += PAGE;
          this.show();
        },
      },
      "Show more",
    );
    this.detail = el("div", { class: "detail", tabindex: "-1" });
    const further = el(
      "details",
      {},
      el("summary", {}, "More filters"),
      el("div", { class: "filters" }, Object.values(this.limits), this.finish, this.tag),
    );
    place.replaceChildren(
      el("div", { class: "filters" }, this.set, this.order, this.text),
      further,
      this.count,
      el("div", { class: "panes" }, el("div", { class: "list" }, this.list, this.more), this.detail),
    );
    const best = this.samples.sets.filter((set) => set.pairs && set.iteration !== null).pop();
    const trained = this.samples.sets.filter((set) => set.iteration !== null && set.role === "generation").pop();
    if (best || trained) this.set.value = (best || trained).name;
    if (!best) this.order.value = "spread";
    this.detail.append(el("p", { class: "note" }, "Choose a prompt to see all answers to it."));
  }

  /** The sets, the latest iteration first. */
  options() {
    const sets = [...this.samples.sets].sort(
      (a, b) => (b.iteration ?? -1) - (a.iteration ?? -1) || (a.role === "generation" ? -1 : 1),
    );
    return sets.map((set) => el("option", { value: set.name }, titleOf(set)));
  }

  /** Replace the samples by newer ones, and keep what is selected. */
  renew(samples) {
    const before = this.set.value;
    this.samples = samples;
    this.set.replaceChildren(...this.options());
    if (samples.byName.has(before)) this.set.value = before;
  }

  get current() {
    return this.samples.byName.get(this.set.value);
  }

  /** Apply the selected set, filters and order. */
  async refresh() {
    const set = this.current;
    if (!set) return;
    this.tags(set);
    const turn = (this.turn = (this.turn || 0) + 1);
    const key = ORDERS[this.order.value][1];
    const value = key ? (at) => key(set, at) : (at) => this.samples.changeOf(set, at);
    const direction = ORDERS[this.order.value][2];
    const places = set.columns.prompt.map((_, at) => at).filter((at) => this.passes(set, at));
    const wanted = await this.search(set, places);
    if (turn !== this.turn) return;
    const rank = (at) => value(at) ?? -direction * Infinity * -1;
    this.matches = wanted.sort((a, b) => {
      const [x, y] = [rank(a), rank(b)];
      return x === y ? a - b : direction * (x < y ? -1 : 1);
    });
    this.show();
  }

  tags(set) {
    const found = new Set(set.columns.prompt.flatMap((prompt) => this.samples.data.prompts[prompt]?.[1] || []));
    const before = this.tag.value;
    this.tag.replaceChildren(
      el("option", { value: "" }, found.size ? "any tag" : "no tags"),
      ...[...found].sort().map((tag) => el("option", { value: tag }, visible(tag))),
    );
    this.tag.value = found.has(before) ? before : "";
    this.tag.disabled = !found.size;
  }

  passes(set, at) {
    const columns = set.columns;
    const limit = (name) => (this.limits[name].value === "" ? null : Number(this.limits[name].value));
    const within = (value, low, high) =>
      (low === null || (value !== null && value >= low)) && (high === null || (value !== null && value <= high));
    if (!within(columns.best[at], limit("minScore"), null) || !within(columns.worst[at], null, limit("maxScore")))
      return false;
    if (!within(columns.longest[at], limit("minLength"), null) || !within(columns.length[at], null, limit("maxLength")))
      return false;
    if (!within(columns.margin[at], limit("minMargin"), null)) return false;
    if (this.finish.value === "length" && !columns.truncated[at]) return false;
    if (this.finish.value === "stop" && columns.truncated[at]) return false;
    return !this.tag.value || (this.samples.data.prompts[columns.prompt[at]]?.[1] || []).includes(this.tag.value);
  }

  /** The prompts whose text or answers contain the searched text, ignoring case. */
  async search(set, places) {
    const wanted = this.text.value.trim().toLowerCase();
    this.unsearched = 0;
    if (!wanted) return places;
    const found = [];
    for (const at of places) {
      if (set.columns.prompt[at].startsWith(wanted)) {
        found.push(at);
        continue;
      }
      try {
        const group = await this.samples.group(set, at);
        const texts = [...group.messages.map(([, content]) => content), ...group.answers.map((answer) => answer.text)];
        if (texts.some((text) => text.toLowerCase().includes(wanted))) found.push(at);
      } catch {
        this.unsearched += 1;
      }
    }
    return found;
  }

  show() {
    const set = this.current;
    const rows = this.matches.slice(0, this.shown).map((at) => this.row(set, at));
    this.list.replaceChildren(...rows);
    this.more.hidden = this.matches.length <= this.shown;
    const total = set.columns.prompt.length;
    const notes = [`${this.matches.length} of ${total} prompts`];
    if (set.left_out) notes.push(`${set.left_out} further ones count in the figures and are not shown`);
    if (this.unsearched) notes.push(`the texts of ${this.unsearched} are missing next to this page and were not searched`);
    this.count.textContent = `${notes.join("; ")}.`;
  }

  row(set, at) {
    const columns = set.columns;
    const excerpt = this.samples.data.prompts[columns.prompt[at]]?.[0] ?? columns.prompt[at];
    const change = this.samples.changeOf(set, at);
    const facts = [
      columns.margin[at] === null ? null : `margin ${number(columns.margin[at])}`,
      columns.best[at] === null ? null : `scores ${number(columns.worst[at])} to ${number(columns.best[at])}`,
      `${number(columns.length[at])} tokens`,
      change === null ? null : `change ${change > 0 ? "+" : ""}${number(change)}`,
      columns.truncated[at] ? `${columns.truncated[at]} cut off` : null,
    ].filter(Boolean);
    const link = el(
      "a",
      { href: fragment(set, columns.prompt[at]) },
      textOf(excerpt || "(no text)"),
      el("small", {}, facts.join(" · ")),
    );
    return el("li", { class: this.open === `${set.name} ${at}` ? "open" : null }, link);
  }

  /** Open the sample in the page's address, if there is one. */
  follow() {
    const wanted = location.hash.match(/^#sample=([^;]*);([^;]*)(?:;(\d+))?$/);
    if (!wanted) return;
    const set = this.samples.byName.get(decodeOrNull(wanted[1]));
    const at = set?.place.get(decodeOrNull(wanted[2]));
    if (at === undefined) {
      this.detail.replaceChildren(
        el("p", { class: "note" }, "This report does not have the sample in the address."),
      );
      return;
    }
    if (this.set.value !== set.name) {
      this.set.value = set.name;
      this.shown = PAGE;
      this.refresh();
    }
    this.open = `${set.name} ${at}`;
    showGroup(this.detail, this.samples, set, at, wanted[3] === undefined ? null : Number(wanted[3]));
    this.list.querySelector(".open")?.classList.remove("open");
    [...this.list.children]
      .find((row) => row.querySelector("a").getAttribute("href") === fragment(set, set.columns.prompt[at]))
      ?.classList.add("open");
  }

  /** Links to notable samples: [{id, title, target}]. */
  notable() {
    const last = Math.max(...this.samples.sets.map((set) => set.iteration ?? -1));
    const held = (set) => set.role === "heldout/generation" && set.iteration === last;
    const trained = (set) => set.iteration !== null && set.pairs;
    const trainedBySamples = (set) => set.iteration === last && set.role === "generation" && !set.pairs;
    const change = (set, at) => this.samples.changeOf(set, at);
    return [
      ["largest-margin", "The pair with the largest margin", trained, (set, at) => set.columns.margin[at]],
      ["differ", "The prompt whose answers differ most", trainedBySamples, spread],
      ["gained", "The prompt whose answers gained most", held, change],
      ["lost", "The prompt whose answers lost most", held, (set, at) => negative(change(set, at))],
      ["worst", "The answer with the lowest score", held, (set, at) => negative(set.columns.worst[at])],
      ["longest", "The longest answer", held, (set, at) => set.columns.longest[at]],
    ].flatMap(([id, title, wanted, value]) => {
      const found = this.extreme(wanted, value);
      return found ? [{ id, title, target: found }] : [];
    });
  }

  /** The link to the prompt with the highest value in the wanted sets. */
  extreme(wanted, value) {
    let best = null;
    for (const set of this.samples.sets.filter(wanted)) {
      set.columns.prompt.forEach((_, at) => {
        const here = value(set, at);
        if (here !== null && (best === null || here > best.here)) best = { set, at, here };
      });
    }
    return best && fragment(best.set, best.set.columns.prompt[best.at]);
  }
}

/** The highest score of a prompt's answers minus the lowest. */
function spread(set, at) {
  return set.columns.best[at] === null ? null : set.columns.best[at] - set.columns.worst[at];
}

function negative(value) {
  return value === null ? null : -value;
}

function decodeOrNull(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return null;
  }
}

function titleOf(set) {
  const what = { generation: "training prompts", "heldout/generation": "held-out prompts" }[set.role] || set.role;
  return set.iteration === null ? what : `iteration ${set.iteration}: ${what}`;
}

function fragment(set, prompt, sample) {
  return `#sample=${encodeURIComponent(set.name)};${encodeURIComponent(prompt)}${sample === undefined ? "" : `;${sample}`}`;
}
