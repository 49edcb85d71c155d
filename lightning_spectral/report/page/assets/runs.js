// The page of several runs: its state, its tables, what a reader can do, and its plots.

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

const state = { hidden: new Set(), quantity: "alpha", plots: false };

// What is said of a run: head, and text of the i-th.
const OPTIONS = [
  ["probes", (i) => String(data.runs[i].probes.length)],
  ["last probe", (i) => lastProbe(data, i).label],
  ["last loss", (i) => brief(lastProbe(data, i).loss)],
  ["median alpha", (i) => fixed(lastProbe(data, i).medians.alpha)],
  ["to trust", (i) => `${lastProbe(data, i).doubts.filter((doubt) => doubt === "").length}/${lastProbe(data, i).doubts.filter((doubt) => doubt !== null).length}`],
  ...Object.keys(data.runs[0].options).map((name) => [name, (i) => data.runs[i].options[name]]),
];

// A marker as plotly draws it, on a piece of the run's line.
function key(i, c) {
  const { colour, symbol, dash } = runOf(data, i, c);
  const shapes = {
    circle: "M17 7a4 4 0 1 1 -8 0a4 4 0 1 1 8 0z",
    square: "M9 3h8v8h-8z",
    diamond: "M13 1.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "triangle-up": "M13 2l5 9h-10z",
    "triangle-down": "M13 12l5 -9h-10z",
    cross: "M11 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
  };
  const dashes = { solid: "", dash: "6 3", dot: "2 2", dashdot: "6 2 2 2" };
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 26 14");
  svg.setAttribute("aria-hidden", "true");
  for (const [d, attributes] of [
    ["M0 7h26", { stroke: colour, "stroke-width": 2, "stroke-dasharray": dashes[dash] }],
    [shapes[symbol], { fill: colour }],
  ]) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [name, content] of Object.entries({ d, ...attributes })) path.setAttribute(name, content);
    svg.append(path);
  }
  return svg;
}

// Each run's look and name; a click leaves it out of the plots, and puts it back.
function showLegend(c) {
  get("legend").replaceChildren(
    ...data.runs.map((run, i) => {
      const button = make("button", undefined, { type: "button", "aria-pressed": String(!state.hidden.has(i)), title: "show or hide" });
      button.append(key(i, c), run.name);
      button.addEventListener("click", () => {
        if (!state.hidden.delete(i)) state.hidden.add(i);
        show();
        get("legend").querySelectorAll("button")[i].focus();
      });
      const item = make("li");
      item.append(button);
      return item;
    }),
  );
}

function showRuns(c) {
  const differ = new Set(data.differences.map((text) => text.split(":")[0]));
  get("options").replaceChildren(
    ...["run", ...OPTIONS.map(([name]) => name)].map((name) => make("th", name, { scope: "col", class: "plain" })),
  );
  get("runs").replaceChildren(
    ...data.runs.map((run, i) => {
      const row = make("tr");
      const first = make("td");
      first.append(key(i, c), run.name);
      row.append(first, ...OPTIONS.map(([name, text]) => make("td", text(i), differ.has(name) ? { class: "differs" } : {})));
      return row;
    }),
  );
}

function showTable(c) {
  const two = data.runs.length === 2;
  const heads = data.runs.map((run, i) => {
    const cell = make("th", undefined, { scope: "col", class: "plain" });
    cell.append(key(i, c), run.name);
    return cell;
  });
  get("columns").replaceChildren(
    make("th", "layer", { scope: "col", class: "plain" }),
    make("th", "kind", { scope: "col", class: "plain text" }),
    ...heads,
    ...(two ? [make("th", "difference", { scope: "col", class: "plain", title: `${data.runs[1].name} minus ${data.runs[0].name}` })] : []),
  );
  get("rows").replaceChildren(
    ...data.layers.map((name, layer) => {
      const row = make("tr");
      row.append(breakable("td", short(name), { title: name }), make("td", data.kinds[layer], { class: "text" }));
      for (const i of data.runs.keys()) {
        const doubt = lastProbe(data, i).doubts[layer];
        const untrusted = doubt === "" ? {} : { class: "quiet", title: doubt === null ? "not measured" : `not to be trusted: ${doubt}` };
        row.append(make("td", alphaText(data, i, layer), untrusted));
      }
      if (two) {
        const [before, after] = [0, 1].map((i) => lastValue(data, i, layer, "alpha"));
        const change = known(before) && known(after) ? after - before : null;
        row.append(make("td", known(change) && change > 0 ? `+${fixed(change)}` : fixed(change)));
      }
      return row;
    }),
  );
}

function showQuantities() {
  const any = (name) => name === "alpha" || everyValue(data, name).length;
  get("quantity").replaceChildren(
    ...Object.keys(data.medians).filter(any).map((name) => make("option", name, { value: name, title: data.meanings[name] })),
  );
  get("quantity").addEventListener("change", (event) => {
    state.quantity = event.target.value;
    if (state.plots) showKinds(colours());
  });
  for (const kind of kindsOf(data)) {
    const figure = make("figure");
    figure.append(make("figcaption", kind), make("div", undefined, { id: `kind-${kind}`, class: "plot low" }));
    get("kinds").append(figure);
  }
}

function showKinds(c) {
  const of = data.medians[state.quantity] ? " over the fits to trust" : "";
  const band = state.quantity === "alpha" ? `; grey: alpha ${data.band.join(" to ")}` : "";
  get("kinds-legend").textContent = `A plot per kind of layer. Thick: its median${of}; thin: layers${band}.`;
  for (const kind of kindsOf(data)) draw(`kind-${kind}`, kindFigure(data, state, c, kind), c);
}

// What is drawn of runs as a whole, and what is said where there is nothing of it.
const CURVES = {
  loss: [(probe) => probe.loss, "loss", {}, "No loss is known."],
  scale: [(probe) => probe.scale, "factor", { at: 1 }, "The step's scale is not shown: no run measured the optimizer's step after its probes."],
  noise: [(probe) => probe.medians.noise_scale, "samples", { log: true }, "The noise scale is not shown: no run measured it, which takes several batches or micro-batches."],
};

function showCurves(c) {
  const given = (read) => data.runs.some((run) => run.probes.some((probe) => known(read(probe))));
  get("curves-legend").textContent = [
    given(CURVES.scale[0]) && "A step scale below 1 is of a step too long, above 1 of one too timid.",
    given(CURVES.noise[0]) && "At the noise scale, half of the squared gradient is noise.",
  ]
    .filter(Boolean)
    .join(" ");
  list("absent", Object.values(CURVES).filter(([read]) => !given(read)).map(([, , , why]) => why));
  for (const [id, [read, text, options]] of Object.entries(CURVES)) {
    get(id).closest("figure").hidden = !given(read);
    if (state.plots && given(read)) draw(id, curvesFigure(data, state, c, read, text, options), c);
  }
}

function show() {
  const c = colours();
  showLegend(c);
  showRuns(c);
  showTable(c);
  showCurves(c);
  if (!state.plots) return;
  showKinds(c);
  draw("pairs", pairsFigure(data, state, c, get("pairs").clientWidth > 640), c);
}

get("facts").textContent = `${data.runs.length} runs, ${data.layers.length} layer${data.layers.length === 1 ? "" : "s"}`;
list(
  "differences",
  data.differences.length ? ["The runs were measured in different ways, and alphas may differ for that alone:", ...data.differences] : [],
);
list("summary", data.summary.map(withSigns));
list("notes", data.notes);
showQuantities();
followTheme(show);
start(() => {
  state.plots = true;
  show();
});
