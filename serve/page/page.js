// Asks for the state every two seconds and shows it. Nothing is remembered but the token, and that only in this tab.

import { $, bytes, h, number, show, span, table, when } from "./dom.js";
import { parts, picture } from "./flow.js";
import { address, asked, explore } from "./keys.js";

const EVERY = 2000; // ms
const narrow = matchMedia("(max-width: 46rem)");
let status = null;
let explored = null; // the key that is shown
let shown = null; // the space that is
let timer = 0;

class Unauthorised extends Error {}

async function ask(path) {
  const token = sessionStorage.getItem("token");
  const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {}, cache: "no-store", signal: AbortSignal.timeout(15000) });
  const said = await answer.json().catch(() => ({ error: `status ${answer.status}`, fix: "" }));
  if (answer.status === 401) throw new Unauthorised(said.error);
  if (!answer.ok) throw new Error(`${said.error}: ${said.fix}`);
  return said;
}

async function poll() {
  clearTimeout(timer);
  try {
    status = await ask("v1/status");
    known();
    render();
    await follow();
  } catch (error) {
    if (error instanceof Unauthorised) return challenge();
    const away = error instanceof TypeError || error.name === "TimeoutError";
    overall("bad", away ? "The replica does not answer" : "The replica cannot say");
    problem(away ? "This replica does not answer. What is below is what it said last." : error.message);
  }
  if (!document.hidden) timer = setTimeout(poll, status?.flow ? EVERY : 500);
}

// --- The token ---

function challenge() {
  $("token-problem").textContent = sessionStorage.getItem("token") ? "That token is not valid." : "";
  sessionStorage.removeItem("token");
  overall("unknown", "A token is needed");
  $("content").hidden = true;
  if ($("token").hidden) {
    $("token").hidden = false;
    $("token-input").focus();
  }
}

function known() {
  if (!$("token").hidden) $("token").hidden = true;
  $("content").hidden = false;
}

$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token-input").value.trim());
  $("token-input").value = "";
  poll();
});

// --- The state ---

function overall(state, text) {
  const glyph = { good: "✓", wait: "▲", bad: "✕", unknown: "…" }[state];
  const shown = `${glyph} ${text}`;
  if ($("state").textContent !== shown) $("state").textContent = shown; // or it would be read out again and again
  $("state").className = `state ${state}`;
}

function problem(text) {
  $("problem").hidden = !text;
  if ($("problem").textContent !== text) $("problem").textContent = text;
}

function render() {
  const { alias } = status;
  $("space").textContent = alias ? `${alias.name} → ${status.space}${alias.loading ? `, loading ${alias.loading} …` : ""}` : status.space;
  document.title = `${status.space} · crossrep`;
  if (shown !== status.space) {
    const chosen = $("entity").value;
    $("entity").replaceChildren(...Object.keys(status.entities).map((name) => h("option", name === chosen ? { selected: "" } : {}, name)));
    explored = null;
    $("found").replaceChildren(); // it is of the former space
    shown = status.space;
  }
  if (alias?.problem) problem(`${alias.problem}. It is tried again.`);
  else problem(status.error ? `${status.error}. What is below was seen ${status.looked === null ? "never" : `${span(status.looked)} ago`}; look-ups are answered from what this replica holds.` : "");
  tables();
  if (!status.flow) return overall(status.error ? "bad" : "unknown", status.error ? "The cluster is away" : "Looking …");
  const flow = parts(status);
  show($("flow"), picture(flow, narrow.matches));
  tiles();
  partitions();
  letters();
  const workers = flow.nodes.filter((node) => node.id !== "letters");
  const bad = workers.filter((node) => node.state === "bad").map((node) => node.title);
  const late = workers.filter((node) => node.state === "wait").map((node) => node.title);
  if (status.error) overall("bad", "The cluster is away");
  else if (bad.length) overall("bad", `Stopped: ${bad.join(", ")}`);
  else if (late.length) overall("wait", `Behind: ${late.join(", ")}`);
  else overall("good", "All is flowing");
}

function tiles() {
  const { freshness, topics } = status.flow;
  const entities = Object.values(status.entities);
  const behind = Math.max(...entities.map((entity) => entity.lag.seconds ?? Infinity));
  const stalled = freshness.waiting > 2 * (freshness.seconds ?? 0) + 2;
  const through = stalled ? `over ${span(freshness.waiting)}` : freshness.seconds === null ? "?" : `under ${span(freshness.seconds + behind)}`;
  const events = status.flow.stages.infer.topics.map((topic) => topics[topic]?.newest).filter(Boolean);
  const stream = Math.max(...entities.map((entity) => entity.stream_time ?? -Infinity));
  const tile = (name, value, note) => h("div", {}, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "note" }, note));
  show(
    $("tiles"),
    tile("Freshness", through, "from an event's append until it is in the answers; as coarse as the looks, twice a second"),
    tile("This replica", `${span(behind)} behind`, "whatever readers could see longer ago than this is in its answers"),
    tile("Newest event", events.length ? `${span(Math.max(0, status.time - Math.max(...events)))} ago` : "?", "since it was appended, by the broker's clock"),
    tile("Stream's time", isFinite(stream) ? when(stream).replace(" UTC", "") : "?", "UTC, the newest event time in any record; weights are decayed to it"),
  );
}

function partitions() {
  const told = status.flow.workers.length > 0;
  const rows = status.flow.partitions.map((partition) => [
    number(partition.number),
    partition.owner ? `${partition.owner} (${partition.host})` : h("span", { class: "bad" }, "✕ nobody"),
    { content: number(partition.lag), class: "number" },
    { content: number(partition.position), class: "number" },
    restored(partition.worker, told),
    { content: partition.worker ? number(partition.worker.keys_in_memory) : "not known", class: partition.worker ? "number" : "number soft" },
  ]);
  const silent = status.flow.workers.filter((worker) => worker.error).map((worker) => h("p", { class: "bad" }, `✕ ${worker.url}: ${worker.error}`));
  const hint = told ? null : h("p", { class: "soft" }, "Kafka does not know how far a worker has restored its partitions. Start crossrep serve with --worker URL, the address of a fold worker's /metrics, once for each worker.");
  show($("partitions"), table("Of the fold workers. Behind: offsets of frames not yet folded and committed.", ["partition", "owner", "behind", "progress", "restored", "keys in memory"], rows), ...silent, hint);
}

function restored(worker, told) {
  if (!worker) return h("span", { class: "soft" }, told ? "its worker does not say" : "not known");
  const { restored_records: done, restore_records: all, flowing, restore_seconds: seconds } = worker;
  if (flowing) return h("span", { class: "good" }, `✓ flowing${all ? `, ${number(done)} records in ${span(seconds)}` : ""}`);
  const part = all ? done / all : 0;
  return h("span", { class: "wait" }, h("progress", { max: 1, value: part, "aria-label": "restored" }), `▲ ${number(100 * part)} % of ${number(all)} records`);
}

function tables() {
  const rows = Object.entries(status.entities).map(([name, entity]) => [
    name,
    { content: `${entity.keys_exact ? "" : "≈ "}${number(entity.keys)}`, class: "number" },
    { content: bytes(entity.record_bytes), class: "number" },
    { content: bytes(entity.keys * entity.record_bytes), class: "number" },
    { content: bytes(entity.disk_bytes), class: "number" },
    { content: entity.keys_exact ? "all keys" : `${number(entity.keys_in_memory)} keys`, class: "number" },
    { content: number(entity.lag.records), class: "number" },
  ]);
  show($("tables"), table("As this replica holds them.", ["entity", "keys", "a record", "records", "on disk", "in memory", "behind"], rows));
}

function letters() {
  const { reasons, counted_from: first, end, kept, topic } = status.flow.dead_letters;
  if (!reasons.length) return show($("letters"), h("p", {}, h("span", { class: "good" }, "✓ "), `None${first > kept ? ` among the newest ${number(end - first)} offsets` : ""} in ${topic}.`));
  const rows = reasons.map(({ reason, count, example }) => [
    reason,
    { content: number(count), class: "number" },
    {
      class: "long",
      content: h(
        "div", {}, example.detail,
        h("div", { class: "soft" }, `${example.topic}[${example.partition}] at ${example.offset}, refused ${when(example.time)}`),
        h("div", { class: "raw" }, `key ${example.key ?? "none"} · ${number(example.bytes)} bytes: ${example.value ?? "none"}`),
      ),
    },
  ]);
  const earlier = first > kept ? ` Counted from offset ${number(first)} on; the broker has earlier ones from ${number(kept)} on.` : "";
  show($("letters"), table(`In ${topic}, the newest of each as an example.${earlier}`, ["reason", "letters", "example"], rows));
}

// --- Keys ---

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  explored = null;
  const wanted = address($("entity").value, $("id").value);
  if (location.hash === wanted) follow();
  else location.hash = wanted;
});

async function follow() {
  const wanted = asked();
  if (!status || !wanted || location.hash === explored) return;
  explored = location.hash;
  if (!(wanted.entity in status.entities)) return;
  $("entity").value = wanted.entity;
  $("id").value = wanted.id;
  await explore(ask, status, wanted);
}

addEventListener("hashchange", follow);
narrow.addEventListener("change", () => status?.flow && render());
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
poll();
