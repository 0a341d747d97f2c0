"use strict";
// Starts the page's scripts, and updates a page that `pipeline view` serves.

const NEWS_SECONDS = 4;
const SECTIONS = ["words", "missing", "results", "dropped", "time", "provenance"];

let browser = null;

/** Draw everything from the page's data. An existing browser of samples keeps what is selected in it. */
async function draw() {
  const data = await unpack(document.getElementById("data").textContent);
  plots.clear();
  const charts = document.getElementById("charts");
  const held = [charts, document.getElementById("training-charts")];
  held.forEach((place) => {
    place.style.minHeight = `${place.offsetHeight}px`;
  }); // so that the page does not jump while it is drawn
  charts.replaceChildren();
  drawCurves(charts, data);
  if (!charts.children.length) charts.append(el("p", { class: "note" }, "There is nothing to draw yet."));
  drawTraining(document.getElementById("training-charts"), data);
  held.forEach((place) => {
    place.style.minHeight = "";
  });
  const place = document.getElementById("browser");
  if (!data.sets.length) {
    place.replaceChildren(el("p", { class: "note" }, "There are no answers yet."));
    return data;
  }
  const samples = new Samples(data);
  if (browser) browser.renew(samples);
  else browser = new Browser(place, samples);
  drawNotable();
  await browser.refresh();
  return data;
}

/** Draw the buttons that lead to notable samples. */
function drawNotable() {
  const buttons = browser.notable().map(({ id, title, target }) =>
    el(
      "button",
      {
        type: "button",
        id,
        onclick: () => {
          if (location.hash === target) browser.follow();
          location.hash = target;
          document.getElementById("samples").scrollIntoView();
        },
      },
      title,
    ),
  );
  document.querySelector("#looks .actions").replaceChildren(...buttons);
  document.getElementById("looks").hidden = !buttons.length;
}

/** Update what has changed from the server's page, and keep what the reader has opened and selected. */
async function renew(known) {
  try {
    const version = await (await fetch("version")).json();
    if (version === known.version) return;
    const fresh = new DOMParser().parseFromString(await (await fetch(".")).text(), "text/html");
    const open = new Set(
      [...document.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent),
    );
    for (const id of SECTIONS) document.getElementById(id).replaceWith(document.adoptNode(fresh.getElementById(id)));
    document.querySelectorAll("main > section details > summary").forEach((summary) => {
      if (open.has(summary.textContent)) summary.parentElement.open = true;
    });
    document.querySelector(".state").replaceWith(document.adoptNode(fresh.querySelector(".state")));
    document.getElementById("data").textContent = fresh.getElementById("data").textContent;
    await draw();
    known.version = version;
    document.body.classList.remove("silent");
  } catch {
    document.body.classList.add("silent");
  }
}

draw().then((data) => {
  browser?.follow();
  document.documentElement.dataset.ready = "yes";
  if (data.live !== null) {
    const known = { version: data.live };
    setInterval(() => renew(known), 1000 * NEWS_SECONDS);
  }
});
