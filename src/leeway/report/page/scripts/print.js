// For printing: unfold the tables, draw the charts in light colours at the page's width; afterwards restore the screen.

function print() {
  const opened = [], root = document.documentElement;
  let theme = null;
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("#summary details, #evidence details, #audit details, #reproduce details")) {
      if (!details.open && !details.classList.contains("numbers")) { details.open = true; opened.push(details); }
    }
    theme = root.dataset.theme;
    root.dataset.theme = "light"; // charts have their colours as literals
    drawForPrint();
  });
  addEventListener("afterprint", () => {
    for (const details of opened.splice(0)) details.open = false;
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    redraw();
  });
}
