// The key explorer: one key's counts, weights, what the next event would do, and its nearest keys.

import { $, h, number, precise, s, short, span, when } from "./dom.js";

const HALF_LIVES = 4; // shown from the last event on

export const address = (entity, id) => `#/${encodeURIComponent(entity)}/${encodeURIComponent(id)}`;

export function asked() {
  const parts = location.hash.match(/^#\/([^/]+)\/([^/]+)$/);
  try {
    return parts && { entity: decodeURIComponent(parts[1]), id: decodeURIComponent(parts[2]) };
  } catch {
    return null; // not an address that we made
  }
}

// `ask(path)` fetches JSON; `status` says the columns and the weights of events.
export async function explore(ask, status, { entity, id }) {
  const path = `v1/${encodeURIComponent(entity)}/${encodeURIComponent(id)}`;
  const place = $("found");
  place.setAttribute("aria-busy", "true");
  try {
    // Decayed to 1970 they are whole: the weights as they were at each column's newest event.
    const [now, then] = await Promise.all([ask(path), ask(`${path}?at=0`)]);
    const columns = status.entities[entity].columns;
    const facts = h("p", {}, `${number(now.count)} events · newest ${when(now.event_time)} · weights as of ${when(now.at)}, the stream's time`);
    const sections = Object.entries(now.columns).map(([name, values]) => section(name, columns[name], values, then.columns[name], now.at, status.weights));
    const vectors = Object.keys(columns).filter((name) => columns[name].dim);
    const near = vectors.length ? h("section", { "aria-label": "Nearest keys" }) : null;
    place.replaceChildren(h("h3", {}, `${entity} ${id}`), facts, ...sections, ...(near ? [near] : []));
    if (near) await neighbours(ask, path, entity, vectors, vectors[0], near);
  } catch (error) {
    place.replaceChildren(h("p", { class: "problem" }, error.message));
  } finally {
    place.removeAttribute("aria-busy");
  }
}

function section(name, column, values, whole, at, weights) {
  const title = h("h4", {}, name, h("span", { class: "soft" }, ` ${column.half_life ? `decayed mean, half-life ${span(column.half_life)}` : "latest"}${column.dim ? `, ${column.dim} dims` : ", weight alone"}`));
  if (values.time === null) return h("section", {}, title, h("p", { class: "soft" }, "No event yet."));
  if (!column.half_life) return h("section", {}, title, h("p", {}, `Set ${when(values.time)}, ${span(at - values.time)} before the stream's time.`));
  const events = column.events ?? Object.keys(weights);
  const left = (seconds) => whole.weight * 2 ** (-Math.max(seconds, 0) / column.half_life);
  const beta = (event) => (seconds) => left(seconds) / (left(seconds) + weights[event]);
  const since = at - values.time;
  const now = h("p", {}, `Weight ${precise(values.weight)} now, ${precise(whole.weight)} at its newest event ${span(since)} before. `, `β now: ${events.map((event) => `${precise(beta(event)(since))} (${event})`).join(", ")}.`);
  const plots = h(
    "div", { class: "plots" },
    plot("Weight that is left", column.half_life, since, whole.weight, [["weight", left]]),
    plot("β that the next event would have: the share that what is known keeps", column.half_life, since, 1, events.map((event) => [event, beta(event)])),
  );
  return h("section", {}, title, now, plots);
}

// Lines over the time since the newest event, in half-lives; a rule where the stream is now.
function plot(caption, halfLife, since, top, lines) {
  const [width, height, left, bottom] = [340, 150, 44, 24];
  const x = (seconds) => left + ((width - left - 8) * seconds) / (HALF_LIVES * halfLife);
  const y = (value) => 8 + (height - 8 - bottom) * (1 - value / (top || 1));
  const ticks = Array.from({ length: HALF_LIVES + 1 }, (_, i) => i);
  const path = (f) => Array.from({ length: 81 }, (_, i) => (i * HALF_LIVES * halfLife) / 80).map((t, i) => `${i ? "L" : "M"}${x(t).toFixed(1)} ${y(f(t)).toFixed(1)}`).join("");
  const inside = since >= 0 && since <= HALF_LIVES * halfLife;
  const drawn = s(
    "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${caption}: ${lines.map(([name, f]) => `${name} ${precise(f(0))} at the newest event, ${precise(f(since))} now, ${precise(f(HALF_LIVES * halfLife))} after ${HALF_LIVES} half-lives`).join("; ")}` },
    [0, 0.5, 1].map((part) => s("g", {}, s("line", { class: "axis", x1: left, x2: width - 8, y1: y(part * top), y2: y(part * top) }), s("text", { class: "soft", x: left - 6, y: y(part * top) + 4, "text-anchor": "end" }, short(part * top)))),
    ticks.map((i) => s("text", { class: "soft", x: x(i * halfLife), y: height - 6, "text-anchor": i === HALF_LIVES ? "end" : "middle" }, span(i * halfLife))),
    inside ? s("line", { class: "now", x1: x(since), x2: x(since), y1: 8, y2: height - bottom }) : null,
    lines.map(([, f], i) => s("path", { class: `line c${i % 3}`, d: path(f) })),
    inside ? lines.map(([, f]) => s("circle", { class: "dot", cx: x(since), cy: y(f(since)), r: 3.5 })) : null,
  );
  const legend = lines.length > 1 ? lines.map(([name], i) => h("span", { class: `legend c${i % 3}` }, `${"━╍┅"[i % 3]} ${name} `)) : null;
  return h("figure", {}, drawn, h("figcaption", {}, legend, caption, inside ? "; the rule is the stream's time" : `; the stream's time is ${span(since)} on`));
}

async function neighbours(ask, path, entity, vectors, column, place) {
  const choice = h("select", { "aria-label": "Vectors to compare" }, vectors.map((name) => h("option", name === column ? { selected: "" } : {}, name)));
  choice.addEventListener("change", async () => {
    await neighbours(ask, path, entity, vectors, choice.value, place);
    place.querySelector("select")?.focus();
  });
  const found = await ask(`${path}/nearest?column=${encodeURIComponent(column)}`).then((answer) => answer.nearest, (error) => error);
  const list = Array.isArray(found)
    ? h("ol", { class: "near" }, found.map((other) => h("li", {}, h("a", { href: address(entity, other.id) }, other.id), ` ${other.cosine.toFixed(4)}`)))
    : h("p", { class: "problem" }, found.message);
  place.replaceChildren(h("h4", {}, "Nearest by cosine"), h("div", { class: "fields" }, h("label", {}, "Vectors ", choice)), list);
}
