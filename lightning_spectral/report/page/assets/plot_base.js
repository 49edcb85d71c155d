// What all figures share: colours, how figures are written, values by layer and probe, and `draw`.

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down"];
const PALETTES = {
  light: ["#0072b2", "#c8501e", "#00845a", "#9a4f92", "#8a6d00", "#3d6fd6", "#b3243c", "#555f6b"],
  dark: ["#56b4e9", "#f08a5d", "#3ecf9a", "#d58fcb", "#e3c04b", "#8fb0ff", "#ff7d8e", "#aab4c0"],
};

// plotly reads a subset of HTML in all of its texts; names of layers are to be shown as they are.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = (value) => typeof value === "number";
const fixed = (value, digits = 2) =>
  known(value)
    ? Math.abs(value) < 1000
      ? value.toFixed(digits)
      : value.toExponential(1)
    : value === "inf"
      ? "∞"
      : "–";
const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : "–");
const short = (name) => name.replace(/\.weight(?=(\.[qkv])?$)/, "");
const clipped = (name) => plain(name.length > 24 ? `${name.slice(0, 11)}…${name.slice(-12)}` : name);

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  const dark = style.colorScheme === "dark";
  return {
    ink: of("ink"),
    quiet: of("quiet"),
    grid: of("grid"),
    line: of("line"),
    card: of("card"),
    select: of("select"),
    kinds: PALETTES[dark ? "dark" : "light"],
  };
}

function kindsOf(data) {
  return [...new Set(data.kinds)];
}

function markOf(data, kind, c) {
  const i = kindsOf(data).indexOf(kind);
  return { colour: c.kinds[i % c.kinds.length], symbol: SYMBOLS[i % SYMBOLS.length], name: plain(kind) };
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

// Probes as an axis: their steps, or their labels where some were measured outside training.
function probesAxis(data) {
  if (data.probes.every((probe) => known(probe.step)))
    return { at: data.probes.map((probe) => probe.step), axis: { title: { text: "step" } } };
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
    name: `alpha from ${low} to ${high}`,
    showlegend: true,
  };
}

function draw(id, [traces, layout], c) {
  const axis = { gridcolor: c.grid, linecolor: c.line, zeroline: false, ticks: "outside", tickcolor: c.line };
  const named = (layout.shapes ?? []).filter((shape) => shape.showlegend);
  const entries = [...traces.filter((trace) => trace.showlegend !== false && trace.name), ...named];
  const whole = {
    ...layout,
    paper_bgcolor: c.card,
    plot_bgcolor: c.card,
    font: { color: c.ink, size: 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 58, r: 14, t: 12, b: 46 },
    showlegend: entries.length > 1,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
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
  const plot = document.getElementById(id);
  const drawn = Plotly.react(plot, traces, whole, {
    responsive: true,
    displaylogo: false,
    displayModeBar: true,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  });
  // A plot that stood beside another, or does now, has another width than it was drawn with.
  const before = plot.dataset.width;
  plot.dataset.width = plot.clientWidth;
  return before && before !== plot.dataset.width ? drawn.then(() => Plotly.Plots.resize(plot)) : drawn;
}
