// Expand every table for printing; harmful responses stay collapsed.

function print() {
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("#summary details, #evidence details, #audit details, #reproduce details")) {
      if (!details.open) { details.open = true; opened.push(details); }
    }
  });
  addEventListener("afterprint", () => { for (const details of opened.splice(0)) details.open = false; });
}
