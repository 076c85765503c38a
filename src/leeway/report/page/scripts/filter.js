// Filter charts and tables by objective, budget and attack; choose the budget that the finding and the charts show.

function filter() {
  const form = document.getElementById("filter");
  const sets = [...form.querySelectorAll("fieldset[data-by]")].map((f) => ({ by: f.dataset.by, title: f.querySelector("legend").textContent.toLowerCase(), boxes: [...f.querySelectorAll("input")] }));
  const apply = () => {
    const wanted = sets.map((s) => ({ by: s.by, known: new Set(s.boxes.map((b) => b.value)), on: new Set(s.boxes.filter((b) => b.checked).map((b) => b.value)) }));
    const hidden = (element) => wanted.some((w) => { const v = element.dataset[w.by]; return v !== undefined && w.known.has(v) && !w.on.has(v); });
    let rows = 0, left = 0;
    for (const row of document.querySelectorAll("tr[data-line], tr[data-budget]")) {
      row.hidden = hidden(row);
      if (!row.classList.contains("remark")) { rows += 1; left += row.hidden ? 0 : 1; }
    }
    const values = {};
    for (const w of wanted) values[`${w.by}s`] = w.by === "budget" ? [...w.on].map(Number) : [...w.on];
    setParameters(values);
    const parts = wanted.map((w, n) => (w.on.size < w.known.size ? `${w.on.size} of ${w.known.size} ${sets[n].title}` : "")).filter(Boolean);
    document.getElementById("filter-status").textContent = parts.length ? `${parts.join(", ")} (${formatCount(left)} of ${formatCount(rows)} table rows)` : "all shown";
  };
  form.addEventListener("change", (e) => { if (e.target.name !== "budget") apply(); });
  form.addEventListener("submit", (e) => e.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { apply(); chooseBudget(); }));
}

function chooseBudget() {
  const picked = document.querySelector("#budget-picker input:checked");
  if (!picked) return;
  for (const part of document.querySelectorAll("[data-at]")) part.hidden = part.dataset.at !== picked.value;
  setParameters({ budget: Number(picked.value) });
}

function budgetPicker() {
  const picker = document.getElementById("budget-picker");
  if (!picker) return;
  picker.addEventListener("change", chooseBudget);
  chooseBudget(); // a browser may restore the choice of an earlier visit
}
