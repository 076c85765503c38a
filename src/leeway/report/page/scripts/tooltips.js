// The tooltip, and the keyboard's way through a chart: a Tab stop for its legend and one for its marks, arrow keys inside.

const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const own = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
  const above = y - own.height - 12;
  tip.style.left = `${Math.max(4, Math.min(x - own.width / 2, width - own.width - 4)) + scrollX}px`;
  tip.style.top = `${(above > 0 ? above : y + 16) + scrollY}px`;
}

function hideTip() { tip.hidden = true; }

function keyboardNavigation(holder) {
  const marks = [...holder.querySelectorAll('[role="graphics-symbol"][aria-label]')].filter((m) => !/axis|legend|title|header/.test(m.getAttribute("aria-roledescription")));
  marks.forEach((mark, n) => mark.setAttribute("tabindex", n ? "-1" : "0"));
  // marks without data leave a container without a name
  for (const group of holder.querySelectorAll('g[role="graphics-symbol"]')) group.ariaHidden = group.childElementCount ? null : "true";
  if (!drawn.get(holder).toggles) return;
  for (const legend of holder.querySelectorAll('[aria-roledescription="legend"]')) legend.setAttribute("role", "group"); // a symbol hides its children
  const entries = [...holder.querySelectorAll(".role-legend-label text")];
  entries.forEach((entry, n) => {
    entry.setAttribute("role", "button");
    entry.setAttribute("aria-label", `Single out ${entry.textContent}`);
    entry.setAttribute("aria-pressed", String(holder.dataset.only === entry.textContent));
    entry.setAttribute("tabindex", n ? "-1" : "0");
  });
}

/** Single out a legend's entry as a click does; a second time, show all again. */
function pressLegend(entry) {
  const holder = entry.closest(".chart"), again = holder.dataset.only === entry.textContent;
  const target = again ? holder.querySelector("svg") : entry; // a click beside every mark shows all again
  target.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  holder.dataset.only = again ? "" : entry.textContent;
  for (const one of holder.querySelectorAll('[role="button"]')) one.setAttribute("aria-pressed", String(one === entry && !again));
}

function tooltips() {
  const onMark = (event) => event.target.closest && event.target.closest('.chart [role="graphics-symbol"][tabindex]');
  const onEntry = (event) => event.target.closest && event.target.closest('.chart [role="button"]');
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
    const one = onMark(event) || onEntry(event), steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (!one) return;
    if (onEntry(event) && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); pressLegend(one); return; }
    if (!(event.key in steps || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    const all = [...one.closest(".chart").querySelectorAll(`[role="${one.getAttribute("role")}"][tabindex]`)];
    const next = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : (all.indexOf(one) + steps[event.key] + all.length) % all.length;
    one.setAttribute("tabindex", "-1");
    all[next].setAttribute("tabindex", "0");
    all[next].focus();
  });
  document.addEventListener("focusin", (event) => {
    const mark = onMark(event);
    if (!mark) return hideTip();
    const box = mark.getBoundingClientRect();
    showTip(mark.getAttribute("aria-label"), box.left + box.width / 2, box.top);
  });
}
