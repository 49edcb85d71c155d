// Figures of all layers: functions of (data, state, colours) that give traces and a layout.

// One trace per kind of the layers' points; the chosen layer has a ring around it.
function points(data, state, c, x, y, error) {
  const traces = kindsOf(data).map((kind) => {
    const layers = data.layers
      .map((_, layer) => layer)
      .filter((layer) => data.kinds[layer] === kind && known(x(layer)) && known(y(layer)))
      // The legend shows the first one's symbol.
      .sort((i, j) => trusted(data, state.probe, j) - trusted(data, state.probe, i));
    const mark = markOf(data, kind, c);
    const trace = {
      type: "scatter",
      mode: "markers",
      name: mark.name,
      x: layers.map(x),
      y: layers.map(y),
      customdata: layers,
      hoverinfo: "text",
      hovertext: layers.map((layer) => hover(data, state.probe, layer)),
      marker: {
        size: data.layers.length > 60 ? 6 : 9,
        line: { width: 1.5, color: mark.colour },
        symbol: layers.map((layer) => mark.symbol + (trusted(data, state.probe, layer) ? "" : "-open")),
        color: mark.colour,
      },
    };
    if (error) trace.error_y = bars(layers.map(error), mark.colour);
    return trace;
  });
  if (known(x(state.layer)) && known(y(state.layer))) {
    traces.push({
      type: "scatter",
      mode: "markers",
      x: [x(state.layer)],
      y: [y(state.layer)],
      hoverinfo: "skip",
      showlegend: false,
      marker: { size: 18, symbol: "circle-open", color: c.select, line: { width: 2.5 } },
    });
  }
  return traces;
}

// Limits that hold the error bars of the points within them, too, but for bars longer than all of the axis.
function withBars(data, range) {
  if (!range) return range;
  const longest = Math.max(1, range[1] - range[0]);
  let [low, high] = range;
  data.probes.forEach((_, probe) =>
    data.layers.forEach((_, layer) => {
      const [alpha, error] = ["alpha", "alpha_stderr"].map((key) => value(data, probe, layer, key));
      if (!known(alpha) || !known(error) || beyond(alpha, range)) return;
      low = Math.min(low, alpha - 1.05 * Math.min(error, longest));
      high = Math.max(high, alpha + 1.05 * Math.min(error, longest));
    }),
  );
  return [low, high];
}

function depthFigure(data, state, c, wide) {
  const read = (layer) => value(data, state.probe, layer, "alpha");
  const range = withBars(
    data,
    limits(data, (probe, layer) => value(data, probe, layer, "alpha")),
  );
  return [
    points(
      data,
      state,
      c,
      (layer) => layer,
      read,
      (layer) => value(data, state.probe, layer, "alpha_stderr"),
    ),
    {
      xaxis: layersAxis(data, wide),
      yaxis: { title: { text: "alpha" }, range },
      annotations: outside(data.layers.filter((_, layer) => beyond(read(layer), range)).length, c),
      shapes: [bandAroundTwo(data, c)],
    },
  ];
}

function transferFigure(data, state, c) {
  const [x, y] = [(layer) => product(data, state.probe, layer), (layer) => value(data, state.probe, layer, "s")];
  const both = [
    limits(data, (probe, layer) => product(data, probe, layer)),
    limits(data, (probe, layer) => value(data, probe, layer, "s")),
  ].filter(Boolean);
  const range = both.length
    ? [Math.min(...both.map(([low]) => low)), Math.max(...both.map(([, high]) => high))]
    : [0, 3];
  return [
    points(data, state, c, x, y),
    {
      xaxis: { title: { text: "alpha · gamma" }, range },
      yaxis: { title: { text: "s" }, range },
      annotations: outside(
        data.layers.filter((_, layer) => beyond(x(layer), range) || beyond(y(layer), range)).length,
        c,
      ),
      shapes: [dotted(c, { x0: range[0], x1: range[1], y0: range[0], y1: range[1], layer: "below" })],
    },
  ];
}

const written = (v, key) => (LOGARITHMIC.has(key) ? brief(v) : fixed(v));

// What a point at a layer and probe says of a quantity.
function saying(data, probe, layer, key) {
  const what = key === "alpha" ? "" : `<br>${key} ${written(value(data, probe, layer, key), key)}`;
  return `${hover(data, probe, layer)}${what}<br>${plain(data.probes[probe].label)}`;
}

// Of more points than that only the hollow ones are drawn: a line's others are filled.
const MOST_POINTS = 2000;

// One trace per kind of the points of fits to trust, filled, or of the others, hollow.
function trainingPoints(data, state, c, x, read, key, good) {
  const many = data.layers.length * x.length > MOST_POINTS;
  return kindsOf(data).map((kind) => {
    const mark = markOf(data, kind, c);
    const colour = ([, layer]) => (layer === state.layer ? c.select : mark.colour);
    const at = data.layers
      .map((_, layer) => layer)
      .filter((layer) => data.kinds[layer] === kind)
      .flatMap((layer) => x.map((_, probe) => [probe, layer]))
      .filter(([probe, layer]) => known(read(probe, layer)) && trusted(data, probe, layer) === good);
    return {
      type: "scatter",
      mode: "markers",
      name: mark.name,
      showlegend: false,
      x: at.map(([probe]) => x[probe]),
      y: at.map(([probe, layer]) => read(probe, layer)),
      customdata: at.map(([, layer]) => layer),
      hoverinfo: "text",
      hovertext: at.map(([probe, layer]) => saying(data, probe, layer, key)),
      marker: {
        // Upon the thick line of the chosen layer a small one could not be seen.
        size: at.map(([, layer]) => (layer === state.layer ? 9 : many ? 3 : 5)),
        symbol: good ? "circle" : "circle-open",
        color: at.map(colour),
        line: { width: 1, color: at.map(colour) },
      },
      opacity: many ? 0.4 : 0.7,
    };
  });
}

function trainingFigure(data, state, c) {
  const { at: x, axis } = probesAxis(data);
  const key = state.quantity;
  const [log, ofFit] = [LOGARITHMIC.has(key), data.medians[key] === 1];
  const shown = (v) => (known(v) && (!log || v > 0) ? v : null);
  const read = (probe, layer) => shown(value(data, probe, layer, key));
  const scale = (v) => (log && known(v) ? Math.log10(v) : v);
  const range = limits(data, (probe, layer) => scale(read(probe, layer)), ofFit ? undefined : () => true);
  const thin = data.layers.map((name, layer) => ({
    type: "scatter",
    mode: "lines",
    x,
    y: x.map((_, probe) => read(probe, layer)),
    showlegend: layer === state.layer,
    name: clipped(short(name)),
    hoverinfo: "text",
    customdata: x.map(() => layer),
    hovertext: x.map((_, probe) => saying(data, probe, layer, key)),
    line: {
      color: layer === state.layer ? c.select : markOf(data, data.kinds[layer], c).colour,
      width: layer === state.layer ? 2.5 : 1,
    },
    opacity: layer === state.layer ? 1 : 0.35,
  }));
  const points = ofFit
    ? [true, false]
        .filter((good) => !good || data.layers.length * x.length <= MOST_POINTS)
        .flatMap((good) => trainingPoints(data, state, c, x, read, key, good))
        .filter((trace) => trace.x.length)
    : [];
  const medians = kindsOf(data).map((kind) => {
    const mark = markOf(data, kind, c);
    const y = data.probes.map((probe) => shown(probe.kinds[kind]?.[Object.keys(data.medians).indexOf(key)]));
    return {
      type: "scatter",
      mode: "lines+markers",
      name: mark.name,
      x,
      y,
      hoverinfo: "text",
      hovertext: y.map(
        (v, probe) =>
          `<b>${mark.name}</b>, median${ofFit ? " of fits to trust" : ""}` +
          `<br>${plain(data.probes[probe].label)}: ${key} ${written(v, key)}`,
      ),
      line: { color: mark.colour, width: 2.5 },
      marker: { size: 7, symbol: mark.symbol, maxdisplayed: MOST_MARKERS },
    };
  });
  const drawn = [...thin, ...medians].flatMap(({ y }) => y);
  return [
    [...thin, ...points, ...medians],
    {
      xaxis: axis,
      yaxis: log
        ? { ...logAxis(key, drawn.filter((v) => known(v) && !beyond(scale(v), range))), range }
        : { title: { text: key }, range },
      annotations: outside(drawn.filter((v) => beyond(scale(v), range)).length, c),
      shapes: [...(key === "alpha" ? [bandAroundTwo(data, c)] : []), upright(x[state.probe], c)],
    },
  ];
}
