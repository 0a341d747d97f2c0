"use strict";
// Brings the page to life; of a run that goes on, asks the server for news.

const NEWS_SECONDS = 5;

async function start() {
  const data = await unpack(document.getElementById("data").textContent);
  plots.clear();
  const charts = document.getElementById("charts");
  charts.replaceChildren();
  drawCurves(charts, data);
  if (!charts.children.length) charts.append(el("p", { class: "note" }, "There is nothing to draw yet."));
  const training = document.getElementById("training-charts");
  training.replaceChildren();
  drawTraining(training, data);
  const place = document.getElementById("browser");
  if (!data.sets.length) {
    place.replaceChildren(el("p", { class: "note" }, "There are no answers yet."));
    return data;
  }
  const browser = new Browser(place, new Samples(data));
  const button = document.getElementById("largest-margin");
  const target = browser.largestMargin();
  button.hidden = target === null;
  button.onclick = () => {
    if (location.hash === target) browser.follow();
    location.hash = target;
    document.getElementById("samples").scrollIntoView();
  };
  await browser.refresh();
  browser.follow();
  return data;
}

start().then((data) => {
  document.documentElement.dataset.ready = "yes";
  if (data.live) setInterval(renew, 1000 * NEWS_SECONDS, { made: data.made });
});
