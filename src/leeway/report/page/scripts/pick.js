// Which objectives, budgets and attacks the figures and tables show; which budget the decision is about.

function pick() {
  const form = document.getElementById("pick");
  const sets = [...form.querySelectorAll("fieldset")].map((f) => ({ by: f.dataset.by, title: f.querySelector("legend").textContent.toLowerCase(), boxes: [...f.querySelectorAll("input")] }));
  const scope = document.getElementById("evidence");
  const apply = () => {
    const wanted = sets.map((s) => ({ by: s.by, known: new Set(s.boxes.map((b) => b.value)), on: new Set(s.boxes.filter((b) => b.checked).map((b) => b.value)) }));
    const out = (element) => wanted.some((w) => { const v = element.dataset[w.by]; return v !== undefined && w.known.has(v) && !w.on.has(v); });
    for (const element of scope.querySelectorAll("svg [data-line], svg [data-budget], svg [data-attack]")) element.classList.toggle("out", out(element));
    let rows = 0, shown = 0;
    for (const row of scope.querySelectorAll("tr[data-line], tr[data-budget]")) {
      row.hidden = out(row);
      if (!row.classList.contains("remark")) { rows += 1; shown += row.hidden ? 0 : 1; }
    }
    for (const card of document.querySelectorAll(".card svg")) first(card);
    const parts = wanted.map((w, n) => (w.on.size < w.known.size ? `${w.on.size} of ${w.known.size} ${sets[n].title}` : "")).filter(Boolean);
    document.getElementById("picked").textContent = parts.length ? `${parts.join(", ")} (${counted(shown)} of ${counted(rows)} table rows)` : "everything";
  };
  form.addEventListener("change", apply);
  form.addEventListener("submit", (e) => e.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
}

/** The Tab key finds a mark that is shown. */
function first(svg) {
  const marks = [...svg.querySelectorAll(".mark")];
  const now = marks.find((m) => m.getAttribute("tabindex") === "0");
  if (!now || !now.closest(".out")) return;
  const next = marks.find((m) => !m.closest(".out"));
  if (next) for (const mark of marks) mark.setAttribute("tabindex", mark === next ? "0" : "-1");
}

function budgets() {
  const picker = document.getElementById("budget-picker");
  if (!picker) return;
  const apply = () => {
    const value = picker.querySelector("input:checked").value;
    for (const part of document.querySelectorAll("[data-at]")) part.hidden = part.dataset.at !== value;
  };
  picker.addEventListener("change", apply);
  apply();
}
