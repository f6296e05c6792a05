"use strict";
// What is shown, and where it comes from: from the file itself, or from the server that sent it, while runs go on.

const told = JSON.parse(byId("told").textContent);
const LOOK_MS = 2000,
  HIDDEN_MS = 15000,
  NEWEST = 4,
  EVENTS = 500;
const runs = new Map(told.runs.map((run) => [run.name, run])); // what is known of each run
const versions = new Map();
const indices = new Map(); // a run keeps its colour
let list = told.list,
  sorted = { column: "", down: true };
let chosen = told.live
  ? new Set(decodeURIComponent(location.hash.slice(1)).split("\n").filter(Boolean))
  : new Set(list.map((row) => row.name));

const COLUMNS = [
  ["run", (row) => row.name, (row) => row.name],
  ["state", (row) => row.state, (row) => row.state + (row.read < 1 ? `, ${Math.floor(100 * row.read)} % read` : "")],
  [
    "step",
    (row) => row.last_step,
    (row) => row.last_step.toLocaleString("en") + (row.steps ? ` of ${row.steps.toLocaleString("en")}` : ""),
  ],
  ["best", (row) => row.best && row.best[1], (row) => (row.best ? `${row.best[0]} ${number(row.best[1])}` : "-")],
  ["loss", (row) => row.loss, (row) => number(row.loss)],
  ["restarts", (row) => row.restarts, (row) => String(row.restarts)],
  ["useful", (row) => row.useful, (row) => percent(row.useful)],
  ["samples/s", (row) => row.speed, (row) => number(row.speed)],
  ["last heard", (row) => row.heard, (row) => (row.heard ? when(row.heard) : "-")],
];

const lines = new Map(); // the table's rows by name, kept so that focus stays
function line(row) {
  let own = lines.get(row.name);
  if (!own) {
    const box = el("input", {
      type: "checkbox",
      "aria-label": `show ${row.name}`,
      change: () => choose(row.name, box.checked),
    });
    own = {
      box,
      mark: el("td", {}, box),
      cells: COLUMNS.map((column, i) => el(i ? "td" : "th", i ? {} : { scope: "row" })),
    };
    own.element = el("tr", {}, own.mark, ...own.cells);
    lines.set(row.name, own);
  }
  own.box.checked = chosen.has(row.name);
  COLUMNS.forEach(([, , text], i) => {
    if (own.cells[i].textContent !== text(row)) own.cells[i].textContent = text(row);
  });
  own.cells[1].className = row.tone;
  if (chosen.has(row.name)) own.cells[0].prepend(swatch(index(row.name)));
  return own.element;
}

function index(name) {
  if (!indices.has(name)) indices.set(name, indices.size);
  return indices.get(name);
}

function overview() {
  const wanted = byId("filter").value.toLowerCase().split(/\s+/);
  const rows = list.filter((row) => wanted.every((word) => `${row.name} ${row.state}`.toLowerCase().includes(word)));
  const column = COLUMNS.find(([name]) => name === sorted.column);
  if (column) rows.sort((a, b) => compare(column[1](a), column[1](b)) * (sorted.down ? -1 : 1));
  byId("found").textContent = `${rows.length} of ${list.length} runs, ${chosen.size} shown`;
  const head = COLUMNS.map(([name]) =>
    el(
      "th",
      { scope: "col", "aria-sort": sorted.column === name ? (sorted.down ? "descending" : "ascending") : null },
      el("button", { type: "button", click: () => sort(name) }, name),
    ),
  );
  fill(heads, [sorted], () => [el("tr", {}, el("td", {}, ""), ...head)]);
  const elements = rows.map(line);
  if (elements.some((element, i) => body.children[i] !== element) || body.children.length !== elements.length)
    body.replaceChildren(...elements);
}
const heads = el("thead"),
  body = el("tbody");
byId("runs").append(heads, body);

function compare(a, b) {
  // what is not known comes last when the largest comes first
  if (a === null || a === undefined || b === null || b === undefined)
    return Number(a !== null && a !== undefined) - Number(b !== null && b !== undefined);
  return typeof a === "string" ? a.localeCompare(b) : a - b;
}

function sort(name) {
  sorted = { column: name, down: sorted.column === name ? !sorted.down : name !== "run" && name !== "state" };
  overview();
  [...heads.querySelectorAll("button")].find((button) => button.textContent === name).focus();
}

function choose(name, wanted) {
  if (wanted) chosen.add(name);
  else chosen.delete(name);
  if (told.live) history.replaceState(null, "", `#${encodeURIComponent([...chosen].join("\n"))}`);
  show();
  if (told.live) look();
}

function show() {
  overview();
  const shown = list.map((row) => row.name).filter((name) => chosen.has(name) && runs.has(name));
  const known = shown.map((name) => Object.assign(runs.get(name), { index: index(name) }));
  for (const part of [verdicts, curves, samples, timeline, goodput, ranks, configuration, events]) part(known);
}

// ------------------------------------------------------------ live

function widthFor(lastStep, count) {
  // steps per point, as thin.py has it
  const points = Math.max(128, Math.min(1024, Math.floor(24000 / Math.max(count, 1))));
  return 2 ** Math.max(0, Math.ceil(Math.log2(Math.max(lastStep, 1) / points)));
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
  return answer.json();
}

function join(name, news) {
  // what is new of a run, to what is known: points from news.begin on are news
  const old = runs.get(name);
  if (old && old.generation === news.generation && old.width === news.width) {
    news.events = [...old.events, ...news.events].slice(-EVENTS);
    for (const [metric, curve] of Object.entries(news.curves)) {
      const before = old.curves[metric];
      if (!before) continue;
      const kept = last(before.x, news.begin - 1) + 1,
        own = ["mean", "low", "high"];
      if (before.low || curve.low)
        for (const each of [before, curve]) for (const edge of ["low", "high"]) each[edge] ||= each.mean;
      for (const column of ["x", ...own])
        if (curve[column]) curve[column] = [...before[column].slice(0, kept), ...curve[column]];
    }
  }
  runs.set(name, news);
}

let looking = 0,
  timer = 0;
async function look() {
  const mine = ++looking;
  let fresh = false;
  clearTimeout(timer);
  try {
    list = (await ask("api/runs")).runs;
    if (!chosen.size && !runs.size) chosen = new Set(list.slice(0, NEWEST).map((row) => row.name));
    const rows = list.filter((row) => chosen.has(row.name)),
      width = widthFor(Math.max(...rows.map((row) => row.last_step)), rows.length);
    for (const row of rows) {
      const known = runs.get(row.name);
      if (known && versions.get(row.name) === row.version && known.width === width) continue;
      const same = known && known.width === width;
      const have = same ? { begin: known.next, generation: known.generation, events: known.event_count } : {};
      const query = new URLSearchParams({ name: row.name, width, ...have });
      const news = await ask(`api/run?${query}`);
      if (mine !== looking) return; // a newer look is under way
      join(row.name, news);
      fresh = true;
      versions.set(row.name, row.version);
    }
    for (const name of runs.keys()) if (!chosen.has(name)) runs.delete(name);
    byId("made").textContent = `live, seen at ${when(Date.now() / 1000)}`;
    byId("made").className = "";
    if (fresh) show();
    else overview();
  } catch (error) {
    byId("made").textContent =
      `no answer from the server at ${when(Date.now() / 1000)} (${error.message}): is "millstream dashboard" running?`;
    byId("made").className = "bad";
  }
  if (mine === looking) timer = setTimeout(look, document.hidden ? HIDDEN_MS : LOOK_MS);
}

byId("title").textContent = told.live ? told.title : list.length === 1 ? list[0].name : `${list.length} runs`;
byId("filter").addEventListener("input", overview);
byId("kind").addEventListener("change", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of charts.values()) chart.shape = "";
  show();
});
if (told.live) {
  byId("made").textContent = "connecting";
  document.addEventListener("visibilitychange", () => document.hidden || look());
  look();
} else {
  byId("made").textContent = `as of ${when(told.made)}, millstream ${told.version}`;
  show();
}
