// What a view is asked with: which scores, how many images, which of them. All of it stands in the
// address.
import { h, scientific } from "./dom.js";
import { run } from "./tiles.js";

export const sourceNamed = (name) => run.sources.find((source) => source.name === name) ?? run.sources[0];

// A choice of scores: the method, and a slider over its dampings where it has several.
export function sourceControls(title, names, parameters, change, none = null) {
  const chosen = parameters.get(names.source);
  const source = none !== null && !chosen ? null : sourceNamed(chosen);
  const options = run.sources.map((one) =>
    h("option", { value: one.name, selected: source !== null && one.name === source.name }, one.title));
  if (none !== null) options.unshift(h("option", { value: "", selected: source === null }, none));
  const select = h("select", { change: () => change({ [names.source]: select.value, [names.damping]: null }) }, options);
  const controls = run.sources.length > 1 || none !== null ? [h("label", {}, title, select)] : [];
  if (source !== null && source.dampings.length > 1) controls.push(dampingSlider(source, names.damping, parameters, change));
  return controls;
}

function dampingSlider(source, name, parameters, change) {
  // Along the slider λ grows; the dampings themselves stay in their order.
  const dampings = [...source.dampings].sort((a, b) => a - b);
  const given = parameters.get(name);
  const now = given === null ? source.dampings[source.default] : Number(given);
  const place = Math.max(0, dampings.findIndex((damping) => Math.abs(damping / now - 1) < 1e-6));
  const words = (i) => `${source.symbol} = ${scientific(dampings[i])}`;
  const output = h("output", {}, words(place));
  const input = h("input", {
    type: "range", min: 0, max: dampings.length - 1, step: 1, value: place, "aria-valuetext": words(place), name,
    input: () => {
      output.textContent = words(input.value);
      input.setAttribute("aria-valuetext", words(input.value));
    },
    change: () => change({ [name]: dampings[input.value] }),
  });
  return h("label", {}, name === "damping" ? "Damping" : "Its damping", h("span", { class: "row" }, input, output));
}

export function topK(parameters, change, most) {
  const now = Math.min(Number(parameters.get("k") ?? 12), most);
  const output = h("output", {}, String(now));
  const input = h("input", {
    type: "range", min: 1, max: most, step: 1, value: now, name: "k",
    input: () => { output.textContent = input.value; },
    change: () => change({ k: input.value }),
  });
  return h("label", {}, "Images in each list", h("span", { class: "row" }, input, output));
}

// By label, where there are labels, and by a text in id or caption.
export function filters(parameters, change) {
  const controls = [];
  if (run.labels.length) {
    const now = parameters.get("label");
    const select = h("select", { name: "label", change: () => change({ label: select.value || null }) },
      h("option", { value: "" }, "all"),
      run.labels.map((label, i) => h("option", { value: i, selected: now === String(i) }, label)));
    controls.push(h("label", {}, "Label", select));
  }
  let waiting = 0;
  const input = h("input", {
    type: "search", name: "text", value: parameters.get("text") ?? "", placeholder: "part of an id", maxlength: 200,
    input: () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => change({ text: input.value || null }), 350);
    },
  });
  controls.push(h("label", {}, "Id", input));
  return controls;
}

// In words: which scores these are, and what their errors are.
export function about(scores) {
  const parts = [scores.title];
  if (scores.damping !== null) parts.push(`${scores.symbol} = ${scientific(scores.damping)}`);
  if (scores.draws) parts.push(`${scores.draws} draws of noise an image`);
  if (scores.models > 1) parts.push(`mean of ${scores.models} models`);
  const errors = scores.replicates > 1
    ? "± is one standard error over the draws; a score below twice its ± can hardly be told from zero."
    : "There are no standard errors: the draws are one replicate.";
  return `${parts.join(", ")}. ${errors}`;
}
