// Elements and numbers. Text is only ever set as text: ids and dead letters were written by others.

export const $ = (id) => document.getElementById(id);

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined).map((c) => (c instanceof Node ? c : String(c))));
  return element;
}

export const h = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
export const s = (name, attributes = {}, ...children) => filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

export const number = (value, digits = 0) => (value === null || value === undefined ? "?" : value.toLocaleString("en", { maximumFractionDigits: digits }));

export function rate(value) {
  if (value === null || value === undefined) return "…/s";
  if (value >= 9999.5) return `${number(value / 1000, value >= 99950 ? 0 : 1)} k/s`;
  return `${number(value, value < 10 ? 1 : 0)}/s`;
}

export function bytes(value) {
  if (value === null || value === undefined) return "?";
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return `${number(value, value < 10 && unit !== "B" ? 1 : 0)} ${unit}`;
    value /= 1024;
  }
  return `${number(value, 1)} TiB`;
}

export function span(seconds) {
  if (seconds === null || seconds === undefined || !isFinite(seconds)) return "?";
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([size]) => Math.abs(seconds) >= 2 * size) ?? [1, "s"];
  return `${number(seconds / size, seconds / size < 10 ? 1 : 0)} ${unit}`;
}

export const when = (time) => (time === null || time === undefined ? "never" : new Date(time * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC");

export const precise = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.001 && Math.abs(value) < 1e6 ? number(value, 3) : value.toExponential(2));

export const short = (value) => (value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1e5) ? Number(value.toPrecision(3)).toLocaleString("en") : value.toExponential(1));

// A table; a cell is text, an element, or {content, ...attributes}. The first cell of a row is its heading.
export function table(caption, columns, rows) {
  const cell = (value, index) => {
    const given = value !== null && typeof value === "object" && !(value instanceof Node);
    const { content, ...attributes } = given ? value : { content: value };
    return h(index === 0 ? "th" : "td", { ...(index === 0 ? { scope: "row" } : {}), "data-label": columns[index], ...attributes }, content);
  };
  const right = rows.length ? rows[0].map((value) => value?.class?.includes?.("number")) : [];
  const head = h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col", class: right[columns.indexOf(name)] ? "number" : null }, name))));
  return h("table", {}, h("caption", {}, caption), head, h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell)))));
}

// Replace what is shown only if it changed, so that a screen reader, a selection and the focus are left alone.
export function show(place, ...children) {
  const fresh = place.cloneNode(false);
  fresh.append(...children.filter((child) => child !== null));
  if (!place.isEqualNode(fresh)) place.replaceChildren(...fresh.childNodes);
}
