// Figures of a run: pure functions of (data, state) that give traces and layouts, and `draw`, which shows them.

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down"];
const PALETTES = {
  light: ["#0072b2", "#c8501e", "#00845a", "#9a4f92", "#8a6d00", "#3d6fd6", "#b3243c", "#555f6b"],
  dark: ["#56b4e9", "#f08a5d", "#3ecf9a", "#d58fcb", "#e3c04b", "#8fb0ff", "#ff7d8e", "#aab4c0"],
};

// plotly reads a subset of HTML in all of its texts; names of layers are to be shown as they are.
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = (value) => typeof value === "number";
const fixed = (value, digits = 2) => (known(value) ? (Math.abs(value) < 1000 ? value.toFixed(digits) : value.toExponential(1)) : value === "inf" ? "∞" : "–");
const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : "–");
const short = (name) => name.replace(/\.weight$/, "");
const clipped = (name) => plain(name.length > 24 ? `${name.slice(0, 11)}…${name.slice(-12)}` : name);
const middle = (values) => {
  const sorted = values.filter(known).sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length ? (sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2) : null;
};

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  const dark = style.colorScheme === "dark";
  return { ink: of("ink"), quiet: of("quiet"), grid: of("grid"), line: of("line"), card: of("card"), select: of("select"), kinds: PALETTES[dark ? "dark" : "light"] };
}

function kindsOf(data) {
  return [...new Set(data.kinds)];
}

function markOf(data, kind, c) {
  const i = kindsOf(data).indexOf(kind);
  return { colour: c.kinds[i % c.kinds.length], symbol: SYMBOLS[i % SYMBOLS.length], name: plain(kind || "layers") };
}

function value(data, probe, layer, key) {
  const row = data.probes[probe].values[layer];
  return row ? row[data.keys.indexOf(key)] : null;
}

function product(data, probe, layer) {
  const [alpha, gamma] = [value(data, probe, layer, "alpha"), value(data, probe, layer, "gamma")];
  return known(alpha) && known(gamma) ? alpha * gamma : null;
}

function trusted(data, probe, layer) {
  return value(data, probe, layer, "r2_alpha") >= data.good_fit;
}

// Limits that hold at every probe, so that points move and axes do not. Far outliers are left outside.
function limits(data, read) {
  const all = data.probes.flatMap((_, probe) => data.layers.map((_, layer) => read(probe, layer))).filter(known).sort((a, b) => a - b);
  if (!all.length) return undefined;
  const at = (share) => all[Math.round(share * (all.length - 1))];
  const reach = 3 * (at(0.75) - at(0.25)) + 0.05;
  const [low, high] = [Math.max(all[0], at(0.25) - reach), Math.min(all[all.length - 1], at(0.75) + reach)];
  const margin = 0.06 * (high - low) + 0.05;
  return [low - margin, high + margin];
}

// Says how many points the axes leave out.
function outside(count, c) {
  return count ? [{ text: `${count} outside`, xref: "paper", yref: "paper", x: 1, y: 0, xanchor: "right", yanchor: "bottom", showarrow: false, font: { color: c.quiet } }] : [];
}

const beyond = (x, range) => known(x) && range && (x < range[0] || x > range[1]);

function hover(data, probe, layer) {
  const of = (key) => value(data, probe, layer, key);
  return (
    `<b>${plain(short(data.layers[layer]))}</b>${data.kinds[layer] ? ` (${plain(data.kinds[layer])})` : ""}` +
    `<br>alpha ${fixed(of("alpha"))} ± ${fixed(of("alpha_stderr"))}, r2 ${fixed(of("r2_alpha"))}` +
    `<br>gamma ${fixed(of("gamma"))}, s ${fixed(of("s"))}, alpha · gamma ${fixed(product(data, probe, layer))}`
  );
}

// One trace per kind of the layers' points; the chosen layer has a ring around it.
function points(data, state, c, x, y, error) {
  const traces = kindsOf(data).map((kind) => {
    const layers = data.layers.map((_, layer) => layer).filter((layer) => data.kinds[layer] === kind && known(x(layer)) && known(y(layer)));
    const mark = markOf(data, kind, c);
    const trace = {
      type: "scatter", mode: "markers", name: mark.name, x: layers.map(x), y: layers.map(y), customdata: layers,
      hoverinfo: "text", hovertext: layers.map((layer) => hover(data, state.probe, layer)),
      marker: {
        size: data.layers.length > 60 ? 6 : 9, line: { width: 1.5, color: mark.colour },
        symbol: layers.map((layer) => mark.symbol + (trusted(data, state.probe, layer) ? "" : "-open")), color: mark.colour,
      },
    };
    if (error) trace.error_y = { type: "data", array: layers.map((layer) => error(layer) ?? 0), color: mark.colour, thickness: 1, width: 3 };
    return trace;
  });
  if (known(x(state.layer)) && known(y(state.layer))) {
    traces.push({
      type: "scatter", mode: "markers", x: [x(state.layer)], y: [y(state.layer)], hoverinfo: "skip", showlegend: false,
      marker: { size: 18, symbol: "circle-open", color: c.select, line: { width: 2.5 } },
    });
  }
  return traces;
}

function depthFigure(data, state, c, wide) {
  const read = (layer) => value(data, state.probe, layer, "alpha");
  const range = limits(data, (probe, layer) => value(data, probe, layer, "alpha"));
  const edge = Math.max(0.6, 0.015 * data.layers.length);
  const named = wide && data.layers.length <= 30;
  return [
    points(data, state, c, (layer) => layer, read, (layer) => value(data, state.probe, layer, "alpha_stderr")),
    {
      xaxis: {
        range: [-edge, data.layers.length - 1 + edge], title: named ? undefined : { text: data.kinds.some(Boolean) ? "layer, from the input to the output" : "layer, by name" },
        ...(named ? { tickvals: data.layers.map((_, i) => i), ticktext: data.layers.map((name) => clipped(short(name))), tickangle: -35 } : {}),
      },
      yaxis: { title: { text: "alpha" }, range },
      annotations: outside(data.layers.filter((_, layer) => beyond(read(layer), range)).length, c),
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 2, y1: 2, line: { color: c.quiet, width: 1, dash: "dot" } }],
    },
  ];
}

function transferFigure(data, state, c) {
  const [x, y] = [(layer) => product(data, state.probe, layer), (layer) => value(data, state.probe, layer, "s")];
  const both = [limits(data, (probe, layer) => product(data, probe, layer)), limits(data, (probe, layer) => value(data, probe, layer, "s"))].filter(Boolean);
  const range = both.length ? [Math.min(...both.map(([low]) => low)), Math.max(...both.map(([, high]) => high))] : [0, 3];
  return [
    points(data, state, c, x, y),
    {
      xaxis: { title: { text: "alpha · gamma" }, range },
      yaxis: { title: { text: "s" }, range },
      annotations: outside(data.layers.filter((_, layer) => beyond(x(layer), range) || beyond(y(layer), range)).length, c),
      shapes: [{ type: "line", x0: range[0], x1: range[1], y0: range[0], y1: range[1], line: { color: c.quiet, width: 1, dash: "dot" }, layer: "below" }],
    },
  ];
}

function trainingFigure(data, state, c) {
  const x = data.probes.map((probe, i) => probe.step ?? i);
  const curve = (layer) => x.map((_, probe) => value(data, probe, layer, "alpha"));
  const thin = data.layers.map((name, layer) => ({
    type: "scatter", mode: "lines", x, y: curve(layer), showlegend: layer === state.layer, name: clipped(short(name)), hoverinfo: "text", customdata: x.map(() => layer),
    hovertext: x.map((_, probe) => hover(data, probe, layer)),
    line: { color: layer === state.layer ? c.select : markOf(data, data.kinds[layer], c).colour, width: layer === state.layer ? 2.5 : 1 },
    opacity: layer === state.layer ? 1 : 0.35,
  }));
  const medians = kindsOf(data).map((kind) => {
    const mark = markOf(data, kind, c);
    const of = (probe) => middle(data.layers.map((_, layer) => (data.kinds[layer] === kind ? value(data, probe, layer, "alpha") : null)));
    return {
      type: "scatter", mode: "lines+markers", name: kind ? mark.name : "median", x, y: x.map((_, probe) => of(probe)),
      hoverinfo: "text", hovertext: x.map((at, probe) => `<b>${mark.name}</b>, median<br>${plain(data.probes[probe].label)}: alpha ${fixed(of(probe))}`),
      line: { color: mark.colour, width: 2.5 }, marker: { size: 5, symbol: mark.symbol },
    };
  });
  return [
    [...thin, ...medians],
    {
      xaxis: { title: { text: "step" } },
      yaxis: { title: { text: "alpha" }, range: limits(data, (probe, layer) => value(data, probe, layer, "alpha")) },
      shapes: [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: x[state.probe], x1: x[state.probe], line: { color: c.quiet, width: 1, dash: "dot" } }],
    },
  ];
}

const logAxis = (text) => ({ type: "log", title: { text }, exponentformat: "power", dtick: undefined, nticks: 6 });
const line = (x, y, colour, name) => ({ type: "scatter", mode: "lines", x, y, name, hoverinfo: "skip", line: { color: colour, width: 2 } });

function lawFigure(data, state, c, spectra) {
  const mark = markOf(data, data.kinds[state.layer], c);
  const alpha = value(data, state.probe, state.layer, "alpha");
  const at = spectra.sigma.map((_, k) => k).filter((k) => known(spectra.h[k]) && spectra.h[k] !== 0);
  const group = (name, ks, marker) => ({
    type: "scatter", mode: "markers", name, x: ks.map((k) => spectra.sigma[k]), y: ks.map((k) => Math.abs(spectra.h[k])), marker,
    hoverinfo: "text", hovertext: ks.map((k) => `k = ${k + 1}<br>sigma ${spectra.sigma[k].toExponential(2)}<br>h ${spectra.h[k].toExponential(2)}${spectra.error ? ` ± ${spectra.error[k]?.toExponential(1)}` : ""}`),
    ...(spectra.error ? { error_y: { type: "data", array: ks.map((k) => spectra.error[k] ?? 0), color: mark.colour, thickness: 1, width: 3 } } : {}),
  });
  const positive = at.filter((k) => spectra.h[k] > 0);
  const negative = at.filter((k) => spectra.h[k] < 0);
  const traces = [group("h > 0", positive, { size: 9, color: mark.colour })];
  if (negative.length) traces.push(group("h < 0, |h| shown".replace("<", "&lt;"), negative, { size: 9, color: c.select, symbol: "x-thin", line: { width: 2, color: c.select } }));
  if (known(alpha) && known(spectra.lines[0]) && positive.length) {
    const ends = [positive[0], positive[positive.length - 1]].map((k) => spectra.sigma[k]);
    traces.push(line(ends, ends.map((sigma) => Math.exp(spectra.lines[0]) * sigma ** alpha), c.ink, `alpha = ${fixed(alpha)}`));
  }
  return [traces, { xaxis: logAxis("sigma, gradient singular value"), yaxis: logAxis("h, curvature") }];
}

function spectrumFigure(data, state, c, spectra) {
  const mark = markOf(data, data.kinds[state.layer], c);
  const other = c.kinds[(kindsOf(data).indexOf(data.kinds[state.layer]) + 1) % c.kinds.length];
  const sorted = spectra.h.filter((h) => h > 0).sort((a, b) => b - a);
  const usable = spectra.sigma.slice(0, spectra.usable);
  const curve = (values, name, what, colour, symbol) => ({
    type: "scatter", mode: "markers", name, x: values.map((_, k) => k + 1), y: values.map((v) => v / values[0]), marker: { size: 8, color: colour, symbol },
    hoverinfo: "text", hovertext: values.map((v, k) => `${what} ${k + 1}: ${v.toExponential(2)}`),
  });
  const decay = (values, exponent, intercept, name, colour) => {
    if (!known(exponent) || !known(intercept)) return [];
    const ends = [1, values.length];
    return [{ ...line(ends, ends.map((k) => (Math.exp(intercept) * k ** -exponent) / values[0]), colour, name), line: { color: colour, width: 1.5 } }];
  };
  const noise = spectra.sigma.slice(spectra.usable).map((v, i) => [spectra.usable + i + 1, v / spectra.sigma[0]]).filter(([, v]) => v > 0);
  const traces = [
    curve(usable, "sigma<sub>k</sub>", "sigma", mark.colour, "circle"),
    ...decay(usable, value(data, state.probe, state.layer, "gamma"), spectra.lines[1], `gamma = ${fixed(value(data, state.probe, state.layer, "gamma"))}`, mark.colour),
    curve(sorted, "h, sorted", "h", other, "diamond"),
    ...decay(sorted, value(data, state.probe, state.layer, "s"), spectra.lines[2], `s = ${fixed(value(data, state.probe, state.layer, "s"))}`, other),
  ];
  if (noise.length) traces.push({ type: "scatter", mode: "markers", name: "rounding noise", x: noise.map(([k]) => k), y: noise.map(([, v]) => v), hoverinfo: "name", marker: { size: 7, color: c.quiet, symbol: "circle-open" } });
  return [traces, { xaxis: { ...logAxis("rank"), tickvals: [1, 2, 5, 10, 20, 50, 100, 200, 500] }, yaxis: logAxis("relative to the first") }];
}

function layerTrainingFigure(data, state, c) {
  const x = data.probes.map((probe, i) => probe.step ?? i);
  const curve = (key, name, colour, symbol) => {
    const y = x.map((_, probe) => value(data, probe, state.layer, key));
    return { type: "scatter", mode: "lines+markers", name, x, y, line: { color: colour, width: 2 }, marker: { size: 6, symbol }, hoverinfo: "text", hovertext: y.map((v, probe) => `${name} ${fixed(v)}<br>${plain(data.probes[probe].label)}`) };
  };
  const traces = [curve("alpha", "alpha", c.kinds[0], "circle"), curve("gamma", "gamma", c.kinds[1], "square"), curve("s", "s", c.kinds[2], "diamond")];
  return [traces, { xaxis: { title: { text: "step" } }, yaxis: { title: { text: "exponent" } }, shapes: [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: x[state.probe], x1: x[state.probe], line: { color: c.quiet, width: 1, dash: "dot" } }] }];
}

function draw(id, [traces, layout], c) {
  const axis = { gridcolor: c.grid, linecolor: c.line, zeroline: false, ticks: "outside", tickcolor: c.line };
  const entries = traces.filter((trace) => trace.showlegend !== false && trace.name);
  const whole = {
    ...layout,
    paper_bgcolor: c.card, plot_bgcolor: c.card, font: { color: c.ink, size: 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 58, r: 14, t: 12, b: 46 }, showlegend: entries.length > 1,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    hoverlabel: { bgcolor: c.card, bordercolor: c.line, font: { color: c.ink, size: 12 }, align: "left", namelength: -1 },
    hovermode: "closest", xaxis: { ...axis, automargin: true, ...layout.xaxis }, yaxis: { ...axis, automargin: true, ...layout.yaxis },
    // On a touch screen a finger scrolls the page.
    dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false, modebar: { bgcolor: "rgba(0,0,0,0)", color: c.quiet, activecolor: c.ink },
  };
  return Plotly.react(id, traces, whole, { responsive: true, displaylogo: false, displayModeBar: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] });
}
