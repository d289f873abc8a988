// Which training images are ticked to be removed: kept while the browser's tab is open, and in the
// address of the view what-if.
import { address, count, h } from "./dom.js";

let ids = new Set();
let labels = new Set();
let storage = "";

export function restore(version) {
  storage = `jaxinf-ticks-${version}`;
  const kept = JSON.parse(sessionStorage.getItem(storage) || '{"ids": [], "labels": []}');
  ids = new Set(kept.ids);
  labels = new Set(kept.labels);
  show();
}

export const ticked = (id) => ids.has(id);
export const all = () => ({ ids: [...ids], labels: [...labels] });
export const whatIf = (more = {}) => address("/what-if", { id: [...ids], label: [...labels], ...more });

export function tick(id, on) {
  if (on) ids.add(id);
  else ids.delete(id);
  keep();
}

export function tickLabel(label, on) {
  if (on) labels.add(label);
  else labels.delete(label);
  keep();
}

export function replace(found) {
  ids = new Set(found.ids);
  labels = new Set(found.labels);
  keep();
}

// A box that ticks one training image.
export function box(image) {
  if (image.position === null) return null;
  const input = h("input", {
    type: "checkbox", checked: ticked(image.id), "aria-label": `remove ${image.id}`,
    change: () => tick(image.id, input.checked),
  });
  return h("label", { class: "tick" }, input, "remove");
}

function keep() {
  sessionStorage.setItem(storage, JSON.stringify(all()));
  show();
}

function show() {
  const bar = document.getElementById("ticked");
  const parts = [];
  if (ids.size) parts.push(`${count(ids.size)} training image${ids.size > 1 ? "s" : ""}`);
  if (labels.size) parts.push(`${labels.size} label${labels.size > 1 ? "s" : ""}`);
  bar.hidden = parts.length === 0 || location.pathname === "/what-if";
  bar.replaceChildren(
    h("span", {}, `${parts.join(" and ")} ticked.`),
    h("a", { class: "button", href: whatIf() }, "What if they were removed?"),
    h("button", { type: "button", click: () => { replace({ ids: [], labels: [] }); untick(); } }, "Untick all"),
  );
}

export const refresh = show;

function untick() {
  for (const input of document.querySelectorAll(".tick input")) input.checked = false;
}
