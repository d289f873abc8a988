// Tiles of images, error bars, and a list that draws only the tiles that can be seen.
import { announce, count, h, svg } from "./dom.js";
import { box } from "./ticks.js";

export let run = null;
export function setRun(found) {
  run = found;
}

// The picture of an entry; its id where it has none.
export function picture(kind, entry, size = "small") {
  const shown = h("span", { class: run.sharp ? "picture sharp" : "picture" });
  if (entry.position === null || !run.hasPictures) {
    shown.append(h("span", { class: "none" }, entry.id ?? "not in the data set"));
    return shown;
  }
  const place = `/picture/${kind}/${entry.position}?v=${run.version}${size === "whole" ? "&size=whole" : ""}`;
  shown.append(h("img", { src: place, alt: "", loading: "lazy", decoding: "async" }));
  return shown;
}

const words = (entry) => [entry.label, entry.caption].filter(Boolean).join(", ");

// A picture with its name, which leads to its view; training images can be ticked.
export function tile(kind, entry, place, ...more) {
  const text = words(entry);
  const content = [
    picture(kind, entry),
    h("span", { class: "name", title: entry.id }, entry.id),
    text ? h("span", { class: "words", title: text }, text) : null,
  ];
  return h("div", { class: "tile" },
    entry.position === null ? content : h("a", { href: place }, content),
    more, kind === "train" ? box(entry) : null);
}

// A bar from zero to a value, with whiskers of one standard error over draws and between models.
export function bar(value, error, modelError, scale) {
  const shown = h("div", { class: `bar ${value < 0 ? "opposing" : "supporting"}`, "aria-hidden": "true" });
  if (value === null) return shown;
  const at = (x) => 100 * (x - scale.low) / (scale.high - scale.low);
  const span = (name, from, to) => {
    const part = h("i", { class: name });
    part.style.left = `${at(Math.max(from, scale.low))}%`;
    part.style.width = `${at(Math.min(to, scale.high)) - at(Math.max(from, scale.low))}%`;
    shown.append(part);
  };
  span("length", Math.min(0, value), Math.max(0, value));
  const zero = h("i", { class: "zero" });
  zero.style.left = `${at(0)}%`;
  shown.append(zero);
  if (error !== null) span("draws", value - error, value + error);
  if (modelError !== null) span("models", value - modelError, value + modelError);
  return shown;
}

// The range that bars of some rows need, with zero in it.
export function scaleOf(rows, name = "score") {
  let low = 0;
  let high = 0;
  for (const row of rows) {
    const error = Math.max(row.error ?? 0, row.modelError ?? 0);
    low = Math.min(low, (row[name] ?? 0) - error);
    high = Math.max(high, (row[name] ?? 0) + error);
  }
  return { low, high: high > low ? high : low + 1 };
}

// A score with its errors, in figures and as a bar.
export function scored(row, unit, scale, name = "score") {
  const between = row.modelError === null ? null : h("small", {}, ` (models${unit.error(row.modelError)})`);
  return [
    bar(row[name], row.error, row.modelError, scale),
    h("span", { class: `number ${row[name] < 0 ? "opposing" : "supporting"}` },
      unit.number(row[name]), h("small", {}, unit.error(row.error)), between),
  ];
}

export function curve(values) {
  const [width, height] = [352, 56];
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  const y = (value) => ((high - value) / (high - low || 1)) * height;
  const area = (name, part) => {
    const points = values.map((value, i) => `L${((i / (values.length - 1 || 1)) * width).toFixed(1)} ${y(part(value)).toFixed(1)}`);
    return svg("path", { class: name, d: `M0 ${y(0).toFixed(1)} ${points.join(" ")} L${width} ${y(0).toFixed(1)} Z` });
  };
  return svg("svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    area("up", (value) => Math.max(0, value)), area("down", (value) => Math.min(0, value)),
    svg("path", { class: "line", d: `M0 ${y(0).toFixed(1)} H${width}` }));
}

const PART = 120; // tiles in one request
const GAP = 14;

// A list of any length: `load(start, count)` → {total, rows}, `draw(row)` → a tile with `below` pixels
// under its picture.
// Arrow keys, Home, End, Page Up and Page Down move between tiles.
export class Grid {
  constructor(load, draw, { below, label }) {
    Object.assign(this, { load, draw, below, total: 0, parts: new Map(), shown: new Map(), focused: -1 });
    this.list = h("ul", { class: "grid", "aria-label": label, keydown: (event) => this.move(event), focusin: (event) => this.noticed(event) });
    this.element = h("div", {}, h("p", { class: "note" }), this.list);
    this.update = () => requestAnimationFrame(() => this.render());
    this.observer = new ResizeObserver(this.update);
  }

  async start() {
    await this.part(0);
    this.element.firstChild.textContent = `${count(this.total)} in all.`;
    announce(`${count(this.total)} images`);
    addEventListener("scroll", this.update, { passive: true });
    this.observer.observe(this.element);
    this.render();
  }

  stop() {
    removeEventListener("scroll", this.update);
    this.observer.disconnect();
  }

  part(number) {
    if (!this.parts.has(number)) {
      const asked = this.load(number * PART, PART).then((found) => {
        this.total = found.total;
        this.parts.set(number, found.rows);
      });
      this.parts.set(number, asked);
      asked.catch(() => this.parts.delete(number));
    }
    return this.parts.get(number);
  }

  get layout() {
    const tile = parseInt(getComputedStyle(document.documentElement).getPropertyValue("--tile"), 10);
    const columns = Math.max(1, Math.floor((this.list.clientWidth + GAP) / (tile + GAP)));
    return { tile, columns, step: tile + this.below + GAP };
  }

  render() {
    const { tile, columns, step } = this.layout;
    this.list.style.height = `${Math.ceil(this.total / columns) * step}px`;
    const top = -this.list.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / step) - 2) * columns;
    const last = Math.min(this.total, (Math.ceil((top + innerHeight) / step) + 2) * columns);
    for (const [number, item] of this.shown) {
      if ((number < first || number >= last) && !item.contains(document.activeElement)) {
        item.remove();
        this.shown.delete(number);
      }
    }
    for (let number = first; number < last; number++) {
      const rows = this.part(Math.floor(number / PART));
      if (rows instanceof Promise) {
        rows.then(this.update, () => {});
        continue;
      }
      if (!this.shown.has(number)) this.insert(number, rows[number % PART]);
      const item = this.shown.get(number);
      item.style.transform = `translate(${(number % columns) * (tile + GAP)}px, ${Math.floor(number / columns) * step}px)`;
    }
  }

  insert(number, row) {
    const item = h("li", { "aria-setsize": this.total, "aria-posinset": number + 1, "data-number": number }, this.draw(row));
    this.shown.set(number, item);
    const next = [...this.shown.keys()].filter((other) => other > number).sort((a, b) => a - b)[0];
    this.list.insertBefore(item, next === undefined ? null : this.shown.get(next)); // tabs in order
  }

  noticed(event) {
    const item = event.target.closest("li");
    if (item) this.focused = Number(item.dataset.number);
  }

  async move(event) {
    if (event.target.tagName !== "A") return;
    const { columns, step } = this.layout;
    const page = columns * Math.max(1, Math.floor(innerHeight / step) - 1);
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      PageUp: -page, PageDown: page, Home: -this.total, End: this.total,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const number = Math.min(this.total - 1, Math.max(0, this.focused + steps[event.key]));
    const place = this.list.getBoundingClientRect().top + scrollY + Math.floor(number / columns) * step;
    if (place < scrollY || place + step > scrollY + innerHeight) scrollTo(0, place - (innerHeight - step) / 2);
    await this.part(Math.floor(number / PART));
    this.render();
    this.shown.get(number)?.querySelector("a")?.focus({ preventScroll: true });
  }
}
