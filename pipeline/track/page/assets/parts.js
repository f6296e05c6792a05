"use strict";
// The parts of the page besides the charts. Each fills its place from what was told, and only when that has changed, so
// that focus, selection and scroll position stay while a run trains.

function verdicts(runs) {
  fill(
    byId("verdict"),
    runs.map((run) => [run.name, run.index, run.verdict, run.facts]),
    () =>
      runs.map((run) => {
        const { state, tone, sentence, notes } = run.verdict;
        const list = notes.length
          ? el("ul", {}, ...notes.map((note) => el("li", {}, note)))
          : el("p", {}, "Nothing else asks for a look.");
        const facts = run.facts.flatMap(([what, value]) => [el("dt", {}, what), el("dd", {}, value)]);
        return el(
          "article",
          { class: "card" },
          heading(run),
          el("p", {}, el("span", { class: `state ${tone}` }, state), `: ${sentence}`),
          list,
          el("dl", {}, ...facts),
        );
      }),
  );
}

const PLACED = [
  "train/loss",
  "eval/",
  "train/",
  "optim/",
  "throughput/",
  "time/",
  "data/",
  "pace/",
  "memory/",
  "checkpoint/",
];
const OPEN = PLACED.indexOf("checkpoint/"); // these and what is not listed are folded away
function rank(name) {
  const place = PLACED.findIndex((prefix) => name.startsWith(prefix));
  return place < 0 ? PLACED.length : place;
}

function curves(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))],
    place = byId("charts");
  names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  bounds.last = Math.max(
    1,
    ...runs.flatMap((run) => Object.values(run.curves).map((curve) => curve.x[curve.x.length - 1])),
  );
  for (const name of names) if (!charts.has(name)) charts.set(name, new Chart(name));
  fill(place, names, () => {
    const folded = new Map(),
      figures = (some) => some.map((name) => charts.get(name).figure);
    for (const name of names.filter((name) => rank(name) >= OPEN)) {
      const group = name.split("/")[0];
      folded.set(group, [...(folded.get(group) || []), name]);
    }
    const unfold = (own) => () => own.forEach((name) => charts.get(name).draw());
    const groups = [...folded].map(([group, own]) =>
      el(
        "details",
        { toggle: unfold(own) },
        el("summary", {}, `${group}: ${own.length} more`),
        el("div", { class: "grid" }, ...figures(own)),
      ),
    );
    return [el("div", { class: "grid" }, ...figures(names.filter((name) => rank(name) < OPEN))), ...groups];
  });
  for (const name of names) {
    const own = runs.filter((run) => run.curves[name]);
    charts
      .get(name)
      .update(own.map((run) => ({ name: run.name, index: run.index, curve: run.curves[name], width: run.width })));
  }
}

function timeline(runs) {
  fill(
    byId("timeline"),
    runs.map((run) => [run.name, run.index, run.attempts, run.marks]),
    () =>
      runs.flatMap((run) => {
        const { attempts, marks } = run;
        if (!attempts.length) return [];
        const begin = attempts[0].begin,
          end = Math.max(...attempts.map((span) => span.end)),
          long = Math.max(end - begin, 1e-3);
        const bars = attempts.map((span) => {
          const bar = el("div", {
            class: `span${["done", "stopped", ""].includes(span.outcome) ? "" : " lost"}`,
            title: `attempt ${span.number}, ${span.workers} workers: ${span.outcome}`,
          });
          bar.style.left = `${(100 * (span.begin - begin)) / long}%`;
          bar.style.width = `${(100 * (span.end - span.begin)) / long}%`;
          return bar;
        });
        const ticks = marks.map(([at, kind, step, text]) => {
          const tick = el("div", {
            class: `mark ${MARKED[kind] || "warn"}`,
            title: `${kind}${step === null ? "" : ` at step ${step}`} ${text}`,
          });
          tick.style.left = `${(100 * (at - begin)) / long}%`;
          return tick;
        });
        const label = `${run.name}: ${attempts.length} attempts, ${marks.length} marks, ${when(begin)} to ${when(end)}`;
        const rows = attempts.map((span) => [
          String(span.number),
          when(span.begin),
          when(span.end),
          String(span.workers || 1),
          span.first === null ? "-" : String(span.first),
          String(span.last),
          span.outcome || "-",
        ]);
        return [
          heading(run),
          el("div", { class: "line", role: "img", "aria-label": label }, ...bars, ...ticks),
          el("p", { class: "hint" }, `${when(begin)} to ${when(end)}`),
          el(
            "details",
            {},
            el("summary", {}, `${attempts.length} attempt${attempts.length > 1 ? "s" : ""} as a table`),
            el(
              "div",
              { class: "scroll", tabindex: "0", role: "region", "aria-label": `attempts of ${run.name}` },
              table(["attempt", "begin", "last heard", "workers", "from step", "to step", "outcome"], rows, "attempts"),
            ),
          ),
        ];
      }),
  );
}
const MARKED = {
  save: "save",
  evaluation: "evaluation",
  failure: "bad",
  error: "bad",
  stall: "bad",
  save_failed: "bad",
};

const KINDS = { useful: 2, data: 1, save: 0, evaluation: 4, restore: 6, start: 5, rework: 7, idle: 3 };
function split(shares, label) {
  // a bar of shares that add up to 1 at most
  const bar = el("div", { class: "split", role: "img", "aria-label": label });
  for (const [kind, share] of Object.entries(shares)) {
    const part = el("div", { title: `${kind} ${percent(share)}` });
    part.style.width = `${100 * share}%`;
    part.style.background = `var(--${KINDS[kind] ?? 3})`;
    bar.append(part);
  }
  return bar;
}

function key(kinds) {
  return el(
    "div",
    { class: "key", "aria-hidden": "true" },
    ...kinds.map((kind) => {
      const box = el("i");
      box.style.background = `var(--${KINDS[kind] ?? 3})`;
      return el("span", {}, box, kind);
    }),
  );
}

function goodput(runs) {
  fill(
    byId("goodput"),
    runs.map((run) => [run.name, run.index, run.goodput]),
    () => {
      const own = runs.filter((run) => Object.keys(run.goodput).length),
        kinds = [...new Set(own.flatMap((run) => Object.keys(run.goodput)))];
      if (!own.length) return [el("p", {}, "Nothing recorded yet.")];
      const bars = own.flatMap((run) => [
        el("div", {}, swatch(run.index), run.name),
        split(run.goodput, `${run.name}: ${kinds.map((kind) => `${kind} ${percent(run.goodput[kind])}`).join(", ")}`),
      ]);
      const rows = own.map((run) => [run.name, ...kinds.map((kind) => percent(run.goodput[kind]))]);
      return [
        ...bars,
        key(kinds),
        el(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": "time by kind" },
          table(["run", ...kinds], rows, "share of the seconds of all workers"),
        ),
      ];
    },
  );
}

const PHASES = {
  data: "data",
  forward: "useful",
  backward: "useful",
  step: "useful",
  commit: "save",
  upload: "save",
  silent: "idle",
};
const A_STEP = { computes: "computes, s a step", waits: "waits for data, s a step" }; // lately
function ranks(runs) {
  fill(
    byId("ranks"),
    runs.map((run) => [run.name, run.index, run.ranks]),
    () => {
      const own = runs.filter((run) => Object.keys(run.ranks).length);
      if (!own.length) return [el("p", {}, "How the workers spent their time has not been recorded yet.")];
      return own.flatMap((run) => {
        const phases = [...new Set(Object.values(run.ranks).flatMap(Object.keys))];
        const rows = Object.entries(run.ranks).map(([rank, spent]) => {
          const shares = {},
            whole =
              Object.entries(spent).reduce((sum, [phase, seconds]) => sum + (phase in A_STEP ? 0 : seconds), 0) || 1;
          for (const [phase, seconds] of Object.entries(spent)) {
            if (phase in A_STEP) continue;
            const kind = PHASES[phase] || phase;
            shares[kind] = (shares[kind] || 0) + seconds / whole;
          }
          return [`worker ${rank}`, split(shares, `worker ${rank}`), ...phases.map((phase) => number(spent[phase]))];
        });
        return [
          heading(run),
          el(
            "div",
            { class: "scroll", tabindex: "0", role: "region", "aria-label": `workers of ${run.name}` },
            table(
              ["worker", "share", ...phases.map((phase) => A_STEP[phase] || phase)],
              rows,
              "seconds in each phase, newest attempt",
            ),
          ),
        ];
      });
    },
  );
}

function configuration(runs) {
  fill(
    byId("config"),
    runs.map((run) => [run.name, run.config]),
    () => {
      const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))],
        columns = ["key", ...runs.map((run) => run.name)];
      const row = (name) => [name, ...runs.map((run) => run.config[name] ?? "-")];
      const differ = keys.filter((name) => new Set(runs.map((run) => run.config[name])).size > 1);
      const box = (label, names) =>
        el(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
          table(columns, names.map(row), label),
        );
      const all = el("details", {}, el("summary", {}, `all ${keys.length} keys`), box("configuration", keys));
      if (runs.length < 2) return [all];
      return [differ.length ? box("what differs", differ) : el("p", {}, "No key differs between these runs."), all];
    },
  );
}

const LISTED = 300;
const NUMERIC = ["attempt", "step"];
function events(runs) {
  const many = runs.length > 1,
    wanted = byId("kind").value;
  fill(byId("events"), [wanted, runs.map((run) => [run.name, run.event_count])], () => {
    const all = runs.flatMap((run) => run.events.map((event) => [run, event])).sort((a, b) => b[1][0] - a[1][0]);
    const kinds = ["", ...new Set(all.map(([, event]) => event[3]))].sort();
    if (byId("kind").options.length !== kinds.length)
      byId("kind").replaceChildren(
        ...kinds.map((kind) => el("option", { value: kind, selected: kind === wanted }, kind || "all")),
      );
    const listed = all.filter(([, event]) => !wanted || event[3] === wanted),
      total = runs.reduce((sum, run) => sum + run.event_count, 0);
    byId("counted").textContent =
      `${Math.min(listed.length, LISTED)} shown of ${total.toLocaleString("en")}, the newest first`;
    const columns = ["time", ...(many ? ["run"] : []), "attempt", "step", "kind", "what"];
    const rows = listed
      .slice(0, LISTED)
      .map(([run, [at, attempt, step, kind, tone, line, rest]]) =>
        el(
          "tr",
          {},
          el("td", { class: "path" }, when(at)),
          many ? el("td", {}, swatch(run.index), run.name) : null,
          el("td", { class: "n" }, String(attempt)),
          el("td", { class: "n" }, step === null ? "-" : step.toLocaleString("en")),
          el("td", { class: `path ${tone}` }, kind),
          el("td", {}, line, rest ? el("details", {}, el("summary", {}, "more"), el("pre", {}, rest)) : null),
        ),
      );
    return [
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ...columns.map((name) => el("th", { scope: "col", class: NUMERIC.includes(name) ? "n" : null }, name)),
        ),
      ),
      el("tbody", {}, ...rows),
    ];
  });
}
