// Figures of one layer: functions of (data, state, colours) that give traces and a layout.

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
