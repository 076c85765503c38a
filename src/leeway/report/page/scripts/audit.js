// Reading answers: filters, search, one by one or two checkpoints side by side.

const PAGE = 20;

function audit() {
  const get = (id) => document.getElementById(id);
  const form = get("audit-form"), list = get("audit-list"), count = get("audit-count");
  const state = { table: null, loading: null, found: [], page: 0, turn: 0, item: null, keep: false };
  const value = (id) => (get(id) ? get(id).value : "");
  const mode = () => form.querySelector("input[name=mode]:checked").value;

  async function load() {
    state.loading ||= unpack((n) => { count.textContent = `Unpacking the rows… ${n ? counted(n) : ""}`; });
    state.table = await state.loading;
    return state.table;
  }

  /** Codes that a filter lets through, or null where it lets everything through. */
  function codes(name, wanted, same = (a, b) => a === b) {
    if (!wanted) return null;
    return new Set(state.table.texts[name].flatMap((text, n) => (same(text, wanted) ? [n] : [])));
  }

  async function wordsIn(alive) {
    const words = value("f-text").trim().toLowerCase();
    if (!words) return () => true;
    const { texts, columns } = state.table;
    const prompts = await holding(texts.prompt, words, alive);
    const answers = prompts && await holding(texts.response, words, alive);
    return answers && ((n) => prompts[columns.prompt[n]] === 1 || answers[columns.response[n]] === 1);
  }

  async function search(focus) {
    const turn = (state.turn += 1), alive = () => turn === state.turn;
    const table = await load();
    if (!alive()) return;
    count.textContent = "Searching…";
    const has = await wordsIn(alive);
    if (!has || !alive()) return;
    const kind = (a, b) => a.split(":")[0] === b;
    const sets = [["eval", codes("eval", value("f-eval"))], ["attack", codes("attack", value("f-attack"))], ["judge", codes("judge", value("f-judge"))]].filter(([, s]) => s);
    const verdict = codes("verdict", value("f-verdict"), kind);
    const item = state.item;
    const fits = (n) => sets.every(([name, set]) => set.has(table.columns[name][n])) && (!item || item(n));
    const found = mode() === "two" ? await pairs(fits, verdict, has, alive) : await singles(fits, verdict, has, alive);
    if (!found) return;
    Object.assign(state, { found, page: 0 });
    show(focus);
  }

  async function singles(fits, verdict, has, alive) {
    const { models, columns, rows } = state.table, line = value("f-line"), budget = value("f-budget");
    const who = models.map((m) => (!line || m.line === line) && (!budget || String(m.budget) === budget));
    const found = [];
    const done = await inSlices(rows, (n) => {
      if (who[columns.model[n]] && fits(n) && (!verdict || verdict.has(columns.verdict[n])) && has(n)) found.push([n]);
    }, alive);
    return done ? found : null;
  }

  /** Rows of two models with the same question, attack, sample and judge. */
  async function pairs(fits, verdict, has, alive) {
    const { columns: c, rows } = state.table, left = +value("f-left"), right = +value("f-right");
    const key = (n) => `${c.eval[n]}|${c.attack[n]}|${c.item[n]}|${c.sample[n]}|${c.judge[n]}`;
    const others = new Map(), lefts = [];
    const gathered = await inSlices(rows, (n) => {
      if (!fits(n)) return;
      if (c.model[n] === left) lefts.push(n);
      if (c.model[n] === right) others.set(key(n), n);
    }, alive);
    if (!gathered) return null;
    const differ = get("f-differ").checked, found = [];
    for (const n of lefts) {
      const m = others.get(key(n));
      if (m === undefined || (differ && c.verdict[n] === c.verdict[m])) continue;
      if (verdict && !verdict.has(c.verdict[n]) && !verdict.has(c.verdict[m])) continue;
      if (has(n) || has(m)) found.push([n, m]);
    }
    return found;
  }

  const text = (name, n) => state.table.texts[name][state.table.columns[name][n]] ?? "";
  const model = (n) => state.table.models[state.table.columns.model[n]].name;

  function said(n) {
    const verdict = text("verdict", n), score = state.table.columns.score[n];
    return visible(verdict === "graded" ? `score ${score.toFixed(2)}` : verdict);
  }

  function answer(n) {
    const verdict = text("verdict", n);
    const folded = text("eval", n) === "jailbreak" && !state.table.open.has(verdict);
    const mark = verdict === "harmful" ? "harmful" : folded || verdict.startsWith("unscored") ? "unscored" : "";
    const who = make("div", { class: "who" }, make("bdi", {}, visible(model(n))), make("span", { class: `badge ${mark}` }, said(n)));
    const body = make("div", {});
    if (folded) {
      const fold = make("details", {}, make("summary", {}, `Show the answer (${said(n)})`));
      fold.addEventListener("toggle", () => { if (fold.open && fold.childElementCount === 1) fold.append(block(text("response", n))); });
      body.append(fold);
    } else {
      body.append(block(text("response", n)));
    }
    const raw = text("raw", n);
    if (raw) {
      const more = make("details", { class: "raw" }, make("summary", {}, `What the judge wrote (${visible(text("judge", n))})`));
      more.addEventListener("toggle", () => { if (more.open && more.childElementCount === 1) more.append(block(raw)); });
      body.append(more);
    }
    return make("div", { class: "answer" }, who, body);
  }

  function card(rows, place) {
    const n = rows[0], c = state.table.columns;
    const attack = text("attack", n);
    const named = attack ? [...get("f-attack").options].find((o) => o.value === attack) : null;
    const title = make("h4", { id: `found-${place}` }, `${text("eval", n)}${attack ? `: ${named ? named.textContent : attack}` : ""} `, make("span", { class: "soft" }, "· ", make("bdi", {}, visible(text("item", n)))));
    const same = make("button", { type: "button", class: "more" }, "Every checkpoint on this prompt");
    same.addEventListener("click", () => only(n));
    const prompts = [...new Set(rows.map((r) => c.prompt[r]))];
    const asked = prompts.map((p, k) => make("div", {}, ...(prompts.length > 1 ? [make("p", { class: "soft label" }, `Prompt to ${visible(model(rows[k]))}`)] : []), block(state.table.texts.prompt[p])));
    return make("article", { "aria-labelledby": `found-${place}`, class: rows.length > 1 ? "two" : "" }, title, ...asked, make("div", { class: "answers" }, ...rows.map(answer)), same);
  }

  /** All answers to one prompt, whatever the other filters said. */
  function only(n) {
    const c = state.table.columns, [e, a, i, s] = [c.eval[n], c.attack[n], c.item[n], c.sample[n]];
    state.keep = true; // the prompt, while the other filters are emptied
    form.reset();
    modes();
    state.item = (m) => c.eval[m] === e && c.attack[m] === a && c.item[m] === i && c.sample[m] === s;
    get("chosen").hidden = false;
    get("chosen").firstElementChild.textContent = `Only the prompt ${visible(text("item", n))}.`;
    setTimeout(() => go(true));
  }

  function show(focus) {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE)), from = state.page * PAGE;
    const here = state.found.slice(from, from + PAGE), two = mode() === "two";
    const what = two ? "prompts answered by both" : "answers";
    const total = two ? "" : ` of ${counted(state.table.rows)}`;
    count.textContent = here.length ? `${counted(state.found.length)}${total} ${what}; ${counted(from + 1)} to ${counted(from + here.length)} shown` : `No ${what} fit.`;
    list.hidden = !here.length;
    list.replaceChildren(...here.map((rows, n) => card(rows, from + n)));
    get("audit-pages").hidden = pages < 2;
    get("audit-page").textContent = `page ${counted(state.page + 1)} of ${counted(pages)}`;
    get("previous").disabled = state.page === 0;
    get("next").disabled = state.page === pages - 1;
    if (focus) list.focus();
  }

  function modes() {
    for (const part of form.querySelectorAll("[data-mode]")) part.hidden = part.dataset.mode !== mode();
  }

  const turnTo = (step) => { state.page += step; show(true); list.scrollIntoView({ block: "start" }); };
  const free = () => { state.item = null; get("chosen").hidden = true; };
  const failed = (error) => { count.textContent = `The rows in this page could not be read (${error.message}); rows.parquet has them.`; };
  const go = (focus) => search(focus).catch(failed);
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
