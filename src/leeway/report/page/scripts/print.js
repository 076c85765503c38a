// On paper every table is open; the folded answers are not.

function print() {
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("#decide details, #evidence details, #rerun details")) {
      if (!fold.open) { fold.open = true; opened.push(fold); }
    }
  });
  addEventListener("afterprint", () => { for (const fold of opened.splice(0)) fold.open = false; });
}
