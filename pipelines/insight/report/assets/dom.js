"use strict";
// Helpers for elements and texts. Texts of models become text nodes, never markup.

/** An element with attributes ("on..." are listeners) and children (elements, texts, null). */
function el(name, attributes, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else if (key === "class") found.className = value;
    else found.setAttribute(key, value === true ? "" : value);
  }
  found.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return found;
}

const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** A text with control characters, changes of direction and lone surrogates replaced by their codes. */
function visible(text) {
  return text.replace(UNSEEN, (letter) => `⟨${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

/** An element with a text of a model or a user, whose writing direction is isolated from the rest of the page. */
function textOf(text, name) {
  return el(name || "span", { dir: "auto", class: "model-text" }, visible(text));
}

function number(value) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) ? String(value) : Number(value).toPrecision(3);
}

/** Decode base64 of deflated JSON. */
async function unpack(content) {
  const bytes = Uint8Array.from(atob(content.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
