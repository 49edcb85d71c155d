// The page: its state, the table, and what a reader can do.

const state = { probe: data.probes.length - 1, layer: 0, column: "", down: false, query: "", plots: false, quantity: "alpha" };

const of = (key) => (layer) => value(data, state.probe, layer, key);
const spectraOf = (layer) => data.probes[state.probe].spectra?.[layer];

const interval = (key, i) =>
  known(of(`${key}_low`)(i)) ? `${fixed(of(`${key}_low`)(i))} to ${fixed(of(`${key}_high`)(i))}` : "–";
const withError = (key, show) => (i) =>
  show(of(key)(i)) + (known(of(`${key}_stderr`)(i)) ? ` ± ${show(of(`${key}_stderr`)(i))}` : "");

const inDigits = (key) => (i) => brief(of(key)(i));

// A column of a logged quantity.
const measured = (key, head = key, text = (i) => fixed(of(key)(i)), meaning = data.meanings[key]) => ({
  key,
  head,
  sort: of(key),
  text,
  meaning,
});

// What is measured on request, of which the data hold what was asked for.
const REQUESTED = [
  measured("s_weight"),
  measured("gamma_weight"),
  measured("hessian_trace", "tr H ± se", withError("hessian_trace", brief)),
  measured("curvature_fraction", "fraction ± se", withError("curvature_fraction", percent)),
  measured("curvature_over_random", "over random", inDigits("curvature_over_random")),
  measured("beta"),
  measured("phi"),
  measured("chi_slope"),
  measured("chi", "chi", inDigits("chi")),
  measured("concentration_ratio", "ratio"),
  measured("effective_rank_a", "rank a", inDigits("effective_rank_a")),
  measured("effective_rank_delta", "rank delta", inDigits("effective_rank_delta")),
].map((column) => ({ ...column, requested: true }));

// head, what a cell says, what it sorts by, what the column means
const COLUMNS = [
  { key: "layer", head: "layer", sort: (i) => i, text: (i) => short(data.layers[i]), meaning: "sorts by depth" },
  {
    key: "kind",
    head: "kind",
    sort: (i) => data.kinds[i],
    text: (i) => data.kinds[i],
    meaning: "inferred from the module's structure",
    words: true,
  },
  {
    key: "shape",
    head: "shape",
    sort: (i) => data.shapes[i].split("×").reduce((a, b) => a * parseFloat(b), 1),
    text: (i) => data.shapes[i],
    meaning: "of the matrix; sorts by its entries",
  },
  measured("alpha", "alpha ± se", withError("alpha", fixed)),
  measured(
    "alpha_low",
    "alpha 95 %",
    (i) => interval("alpha", i),
    "95 % of the slopes of bootstrap draws; sorts by the lower end",
  ),
  measured("r2_alpha", "r2"),
  measured("signal"),
  {
    key: "doubt",
    head: "doubt",
    sort: (i) => doubt(data, state.probe, i),
    text: (i) => doubt(data, state.probe, i) ?? "–",
    meaning: "why the fit is not to be trusted; empty where it is",
    words: true,
  },
  measured("gamma"),
  measured("s"),
  {
    key: "product",
    head: "alpha·gamma",
    sort: (i) => product(data, state.probe, i),
    text: (i) => fixed(product(data, state.probe, i)),
    meaning: "alpha times gamma, which the transfer identity says is s",
  },
  measured("transfer_error", "error", (i) => percent(of("transfer_error")(i))),
  measured("pr_curvature", "PR_h"),
  measured("zeta_bound", "zeta"),
  measured("points", "points", (i) =>
    known(of("points")(i)) ? String(of("points")(i)) + (spectraOf(i) ? `/${spectraOf(i).sigma.length}` : "") : "–",
  ),
  measured("negative_curvature", "h < 0", (i) => fixed(of("negative_curvature")(i), 0)),
  ...["strongest", "second", "third", "weakest"].map((which, quarter) => ({
    key: `alpha_q${quarter + 1}`,
    head: `q${quarter + 1}`,
    sort: (i) => data.probes[state.probe].quarters[i]?.[quarter],
    text: (i) => fixed(data.probes[state.probe].quarters[i]?.[quarter]),
    meaning: `alpha of the ${which} quarter of the directions alone`,
  })),
  ...REQUESTED,
].filter(({ key, requested }) => !(requested || key === "alpha_low") || data.keys.includes(key));

function order(layers) {
  const column = COLUMNS.find(({ key }) => key === state.column);
  if (!column) return layers;
  const number = (x) => (x === "inf" ? Infinity : x === "-inf" ? -Infinity : x);
  const missing = (x) => x === null || x === undefined || x === "" || Number.isNaN(x);
  return [...layers].sort((i, j) => {
    const [a, b] = [number(column.sort(i)), number(column.sort(j))];
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const way = typeof a === "string" ? a.localeCompare(b) : a < b ? -1 : a > b ? 1 : 0;
    return state.down ? -way : way;
  });
}

function layersShown() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const all = data.layers.map((_, i) => i);
  return order(
    all.filter((i) => words.every((word) => `${data.layers[i]} ${data.kinds[i]}`.toLowerCase().includes(word))),
  );
}

function showHead() {
  for (const { key, head, meaning, words } of COLUMNS) {
    const button = make("button", head, { type: "button", title: meaning });
    button.addEventListener("click", () => {
      state.down = state.column === key && !state.down;
      state.column = key;
      showTable();
    });
    const cell = make("th", undefined, {
      scope: "col",
      "data-key": key,
      "aria-sort": "none",
      ...(words ? { class: "text" } : {}),
    });
    cell.append(button);
    get("columns").append(cell);
  }
}

function showTable() {
  for (const cell of get("columns").children) {
    const sorted = cell.dataset.key === state.column;
    cell.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
  }
  const layers = layersShown();
  const rows = layers.map((layer) => {
    const row = make("tr");
    row.classList.toggle("doubtful", !trusted(data, state.probe, layer));
    const why = doubt(data, state.probe, layer);
    if (why) row.title = `not to be trusted: ${why}`;
    if (layer === state.layer) row.setAttribute("aria-current", "true");
    for (const { key, text, words } of COLUMNS) {
      const cell = make("td", key === "layer" ? undefined : text(layer), {
        "data-key": key,
        ...(words ? { class: "text" } : {}),
      });
      if (key === "layer")
        cell.append(
          breakable("a", text(layer), {
            href: address(layer),
            title: data.probes[state.probe].notes[data.layers[layer]] || data.layers[layer],
          }),
        );
      row.append(cell);
    }
    row.addEventListener("click", (event) => {
      event.preventDefault();
      open(layer);
    });
    return row;
  });
  get("rows").replaceChildren(...rows);
  get("count").textContent = `${layers.length} of ${data.layers.length} layers`;
}

const address = (layer) => `#layer=${encodeURIComponent(data.layers[layer].toWellFormed?.() ?? data.layers[layer])}`;

// Choose a layer, show its plots and go to them; the address then leads there again.
function open(layer) {
  choose(layer);
  history.replaceState(null, "", address(layer));
  get("layer").focus({ preventScroll: true });
  get("layer").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

function choose(layer) {
  state.layer = layer;
  showTable();
  showLayer();
  showOverview();
}

function showProbe() {
  const probe = data.probes[state.probe];
  const loss = known(probe.loss) ? `, loss ${brief(probe.loss)}` : "";
  get("at").textContent = probe.label + loss;
  get("step").value = state.probe;
  get("step").setAttribute("aria-valuetext", probe.label);
  const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
  get("facts").textContent = [probe.facts, count(data.layers.length, "layer"), count(data.probes.length, "probe")]
    .filter(Boolean)
    .join(", ");
  list("summary", probe.summary.map(withSigns));
  list("notes", [...data.notes, ...probe.problems]);
  list(
    "skipped",
    probe.skipped.map((text) => `Not measured: ${text}`),
  );
  showTable();
  showLayer();
  showOverview();
}

// Which plots of all layers have anything to show, and why the others have not.
function overviewPlots() {
  const any = (read) => data.layers.some((_, layer) => known(read(layer)));
  const label = data.probes[state.probe].label;
  return {
    depth: [any(of("alpha")), `alpha by layer is not shown: no layer has an alpha at ${label}.`],
    transfer: [
      any((layer) => product(data, state.probe, layer)) && any(of("s")),
      `The transfer identity is not shown: no layer has alpha, gamma and s at ${label}.`,
    ],
    training: [data.probes.length > 1, "alpha over training is not shown: it takes several probes."],
  };
}

function showOverview() {
  const plots = overviewPlots();
  list(
    "absent",
    Object.values(plots)
      .filter(([given]) => !given)
      .map(([, why]) => why),
  );
  for (const [id, [given]] of Object.entries(plots)) get(id).closest("figure").hidden = !given;
  for (const [id, beside] of [["transfer", "training"], ["training", "transfer"]])
    get(id).closest("figure").classList.toggle("wide", !plots[beside][0]);
  if (!state.plots) return;
  const c = colours();
  if (plots.depth[0]) draw("depth", depthFigure(data, state, c, get("depth").clientWidth > 640), c);
  if (plots.transfer[0]) draw("transfer", transferFigure(data, state, c), c);
  if (plots.training[0]) showTraining(c);
}

function showTraining(c) {
  draw("training", trainingFigure(data, state, c), c);
  get("training-legend").textContent =
    data.medians[state.quantity] === 1
      ? "thin: layers; thick: median by kind of the fits to trust"
      : "thin: layers; thick: median by kind";
}

// Quantities with a median by kind, of those that some layer has at some probe.
function showQuantities() {
  const any = (key) =>
    data.probes.some((_, probe) => data.layers.some((_, layer) => known(value(data, probe, layer, key))));
  const quantities = Object.keys(data.medians).filter((key) => key === "alpha" || any(key));
  get("quantity").replaceChildren(
    ...quantities.map((key) => make("option", key, { value: key, title: data.meanings[key] })),
  );
  get("quantity").addEventListener("change", (event) => {
    state.quantity = event.target.value;
    if (state.plots) showTraining(colours());
  });
}

// What is known of a layer beside its exponents, a line each.
function moreOf(layer, spectra) {
  const { winners } = data.probes[state.probe];
  const winner = winners[layer];
  const has = (key) => known(of(key)(layer));
  const requested = COLUMNS.filter((column) => column.requested && has(column.key));
  const values = spectra?.ranked;
  const margin = has("rank_margin") ? `, ${fixed(of("rank_margin")(layer))} in BIC ahead of the next model` : "";
  return [
    winner && `gradient spectrum${values ? ` of ${values} singular values` : ""}: ${data.looks.models[winner]?.[0] ?? winner}${margin}`,
    has("alpha_low") &&
      `95 % of bootstrap draws: ${["alpha", "gamma", "s"].map((key) => `${key} ${interval(key, layer)}`).join(", ")}`,
    [
      has("h_max") && `largest h ${brief(of("h_max")(layer))}`,
      has("sigma_max") && `largest sigma ${brief(of("sigma_max")(layer))}`,
      has("signal") && `signal ${withError("signal", fixed)(layer)}`,
      has("noise_scale") && `noise scale ${brief(of("noise_scale")(layer))} samples`,
    ]
      .filter(Boolean)
      .join(", "),
    requested.length && requested.map(({ head, text }) => `${head.replace(" ± se", "")} ${text(layer)}`).join(", "),
  ].filter(Boolean);
}

function showLayer() {
  const [layer, spectra] = [state.layer, spectraOf(state.layer)];
  get("layer-title").textContent = short(data.layers[layer]);
  const exponents = `alpha ${COLUMNS.find(({ key }) => key === "alpha").text(layer)}, gamma ${fixed(of("gamma")(layer))}, s ${fixed(of("s")(layer))}`;
  get("layer-facts").textContent = [
    data.probes[state.probe].label,
    data.kinds[layer],
    data.shapes[layer],
    exponents,
    doubt(data, state.probe, layer) && `not to be trusted: ${doubt(data, state.probe, layer)}`,
    spectra && `curvature by ${spectra.method}`,
  ]
    .filter(Boolean)
    .join(", ");
  const note = data.probes[state.probe].notes[data.layers[layer]];
  const missing = spectra
    ? ""
    : `No sigma and h of this layer at ${data.probes[state.probe].label} on this page.`;
  get("layer-missing").textContent = [note, missing].filter(Boolean).join(" ");
  get("layer-missing").hidden = !note && !missing;
  list("layer-more", moreOf(layer, spectra));
  const curves = ["alpha", "gamma", "s"].some((key) => data.probes.some((_, i) => known(value(data, i, layer, key))));
  get("layer-training-figure").hidden = data.probes.length < 2 || !curves;
  get("split-figure").hidden = !spectra?.split;
  get("layer-training-figure").classList.toggle("wide", !spectra || Boolean(spectra.split));
  for (const figure of document.querySelectorAll("figure.spectral")) figure.hidden = !spectra;
  if (!state.plots) return;
  const c = colours();
  if (spectra) {
    draw("law", lawFigure(data, state, c, spectra), c);
    draw("spectrum", spectrumFigure(data, state, c, spectra), c);
    draw("models", modelsFigure(data, state, c, spectra), c);
  }
  if (spectra?.split) draw("split", splitFigure(data, state, c, spectra), c);
  if (!get("layer-training-figure").hidden) draw("layer-training", layerTrainingFigure(data, state, c), c);
}

function listen() {
  get("step").max = data.probes.length - 1;
  get("toolbar").hidden = data.probes.length < 2;
  get("step").addEventListener("input", (event) => {
    state.probe = Number(event.target.value);
    showProbe();
  });
  get("search").addEventListener("input", (event) => {
    state.query = event.target.value;
    showTable();
  });
  const beside = (by) => {
    const layers = layersShown().length ? layersShown() : [state.layer];
    const at = layers.indexOf(state.layer) + by;
    choose(layers[(at + layers.length) % layers.length]);
    history.replaceState(null, "", address(state.layer));
  };
  get("previous").addEventListener("click", () => beside(-1));
  get("next").addEventListener("click", () => beside(1));
  addEventListener("hashchange", () => {
    if (fromAddress() >= 0) open(fromAddress());
  });
}

function fromAddress() {
  try {
    return data.layers.indexOf(decodeURIComponent(location.hash.replace(/^#layer=/, "")));
  } catch {
    return -1;
  }
}

showHead();
showQuantities();
listen();
for (const key of data.keys) get("meanings").append(make("dt", key), make("dd", data.meanings[key]));
state.layer = Math.max(0, fromAddress());
showProbe();
followTheme(() => {
  showLayer();
  showOverview();
});
start(() => {
  state.plots = true;
  showLayer();
  showOverview();
  for (const id of ["depth", "transfer", "training"]) {
    get(id).on?.("plotly_click", ({ points: [point] }) => {
      if (point.customdata !== undefined) open(point.customdata);
    });
  }
});
