// The views. Each takes {parameters, change, current} and gives {title, nodes}, maybe with `shown`,
// which is called once they are on the page, and `leave`, once they are gone.
import { address, announce, ask, count, h, post, save, scientific, Unit } from "./dom.js";
import { about, filters, sourceControls, sourceNamed, topK } from "./controls.js";
import { bar, curve, Grid, picture, run, scaleOf, scored, tile } from "./tiles.js";
import * as ticks from "./ticks.js";

const SCORES = { source: "source", damping: "damping" };
const VERSUS = { source: "versus", damping: "versus_damping" };
const MOST = 100; // images in each list

const sampleAt = (id, parameters) =>
  address("/sample", { id, source: parameters?.get("source"), damping: parameters?.get("damping") });
const imageAt = (id, parameters) =>
  address("/image", { id, source: parameters?.get("source"), damping: parameters?.get("damping") });
const chosen = (parameters, names = SCORES) =>
  ({ source: parameters.get(names.source), damping: parameters.get(names.damping) });
const note = (...children) => h("p", { class: "note" }, ...children);
const file = (text, path, parameters) =>
  h("a", { class: "button", href: address(path, parameters), download: true }, text);

export function nowhere() {
  return { title: "There is no such view", nodes: [h("p", {}, "Choose one above.")] };
}

export function samples() {
  if (!run.numSamples) {
    return { title: "No samples yet", nodes: [h("p", {}, "This run has a store and no samples: look at the training images, or upload an image.")] };
  }
  const grid = new Grid((start, num) => ask("/api/samples", { start, count: num }),
    (row) => tile("sample", row, sampleAt(row.id)), { below: 40, label: "Samples" });
  const text = run.sources.length
    ? `A model learnt from ${count(run.numTrain)} training images (${run.name}) and generated these. Choose one to see which training images support it, and which oppose it.`
    : "There are no scores yet: run the stage attribute, then start again.";
  return { title: "Samples", nodes: [h("p", {}, text), run.howShown && note(run.howShown), grid.element], shown: () => grid.start(), leave: () => grid.stop() };
}

export function training({ parameters, change }) {
  const only = { label: parameters.get("label"), text: parameters.get("text") };
  const grid = new Grid((start, num) => ask("/api/training", { ...only, start, count: num }),
    (row) => tile("train", row, imageAt(row.id)), { below: run.labels.length ? 64 : 46, label: "Training images" });
  const nodes = [
    h("p", {}, "Choose one to see the samples that it supports; tick some to ask what their removal would change."),
    run.howShown && note(run.howShown),
    h("div", { class: "controls" }, filters(parameters, change), labelBox(only.label)), grid.element,
  ];
  return { title: "Training images", nodes, shown: () => grid.start(), leave: () => grid.stop() };
}

function labelBox(label) {
  if (label === null) return null;
  const number = Number(label);
  const input = h("input", { type: "checkbox", checked: ticks.all().labels.includes(number), change: () => ticks.tickLabel(number, input.checked) });
  return h("label", { class: "tick" }, h("span", { class: "row" }, input, `remove all of ${run.labels[number]}`));
}

export async function sample({ parameters, change }) {
  const id = parameters.get("id");
  const k = Math.min(Number(parameters.get("k") ?? 12), MOST, run.numTrain);
  const asked = { id, k, label: parameters.get("label"), text: parameters.get("text") };
  const versus = parameters.get("versus");
  const [one, two, agreement] = await Promise.all([
    ask("/api/sample", { ...asked, ...chosen(parameters) }),
    versus ? ask("/api/sample", { ...asked, ...chosen(parameters, VERSUS) }) : null,
    versus ? ask("/api/compare", { id, k, ...chosen(parameters), versus, versus_damping: parameters.get("versus_damping") }) : null,
  ]);
  const place = { ...chosen(parameters), id, label: asked.label, text: asked.text };
  const nodes = [
    h("div", { class: "hero" }, picture("sample", one.sample, "whole"),
      h("div", {},
        one.sample.label && h("p", {}, `Made from ${one.sample.label}.`),
        two ? null : h("p", { class: "about" }, about(one.scores)),
        h("p", {}, h("b", { class: "supporting" }, "Supporters"), ": without them the model would fit this sample worse. ",
          h("b", { class: "opposing" }, "Opposers"), ": without them, better."),
        neighbours(id, parameters))),
    h("div", { class: "controls" },
      sourceControls("Scores", SCORES, parameters, change), topK(parameters, change, Math.min(MOST, run.numTrain)),
      filters(parameters, change),
      run.sources.some((s) => s.dampings.length > 1) || run.sources.length > 1 ? sourceControls("Compare with", VERSUS, parameters, change, "nothing") : null),
    h("div", { class: "controls" }, file("All scores as CSV", "/api/export/sample.csv", place),
      file("as JSON", "/api/export/sample.json", place), file("Picture (PNG)", "/api/export/sample.png", { ...place, k })),
    agreement && h("p", {}, `The two agree on ${agreement.shared} of the ${agreement.k} most supporting images of all; their rank correlation over all images is ${agreement.spearman === null ? "unknown" : agreement.spearman.toFixed(2).replace("-", "−")}.`),
    two ? h("div", { class: "columns" }, [one, two].map((found) =>
      h("section", {}, h("h2", {}, heading(found.scores)), h("p", { class: "about" }, about(found.scores)), ranked(found, parameters))))
      : ranked(one, parameters),
  ];
  return { title: `Sample ${id}`, nodes };
}

const heading = (scores) => scores.damping === null ? scores.title : `${scores.title}, ${scores.symbol} = ${scientific(scores.damping)}`;

// To the samples before and after.
function neighbours(id, parameters) {
  const links = h("p", {});
  ask("/api/samples", { start: 0, count: 500 }).then(({ rows }) => {
    const here = rows.findIndex((row) => row.id === id);
    if (here > 0) links.append(h("a", { href: sampleAt(rows[here - 1].id, parameters), rel: "prev" }, "← previous"), "  ");
    if (here >= 0 && here + 1 < rows.length) links.append(h("a", { href: sampleAt(rows[here + 1].id, parameters), rel: "next" }, "next →"));
  }, () => {});
  return links;
}

// Supporters and opposers with their scores, in one unit and on one scale.
function ranked(found, parameters) {
  const rows = [...found.supporting, ...found.opposing];
  if (!rows.length) return h("p", {}, "No training image matches the filter.");
  const unit = new Unit(rows.map((row) => row.score));
  const scale = scaleOf(rows);
  const list = (title, name, entries) => h("section", {}, h("h2", { class: name }, title),
    h("ol", { class: "tiles" }, entries.map((row) => h("li", {}, tile("train", row, imageAt(row.id, parameters), scored(row, unit, scale))))));
  const [errors, models] = ["error", "modelError"].map((name) => rows.some((row) => row[name] !== null));
  return [
    note(`Scores ${unit.words}.${errors ? ` The bar’s dark whisker is ± over draws${models ? ", the grey one ± between models" : ""}.` : ""}`),
    list("Most supporting", "supporting", found.supporting), list("Most opposing", "opposing", found.opposing),
    h("h2", {}, `All ${count(found.numMatching)} scores, sorted`), curve(found.curve),
  ];
}

export async function image({ parameters, change }) {
  const id = parameters.get("id");
  const found = await ask("/api/image", { id, ...chosen(parameters) });
  const nearest = h("div", {}, note("Looking for images like it …"));
  const { image: own } = found;
  const nodes = [
    h("div", { class: "hero" }, picture("train", own, "whole"),
      h("div", {}, [own.label, own.caption].filter(Boolean).map((text) => h("p", {}, text)),
        found.selfInfluence && h("p", {}, "Self-influence ", inOwnUnit(found.selfInfluence), ". ", h("a", { href: "/self-influence" }, "All of them")),
        ticks.box(own))),
  ];
  if (found.scores) {
    const unit = new Unit(found.samples.map((row) => row.score));
    const change_ = new Unit(found.samples.map((row) => row.change));
    const scale = scaleOf(found.samples);
    const place = { id, ...chosen(parameters) };
    nodes.push(
      h("div", { class: "controls" }, sourceControls("Scores", SCORES, parameters, change),
        file("All scores as CSV", "/api/export/image.csv", place), file("as JSON", "/api/export/image.json", place)),
      h("h2", {}, "Samples, the most supported first"), h("p", { class: "about" }, about(found.scores)),
      note(`Scores ${unit.words}. ${found.scores.measurement
        ? `Removing this image alone is predicted to change the ${found.scores.measurement} of the first by ${change_.number(found.samples[0].change)} (${change_.words}).` : ""}`),
      h("ol", { class: "tiles" }, found.samples.map((row) => h("li", {}, tile("sample", row, sampleAt(row.id, parameters), scored(row, unit, scale))))));
  }
  nodes.push(h("h2", {}, "Nearest training images, by pixels"), nearest);
  const look = async () => {
    const { rows } = await ask("/api/nearest", { id, k: 8 });
    nearest.replaceChildren(h("ul", { class: "tiles" }, rows.map((row) =>
      h("li", {}, tile("train", row, imageAt(row.id, parameters), h("span", { class: "number" }, `distance ${row.distance.toPrecision(3)}`))))));
  };
  return { title: `Training image ${id}`, nodes, shown: () => { look().catch((error) => nearest.replaceChildren(note(error.message))); } };
}

function inOwnUnit(row) {
  const unit = new Unit([row.value]);
  return `${unit.number(row.value)}${unit.error(row.error)} (${unit.words})`;
}

export async function whatIf({ parameters, change }) {
  const named = { ids: parameters.getAll("id"), labels: parameters.getAll("label").map(Number) };
  if (named.ids.length || named.labels.length) ticks.replace(named);
  const asked = ticks.all();
  if (!asked.ids.length && !asked.labels.length) {
    return { title: "What if training images were removed?", nodes: [h("p", {}, "Tick “remove” under training images, here or beside any sample: ",
      h("a", { href: "/training" }, "all training images"), ".")] };
  }
  if (!named.ids.length && !named.labels.length) history.replaceState(history.state, "", ticks.whatIf(chosen(parameters)));
  const body = { ...asked, source: parameters.get("source"), damping: parameters.has("damping") ? Number(parameters.get("damping")) : null };
  const found = await post("/api/what-if", body);
  const unit = new Unit(found.changes.map((row) => row.change));
  const scale = scaleOf(found.changes, "change");
  const sorted = parameters.get("order") !== "sample";
  const rows = [...found.changes];
  if (sorted) rows.sort((a, b) => Math.abs(b.change) - Math.abs(a.change));
  const order = (name, text) => h("button", { type: "button", click: () => change({ order: name }) }, text);
  const measurement = found.scores.measurement ?? "measurement";
  const keep = (kind) => h("button", { type: "button", click: () => save(`/api/export/what-if.${kind}`, body, `jaxinf-what-if.${kind}`).catch((error) => announce(error.message)) }, kind.toUpperCase());
  const table = h("table", {},
    h("caption", {}, `Predicted change of each sample’s ${measurement}, ${unit.words}, ± one standard error over draws${found.scores.models > 1 ? " (and between models)" : ""}`),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden" }, "Picture")), h("th", { scope: "col", "aria-sort": sorted ? "none" : "ascending" }, order("sample", "Sample")),
      h("th", { scope: "col", "aria-sort": sorted ? "descending" : "none" }, order(null, "Predicted change")), h("th", { scope: "col" }, h("span", { class: "hidden" }, "Bar")))),
    h("tbody", {}, rows.map((row) => h("tr", {}, h("td", {}, picture("sample", row)),
      h("th", { scope: "row" }, h("a", { href: sampleAt(row.id, parameters) }, row.id), row.label && h("span", { class: "words" }, row.label)),
      h("td", { class: row.change < 0 ? "opposing" : "supporting" }, unit.number(row.change), unit.error(row.error),
        row.modelError === null ? null : ` (models${unit.error(row.modelError)})`),
      h("td", { class: "bar-cell" }, bar(row.change, row.error, row.modelError, scale))))));
  const nodes = [
    h("p", {}, `Without ${count(found.num)} of the ${count(found.numTrain)} training images. Positive: the model would fit the sample worse. `
      + `A change is the sum of their scores divided by ${count(found.numTrain)}, in which negative scores count ${found.negativeWeight} times, because models trained anew without images seldom fit a sample better. `
      + "To first order: the more is removed, the less it is to be trusted."),
    h("div", { class: "controls" }, sourceControls("Scores", SCORES, parameters, change), keep("csv"), keep("json")),
    h("p", { class: "about" }, about(found.scores)),
    found.scores.measurement ? null : h("p", { class: "failed" }, `${found.scores.title} is of no measurement: the figures order the samples, and have no unit.`),
    removed(asked), h("div", { class: "wide" }, table),
  ];
  return { title: "What if training images were removed?", nodes };
}

// What is removed, each with a way back.
function removed({ ids, labels }) {
  const without = (less) => () => {
    ticks.replace({ ids: ids.filter((id) => id !== less.id), labels: labels.filter((label) => label !== less.label) });
    history.replaceState(history.state, "", ticks.whatIf());
    dispatchEvent(new PopStateEvent("popstate"));
  };
  const shown = ids.slice(0, 60);
  return h("details", { open: ids.length + labels.length <= 12 }, h("summary", {}, "What is removed"),
    h("p", { class: "controls" }, labels.map((label) => h("button", { type: "button", "aria-label": `keep ${run.labels[label]}`, click: without({ label }) }, `all of ${run.labels[label]} ×`)),
      shown.map((id) => h("button", { type: "button", "aria-label": `keep ${id}`, click: without({ id }) }, `${id} ×`)),
      ids.length > shown.length ? ` and ${count(ids.length - shown.length)} more` : null));
}

export async function selfInfluence({ parameters, change }) {
  const least = parameters.get("order") === "least";
  const order = least ? "least" : "largest";
  const head = await ask("/api/self-influence", { order, count: 60 });
  const unit = new Unit(head.rows.map((row) => row.value));
  const grid = new Grid((start, num) => ask("/api/self-influence", { order, start, count: num }),
    (row) => tile("train", row, imageAt(row.id), h("span", { class: "number" }, unit.number(row.value), h("small", {}, unit.error(row.error)))),
    { below: run.labels.length ? 82 : 64, label: "Training images by self-influence" });
  const select = h("select", { name: "order", change: () => change({ order: select.value === "least" ? "least" : null }) },
    h("option", { value: "largest", selected: !least }, "largest first (outliers)"),
    h("option", { value: "least", selected: least }, "least first (taught by others too)"));
  const pairs = h("div", {}, h("button", { type: "button", click: () => {
    pairs.replaceChildren(note("Comparing all pairs; 50,000 images take about half a minute …"));
    duplicates(pairs).catch((error) => pairs.replaceChildren(h("p", { class: "failed" }, error.message)));
  } }, "Find the most alike pairs"));
  const nodes = [
    h("p", {}, "Self-influence divided by the number of images is by how much an image’s own training loss grows where it is left out. Large: nothing else teaches it (rare, mislabelled, damaged, or memorised). Near zero: others teach it as well."),
    head.biased && note("The draws are one replicate, so that the values are too large by their noise: use self_influence.replicates ≥ 3."),
    h("p", { class: "about" }, `λ = ${scientific(head.damping)}. Values ${unit.words}, ± one standard error over draws where it is known.`),
    h("div", { class: "controls" }, h("label", {}, "Order", select), file("All as CSV", "/api/export/self-influence.csv"), file("as JSON", "/api/export/self-influence.json")),
    h("h2", {}, "Near duplicates, by pixels"), pairs, h("h2", {}, "Images by self-influence"), grid.element,
  ];
  return { title: "Self-influence", nodes, shown: () => grid.start(), leave: () => grid.stop() };
}

async function duplicates(place) {
  const { rows } = await ask("/api/duplicates", { k: 24 });
  place.replaceChildren(
    note("The distance is the root mean square over pixels in [−1, 1]: 0 is the same image twice."),
    h("ul", { class: "pairs" }, rows.map((row) => h("li", {}, h("div", { class: "pair" }, tile("train", row.first, imageAt(row.first.id)), tile("train", row.second, imageAt(row.second.id))),
      h("span", { class: "number" }, `distance ${row.distance.toPrecision(3)}`)))));
  announce(`${rows.length} pairs found`);
}

export async function upload({ parameters, change, current }) {
  const name = parameters.get("name");
  const wait = h("div", { role: "status" });
  const nodes = [uploadForm(change, wait), wait];
  if (!name) return { title: "Scores of an image of yours", nodes };
  const k = Math.min(Number(parameters.get("k") ?? 12), MOST, run.numTrain);
  const asked = () => ask("/api/upload", { name, k, label: parameters.get("label"), text: parameters.get("text") });
  const found = await asked();
  if (found.state === "done") {
    const shown = h("span", { class: run.sharp ? "picture sharp" : "picture" }, h("img", { src: `/picture/upload/${name}`, alt: "the upload, as the model takes it" }));
    const place = { name, label: parameters.get("label"), text: parameters.get("text") };
    nodes.push(h("div", { class: "hero" }, shown, h("div", {}, h("p", {}, h("b", {}, found.name)),
      h("p", { class: "about" }, `${found.scores.measurement ?? ""}, damping ${scientific(found.scores.damping)}; ${found.seconds.toFixed(1)} s. As an image that the model may never have seen: a supporter is one whose removal would make the model fit it worse.`))),
    h("div", { class: "controls" }, topK(parameters, change, Math.min(MOST, run.numTrain)), filters(parameters, change)),
    h("div", { class: "controls" }, file("All scores as CSV", "/api/export/upload.csv", place), file("as JSON", "/api/export/upload.json", place), file("Picture (PNG)", "/api/export/upload.png", { name, k })),
    ranked(found, parameters));
    return { title: "Scores of an image of yours", nodes };
  }
  const follow = async () => {
    for (let now = found; current(); now = await asked()) {
      if (now.state === "failed") return wait.replaceChildren(h("p", { class: "failed", role: "alert" }, now.step));
      if (now.state === "done") return change({});
      wait.replaceChildren(h("p", {}, `Scoring ${now.name}: ${now.step}${now.total ? ` (${count(now.done)} of ${count(now.total)})` : " …"}`),
        h("progress", { "aria-label": now.step, ...(now.total ? { value: now.done, max: now.total } : {}) }));
      await new Promise((resolve) => setTimeout(resolve, 400));
    }
  };
  return { title: "Scores of an image of yours", nodes, shown: () => { follow().catch((error) => wait.replaceChildren(h("p", { class: "failed", role: "alert" }, error.message))); } };
}

function uploadForm(change, wait) {
  const input = h("input", { type: "file", accept: "image/png,image/jpeg,image/webp,image/bmp", required: true, name: "file" });
  const label = run.store.needsLabel ? h("select", { name: "class" }, run.labels.map((text, i) => h("option", { value: i }, text))) : null;
  const damping = h("input", { name: "damping", inputmode: "decimal", placeholder: String(run.store.damping), size: 8 });
  const send = async (image) => {
    wait.replaceChildren(h("p", {}, "Sending …"));
    try {
      const parameters = { name: image.name, label: label?.value, damping: damping.value };
      const { name } = await ask("/api/upload", parameters, { method: "POST", body: image, headers: { "Content-Type": "application/octet-stream" } });
      change({ name });
    } catch (error) {
      wait.replaceChildren(h("p", { class: "failed", role: "alert" }, error.message));
    }
  };
  const form = h("form", {
    class: "drop",
    submit: (event) => { event.preventDefault(); if (input.files[0]) send(input.files[0]); },
    dragover: (event) => { event.preventDefault(); form.classList.add("over"); },
    dragleave: () => form.classList.remove("over"),
    drop: (event) => { event.preventDefault(); form.classList.remove("over"); if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]); },
  },
  h("p", {}, "Choose a PNG, JPEG, WebP or BMP file of at most 16 MiB, or drop it here. It stays on the machine of jaxinf; its central square is resized to the model’s images. One is scored at a time."),
  h("div", { class: "controls" }, h("label", {}, "Image", input), label && h("label", {}, "Its label", label), h("label", {}, "Damping", damping),
    h("button", { type: "submit" }, "Score it")));
  return form;
}
