// The flow as a picture: what it consists of, how each part is, and where it is drawn.

import { number, rate, s, span } from "./dom.js";

const GLYPHS = { good: "✓", wait: "▲", bad: "✕", unknown: "?" };
const BEHIND = 5; // seconds

// The parts, each {id, title, state, lines, short}, and the arrows between them, each [from, to, messages a second].
export function parts(status) {
  const { topics, stages, dead_letters: letters } = status.flow;
  const perSecond = (topic) => topics[topic]?.per_second;
  const nodes = [];
  const arrows = [];
  const roles = ["infer", "frame"].filter((role) => role === "infer" || stages[role].used || stages[role].members.length);
  roles.forEach((role) => {
    for (const topic of stages[role].topics) {
      nodes.push({ id: topic, column: "inputs", title: inputName(topic, status.space), state: topics[topic] ? "good" : "bad", lines: [topics[topic] ? `${number(topics[topic].end)} so far` : "no such topic"] });
      arrows.push([topic, role, perSecond(topic)]);
    }
    nodes.push({ id: role, column: "workers", title: role, ...worked(stages[role]) });
    arrows.push([role, "frames", roles.length === 1 ? perSecond(stages.fold.topics[0]) : stages[role].per_second]);
  });
  const frames = topics[stages.fold.topics[0]];
  nodes.push({ id: "frames", column: "frames", title: "frames", state: frames ? "good" : "bad", lines: [frames ? `${frames.partitions} partitions` : "no such topic"] });
  arrows.push(["frames", "fold", stages.fold.per_second]);
  const fold = worked(stages.fold);
  if (status.flow.rows_per_second !== null) fold.lines.push(`${rate(status.flow.rows_per_second).replace("/s", "")} rows/s`);
  nodes.push({ id: "fold", column: "fold", title: "fold", ...fold });
  for (const [name, entity] of Object.entries(status.entities)) {
    const topic = topics[entity.topic];
    nodes.push({ id: entity.topic, column: "outputs", title: name, state: topic ? "good" : "bad", lines: [topic ? `${entity.keys_exact ? "" : "≈ "}${number(entity.keys)} keys` : "no such topic"] });
    arrows.push(["fold", entity.topic, topic?.per_second], [entity.topic, "replica", null]);
  }
  nodes.push({ id: "replica", column: "replica", title: "this replica", ...replica(status) });
  const dead = topics[letters.topic];
  const refused = letters.reasons.reduce((sum, reason) => sum + reason.count, 0);
  const lately = dead?.per_second > 0;
  nodes.push({ id: "letters", column: "letters", title: "dead letters", state: lately ? "bad" : refused ? "wait" : "good", lines: [refused ? `${number(refused)} lately` : "none"] });
  arrows.push([roles[0], "letters", dead?.per_second, "side"], ["fold", "letters", null, "side"]);
  return { nodes, arrows };
}

function inputName(topic, space) {
  const name = topic.endsWith(`.${space}`) ? topic.slice(0, -space.length - 1) : topic;
  return name.replace(/^events\./, "");
}

function worked(stage) {
  const workers = stage.members.length;
  const lines = [`${workers} ${workers === 1 ? "worker" : "workers"}`, `lag ${number(stage.lag)}`];
  if (!workers) return { state: "bad", lines: ["no worker", lines[1]] };
  const seconds = stage.lag / (stage.per_second || 0);
  return { state: stage.lag > 0 && !(seconds < BEHIND) ? "wait" : "good", lines };
}

function replica(status) {
  const entities = Object.values(status.entities);
  const lag = entities.reduce((sum, entity) => sum + entity.lag.records, 0);
  if (entities.some((entity) => !entity.caught_up)) return { state: "wait", lines: ["restoring", `lag ${number(lag)}`] };
  const seconds = Math.max(...entities.map((entity) => entity.lag.seconds ?? Infinity));
  return { state: seconds > BEHIND ? "wait" : "good", lines: [`lag ${number(lag)}`, `${span(seconds)} behind`] };
}

// Where parts lie: along the page, or down it on a phone.
function placed(nodes, narrow) {
  const columns = ["inputs", "workers", "frames", "fold", "outputs", "replica"];
  const [width, height] = narrow ? [136, 86] : [138, 88];
  const tallest = Math.max(2, ...columns.map((name) => nodes.filter((node) => node.column === name).length));
  const across = narrow ? 20 + width : 24 + height;
  const along = narrow ? height + 42 : width + 62;
  const total = tallest * across;
  const at = {};
  columns.forEach((name, column) => {
    const some = nodes.filter((node) => node.column === name);
    some.forEach((node, row) => (at[node.id] = [column * along, ((row + 0.5) * total) / some.length - across / 2]));
  });
  const middle = (total - across) / 2;
  if (narrow) {
    at.frames[1] = middle - across / 2;
    at.letters = [2 * along, middle + across / 2];
  } else {
    at.letters = [2 * along, middle + across * 1.05];
  }
  for (const id of Object.keys(at)) at[id] = narrow ? [at[id][1] + across / 2 - width / 2, at[id][0]] : at[id];
  const right = Math.max(...Object.values(at).map(([x]) => x)) + width;
  const bottom = Math.max(...Object.values(at).map(([, y]) => y)) + height;
  return { at, width, height, right: narrow ? total : right, bottom };
}

export function picture({ nodes, arrows }, narrow) {
  const { at, width, height, right, bottom } = placed(nodes, narrow);
  const drawing = arrows.map(([from, to, perSecond, kind]) => arrow(at[from], at[to], { width, height, narrow, perSecond, kind }));
  const boxes = nodes.map((node) => {
    const [x, y] = at[node.id];
    const line = (text, index, name) => s("text", { x: x + 10, y: y + 23 + 18 * index, class: name }, text);
    return s(
      "g", {},
      s("title", {}, [node.title, ...node.lines].join(", ")),
      s("rect", { x, y, width, height, rx: 8, class: `node ${node.state}` }),
      line(fitted(node.title, 15), 0, "title"),
      s("text", { x: x + width - 10, y: y + 22, class: node.state, "text-anchor": "end" }, GLYPHS[node.state]),
      node.lines.slice(0, 3).map((text, index) => line(text, index + 1, node.state === "good" ? "soft" : node.state)),
    );
  });
  const said = nodes.map((node) => `${node.title}: ${node.lines.join(", ")}`).join("; ");
  return s("svg", { viewBox: `-3 -3 ${right + 6} ${bottom + 6}`, role: "img", "aria-label": `The flow. ${said}` }, drawing.map((d) => d.line), boxes, drawing.map((d) => d.label));
}

function arrow([fromX, fromY], [toX, toY], { width, height, narrow, perSecond, kind }) {
  // From the side that faces the other box; a branch to the side leaves across the flow.
  const back = narrow ? toY < fromY : toX < fromX;
  let start, end, bend;
  if (narrow) {
    start = [fromX + width / 2, back ? fromY : fromY + height];
    end = [toX + width / 2 + (kind && !back ? -12 : kind ? 12 : 0), back ? toY + height : toY];
    bend = [start[0], (start[1] + end[1]) / 2, end[0], (start[1] + end[1]) / 2];
  } else if (kind) {
    start = [fromX + width / 2, fromY + height];
    end = [back ? toX + width : toX, toY + height / 2];
    bend = [start[0], end[1], start[0], end[1]];
  } else {
    start = [fromX + width, fromY + height / 2];
    end = [toX, toY + height / 2];
    bend = [(start[0] + end[0]) / 2, start[1], (start[0] + end[0]) / 2, end[1]];
  }
  const [dx, dy] = [end[0] - bend[2], end[1] - bend[3]];
  const angle = (Math.atan2(dy, dx) * 180) / Math.PI;
  const flowing = perSecond > 0 ? "flowing" : "";
  const path = s("path", { class: `edge ${kind ?? ""} ${flowing}`, d: `M${start} C${bend} ${end}` });
  const head = s("path", { class: "head", d: "M0 0L-8 -4L-8 4Z", transform: `translate(${end}) rotate(${angle})` });
  const middle = kind && !narrow ? [(start[0] + end[0]) / 2, end[1] - 7] : [(start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + (narrow ? 4 : -7)];
  const shown = perSecond !== null && !(kind && !perSecond);
  const label = shown ? s("text", { x: middle[0], y: middle[1], class: "rate", "text-anchor": "middle" }, rate(perSecond)) : null;
  return { line: s("g", {}, path, head), label };
}

const fitted = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
