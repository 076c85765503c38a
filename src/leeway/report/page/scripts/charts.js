// Draw each chart from its Vega-Lite specification: at its width, in the theme's colours, with what the filter shows.

const shown = {}; // parameter of the specifications -> value: lines, budgets, attacks, budget
const drawn = new Map(); // holder -> { view, width }
const PRINT_WIDTH = 680; // of A4 and Letter between usual margins, in CSS pixels
const DARK = JSON.parse(document.getElementById("dark-colours").textContent);

function charts() {
  const holders = [...document.querySelectorAll(".chart")];
  // drawn when first near the screen: the page appears at once, and a chart in closed details has no width before
  const near = new IntersectionObserver((entries) => {
    for (const e of entries) if (e.isIntersecting) draw(e.target);
  }, { rootMargin: "400px" });
  const size = new ResizeObserver((entries) => {
    for (const { target } of entries) if (drawn.has(target) && drawn.get(target).width !== target.clientWidth && target.clientWidth) draw(target);
  });
  for (const holder of holders) {
    near.observe(holder); size.observe(holder); numbers(holder);
    holder.addEventListener("change", () => { // a chart's own picker draws other marks
      const details = holder.parentElement.querySelector("details.numbers");
      details.open = false;
      details.querySelector("tbody").replaceChildren();
      drawn.get(holder).view.runAsync().then(() => keyboardNavigation(holder));
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("change", redraw);
}

function redraw() { for (const holder of drawn.keys()) draw(holder); }

/** Draw every chart as wide as a printed page; nothing may be left to a later task, which printing does not wait for. */
function drawForPrint() {
  for (const holder of document.querySelectorAll(".chart")) draw(holder, PRINT_WIDTH).run();
}

/** Set parameters of all charts: those that are drawn are laid out again, the others follow when they are drawn. */
function setParameters(values) {
  Object.assign(shown, values);
  for (const [holder, { view, names }] of drawn) {
    let changed = false;
    for (const [name, value] of Object.entries(values)) if (names.has(name)) { view.signal(name, value); changed = true; }
    if (changed) view.runAsync().then(() => keyboardNavigation(holder));
  }
}

function specification(holder) { return document.getElementById(`spec-${holder.dataset.chart}`).textContent; }

/** Draw a chart and return its view. */
function draw(holder, width = holder.clientWidth || 640) {
  const last = drawn.get(holder);
  const styles = getComputedStyle(document.documentElement), colour = (name) => styles.getPropertyValue(`--${name}`).trim();
  const isDark = styles.colorScheme === "dark";
  const text = isDark ? specification(holder).replace(/#[0-9A-Fa-f]{6}/g, (c) => DARK[c.toLowerCase()] || c) : specification(holder);
  const spec = fit(JSON.parse(text), width);
  for (const p of spec.params || []) {
    if (p.name in shown) p.value = shown[p.name];
    else if (p.bind && last) p.value = last.view.signal(p.name); // the chart's own picker
  }
  if (last) last.view.finalize();
  spec.config = config(colour, width, longestLabel(spec));
  const compiled = vegaLite.compile(spec).spec, sets = compiled.data.map((d) => d.name);
  const view = new vega.View(vega.parse(compiled, null, { ast: true }), {
    expr: vega.expressionInterpreter, renderer: "svg", container: holder, hover: true, logLevel: vega.Error,
  });
  view.tooltip((_, event, item, value) => (value ? showTip(value, event.clientX, event.clientY) : hideTip()));
  view.addEventListener("click", (event, item) => { if (item && item.tooltip) showTip(item.tooltip, event.clientX, event.clientY); });
  const toggles = text.includes('"bind":"legend"');
  drawn.set(holder, { view, width, sets, toggles, names: new Set((spec.params || []).map((p) => p.name)) });
  holder.dataset.only = "";
  view.runAsync().then(() => {
    const svg = holder.querySelector("svg");
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-labelledby", `title-${holder.dataset.chart}`);
    svg.setAttribute("aria-description", spec.description);
    keyboardNavigation(holder);
  });
  return view;
}

/** Set a chart's width, or the number and the width of its panels. */
function fit(spec, width) {
  const panels = spec.usermeta && spec.usermeta.panels;
  if (!panels && spec.height.step) return { ...spec, width: Math.max(120, width - 116), autosize: { type: "pad" } };
  if (!panels) return { ...spec, width, autosize: { type: "fit-x", contains: "padding" } };
  const rowHeads = spec.usermeta.rows ? 122 : 0, axis = 56, gap = 22;
  const columns = Math.max(1, Math.min(panels, Math.floor(width / spec.usermeta.panel)));
  const each = Math.max(90, Math.floor((width - 8 - rowHeads - columns * (rowHeads ? 0 : axis) - (columns - 1) * gap) / columns));
  const head = (panel) => wrap(panel, each, `bold 13px ${FONT}`);
  for (const datum of spec.data.values) datum.panel = head(datum.panel);
  const sort = spec.facet.sort && spec.facet.sort.map(head);
  const facet = { ...spec.facet, sort, header: { labelExpr: "split(datum.label, '\\n')" } };
  const inner = { ...spec.spec, width: each };
  if (rowHeads && inner.height.step && width < 500) inner.height = { step: Math.min(inner.height.step, 19) }; // a phone's page is long
  return { ...spec, facet, columns, spacing: gap, spec: inner };
}

const FONT = 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const pen = document.createElement("canvas").getContext("2d");

function textWidth(text, font) { pen.font = font; return pen.measureText(text).width; }

/** Break a text into lines of at most `width` pixels, inside a word only where the word alone is wider. */
function wrap(text, width, font) {
  const lines = [];
  for (let word of text.split(" ")) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && textWidth(longer, font) <= width) { lines[lines.length - 1] = longer; continue; }
    lines.push("");
    for (const letter of word) {
      if (lines.at(-1) && textWidth(lines.at(-1) + letter, font) > width) lines.push("");
      lines[lines.length - 1] += letter;
    }
  }
  return lines.join("\n");
}

function longestLabel(spec) {
  return Math.max(0, ...[...new Set(spec.data.values.map((d) => d.label || ""))].map((label) => textWidth(label, `12px ${FONT}`)));
}

function config(colour, width, longest) {
  const column = Math.max(80, longest) + 32; // with the symbol and a gap
  const ink = colour("ink"), soft = colour("soft"), grid = colour("grid"), faint = colour("faint");
  return {
    background: "transparent", font: FONT, padding: 2,
    view: { stroke: null },
    axis: { labelColor: ink, titleColor: soft, gridColor: grid, domainColor: faint, tickColor: faint, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelOverlap: true, labelSeparation: 4 },
    header: { labelColor: ink, labelFontSize: 13, labelFontWeight: "bold", labelAnchor: "start", labelLimit: 0 },
    legend: { orient: "top", direction: "horizontal", columns: Math.max(1, Math.floor(width / column)), labelColor: ink, labelFontSize: 12, symbolSize: 90, symbolOpacity: 1, labelLimit: width - 40, rowPadding: 4 },
    text: { fill: ink }, rule: { color: ink },
  };
}

/** Fill the chart's folded table when it is opened: from its data, or from what the drawn chart computes of it. */
function numbers(holder) {
  const details = holder.parentElement.querySelector("details.numbers");
  details.addEventListener("toggle", () => {
    const body = details.querySelector("tbody"), spec = JSON.parse(specification(holder));
    if (!details.open || body.childElementCount) return;
    if (!(spec.usermeta && spec.usermeta.computed)) return fill(body, spec.data.values);
    if (!drawn.has(holder)) draw(holder);
    const { view, sets } = drawn.get(holder);
    view.runAsync().then(() => { if (!body.childElementCount) fill(body, sets.flatMap((name) => view.data(name))); });
  });
}

function fill(body, data) {
  const seen = new Set();
  for (const { point, reading } of data) {
    if (!point || seen.has(`${point}: ${reading}`)) continue;
    seen.add(`${point}: ${reading}`);
    const row = body.insertRow();
    row.append(make("th", { scope: "row", class: "text" }, point));
    row.append(make("td", { class: "text" }, reading));
  }
}
