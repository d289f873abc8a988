// Elements, requests and numbers. Texts become text nodes, never markup.

// An element with attributes (functions become listeners) and children (texts, elements, lists).
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// An address with the parameters that have values; lists repeat the name.
export function address(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    const values = Array.isArray(value) ? value : [value];
    for (const one of values) if (one !== null && one !== undefined && one !== "") query.append(name, one);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

// The answer as an object; an Error with what the server says otherwise.
export async function ask(path, parameters, options = {}) {
  let answer;
  try {
    answer = await fetch(address(path, parameters), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("jaxinf explore does not answer: is it still running in its terminal?");
  }
  const found = await answer.json().catch(() => ({ error: `The answer ${answer.status} is no JSON.` }));
  if (!answer.ok) throw new Error(found.error || `The answer is ${answer.status}.`);
  return found;
}

export function post(path, value) {
  return ask(path, {}, {
    method: "POST", body: JSON.stringify(value), headers: { "Content-Type": "application/json" },
  });
}

// Saves what a POST answers as a file.
export async function save(path, value, name) {
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(value) });
  if (!answer.ok) throw new Error((await answer.json()).error);
  const place = URL.createObjectURL(await answer.blob());
  h("a", { href: place, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(place), 10000);
}

export const count = (number) => number.toLocaleString("en");

const superscript = (number) => String(number).replace(/[-\d]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

// How numbers of one page are written: as multiples of a power of ten that is a multiple of three.
export class Unit {
  constructor(values) {
    const largest = Math.max(0, ...values.filter(Number.isFinite).map(Math.abs));
    this.exponent = largest > 0 ? 3 * Math.floor(Math.log10(largest) / 3) : 0;
    const scaled = largest / 10 ** this.exponent;
    this.decimals = scaled >= 100 ? 1 : scaled >= 10 ? 2 : 3;
  }

  number(value, signed = true) {
    if (value === null) return "unknown";
    const text = Math.abs(value / 10 ** this.exponent).toFixed(this.decimals);
    if (Number(text) === 0) return text;
    return (value < 0 ? "−" : signed ? "+" : "") + text;
  }

  error(value) {
    return value === null || value === undefined ? "" : ` ± ${this.number(value, false)}`;
  }

  get words() {
    return this.exponent ? `in units of 10${superscript(this.exponent)}` : "in plain numbers";
  }
}

// λ = 10⁻⁸ and the like.
export function scientific(value) {
  if (value === null) return "none";
  if (value === 0 || (Math.abs(value) >= 0.01 && Math.abs(value) < 1000)) return String(Number(value.toPrecision(3)));
  const [digits, exponent] = value.toExponential(1).split("e");
  const power = `10${superscript(Number(exponent))}`;
  return digits === "1.0" ? power : `${digits.replace(/\.0$/, "")} × ${power}`;
}

export function announce(text) {
  document.getElementById("announcement").textContent = text;
}
