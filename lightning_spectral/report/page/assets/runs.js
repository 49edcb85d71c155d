// The page of several runs: its state, its tables, and what a reader can do.

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
