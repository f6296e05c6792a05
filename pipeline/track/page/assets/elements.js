"use strict";
// Elements and numbers: what the other scripts build the page from. Everything told is shown as text, never as HTML.

const COLOURS = 8;
const DASHES = [[], [7, 4], [2, 3]];

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== undefined && value !== null && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (index) => css(`--${index % COLOURS}`);
const dash = (index) => Math.floor(index / COLOURS) % DASHES.length;
const swatch = (index) => {
  const made = el("span", { class: `swatch dash${dash(index)}`, "aria-hidden": "true" });
  made.style.borderTopColor = `var(--${index % COLOURS})`;
  return made;
};

function heading(run) {
  return el("h3", {}, swatch(run.index), run.name);
}

function number(value) {
  // four digits that count
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e9) return Math.round(value).toLocaleString("en");
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(3).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

function short(value) {
  // a label of an axis
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  const [unit, sign] = size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : size >= 1e4 ? [1e3, "k"] : [1, ""];
  return Number((value / unit).toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 4 }) + sign;
}

const byId = (id) => document.getElementById(id);
const when = (seconds) => new Date(seconds * 1000).toLocaleString("sv");
const percent = (share) => (share === null || share === undefined ? "-" : `${(100 * share).toFixed(1)} %`);

function fill(place, told, build) {
  const key = JSON.stringify(told);
  if (place.key === key) return;
  place.key = key;
  place.replaceChildren(...build());
}

function table(columns, rows, caption) {
  const head = el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, name)));
  const body = rows.map((row) =>
    el("tr", {}, ...row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, cell))),
  );
  return el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, ...body));
}
