// Search and filter responses: single responses, or two checkpoints side by side.

const PAGE = 20;

function search() {
  const get = (id) => document.getElementById(id);
  const form = get("search-form"), list = get("search-list"), count = get("search-count");
  const state = { table: null, loading: null, found: [], page: 0, turn: 0, item: null, keep: false };
  const value = (id) => (get(id) ? get(id).value : "");
  const mode = () => form.querySelector("input[name=mode]:checked").value;

  async function load() {
    state.loading ||= unpack((n) => { count.textContent = `Loading the rows… ${n ? formatCount(n) : ""}`; });
    state.table = await state.loading;
    return state.table;
  }

  /** Return the codes that pass a filter, or null without a filter. */
  function codes(name, wanted, matches = (a, b) => a === b) {
    if (!wanted) return null;
    return new Set(state.table.texts[name].flatMap((text, n) => (matches(text, wanted) ? [n] : [])));
  }

  async function textFilter(alive) {
    const words = value("f-text").trim().toLowerCase();
    if (!words) return () => true;
    const { texts, columns } = state.table;
    const prompts = await containing(texts.prompt, words, alive);
    const answers = prompts && await containing(texts.response, words, alive);
    return answers && ((n) => prompts[columns.prompt[n]] === 1 || answers[columns.response[n]] === 1);
  }

  async function run(focus) {
    const turn = (state.turn += 1), alive = () => turn === state.turn;
    const table = await load();
    if (!alive()) return;
    count.textContent = "Searching…";
    const hasText = await textFilter(alive);
    if (!hasText || !alive()) return;
    const kind = (a, b) => a.split(":")[0] === b;
    const sets = [["eval", codes("eval", value("f-eval"))], ["attack", codes("attack", value("f-attack"))], ["judge", codes("judge", value("f-judge"))]].filter(([, s]) => s);
    const outcome = codes("outcome", value("f-outcome"), kind);
    const item = state.item;
    const fits = (n) => sets.every(([name, set]) => set.has(table.columns[name][n])) && (!item || item(n));
    const found = mode() === "two" ? await pairs(fits, outcome, hasText, alive) : await singles(fits, outcome, hasText, alive);
    if (!found) return;
    Object.assign(state, { found, page: 0 });
    show(focus);
  }

  async function singles(fits, outcome, hasText, alive) {
    const { models, columns, rows } = state.table, line = value("f-line"), budget = value("f-budget");
    const who = models.map((m) => (!line || m.line === line) && (!budget || String(m.budget) === budget));
    const found = [];
    const done = await inSlices(rows, (n) => {
      if (who[columns.model[n]] && fits(n) && (!outcome || outcome.has(columns.outcome[n])) && hasText(n)) found.push([n]);
    }, alive);
    return done ? found : null;
  }

  /** Return pairs of rows of two models with the same item, attack, sample and judge. */
  async function pairs(fits, outcome, hasText, alive) {
    const { columns: c, rows } = state.table, left = +value("f-left"), right = +value("f-right");
    const key = (n) => `${c.eval[n]}|${c.attack[n]}|${c.item[n]}|${c.sample[n]}|${c.judge[n]}`;
    const rightRows = new Map(), leftRows = [];
    const complete = await inSlices(rows, (n) => {
      if (!fits(n)) return;
      if (c.model[n] === left) leftRows.push(n);
      if (c.model[n] === right) rightRows.set(key(n), n);
    }, alive);
    if (!complete) return null;
    const differ = get("f-differ").checked, found = [];
    for (const n of leftRows) {
      const m = rightRows.get(key(n));
      if (m === undefined || (differ && c.outcome[n] === c.outcome[m])) continue;
      if (outcome && !outcome.has(c.outcome[n]) && !outcome.has(c.outcome[m])) continue;
      if (hasText(n) || hasText(m)) found.push([n, m]);
    }
    return found;
  }

  const text = (name, n) => state.table.texts[name][state.table.columns[name][n]] ?? "";
  const model = (n) => state.table.models[state.table.columns.model[n]].name;

  function outcomeLabel(n) {
    const outcome = text("outcome", n), score = state.table.columns.score[n];
    return escapeInvisible(outcome === "graded" ? `score ${score.toFixed(2)}` : outcome);
  }

  function response(n) {
    const outcome = text("outcome", n);
    const collapsed = text("eval", n) === "jailbreak" && !state.table.open.has(outcome);
    const mark = outcome === "harmful" ? "harmful" : collapsed || outcome.startsWith("unscored") ? "unscored" : "";
    const who = make("div", { class: "who" }, make("bdi", {}, escapeInvisible(model(n))), make("span", { class: `badge ${mark}` }, outcomeLabel(n)));
    const body = make("div", {});
    if (collapsed) {
      const details = make("details", {}, make("summary", {}, `Show the response (${outcomeLabel(n)})`));
      details.addEventListener("toggle", () => { if (details.open && details.childElementCount === 1) details.append(block(text("response", n))); });
      body.append(details);
    } else {
      body.append(block(text("response", n)));
    }
    const raw = text("raw", n);
    if (raw) {
      const more = make("details", { class: "raw" }, make("summary", {}, `Judge output (${escapeInvisible(text("judge", n))})`));
      more.addEventListener("toggle", () => { if (more.open && more.childElementCount === 1) more.append(block(raw)); });
      body.append(more);
    }
    return make("div", { class: "answer" }, who, body);
  }

  function card(rows, place) {
    const n = rows[0], c = state.table.columns;
    const attack = text("attack", n);
    const named = (id, value) => { const option = [...get(id).options].find((o) => o.value === value); return option ? option.textContent : value; };
    const title = make("h4", { id: `found-${place}` }, `${named("f-eval", text("eval", n))}${attack ? `: ${named("f-attack", attack)}` : ""} `, make("span", { class: "soft" }, "· ", make("bdi", {}, escapeInvisible(text("item", n)))));
    const all = make("button", { type: "button", class: "more" }, "Show all checkpoints for this prompt");
    all.addEventListener("click", () => only(n));
    const prompts = [...new Set(rows.map((r) => c.prompt[r]))];
    const shown = prompts.map((p, k) => make("div", {}, ...(prompts.length > 1 ? [make("p", { class: "soft label" }, `Prompt to ${escapeInvisible(model(rows[k]))}`)] : []), block(state.table.texts.prompt[p])));
    return make("article", { "aria-labelledby": `found-${place}`, class: rows.length > 1 ? "two" : "" }, title, ...shown, make("div", { class: "answers" }, ...rows.map(response)), all);
  }

  /** Show all responses to one prompt, with the other filters cleared. */
  function only(n) {
    const c = state.table.columns, [e, a, i, s] = [c.eval[n], c.attack[n], c.item[n], c.sample[n]];
    state.keep = true; // keep the prompt while the other filters are cleared
    form.reset();
    modes();
    state.item = (m) => c.eval[m] === e && c.attack[m] === a && c.item[m] === i && c.sample[m] === s;
    get("chosen").hidden = false;
    get("chosen").firstElementChild.textContent = `Prompt: ${escapeInvisible(text("item", n))}.`;
    setTimeout(() => go(true));
  }

  function show(focus) {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE)), from = state.page * PAGE;
    const here = state.found.slice(from, from + PAGE), two = mode() === "two";
    const what = two ? "prompts with both responses" : "responses";
    const total = two ? "" : ` of ${formatCount(state.table.rows)}`;
    count.textContent = here.length ? `${formatCount(state.found.length)}${total} ${what}; showing ${formatCount(from + 1)} to ${formatCount(from + here.length)}` : `No ${what} match.`;
    list.hidden = !here.length;
    list.replaceChildren(...here.map((rows, n) => card(rows, from + n)));
    get("search-pages").hidden = pages < 2;
    get("search-page").textContent = `page ${formatCount(state.page + 1)} of ${formatCount(pages)}`;
    get("previous").disabled = state.page === 0;
    get("next").disabled = state.page === pages - 1;
    if (focus) list.focus();
  }

  function modes() {
    for (const part of form.querySelectorAll("[data-mode]")) part.hidden = part.dataset.mode !== mode();
  }

  const turnTo = (step) => { state.page += step; show(true); list.scrollIntoView({ block: "start" }); };
  const free = () => { state.item = null; get("chosen").hidden = true; };
  const failed = (error) => { count.textContent = `The embedded rows could not be read (${error.message}); see rows.parquet.`; };
  const go = (focus) => run(focus).catch(failed);
  let waiting = 0;
  form.addEventListener("submit", (e) => { e.preventDefault(); go(true); });
  form.addEventListener("change", (e) => { if (e.target.id !== "f-text") { modes(); go(false); } });
  form.addEventListener("input", (e) => { if (e.target.id === "f-text") { clearTimeout(waiting); waiting = setTimeout(() => go(false), 250); } });
  form.addEventListener("reset", () => setTimeout(() => {
    if (state.keep) { state.keep = false; modes(); return; }
    free();
    modes();
    go(false);
  }));
  get("clear-item").addEventListener("click", () => { free(); go(true); });
  get("previous").addEventListener("click", () => turnTo(-1));
  get("next").addEventListener("click", () => turnTo(1));
  const right = get("f-right");
  if (right && right.options.length > 1) right.selectedIndex = right.options.length - 1;
}
