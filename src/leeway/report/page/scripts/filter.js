// Filter figures and tables by objective, budget and attack; choose the budget of the summary.

function filter() {
  const form = document.getElementById("filter");
  const sets = [...form.querySelectorAll("fieldset")].map((f) => ({ by: f.dataset.by, title: f.querySelector("legend").textContent.toLowerCase(), boxes: [...f.querySelectorAll("input")] }));
  const scope = document.getElementById("results");
  const apply = () => {
    const wanted = sets.map((s) => ({ by: s.by, known: new Set(s.boxes.map((b) => b.value)), on: new Set(s.boxes.filter((b) => b.checked).map((b) => b.value)) }));
    const hidden = (element) => wanted.some((w) => { const v = element.dataset[w.by]; return v !== undefined && w.known.has(v) && !w.on.has(v); });
    for (const element of scope.querySelectorAll("svg [data-line], svg [data-budget], svg [data-attack]")) element.classList.toggle("out", hidden(element));
    let rows = 0, shown = 0;
    for (const row of scope.querySelectorAll("tr[data-line], tr[data-budget]")) {
      row.hidden = hidden(row);
      if (!row.classList.contains("remark")) { rows += 1; shown += row.hidden ? 0 : 1; }
    }
    for (const card of document.querySelectorAll(".card svg")) updateTabStop(card);
    const parts = wanted.map((w, n) => (w.on.size < w.known.size ? `${w.on.size} of ${w.known.size} ${sets[n].title}` : "")).filter(Boolean);
    document.getElementById("filter-status").textContent = parts.length ? `${parts.join(", ")} (${formatCount(shown)} of ${formatCount(rows)} table rows)` : "all shown";
  };
  form.addEventListener("change", apply);
  form.addEventListener("submit", (e) => e.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
}

/** Keep the Tab stop of a figure on a visible mark. */
function updateTabStop(svg) {
  const marks = [...svg.querySelectorAll(".mark")];
  const current = marks.find((m) => m.getAttribute("tabindex") === "0");
  if (!current || !current.closest(".out")) return;
  const next = marks.find((m) => !m.closest(".out"));
  if (next) for (const mark of marks) mark.setAttribute("tabindex", mark === next ? "0" : "-1");
}

function budgetPicker() {
  const picker = document.getElementById("budget-picker");
  if (!picker) return;
  const apply = () => {
    const value = picker.querySelector("input:checked").value;
    for (const part of document.querySelectorAll("[data-at]")) part.hidden = part.dataset.at !== value;
  };
  picker.addEventListener("change", apply);
  apply();
}
