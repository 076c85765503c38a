// The tooltip, and the keyboard's way through a chart: one Tab stop, arrow keys move between its marks.

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
}

function tooltips() {
  const onMark = (event) => event.target.closest && event.target.closest('.chart [role="graphics-symbol"]');
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
    const mark = onMark(event), steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (!mark || !(event.key in steps || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    const marks = [...mark.closest(".chart").querySelectorAll('[role="graphics-symbol"][tabindex]')];
    const next = event.key === "Home" ? 0 : event.key === "End" ? marks.length - 1 : (marks.indexOf(mark) + steps[event.key] + marks.length) % marks.length;
    mark.setAttribute("tabindex", "-1");
    marks[next].setAttribute("tabindex", "0");
    marks[next].focus();
  });
  document.addEventListener("focusin", (event) => {
    const mark = onMark(event);
    if (!mark) return hideTip();
    const box = mark.getBoundingClientRect();
    showTip(mark.getAttribute("aria-label"), box.left + box.width / 2, box.top);
  });
}
