"use strict";
// What the network made of a few held-out samples. A slider goes through the evaluations that are told; it stays with
// the newest one until somebody moves it away.

const galleries = new Map(); // by run, kept so that focus and place stay while it trains

class Gallery {
  constructor(name) {
    this.wanted = null; // the step that somebody chose; null: the newest
    this.slider = el("input", {
      type: "range",
      min: 0,
      "aria-label": `evaluation of ${name}`,
      input: () => {
        const at = Number(this.slider.value);
        this.wanted = at === this.run.samples.length - 1 ? null : this.run.samples[at].step;
        this.draw();
      },
    });
    this.label = el("span");
    this.head = el("div");
    this.body = el("div");
    this.tools = el("div", { class: "tools" }, this.slider, this.label);
    this.element = el("div", {}, this.head, this.tools, this.body);
  }

  update(run) {
    this.run = run;
    fill(this.head, [run.name, run.index], () => [heading(run)]);
    this.draw();
  }

  draw() {
    const moments = this.run.samples;
    let at = moments.findIndex((moment) => moment.step === this.wanted);
    if (at < 0) at = moments.length - 1;
    const moment = moments[at];
    this.tools.hidden = moments.length < 2;
    this.slider.max = moments.length - 1;
    this.slider.value = at;
    this.label.textContent = `step ${moment.step.toLocaleString("en")}`;
    this.slider.setAttribute("aria-valuetext", this.label.textContent);
    fill(this.body, moment, () => Object.entries(moment.sets).flatMap(([set, rows]) => this.set(set, rows, moment.step)));
  }

  set(name, rows, step) {
    const columns = [...new Set(rows.flatMap(Object.keys))],
      title = `${name} after ${step.toLocaleString("en")} steps`;
    const pictured = columns.filter((column) => rows.some((row) => row[column] && row[column].picture));
    if (pictured.length) {
      const cards = rows.map((row, i) => this.card(row, columns, pictured, `sample ${i} of ${name}`));
      return [el("h4", {}, title), el("div", { class: "samples" }, ...cards)];
    }
    const cells = rows.map((row, i) => [String(i), ...columns.map((column) => told_as(row[column]))]);
    const box = { class: "scroll", tabindex: "0", role: "region", "aria-label": `samples of ${this.run.name}, ${title}` };
    return [el("h4", {}, title), el("div", box, table(["sample", ...columns], cells, `samples of ${name}`))];
  }

  card(row, columns, pictured, what) {
    const words = columns.filter((column) => !pictured.includes(column));
    const words_told = words.map((column) => `${column} ${told_as(row[column])}`);
    const wrong = "label" in row && "prediction" in row && row.label !== row.prediction;
    const images = pictured.map((column) => {
      const source = row[column] && this.source(row[column]);
      if (!source) return el("p", {}, "no picture");
      return el("img", { src: source, alt: `${column}, ${what}: ${words_told.join(", ")}` });
    });
    const facts = words.flatMap((column) => [el("dt", {}, column), el("dd", {}, told_as(row[column]))]);
    return el("div", { class: `sample${wrong ? " wrong" : ""}` }, ...images, el("dl", {}, ...facts));
  }

  source(cell) {
    if (cell.data || !told.live) return cell.data; // a file holds its pictures
    return `api/picture?${new URLSearchParams({ name: this.run.name, file: cell.picture })}`;
  }
}

const told_as = (value) =>
  typeof value === "number" || value === null || value === undefined ? number(value) : String(value);

function samples(runs) {
  const own = runs.filter((run) => run.samples.length);
  for (const run of own) if (!galleries.has(run.name)) galleries.set(run.name, new Gallery(run.name));
  byId("s-samples").hidden = !own.length;
  fill(
    byId("samples"),
    own.map((run) => run.name),
    () => own.map((run) => galleries.get(run.name).element),
  );
  for (const run of own) galleries.get(run.name).update(run);
}
