// Plots of several runs: functions of (data, state, colours) that give traces and a layout. A colour, marker and line is
// a run; what each is stands above all plots, and so not in them.

function runOf(data, i, c) {
  const [light, dark, symbol, dash] = data.runs[i].look;
  return { colour: c.dark ? dark : light, symbol, dash, name: plain(data.runs[i].name) };
}

const visible = (data, state) => data.runs.map((_, i) => i).filter((i) => !state.hidden.has(i));

// The steps of each run, or the numbers of its probes where some were measured outside training.
function runsAxis(data) {
  const inTraining = data.runs.every((run) => run.probes.every((probe) => known(probe.step)));
  const at = data.runs.map((run) => run.probes.map((probe, i) => (inTraining ? probe.step : i + 1)));
  const axis = stepAxis(at.flat());
  return { at, axis: inTraining ? axis : { ...axis, title: { text: "probe" } } };
}

// Ends of an axis for values, with some room.
function span(values) {
  const finite = values.filter(known);
  if (!finite.length) return undefined;
  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  const margin = 0.06 * (high - low) || 0.05;
  return [low - margin, high + margin];
}

// A curve per run, on a log axis where its values go over more than a decade and a half, all above 0.
function curvesFigure(data, state, c, read, text, { log, at: level } = {}) {
  const { at, axis } = runsAxis(data);
  const all = data.runs.flatMap((run) => run.probes.map(read)).filter(known);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const decades = log || (low > 0 && high > 30 * low);
  const shown = (v) => (known(v) && (!decades || v > 0) ? v : null);
  const traces = visible(data, state).map((i) => {
    const { colour, symbol, dash, name } = runOf(data, i, c);
    const { probes } = data.runs[i];
    return {
      type: "scatter",
      mode: "lines+markers",
      name,
      showlegend: false,
      x: at[i],
      y: probes.map((probe) => shown(read(probe))),
      hoverinfo: "text",
      hovertext: probes.map((probe) => `<b>${name}</b><br>${plain(probe.label)}: ${brief(read(probe))}`),
      line: { color: colour, width: 2, dash },
      marker: { size: 7, symbol, maxdisplayed: MOST_MARKERS },
    };
  });
  return [
    traces,
    {
      xaxis: axis,
      yaxis: decades ? { ...logAxis(text, all.filter((v) => v > 0)) } : { title: { text }, range: span([...all, level]) },
      shapes: level === undefined ? [] : [across(level, c)],
    },
  ];
}

// A quantity of the layers of a kind, thin, with their median, thick, in each run.
function kindFigure(data, state, c, kind) {
  const { at, axis } = runsAxis(data);
  const key = state.quantity;
  const [log, column] = [LOGARITHMIC.has(key), data.keys.indexOf(key)];
  const shown = (v) => (known(v) && (!log || v > 0) ? v : null);
  const layers = data.layers.map((_, layer) => layer).filter((layer) => data.kinds[layer] === kind);
  const median = (probe) => shown(probe.kinds[kind]?.[Object.keys(data.medians).indexOf(key)]);
  const traces = visible(data, state).flatMap((i) => {
    const { colour, symbol, dash, name } = runOf(data, i, c);
    const { probes } = data.runs[i];
    // All layers in one trace, apart by gaps.
    const thin = layers.flatMap((layer) => [...probes.map((probe) => shown(probe.values[layer]?.[column])), null]);
    return [
      {
        type: "scatter",
        mode: "lines",
        showlegend: false,
        x: layers.flatMap(() => [...at[i], null]),
        y: thin,
        hoverinfo: "skip",
        line: { color: colour, width: 1, dash },
        opacity: 0.3,
      },
      {
        type: "scatter",
        mode: "lines+markers",
        name,
        showlegend: false,
        x: at[i],
        y: probes.map(median),
        hoverinfo: "text",
        hovertext: probes.map(
          (probe) =>
            `<b>${name}</b>, ${plain(kind)}, ${plain(probe.label)}<br>median ${key} ${log ? brief(median(probe)) : fixed(median(probe))}`,
        ),
        line: { color: colour, width: 2.5, dash },
        marker: { size: 7, symbol, maxdisplayed: MOST_MARKERS },
      },
    ];
  });
  return [
    traces,
    {
      xaxis: axis,
      yaxis: log ? { ...logAxis(key, everyValue(data, key)), range: kindRange(data, key) } : { title: { text: key }, range: kindRange(data, key) },
      shapes: key === "alpha" ? [{ ...bandAroundTwo(data, c), showlegend: false }] : [],
    },
  ];
}

function everyValue(data, key) {
  const column = data.keys.indexOf(key);
  return data.runs.flatMap((run) => run.probes.flatMap((probe) => probe.values.map((row) => row?.[column]))).filter(known);
}

// Limits that all kinds share, so that they can be compared: of all medians, and of nine layers in ten.
function kindRange(data, key) {
  const place = Object.keys(data.medians).indexOf(key);
  const medians = data.runs.flatMap((run) => run.probes.flatMap((probe) => Object.values(probe.kinds).map((row) => row[place])));
  const scale = (v) => (LOGARITHMIC.has(key) ? Math.log10(v) : v);
  const finite = (values) => values.filter((v) => known(v) && Number.isFinite(scale(v))).map(scale);
  const sorted = finite(everyValue(data, key)).sort((a, b) => a - b);
  const tail = Math.floor(sorted.length / 20);
  return span([...finite(medians), ...sorted.slice(tail, sorted.length - tail), ...(key === "alpha" ? data.band : [])]);
}

// The last alpha of each layer: a point per run, joined where there are several.
function pairsFigure(data, state, c, wide) {
  const runs = visible(data, state);
  const alpha = (i, layer) => lastValue(data, i, layer, "alpha");
  const values = runs.flatMap((i) => data.layers.map((_, layer) => alpha(i, layer)));
  const range = span([...values, ...data.band]);
  const ends = data.layers.map((_, layer) => runs.map((i) => alpha(i, layer)).filter(known));
  const joined = {
    type: "scatter",
    mode: "lines",
    showlegend: false,
    hoverinfo: "skip",
    x: ends.flatMap((_, layer) => [layer, layer, null]),
    y: ends.flatMap((at) => (at.length > 1 ? [Math.min(...at), Math.max(...at), null] : [null, null, null])),
    line: { color: c.quiet, width: 1.5 },
  };
  const traces = runs.map((i) => {
    const { colour, symbol, name } = runOf(data, i, c);
    const layers = data.layers.map((_, layer) => layer).filter((layer) => known(alpha(i, layer)));
    const good = (layer) => lastProbe(data, i).doubts[layer] === "";
    return {
      type: "scatter",
      mode: "markers",
      name,
      showlegend: false,
      x: layers,
      y: layers.map((layer) => alpha(i, layer)),
      hoverinfo: "text",
      hovertext: layers.map(
        (layer) =>
          `<b>${plain(short(data.layers[layer]))}</b> (${plain(data.kinds[layer])})<br>${name}, ${plain(lastProbe(data, i).label)}: ` +
          `alpha ${alphaText(data, i, layer)}${good(layer) ? "" : `<br>not to be trusted: ${plain(lastProbe(data, i).doubts[layer])}`}`,
      ),
      marker: {
        size: data.layers.length > 60 ? 6 : 10,
        color: colour,
        symbol: layers.map((layer) => symbol + (good(layer) ? "" : "-open")),
        line: { width: 1.5, color: colour },
      },
    };
  });
  return [
    [joined, ...traces],
    {
      xaxis: layersAxis(data, wide),
      yaxis: { title: { text: "alpha" }, range },
      annotations: outside(values.filter((v) => beyond(v, range)).length, c),
      shapes: [{ ...bandAroundTwo(data, c), showlegend: false }],
    },
  ];
}

const lastProbe = (data, i) => data.runs[i].probes[data.runs[i].probes.length - 1];
const lastValue = (data, i, layer, key) => lastProbe(data, i).values[layer]?.[data.keys.indexOf(key)] ?? null;

function alphaText(data, i, layer) {
  const error = lastValue(data, i, layer, "alpha_stderr");
  return fixed(lastValue(data, i, layer, "alpha")) + (known(error) ? ` ± ${fixed(error)}` : "");
}
