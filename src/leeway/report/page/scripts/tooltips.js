// Tooltips of figure marks: on hover, on tap, or with the arrow keys.

const REACH = 10; // pixels

function tooltips() {
  const tip = document.getElementById("tip");
  let at = null;
  const hide = () => { tip.hidden = true; if (at) at.classList.remove("at"); at = null; };
  const show = (mark) => {
    if (at) at.classList.remove("at");
    at = mark;
    mark.classList.add("at");
    tip.textContent = mark.dataset.label;
    tip.hidden = false;
    const box = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.max(4, Math.min(box.left + box.width / 2 - own.width / 2, width - own.width - 4));
    const above = box.top - own.height - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 8) + scrollY}px`;
  };
  const of = (event) => (event.target.closest ? event.target.closest(".mark") || nearestMark(event) : null);
  document.addEventListener("pointermove", (e) => {
    const mark = of(e);
    if (mark && mark !== at) show(mark); else if (!mark && at && at !== document.activeElement) hide();
  });
  document.addEventListener("click", (e) => { const mark = of(e); if (mark) show(mark); else hide(); });
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") hide(); });
  document.addEventListener("focusin", (e) => { const mark = of(e); if (mark) show(mark); else hide(); });
  for (const svg of document.querySelectorAll(".card svg")) keyboardNavigation(svg);
}

/** Return the mark closest to the pointer, within REACH. */
function nearestMark(event) {
  const svg = event.target.closest(".card svg");
  if (!svg) return null;
  let best = null, least = REACH * REACH;
  for (const mark of svg.querySelectorAll(".mark")) {
    if (mark.closest(".out")) continue;
    const box = mark.getBoundingClientRect();
    const across = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
    const down = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
    const squared = across * across + down * down;
    if (squared < least) [best, least] = [mark, squared];
  }
  return best;
}

/** Make each figure one Tab stop; arrow keys move between its marks. */
function keyboardNavigation(svg) {
  const marks = [...svg.querySelectorAll(".mark")];
  if (!marks.length) return;
  svg.setAttribute("role", "group");
  marks.forEach((mark, n) => {
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", mark.dataset.label);
    mark.setAttribute("tabindex", n ? "-1" : "0");
  });
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  svg.addEventListener("keydown", (event) => {
    const here = marks.indexOf(event.target.closest(".mark"));
    if (here < 0 || !(event.key in steps || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    const shown = marks.filter((m) => !m.closest(".out"));
    const place = shown.indexOf(marks[here]);
    const next = event.key === "Home" ? 0 : event.key === "End" ? shown.length - 1 : (place + steps[event.key] + shown.length) % shown.length;
    move(marks, shown[next]);
  });
}

function move(marks, to) {
  if (!to) return;
  for (const mark of marks) mark.setAttribute("tabindex", mark === to ? "0" : "-1");
  to.focus();
}
