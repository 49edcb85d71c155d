// What both pages have: elements, lists, the theme, plotly.js; colours and markers, how numbers are written, and `draw`.

const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, content] of Object.entries(attributes)) element.setAttribute(name, content);
  return element;
}

// A name whose line may break behind its dots and underscores.
function breakable(tag, text, attributes) {
  const element = make(tag, "", attributes);
  for (const part of text.split(/(?<=[._])/)) element.append(part, document.createElement("wbr"));
  return element;
}

function list(id, lines) {
  get(id).replaceChildren(...lines.map((text) => make("li", text)));
}

function isDark() {
  return getComputedStyle(document.documentElement).colorScheme === "dark";
}

// Call `show` whenever the theme changes, by the button or by the system.
function followTheme(show) {
  const change = () => {
    get("theme").textContent = isDark() ? "Light" : "Dark";
    get("theme").setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
    show();
  };
  get("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    change();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", change);
  change();
}

// plotly.js is compressed within the page, which makes it a third of the size.
async function loadPlotly() {
  const bytes = Uint8Array.from(atob(get("plotly").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", await new Response(stream).text()));
}

// Load plotly.js, let `show` draw, and say so, or why there are no plots.
function start(show) {
  loadPlotly()
    .then(show)
    .then(() => (document.documentElement.dataset.ready = "yes"))
    .catch((error) => {
      get("failed").textContent = `The plots need a browser of 2023 or later (${error}).`;
      get("failed").hidden = false;
    });
}

// plotly reads a subset of HTML in all of its texts; names of layers are to be shown as they are.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = (value) => typeof value === "number";
// A number has one look everywhere: exponents two decimals, other quantities three digits, powers of ten where they are
// very small or large, and the minus sign of the axes.
const raised = (n) => String(n).replace(/./g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻");
const signed = (text) => text.replace("-", "−");

// A sentence with the same minus sign.
const withSigns = (text) => text.replace(/(^|[\s(])-(?=[\d.])/g, "$1−");

function brief(value, digits = 3) {
  if (!known(value)) return value === "inf" ? "∞" : "–";
  if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5))
    return signed(String(Number(value.toPrecision(digits))));
  const [factor, power] = value.toExponential(digits - 1).split("e");
  return signed(`${Number(factor)}·10${raised(Number(power))}`);
}

const fixed = (value, digits = 2) =>
  known(value) && Math.abs(value) < 1000 ? signed(value.toFixed(digits)) : brief(value);
const percent = (value) => (known(value) ? `${signed((100 * value).toFixed(1))} %` : "–");
const short = (name) => name.replace(/\.weight(?=(\.[qkv])?$)/, "");
const clipped = (name) => plain(name.length > 24 ? `${name.slice(0, 11)}…${name.slice(-12)}` : name);

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "quiet", "grid", "line", "card", "select", "sigma", "curvature"];
  const pairs = names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]);
  return { ...Object.fromEntries(pairs), dark: style.colorScheme === "dark" };
}

function kindsOf(data) {
  return [...new Set(data.kinds)];
}

// A look is [colour on white, on dark, symbol or dash]; without a colour it has that of the text.
function markOf(data, kind, c) {
  const [light, dark, symbol] = data.looks.kinds[kind];
  return { colour: (c.dark ? dark : light) ?? c.ink, symbol, name: plain(kind) };
}

function modelOf(data, model, c) {
  const [name, light, dark, dash] = data.looks.models[model];
  return { name, colour: c.dark ? dark : light, dash };
}

function value(data, probe, layer, key) {
  const row = data.probes[probe].values[layer];
  return row ? row[data.keys.indexOf(key)] : null;
}

function product(data, probe, layer) {
  const [alpha, gamma] = [value(data, probe, layer, "alpha"), value(data, probe, layer, "gamma")];
  return known(alpha) && known(gamma) ? alpha * gamma : null;
}

// Why a layer's fits are not to be trusted, in a word or two; empty where they are, null where there is no layer.
function doubt(data, probe, layer) {
  return data.probes[probe].doubts[layer];
}

function trusted(data, probe, layer) {
  return doubt(data, probe, layer) === "";
}

// Limits that hold at every probe, so that points move and axes do not: of all fits to trust, but for what is HUGE units
// away, and of the others but for those far from the middle half of all. `good` says which may be far away.
const HUGE = 10;

function limits(data, read, good = (probe, layer) => trusted(data, probe, layer)) {
  const all = data.probes
    .flatMap((_, probe) => data.layers.map((_, layer) => [read(probe, layer), good(probe, layer)]))
    .filter(([x]) => known(x))
    .sort(([a], [b]) => a - b);
  if (!all.length) return undefined;
  const at = (share) => all[Math.round(share * (all.length - 1))][0];
  const [first, third] = [at(0.25), at(0.75)];
  const reach = 3 * (third - first) + 0.05;
  const within = (x, far) => x >= first - far && x <= third + far;
  const shown = all.filter(([x, keep]) => within(x, keep ? Math.max(reach, HUGE) : reach)).map(([x]) => x);
  const [low, high] = [shown[0], shown[shown.length - 1]];
  const margin = 0.06 * (high - low) + 0.05;
  return [low - margin, high + margin];
}

// Says how many points the axes leave out.
function outside(count, c) {
  return count
    ? [
        {
          text: `${count} outside`,
          xref: "paper",
          yref: "paper",
          x: 1,
          y: 0,
          xanchor: "right",
          yanchor: "bottom",
          showarrow: false,
          font: { color: c.quiet },
        },
      ]
    : [];
}

// Of a few steps plotly would put ticks at halves.
function stepAxis(steps) {
  const few = Math.max(...steps) - Math.min(...steps) < 8;
  return { title: { text: "step" }, ...(few ? { dtick: 1 } : {}) };
}

// The names of layers at an axis.
const layerTicks = (data) => ({
  tickvals: data.layers.map((_, i) => i),
  ticktext: data.layers.map((name) => clipped(short(name))),
  tickangle: -35,
  // Else plotly leaves out the first names, which go beyond the axis, and makes no room for them.
  ticklabeloverflow: "allow",
});

// An axis of the layers, with their names where there is room.
function layersAxis(data, wide) {
  const n = data.layers.length;
  const edge = Math.max(0.6, 0.015 * n);
  const text = wide && n <= 30 ? layerTicks(data) : { title: { text: "layer, from the input to the output" } };
  return { range: [-edge, n - 1 + edge], ...text };
}

// Quantities that go over decades, and are never shown on a linear axis.
const LOGARITHMIC = new Set(["noise_scale", "sigma_max", "h_max"]);

// Ticks at 1, 2 and 5 of each decade, at decades alone where there are many.
function logAxis(text, values) {
  const logs = values.filter((v) => v > 0).map(Math.log10);
  if (!logs.length) return { title: { text } };
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  const steps = high - low < 2.5 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let n = Math.floor(low) - 1; n <= Math.ceil(high); n += Math.ceil((high - low) / 8) || 1) {
    for (const m of steps)
      ticks.push([
        m * 10 ** n,
        n >= -2 && n < 4 ? String(Number((m * 10 ** n).toPrecision(1))) : `${m === 1 ? "" : `${m}·`}10${raised(n)}`,
      ]);
  }
  return { type: "log", title: { text }, tickvals: ticks.map(([v]) => v), ticktext: ticks.map(([, name]) => name) };
}

// No bar where there is no error, which else would be two caps on each other.
const bars = (errors, colour) => ({
  type: "data",
  array: errors.map((error) => (known(error) && error > 0 ? error : NaN)),
  color: colour,
  thickness: 1,
  width: 3,
});

// Markers of so many points at most, or they would hide the line.
const MOST_MARKERS = 25;

// Probes as an axis: their steps, or their labels where some were measured outside training.
function probesAxis(data) {
  if (data.probes.every((probe) => known(probe.step))) {
    const at = data.probes.map((probe) => probe.step);
    return { at, axis: stepAxis(at) };
  }
  const at = data.probes.map((_, i) => i);
  const every = Math.ceil(at.length / 8);
  const tickvals = at.filter((i) => i % every === 0);
  const ticktext = tickvals.map((i) => clipped(data.probes[i].label));
  return { at, axis: { tickvals, ticktext, ticklabeloverflow: "allow", range: [-0.5, at.length - 0.5] } };
}

const beyond = (x, range) => known(x) && range && (x < range[0] || x > range[1]);

function hover(data, probe, layer) {
  const of = (key) => value(data, probe, layer, key);
  const why = doubt(data, probe, layer);
  return (
    `<b>${plain(short(data.layers[layer]))}</b> (${plain(data.kinds[layer])})` +
    `<br>alpha ${fixed(of("alpha"))} ± ${fixed(of("alpha_stderr"))}, r2 ${fixed(of("r2_alpha"))}` +
    (known(of("signal")) ? `, signal ${fixed(of("signal"))}` : "") +
    `<br>gamma ${fixed(of("gamma"))}, s ${fixed(of("s"))}, alpha · gamma ${fixed(product(data, probe, layer))}` +
    (why ? `<br>not to be trusted: ${plain(why)}` : "")
  );
}

// The band around alpha = 2, with a place in the legend.
function bandAroundTwo(data, c) {
  const [low, high] = data.band;
  return {
    type: "rect",
    xref: "paper",
    x0: 0,
    x1: 1,
    y0: low,
    y1: high,
    fillcolor: c.quiet,
    opacity: 0.18,
    line: { width: 0 },
    layer: "below",
    name: `alpha ${low} to ${high}`,
    showlegend: true,
  };
}

const dotted = (c, ends) => ({ type: "line", line: { color: c.quiet, width: 1, dash: "dot" }, ...ends });
const across = (y, c) => dotted(c, { xref: "paper", x0: 0, x1: 1, y0: y, y1: y, layer: "below" });
const upright = (x, c) => dotted(c, { yref: "paper", y0: 0, y1: 1, x0: x, x1: x });

// Pixels that the axes of a plot are high at least, however large its legend.
const LEAST_HEIGHT = 220;

const isNarrow = () => matchMedia("(max-width: 760px)").matches;

// The legend is below the axes, and the plot grows by it where they would be too low.
function draw(id, [traces, layout], c) {
  const axis = {
    gridcolor: c.grid,
    linecolor: c.line,
    zeroline: false,
    ticks: "outside",
    tickcolor: c.line,
    exponentformat: "power",
  };
  const named = (layout.shapes ?? []).filter((shape) => shape.showlegend);
  const entries = [...traces.filter((trace) => trace.showlegend !== false && trace.name), ...named];
  const plot = document.getElementById(id);
  const whole = {
    ...layout,
    paper_bgcolor: c.card,
    plot_bgcolor: c.card,
    font: { color: c.ink, size: 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: isNarrow() ? 44 : 58, r: 14, t: 12, b: 46 },
    showlegend: entries.length > 1,
    legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    hoverlabel: {
      bgcolor: c.card,
      bordercolor: c.line,
      font: { color: c.ink, size: 12 },
      align: "left",
      namelength: -1,
    },
    hovermode: "closest",
    xaxis: { ...axis, automargin: true, ...layout.xaxis },
    yaxis: { ...axis, automargin: true, ...layout.yaxis, title: { ...layout.yaxis.title, standoff: 12 } },
    // On a touch screen a finger scrolls the page.
    dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: c.quiet, activecolor: c.ink },
  };
  const drawn = Plotly.react(plot, traces, whole, {
    responsive: true,
    displaylogo: false,
    displayModeBar: true,
    modeBarButtons: [isNarrow() ? ["toImage"] : ["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  });
  return drawn.then(() => fit(plot));
}

// Give a plot the height that its axes need, and the width of its place, which may have changed since it was drawn.
function fit(plot) {
  const { height, _size } = plot._fullLayout;
  const wanted = plot.classList.contains("low") ? LEAST_HEIGHT : Math.max(LEAST_HEIGHT, isNarrow() ? 0 : 250);
  const size = [plot.clientWidth, Math.round(height + wanted - _size.h)];
  if (Math.abs(wanted - _size.h) < 2 && plot.dataset.width === String(size[0])) return undefined;
  plot.style.height = `${size[1]}px`;
  plot.dataset.width = size[0];
  return Plotly.Plots.resize(plot);
}
