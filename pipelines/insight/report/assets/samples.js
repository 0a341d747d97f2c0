"use strict";
// Loads samples: an index of all prompts at once, their texts in chunks, from the page or from files next to it.

const pendingChunks = new Map();

/** Called by the scripts next to the page, each of which holds a chunk. */
function ratchetChunk(name, content) {
  pendingChunks.get(name)?.(content);
}

class Samples {
  constructor(data) {
    this.data = data;
    this.sets = data.sets;
    this.loaded = new Map();
    this.byName = new Map(data.sets.map((set) => [set.name, set]));
    for (const set of this.sets) {
      set.starts = [];
      set.chunks.reduce((start, size) => (set.starts.push(start), start + size), 0);
      set.place = new Map(set.columns.prompt.map((prompt, place) => [prompt, place]));
    }
    this.addChanges();
  }

  /** Compute, by role, the change of each prompt's mean score from the first to the last iteration that has it. */
  addChanges() {
    this.changes = new Map();
    const roles = new Map();
    for (const set of this.sets) {
      if (set.iteration === null) continue;
      roles.set(set.role, [...(roles.get(set.role) || []), set]);
    }
    for (const [role, sets] of roles) {
      const found = new Map();
      const first = new Map();
      sets.sort((a, b) => a.iteration - b.iteration);
      for (const set of sets) {
        set.columns.prompt.forEach((prompt, place) => {
          const mean = set.columns.mean[place];
          if (mean === null) return;
          if (first.has(prompt)) found.set(prompt, mean - first.get(prompt));
          else first.set(prompt, mean);
        });
      }
      this.changes.set(role, found);
    }
  }

  changeOf(set, place) {
    return this.changes.get(set.role)?.get(set.columns.prompt[place]) ?? null;
  }

  chunkOf(set, place) {
    let chunk = set.starts.length - 1;
    while (set.starts[chunk] > place) chunk -= 1;
    return chunk;
  }

  /** The text of a chunk that is in the page, or null. */
  inside(name) {
    return document.querySelector(`script[data-chunk="${name}"]`)?.textContent ?? null;
  }

  load(name) {
    if (!this.loaded.has(name)) {
      const promise = this.content(name).then(unpack);
      this.loaded.set(name, promise);
      promise.catch(() => this.loaded.delete(name));
    }
    return this.loaded.get(name);
  }

  content(name) {
    const content = this.inside(name);
    if (content !== null) return Promise.resolve(content);
    const folder = this.data.folder;
    if (folder === null) return Promise.reject(new Error("these texts are not in this page"));
    return new Promise((resolve, reject) => {
      const missing = () => reject(new Error(`${folder}/${name}.js is missing next to this page: copy the folder as well`));
      pendingChunks.set(name, resolve);
      document.head.append(el("script", { src: `${folder}/${name}.js`, onerror: missing }));
    }).finally(() => pendingChunks.delete(name));
  }

  /** A prompt with its answers: {prompt, messages, answer, answers, pairs}. */
  async group(set, place) {
    const chunk = this.chunkOf(set, place);
    const groups = await this.load(`${set.key}-${chunk}`);
    return asGroup(groups[place - set.starts[chunk]]);
  }

  /** For each answer to a prompt, its tokens: [{text, logprob}]. */
  async tokens(set, place) {
    const chunk = this.chunkOf(set, place);
    const [vocabulary, groups] = await this.load(`${set.key}-${chunk}t`);
    return groups[place - set.starts[chunk]].map(([ids, logprobs]) =>
      ids.map((id, at) => ({
        text: vocabulary[id] ?? `⟨${id}⟩`,
        logprob: at < logprobs.length ? -logprobs[at] / 100 : null,
      })),
    );
  }

  /** Whether the texts of a chunk are in the page. */
  isInside(set, chunk) {
    return this.inside(`${set.key}-${chunk}`) !== null;
  }
}

function asGroup([prompt, messages, answer, answers, pairs]) {
  return {
    prompt,
    messages,
    answer,
    answers: answers.map(([sample, text, finish, length, scores, details]) => ({
      sample,
      text,
      finish,
      length,
      scores,
      details,
    })),
    pairs: pairs.map(([chosen, rejected, margin]) => ({ chosen, rejected, margin })),
  };
}
