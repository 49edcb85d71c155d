// Figures of all layers and of one: functions of (data, state, colours) that give traces and a layout.

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

const line = (x, y, colour, name) => ({
  type: "scatter",
  mode: "lines",
  x,
  y,
  name,
  hoverinfo: "skip",
  line: { color: colour, width: 2 },
});

function lawFigure(data, state, c, spectra) {
  const mark = markOf(data, data.kinds[state.layer], c);
  const alpha = value(data, state.probe, state.layer, "alpha");
  const at = spectra.sigma.map((_, k) => k).filter((k) => known(spectra.h[k]) && spectra.h[k] !== 0);
  const group = (name, ks, marker) => ({
    type: "scatter",
    mode: "markers",
    name,
    x: ks.map((k) => spectra.sigma[k]),
    y: ks.map((k) => Math.abs(spectra.h[k])),
    marker,
    hoverinfo: "text",
    hovertext: ks.map(
      (k) =>
        `k = ${k + 1}<br>sigma ${brief(spectra.sigma[k])}<br>h ${brief(spectra.h[k])}${spectra.error ? ` ± ${brief(spectra.error[k], 2)}` : ""}`,
    ),
    ...(spectra.error ? { error_y: bars(ks.map((k) => spectra.error[k]), marker.color) } : {}),
  });
  const positive = at.filter((k) => spectra.h[k] > 0);
  const negative = at.filter((k) => spectra.h[k] < 0);
  const traces = [group("h &gt; 0", positive, { size: 9, color: mark.colour, symbol: mark.symbol })];
  if (negative.length)
    traces.push(
      group("h < 0, |h| shown".replace("<", "&lt;"), negative, {
        size: 9,
        color: c.curvature,
        symbol: "x-thin",
        line: { width: 2, color: c.curvature },
      }),
    );
  if (known(alpha) && known(spectra.lines[0]) && positive.length) {
    const ends = [positive[0], positive[positive.length - 1]].map((k) => spectra.sigma[k]);
    const [good, name] = [trusted(data, state.probe, state.layer), `alpha = ${fixed(alpha)}`];
    const fit = line(
      ends,
      ends.map((sigma) => Math.exp(spectra.lines[0]) * sigma ** alpha),
      c.ink,
      good ? name : `${name}, not to be trusted`,
    );
    traces.push({ ...fit, line: { ...fit.line, dash: good ? "solid" : "dash" } });
  }
  return [
    traces,
    {
      xaxis: logAxis(
        "sigma, gradient singular value",
        at.map((k) => spectra.sigma[k]),
      ),
      yaxis: logAxis(
        "h, curvature",
        at.map((k) => Math.abs(spectra.h[k])),
      ),
    },
  ];
}

function spectrumFigure(data, state, c, spectra) {
  const mark = markOf(data, data.kinds[state.layer], c);
  const sorted = spectra.h.filter((h) => h > 0).sort((a, b) => b - a);
  const usable = spectra.sigma.slice(0, spectra.usable);
  const curve = (values, name, what, colour, symbol) => ({
    type: "scatter",
    mode: "markers",
    name,
    x: values.map((_, k) => k + 1),
    y: values.map((v) => v / values[0]),
    marker: { size: 8, color: colour, symbol },
    hoverinfo: "text",
    hovertext: values.map((v, k) => `${what} ${k + 1}: ${brief(v)}`),
  });
  const decay = (values, exponent, intercept, name, colour) => {
    if (!known(exponent) || !known(intercept)) return [];
    const ends = [1, values.length];
    return [
      {
        ...line(
          ends,
          ends.map((k) => (Math.exp(intercept) * k ** -exponent) / values[0]),
          colour,
          name,
        ),
        line: { color: colour, width: 1.5 },
      },
    ];
  };
  const noise = spectra.sigma
    .slice(spectra.usable)
    .map((v, i) => [spectra.usable + i + 1, v / spectra.sigma[0]])
    .filter(([, v]) => v > 0);
  const traces = [
    curve(usable, "sigma<sub>k</sub>", "sigma", mark.colour, mark.symbol),
    ...decay(
      usable,
      value(data, state.probe, state.layer, "gamma"),
      spectra.lines[1],
      `gamma = ${fixed(value(data, state.probe, state.layer, "gamma"))}`,
      mark.colour,
    ),
    curve(sorted, "h, sorted", "h", c.curvature, "diamond-open"),
    ...decay(
      sorted,
      value(data, state.probe, state.layer, "s"),
      spectra.lines[2],
      `s = ${fixed(value(data, state.probe, state.layer, "s"))}`,
      c.curvature,
    ),
  ];
  if (noise.length)
    traces.push({
      type: "scatter",
      mode: "markers",
      name: "rounding noise",
      x: noise.map(([k]) => k),
      y: noise.map(([, v]) => v),
      hoverinfo: "name",
      marker: { size: 7, color: c.quiet, symbol: "circle-open" },
    });
  const shown = traces.filter(({ mode }) => mode === "markers");
  return [
    traces,
    {
      xaxis: logAxis(
        "rank",
        shown.flatMap(({ x }) => x),
      ),
      yaxis: logAxis(
        "relative to the first",
        shown.flatMap(({ y }) => y),
      ),
    },
  ];
}

// sigma at rank k, by the coefficients of a fit.
const MODELS = {
  power_law: ([a, b], k) => Math.exp(a + b * Math.log(k)),
  exponential: ([a, b], k) => Math.exp(a + b * k),
  lognormal: ([a, b, d], k) => Math.exp(a + b * Math.log(k) + d * Math.log(k) ** 2),
};

// All singular values that were taken, with the three models of them; the winner by BIC is thick.
function modelsFigure(data, state, c, spectra) {
  const mark = markOf(data, data.kinds[state.layer], c);
  const sigma = (spectra.spectrum ?? spectra.sigma).filter((v) => v > 0);
  const points = (name, from, to, symbol) => ({
    type: "scatter",
    mode: "markers",
    name,
    x: sigma.slice(from, to).map((_, i) => from + i + 1),
    y: sigma.slice(from, to),
    marker: { size: 7, color: symbol === mark.symbol ? mark.colour : c.quiet, symbol },
    hoverinfo: "text",
    hovertext: sigma.slice(from, to).map((v, i) => `sigma ${from + i + 1}: ${brief(v)}`),
  });
  const ranks = Array.from({ length: 60 }, (_, i) => spectra.ranked ** (i / 59));
  const curves = Object.entries(spectra.models).map(([model, coefficients]) => {
    const { name, colour, dash } = modelOf(data, model, c);
    const wins = model === data.probes[state.probe].winners[state.layer];
    const curve = line(ranks, ranks.map((k) => MODELS[model](coefficients, k)), colour, name);
    return { ...curve, name: wins ? `<b>${name}</b>` : name, line: { ...curve.line, dash, width: wins ? 3 : 1.5 } };
  });
  const noise = spectra.ranked < sigma.length ? [points("rounding noise", spectra.ranked, undefined, "circle-open")] : [];
  return [
    [points("sigma<sub>k</sub>", 0, spectra.ranked, mark.symbol), ...noise, ...curves],
    {
      xaxis: logAxis("rank k", [1, sigma.length]),
      yaxis: logAxis("sigma, gradient singular value", sigma),
    },
  ];
}

// The factors of h, each relative to its line's value at the largest sigma, so that their slopes can be compared.
function splitFigure(data, state, c, spectra) {
  const names = { beta: "Λ<sub>δ</sub>Λ<sub>A</sub>", phi: "Φ", chi_slope: "χ" };
  const symbols = { beta: "circle", phi: "square", chi_slope: "diamond" };
  const traces = spectra.split.flatMap(([key, values, intercept], i) => {
    const slope = value(data, state.probe, state.layer, key);
    const at = values.map((_, k) => k).filter((k) => values[k] > 0 && spectra.sigma[k] > 0);
    if (!at.length) return [];
    const first = known(slope) && known(intercept) ? Math.exp(intercept) * spectra.sigma[at[0]] ** slope : values[at[0]];
    const colour = [c.ink, c.sigma, c.curvature][i];
    const points = {
      type: "scatter",
      mode: "markers",
      name: names[key],
      x: at.map((k) => spectra.sigma[k]),
      y: at.map((k) => values[k] / first),
      marker: { size: 7, color: colour, symbol: symbols[key] },
      hoverinfo: "text",
      hovertext: at.map((k) => `k = ${k + 1}<br>${names[key]} ${brief(values[k])}`),
    };
    if (!known(slope) || !known(intercept)) return [points];
    const ends = [spectra.sigma[at[0]], spectra.sigma[at[at.length - 1]]];
    const fit = line(ends, ends.map((x) => (x / ends[0]) ** slope), colour, `${key} = ${fixed(slope)}`);
    return [points, fit];
  });
  return [
    traces,
    {
      xaxis: logAxis("sigma, gradient singular value", traces.flatMap(({ x }) => x)),
      yaxis: logAxis("relative to the line at sigma₁", traces.flatMap(({ y }) => y)),
    },
  ];
}

function layerTrainingFigure(data, state, c) {
  const { at: x, axis } = probesAxis(data);
  const mark = markOf(data, data.kinds[state.layer], c);
  const curve = (key, name, colour, symbol) => {
    const y = x.map((_, probe) => value(data, probe, state.layer, key));
    return {
      type: "scatter",
      mode: "lines+markers",
      name,
      x,
      y,
      line: { color: colour, width: 2 },
      marker: {
        size: 7,
        symbol: x.map((_, probe) => symbol + (trusted(data, probe, state.layer) ? "" : "-open")),
        color: colour,
        line: { width: 1.5, color: colour },
      },
      hoverinfo: "text",
      hovertext: y.map((v, probe) => {
        const why = doubt(data, probe, state.layer);
        return `${name} ${fixed(v)}<br>${plain(data.probes[probe].label)}${why ? `<br>not to be trusted: ${plain(why)}` : ""}`;
      }),
    };
  };
  const traces = [
    curve("alpha", "alpha", mark.colour, mark.symbol),
    curve("gamma", "gamma", c.sigma, "circle"),
    curve("s", "s", c.curvature, "diamond"),
  ].filter(({ y }) => y.some(known));
  return [
    traces,
    {
      xaxis: axis,
      yaxis: { title: { text: "exponent" } },
      shapes: [upright(x[state.probe], c)],
    },
  ];
}
