// The router: which view the address names. Links within the site change the address and the view
// without loading the page again.
import { ask, h } from "./dom.js";
import { setRun } from "./tiles.js";
import * as ticks from "./ticks.js";
import * as views from "./views.js";

const main = document.getElementById("main");
const VIEWS = {
  "/": ["Samples", views.samples], "/training": ["Training images", views.training],
  "/what-if": ["What if", views.whatIf], "/self-influence": ["Self-influence", views.selfInfluence],
  "/upload": ["Upload", views.upload], "/sample": [null, views.sample], "/image": [null, views.image],
};
let leave = () => {};
let turn = 0;

// Changes parameters of the address, and shows the view anew; what has the focus keeps it.
function change(changes) {
  const parameters = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") parameters.delete(name);
    else parameters.set(name, value);
  }
  history.replaceState({ y: scrollY }, "", `${location.pathname}?${parameters}`.replace(/\?$/, ""));
  show({ keep: true });
}

async function show({ keep = false, y = 0 } = {}) {
  const mine = ++turn;
  const [, view] = VIEWS[location.pathname] ?? [null, views.nowhere];
  for (const link of document.querySelectorAll("nav a")) {
    if (link.pathname === location.pathname) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  ticks.refresh();
  main.setAttribute("aria-busy", "true");
  const page = { parameters: new URLSearchParams(location.search), change, current: () => mine === turn };
  let found;
  try {
    found = await view(page);
  } catch (error) {
    found = { title: "This cannot be shown", nodes: [h("p", { class: "failed", role: "alert" }, error.message)] };
  }
  if (mine !== turn) return found.leave?.(); // another view was asked for meanwhile
  leave();
  leave = found.leave ?? (() => {});
  const focused = keep ? focusOf(document.activeElement) : null;
  document.title = `${found.title} – jaxinf`;
  main.replaceChildren(h("h1", {}, found.title), ...found.nodes.flat(Infinity).filter(Boolean));
  main.removeAttribute("aria-busy");
  await found.shown?.();
  if (keep) restoreFocus(focused);
  else {
    scrollTo(0, y);
    main.focus({ preventScroll: true });
  }
}

// A control by its name, and where the cursor stands in a text.
function focusOf(element) {
  if (!main.contains(element) || !element.name) return null;
  return { name: element.name, cursor: element.type === "search" ? element.selectionStart : null };
}

function restoreFocus(focused) {
  const element = focused && main.querySelector(`[name="${focused.name}"]`);
  element?.focus({ preventScroll: true });
  if (focused?.cursor != null) element?.setSelectionRange(focused.cursor, focused.cursor);
}

addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  if (link.origin !== location.origin || !(link.pathname in VIEWS) || link.hash || link.download) return;
  event.preventDefault();
  history.replaceState({ y: scrollY }, "");
  history.pushState({ y: 0 }, "", link.href);
  show();
});
addEventListener("popstate", (event) => show({ y: event.state?.y ?? 0 }));

const theme = document.getElementById("theme");
theme.value = document.documentElement.dataset.theme;
theme.addEventListener("change", () => {
  document.documentElement.dataset.theme = theme.value;
  localStorage.setItem("jaxinf-theme", theme.value);
});

try {
  const run = await ask("/api/run");
  setRun(run);
  document.getElementById("data-name").textContent = `· ${run.name}`;
  const there = { "/self-influence": run.selfInfluence, "/upload": run.store !== null, "/what-if": run.sources.length > 0, "/": run.numSamples > 0 };
  const links = Object.entries(VIEWS).filter(([path, [title]]) => title && (there[path] ?? true));
  document.getElementById("views").append(...links.map(([path, [title]]) => h("a", { href: path }, title)));
  ticks.restore(run.version);
  await show();
} catch (error) {
  main.replaceChildren(h("p", { class: "failed", role: "alert" }, error.message));
}
