"use strict";
// One chart: a metric of every run that is shown, drawn by uPlot; behind it the same as a table.
// The plot is a slider over steps for the keyboard and for screen readers. All charts share cursor and zoom.

const HEIGHT = 200;
const BANDS = 8; // with more runs the bands would hide the lines
const DRAWN = 240; // ranges of steps within what is seen: two or three pixels each, so that the mean is a calm line
const charts = new Map();

const TITLES = {
  "train/loss": "Training loss",
  "train/grad_norm": "Gradient norm",
  "optim/lr": "Learning rate",
  "throughput/samples_per_second": "Samples per second",
  "throughput/tokens_per_second": "Tokens per second",
  "throughput/mfu": "Model FLOPs utilization",
  "memory/host_gb": "Memory of the worker that holds most, GB",
  "memory/gpu_gb": "GPU memory of the worker that has held most, GB",
  "time/step_seconds": "Seconds per step",
  "pace/slowest_compute": "Slowest worker's computing, times the median's",
  "pace/slowest_data_share": "Slowest worker's wait for data beyond the median's, share of a step",
  "data/wait_share": "Share of the step waiting for data",
  "data/wait_seconds": "Seconds waiting for data",
};

const bounds = { first: 0, last: 1 }; // steps of all that is shown: all charts have the same
let zoom = null;
const seen = () => zoom || { min: bounds.first, max: bounds.last };

function zoomTo(range) {
  const [min, max] = range ? [Math.max(range.min, bounds.first), Math.min(range.max, bounds.last)] : [0, 0];
  zoom = max > min ? { min, max } : null;
  for (const chart of charts.values()) chart.draw();
}

// The same curve with fewer points: means of means, and of the bands the lowest and the highest. Ends and gaps stay.
function coarse(curve, width) {
  const { min, max } = seen(),
    steps = 2 ** Math.ceil(Math.log2((max - min) / DRAWN));
  if (steps <= width) return curve;
  const found = { x: [], mean: [], low: [], high: [] };
  for (let i = 0; i < curve.x.length;) {
    const range = Math.floor(curve.x[i] / steps),
      x = curve.x[i];
    let sum = 0,
      count = 0,
      low = Infinity,
      high = -Infinity;
    for (; i < curve.x.length && Math.floor(curve.x[i] / steps) === range; i++) {
      if (curve.mean[i] === null) continue;
      sum += curve.mean[i];
      count++;
      low = Math.min(low, (curve.low || curve.mean)[i]);
      high = Math.max(high, (curve.high || curve.mean)[i]);
    }
    found.x.push(x);
    found.mean.push(count ? sum / count : null);
    found.low.push(count ? low : null);
    found.high.push(count ? high : null);
  }
  return found;
}

class Chart {
  constructor(name) {
    this.name = name;
    this.log = false;
    this.runs = [];
    this.shape = "";
    this.button = el("button", { type: "button", "aria-pressed": "false", click: () => this.toggle() }, "log");
    this.button.setAttribute("aria-label", `logarithmic: ${name}`);
    this.readout = el("p", { class: "readout" });
    this.plot = el("div", {
      class: "plot",
      tabindex: "0",
      role: "slider",
      "aria-label": `${name} by step`,
      "aria-describedby": "how",
      "aria-valuemin": "0",
      "aria-valuemax": "0",
      "aria-valuenow": "0",
      keydown: (event) => this.key(event),
    });
    this.table = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${name} as a table` });
    this.details = el("details", { toggle: () => this.tabulate() }, el("summary", {}, "as a table"), this.table);
    const title = TITLES[name] ? `${TITLES[name]} (${name})` : name;
    this.figure = el(
      "figure",
      {},
      el("div", { class: "top" }, el("h3", {}, title), this.button),
      this.readout,
      this.plot,
      this.details,
    );
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  resize() {
    if (this.u && this.plot.clientWidth) this.u.setSize({ width: this.plot.clientWidth, height: HEIGHT });
  }

  toggle() {
    this.log = !this.log;
    this.button.setAttribute("aria-pressed", String(this.log));
    this.draw();
  }

  update(runs) {
    // [{name, index, curve, width}], of the runs that have this metric
    this.runs = runs;
    this.draw();
    this.tabulate();
  }

  draw() {
    if (!this.runs.length || !this.plot.checkVisibility()) return; // folded away: drawn when it is unfolded
    const drawn = (values) => (this.log ? values.map((value) => (value > 0 ? value : null)) : values);
    this.drawn = this.runs.map((run) => coarse(run.curve, run.width));
    this.banded = this.drawn.map((curve) => Boolean(curve.low) && this.runs.length <= BANDS);
    const tables = this.drawn.map((curve, i) => [
      curve.x,
      drawn(curve.mean),
      ...(this.banded[i] ? [drawn(curve.low), drawn(curve.high)] : []),
    ]);
    const data = tables.length === 1 ? tables[0] : uPlot.join(tables),
      steps = data[0];
    const shape = JSON.stringify([
      this.log,
      this.banded,
      this.runs.map((run) => [run.name, run.index]),
      steps.length <= 60,
    ]);
    if (this.u && shape === this.shape) {
      this.u.setData(data);
    } else {
      this.shape = shape;
      if (this.u) this.u.destroy();
      this.u = new uPlot(this.options(steps.length), data, this.plot);
    }
    this.plot.setAttribute("aria-valuemin", steps[0]);
    this.plot.setAttribute("aria-valuemax", steps[steps.length - 1]);
    this.tell();
  }

  options(points) {
    const series = [{}],
      bands = [];
    this.runs.forEach(({ name, index }, i) => {
      const stroke = colour(index),
        own = { label: name, stroke, width: 1.5, dash: DASHES[dash(index)] };
      series.push({ ...own, points: { show: points <= 60, size: 5, fill: stroke } });
      if (this.banded[i]) {
        const edge = { stroke: "transparent", width: 0, points: { show: false } };
        series.push({ ...edge }, { ...edge });
        bands.push({ series: [series.length - 1, series.length - 2], fill: `${stroke}38` });
      }
    });
    const axis = {
      stroke: css("--soft"),
      font: "11px system-ui",
      grid: { stroke: css("--grid"), width: 1 },
      ticks: { stroke: css("--grid"), width: 1 },
      values: (u, splits) => splits.map((at) => (at === null ? "" : short(at))),
    };
    return {
      width: this.plot.clientWidth || 480,
      height: HEIGHT,
      legend: { show: false },
      series,
      bands,
      scales: { x: { time: false, range: () => [seen().min, seen().max] }, y: { distr: this.log ? 3 : 1 } },
      axes: [
        {
          ...axis,
          incrs: [1, 2, 5].flatMap((n) => [...Array(9).keys()].map((p) => n * 10 ** p)).sort((a, b) => a - b),
          size: 30,
        },
        { ...axis, size: 58 },
      ],
      cursor: {
        sync: { key: "steps", scales: ["x", null] },
        points: { show: false },
        y: false,
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => zoomTo(null) },
      },
      hooks: {
        setCursor: [(u) => this.point(u.cursor.idx)],
        setSelect: [
          (u) => {
            if (u.select.width < 4) return;
            zoomTo({ min: u.posToVal(u.select.left, "x"), max: u.posToVal(u.select.left + u.select.width, "x") });
            u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          },
        ],
      },
    };
  }

  point(place) {
    // at a place of the plot, at the end of what is seen without one
    this.step = place === null || place === undefined ? undefined : this.u.data[0][place];
    this.tell();
  }

  place() {
    return Math.max(0, last(this.u.data[0], this.step ?? seen().max));
  }

  tell() {
    // what the runs have at the step that is pointed at
    if (!this.u) return;
    const step = this.u.data[0][this.place()],
      parts = [];
    this.readout.replaceChildren(`step ${step.toLocaleString("en")} `);
    for (const [i, { name, index }] of this.runs.entries()) {
      const curve = this.drawn[i],
        at = last(curve.x, step);
      if (at < 0) continue;
      const range =
        curve.low && curve.low[at] !== curve.high[at] ? ` (${number(curve.low[at])} to ${number(curve.high[at])})` : "";
      parts.push(`${name} ${number(curve.mean[at])}${range}`);
      if (parts.length <= BANDS) this.readout.append(" ", swatch(index), parts[parts.length - 1]);
    }
    if (parts.length > BANDS) this.readout.append(` and ${parts.length - BANDS} more`);
    this.plot.setAttribute("aria-valuenow", step);
    this.plot.setAttribute("aria-valuetext", `step ${step}: ${parts.slice(0, BANDS).join("; ")}`);
  }

  key(event) {
    const steps = this.u.data[0],
      by = event.shiftKey ? 10 : 1,
      end = steps.length - 1,
      now = this.place();
    const to = { ArrowLeft: now - by, ArrowDown: now - by, ArrowRight: now + by, ArrowUp: now + by, Home: 0, End: end }[
      event.key
    ];
    if (event.key === "Escape") zoomTo(null);
    else if (event.key === "+" || event.key === "-") {
      const { min, max } = this.u.scales.x,
        half = ((max - min) / 2) * (event.key === "+" ? 0.5 : 2);
      zoomTo({ min: steps[now] - half, max: steps[now] + half });
    } else if (to !== undefined) {
      const place = Math.max(0, Math.min(to, end));
      this.u.setCursor({ left: this.u.valToPos(steps[place], "x"), top: 1 });
      this.point(place);
    } else return;
    event.preventDefault();
  }

  tabulate() {
    if (!this.details.open) return;
    const at = (point) => (point ? `${number(point[1])} at ${point[0].toLocaleString("en")}` : "-");
    const rows = this.runs.map(({ name, curve }) => [
      name,
      at(curve.first),
      at(curve.last),
      at(curve.lowest),
      at(curve.highest),
      curve.points.toLocaleString("en"),
      curve.bad.toLocaleString("en"),
    ]);
    this.table.replaceChildren(
      table(["run", "first", "last", "lowest", "highest", "points", "not finite"], rows, this.name),
    );
  }
}

function last(steps, step) {
  // the place of the last one that is not after `step`
  let low = 0,
    high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
