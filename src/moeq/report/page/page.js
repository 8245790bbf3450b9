// Fills the page from its data. Charts are Vega-Lite's; here is only what they show.
const { embed } = window.moeqCharts;
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const UNITS = ["bytes", "kB", "MB", "GB", "TB"];
let current = data.checkpoints[0];
const views = {};

function bytes(size) {
  let unit = 0;
  while (size >= 1000 && unit < UNITS.length - 1) { size /= 1000; unit += 1; }
  return `${unit ? size.toPrecision(3) : size} ${UNITS[unit]}`;
}
const short = (value) => (value === undefined || value === null ? "" : Number(value.toPrecision(4)).toString());
const bits = (size) => (8 * size) / current.expert_parameters;

function element(tag, text, cls) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (cls) made.className = cls;
  return made;
}
function table(id, header, rows, chosen = -1) {
  const head = element("tr");
  head.append(...header.map((text) => element("th", text)));
  const lines = rows.map((row, at) => {
    const line = element("tr", undefined, at === chosen ? "chosen" : "");
    line.append(...row.map((cell) => element("td", typeof cell === "number" ? short(cell) : cell, typeof cell === "number" ? "number" : "")));
    return line;
  });
  $(id).replaceChildren(...(header.length ? [head] : []), ...lines);
}
function figures(id, pairs) {
  $(id).replaceChildren(...pairs.filter(([, value]) => value !== "").map(([name, value, more]) => {
    const box = element("div"), answer = element("dd", value);
    if (more) answer.append(" ", element("small", more));
    box.append(element("dt", name), answer);
    return box;
  }));
}
function options(id, pairs) {
  $(id).replaceChildren(...pairs.map(([value, text]) => { const made = element("option", text); made.value = value; return made; }));
}
const show = (id, visible) => { $(id).hidden = !visible; };

function config() {
  const ink = colour("--ink"), muted = colour("--muted"), rule = colour("--rule");
  return {
    background: null, font: "system-ui, sans-serif", view: { stroke: rule },
    axis: { labelColor: muted, titleColor: muted, gridColor: rule, domainColor: rule, tickColor: rule, titleFontWeight: "normal" },
    legend: { labelColor: ink, titleColor: muted, titleFontWeight: "normal" }, title: { color: ink },
    range: { category: data.series },
  };
}
async function draw(id, spec) {
  views[id]?.finalize();
  const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", autosize: { type: "fit-x", contains: "padding" }, ...spec };
  const made = await embed($(id), whole, { actions: false, logLevel: 1, config: config(), renderer: "canvas", tooltip: { theme: dark.matches ? "dark" : "light" } });
  views[id] = made.view;
}

// ---- the map ----
const MEASURES = {
  bits: { title: "code bits", all: "mean", colour: () => ({ type: "linear", domain: data.widths.map(([width]) => width), range: data.widths.map(([, shade]) => shade) }) },
  bytes: { title: "bytes", all: "sum", colour: () => ({ scheme: "viridis" }) },
  harm: { title: "predicted harm", all: "sum", colour: () => ({ scheme: "magma", type: "symlog", constant: 1e-9, reverse: !dark.matches }) },
  tokens: { title: "calibration tokens", all: "mean", colour: () => ({ scheme: "viridis", type: "symlog" }) },
};
const measureOf = (name) => MEASURES[name] ?? { title: name, all: "mean", colour: () => ({ scheme: "viridis", zero: false }) };

function valuesOf(name, layer, projection, expert) {
  const shape = current.layers[layer];
  if (name === "bits") return current.widths[layer][projection]?.[expert];
  if (name === "bytes") return current.bytes[layer][projection]?.[expert];
  if (name === "tokens") return current.tokens[layer]?.[expert];
  const at = current.unit === "expert" ? shape.first_expert + expert : shape.first_matrix + expert * shape.projections.length + shape.projections.indexOf(projection);
  return current.statistics[name][at];
}
function cells(name, projection) {
  const found = [], perExpert = name === "tokens" || (current.unit === "expert" && current.statistics[name]);
  current.layers.forEach((shape, layer) => {
    for (let expert = 0; expert < shape.experts; expert += 1) {
      const names = projection === "all" && !perExpert ? shape.projections : [projection === "all" ? shape.projections[0] : projection];
      const values = names.map((each) => valuesOf(name, layer, each, expert)).filter((value) => value !== undefined && value !== null);
      if (!values.length) continue;
      const sum = values.reduce((a, b) => a + b, 0);
      found.push({ layer, expert, value: measureOf(name).all === "sum" ? sum : sum / values.length });
    }
  });
  return found;
}
function mapSpec(values, measure, rows) {
  const experts = Math.max(...current.layers.map((layer) => layer.experts)), layers = current.layers.length;
  const axis = (title) => ({ title, grid: false, tickMinStep: 1, format: "d" });
  return {
    data: { name: "cells", values }, height: Math.max(120, Math.min(rows, 24 * layers)),
    params: [{ name: "zoom", select: "interval", bind: "scales" }],
    transform: [{ calculate: "datum.expert + 1", as: "expert2" }, { calculate: "datum.layer + 1", as: "layer2" }],
    mark: { type: "rect", clip: true },
    encoding: {
      x: { field: "expert", type: "quantitative", scale: { domain: [0, experts], nice: false }, axis: axis("expert") }, x2: { field: "expert2" },
      y: { field: "layer", type: "quantitative", scale: { domain: [0, layers], nice: false, reverse: true }, axis: axis("layer") }, y2: { field: "layer2" },
      color: { field: "value", type: "quantitative", scale: measure.colour(), legend: { title: measure.title, orient: "bottom", gradientLength: 180 } },
      tooltip: [{ field: "layer" }, { field: "expert" }, { field: "value", title: measure.title, format: ".4~g" }],
    },
  };
}
async function drawMap() {
  const name = $("measure").value, measure = measureOf(name);
  await draw("map", mapSpec(cells(name, $("projection").value), measure, 420));
}

// ---- other budgets ----
function budgetCells(point) {
  const found = [];
  point.widths.forEach((text, layer) => {
    const many = current.layers[layer].projections.length;
    for (let expert = 0; expert * many < text.length; expert += 1) {
      const digits = [...text.slice(expert * many, (expert + 1) * many)].map(Number);
      found.push({ layer, expert, value: digits.reduce((a, b) => a + b, 0) / many });
    }
  });
  return found;
}
const here = (point) => (point.objective > 0 ? [{ bits: bits(point.expert_bytes), cost: point.objective }] : []);
function nearest() {
  const distances = current.curve.map((point) => Math.abs(point.expert_bytes - current.expert_bytes));
  return distances.indexOf(Math.min(...distances));
}
async function drawExplorer() {
  show("explorer", current.curve.length > 0);
  if (!current.curve.length) return;
  $("budget").max = current.curve.length - 1;
  $("budget").value = nearest();
  const points = current.curve.map((point) => ({ bits: bits(point.expert_bytes), cost: point.objective }));
  const positive = points.filter((point) => point.cost > 0);
  const y = { field: "cost", type: "quantitative", scale: { type: "log", nice: true }, title: "predicted cost", axis: { format: "~g", tickCount: 5 } };
  const x = { field: "bits", type: "quantitative", scale: { zero: false }, title: "stored bits per expert weight" };
  await draw("curve", {
    height: 240,
    layer: [
      { data: { values: positive }, mark: { type: "line", point: true, color: colour("--accent") }, encoding: { x, y, tooltip: [{ field: "bits", format: ".3f" }, { field: "cost", format: ".4~g" }] } },
      { data: { values: [{ bits: bits(current.expert_bytes), label: "this checkpoint" }] }, mark: { type: "rule", strokeDash: [4, 4], color: colour("--muted") }, encoding: { x } },
      { data: { name: "now", values: here(current.curve[nearest()]) }, mark: { type: "point", size: 160, filled: true, color: "#d9580d", opacity: 1 }, encoding: { x, y } },
    ],
  });
  show("budget-map", current.curve[0].widths.length > 0);
  if (current.curve[0].widths.length) await draw("budget-map", mapSpec(budgetCells(current.curve[nearest()]), MEASURES.bits, 240));
  await setBudget();
}
async function setBudget() {
  const point = current.curve[Number($("budget").value)];
  const total = current.stored_bytes - current.expert_bytes + point.expert_bytes;
  const factor = current.objective > 0 ? `${short(point.objective / current.objective)} times this checkpoint's` : "";
  figures("budget-figures", [
    ["bits per expert weight", bits(point.expert_bytes).toFixed(3)],
    ["weights on disk", bytes(total), `${((100 * total) / current.source_bytes).toFixed(1)} % of the original`],
    ["predicted cost", short(point.objective), factor],
  ]);
  $("budget").setAttribute("aria-valuetext", `${bits(point.expert_bytes).toFixed(3)} bits, ${bytes(total)}`);
  await views.curve?.data("now", here(point)).runAsync();
  if (point.widths.length) await views["budget-map"]?.data("cells", budgetCells(point)).runAsync();
}

// ---- quality ----
function textsOf(checkpoint) {
  const texts = Object.entries(checkpoint.quality_by_text);
  const name = checkpoint.calibrated_on.length === 1 ? checkpoint.calibrated_on[0] : "all texts";
  return texts.length ? texts : Object.keys(checkpoint.quality).length ? [[name, checkpoint.quality]] : [];
}
const METRICS = [["kl", "KL, nats/token"], ["perplexity", "perplexity"], ["reference_perplexity", "of the original"], ["top1_agreement", "same top token"], ["router_overlap", "same experts"]];
function bars(rows, many) {
  return {
    height: many ? 30 + 14 * rows.length : 24 * rows.length, data: { values: rows }, mark: { type: "bar", cornerRadiusEnd: 2 },
    encoding: {
      x: { field: "kl", type: "quantitative", title: "KL to the original, nats per token", axis: { tickCount: 6 } },
      y: { field: "text", type: "nominal", title: null, sort: null }, ...(many ? { yOffset: { field: "checkpoint", sort: null } } : {}),
      color: { field: "checkpoint", type: "nominal", sort: null, legend: many ? { orient: "bottom", title: null, columns: 2, labelLimit: 300 } : null },
      tooltip: [{ field: "checkpoint" }, { field: "text" }, { field: "kl", format: ".4f" }],
    },
  };
}
async function drawMeasured() {
  show("measured", Boolean(data.compared));
  if (!data.compared) return;
  const { checkpoints, tokens } = data.compared, texts = Object.keys(tokens), with_kl = checkpoints.some((each) => "kl" in each.quality[texts[0]]);
  $("measured-note").textContent = `By moeq compare, the same windows for all: ${texts.map((text) => `${tokens[text].toLocaleString("en")} tokens of ${text}`).join(", ")}.`;
  const columns = texts.flatMap((text) => [...(with_kl ? [[text, "kl", `KL ${text}`]] : []), [text, "perplexity", `perplexity ${text}`]]);
  table("measured-table", ["checkpoint", "made by", "weights", "bits/weight", ...columns.map(([, , title]) => title), "tokens/s"], checkpoints.map((each) => [each.name, each.kind, bytes(each.stored_bytes), each.expert_bits_per_weight ?? "", ...columns.map(([text, key]) => each.quality[text][key]), each.decode_tokens_per_second ?? ""]));
  show("measured-chart", with_kl);
  if (with_kl) await draw("measured-chart", bars(checkpoints.flatMap((each) => texts.map((text) => ({ checkpoint: each.name, text, kl: each.quality[text].kl }))), true));
}
async function drawQuality() {
  const rows = data.checkpoints.flatMap((each) => textsOf(each).map(([text, found]) => ({ checkpoint: each.name, text, kl: found.kl ?? null })));
  const own = textsOf(current);
  $("quality-note").textContent = own.length ? current.quality_text : current.quality_note || "nothing was measured";
  const metrics = METRICS.filter(([key]) => own.some(([, found]) => key in found));
  table("quality-table", own.length ? ["text", ...metrics.map(([, title]) => title)] : [], own.map(([text, found]) => [text, ...metrics.map(([key]) => found[key] ?? "")]));
  show("quality-chart", rows.some((row) => row.kl !== null));
  if (rows.some((row) => row.kl !== null)) {
    await draw("quality-chart", bars(rows, data.checkpoints.length > 1));
  }
  const tried = current.trials.filter((trial) => Object.keys(trial.kl).length || trial.error), texts = [...new Set(tried.flatMap((trial) => Object.keys(trial.kl)))];
  show("trials-title", tried.length > 0 || current.trials_note);
  $("trials-note").textContent = tried.length ? "Candidates of one budget, compared on text that calibration did not see." : current.trials_note;
  table("trials", tried.length ? ["candidate", "bits", ...texts.map((text) => `KL ${text}`), ""] : [], tried.map((trial) => [trial.name, trial.bits || "", ...texts.map((text) => trial.kl[text] ?? ""), trial.error || (trial.chosen ? "chosen" : "")]), tried.findIndex((trial) => trial.chosen));
}

// ---- routing and spectra ----
async function drawRouting() {
  const rows = current.tokens.flatMap((counts, layer) => counts.map((tokens, expert) => ({ layer, expert, tokens })));
  show("routing", rows.length > 0);
  if (!rows.length) return;
  const idle = rows.filter((row) => !row.tokens).length;
  $("routing-note").textContent = `Calibration tokens that each expert saw, a mark for each expert; ${idle ? `${idle} of ${rows.length} saw none` : "every expert saw some"}.`;
  await draw("routing-chart", {
    height: Math.max(8, Math.min(18, 480 / current.tokens.length)) * current.tokens.length, data: { values: rows },
    mark: { type: "tick", thickness: 1.5, opacity: 0.6, color: colour("--accent") },
    encoding: {
      x: { field: "tokens", type: "quantitative", scale: { type: "symlog" }, title: "tokens (logarithmic)", axis: { tickCount: 6 } },
      y: { field: "layer", type: "ordinal", title: "layer" },
      tooltip: [{ field: "layer" }, { field: "expert" }, { field: "tokens" }],
    },
  });
}
async function drawSpectra() {
  const alpha = current.statistics.alpha, layers = [...new Set(Object.keys(current.spectra).map((key) => key.split(".")[0]))];
  show("spectra", Boolean(alpha) || layers.length > 0);
  show("spectra-controls", layers.length > 0);
  if (alpha) {
    $("spectra-note").textContent = "How heavy the tail of each spectrum is: a small alpha is taken for a sign of a well trained, sensitive matrix (AlphaQ).";
    await draw("spectra-chart", {
      height: 220, data: { values: alpha.filter((value) => Number.isFinite(value)).map((value) => ({ value })) },
      mark: { type: "bar", color: colour("--accent") },
      encoding: { x: { field: "value", bin: { maxbins: 40 }, title: "alpha" }, y: { aggregate: "count", title: current.unit === "expert" ? "experts" : "matrices" } },
    });
  } else if (layers.length) {
    if (!$("spectra-layer").options.length) options("spectra-layer", layers.map((layer) => [layer, layer]));
    const layer = $("spectra-layer").value;
    $("spectra-note").textContent = "Energy of the components along the directions of the shared bases, strongest first (BitsMoE).";
    const rows = Object.entries(current.spectra).filter(([key]) => key.split(".")[0] === layer).flatMap(([key, values]) => values.map((energy, direction) => ({ projection: key.split(".")[1], direction, energy })));
    await draw("spectra-chart", {
      height: 220, data: { values: rows.filter((row) => row.energy > 0) }, mark: { type: "line", point: true },
      encoding: { x: { field: "direction", type: "quantitative", title: "directions, strongest first" }, y: { field: "energy", type: "quantitative", scale: { type: "log" }, title: "mean energy" }, color: { field: "projection", type: "nominal", legend: { orient: "bottom", title: null } } },
    });
  }
}

// ---- the rest ----
function drawHead() {
  document.title = $("title").textContent = current.name;
  $("subtitle").textContent = `${current.model_type}, ${current.layers.length} layers of ${Math.max(...current.layers.map((layer) => layer.experts))} experts; method ${current.method}, rounded by ${current.quantizer}`;
  const kl = textsOf(current).map(([, found]) => found.kl).filter((value) => value !== undefined);
  figures("figures", [
    ["bits per expert weight", bits(current.expert_bytes).toFixed(3), "everything included"],
    ["weights on disk", bytes(current.stored_bytes), `${((100 * current.stored_bytes) / current.source_bytes).toFixed(1)} % of ${bytes(current.source_bytes)}`],
    ["KL to the original", kl.length ? short(kl.reduce((a, b) => a + b, 0) / kl.length) : "", kl.length > 1 ? `mean of ${kl.length} texts` : ""],
    ["top token as the original's", current.quality.top1_agreement ? `${(100 * current.quality.top1_agreement).toFixed(1)} %` : ""],
  ]);
}
function drawComparison() {
  const many = data.checkpoints.length > 1;
  show("choice", many);
  show("compared", many);
  const texts = [...new Set(data.checkpoints.flatMap((each) => textsOf(each).map(([text]) => text)))];
  table("comparison", ["checkpoint", "method", "quantizer", "bits/weight", "weights", ...texts.map((text) => `KL ${text}`)], data.checkpoints.map((each) => {
    const found = Object.fromEntries(textsOf(each));
    return [each.name, each.method, each.quantizer, (8 * each.expert_bytes) / each.expert_parameters, bytes(each.stored_bytes), ...texts.map((text) => found[text]?.kl ?? "")];
  }), data.checkpoints.indexOf(current));
}
async function drawAll() {
  drawHead();
  drawComparison();
  const measures = ["bits", ...(current.bytes.length ? ["bytes"] : []), ...(current.tokens.length ? ["tokens"] : []), ...Object.keys(current.statistics)];
  options("measure", measures.map((name) => [name, measureOf(name).title]));
  options("projection", [["all", "whole experts"], ...current.layers[0].projections.map((name) => [name, name])]);
  table("options", [], Object.entries(current.options).map(([name, value]) => [name, String(value)]));
  $("loading").textContent = current.loading;
  $("spectra-layer").replaceChildren();
  await drawMeasured();
  await drawQuality();
  await drawMap();
  await drawExplorer();
  await drawRouting();
  await drawSpectra();
  document.body.dataset.ready = "yes";
}

options("checkpoint", data.checkpoints.map((each, at) => [at, each.name]));
$("checkpoint").addEventListener("change", () => { current = data.checkpoints[Number($("checkpoint").value)]; drawAll(); });
$("measure").addEventListener("change", drawMap);
$("projection").addEventListener("change", drawMap);
$("budget").addEventListener("input", setBudget);
$("spectra-layer").addEventListener("change", drawSpectra);
dark.addEventListener("change", drawAll);
drawAll();
