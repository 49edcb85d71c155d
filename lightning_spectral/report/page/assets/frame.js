// What both pages have: elements, lists, the theme, and plotly.js.

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
