// What lacks a name, a caption, a scope, a level of heading.
() => {
  const bad = [];
  const text = (e) => (e.getAttribute("aria-label") || (e.labels && [...e.labels].map(l => l.textContent).join("")) || e.textContent || "").trim();
  for (const e of document.querySelectorAll("input, select, button, a[href], summary")) if (!text(e)) bad.push(e.outerHTML.slice(0, 80));
  for (const e of document.querySelectorAll("svg:not([aria-hidden])")) if (!document.getElementById(e.getAttribute("aria-labelledby"))) bad.push("svg");
  for (const t of document.querySelectorAll("table")) {
    if (!t.caption || !t.caption.textContent.trim()) bad.push("caption");
    if ([...t.querySelectorAll("thead th")].some((h) => h.scope !== "col")) bad.push("col scope");
    if ([...t.querySelectorAll("tbody tr:not(.remark)")].some((r) => r.cells[0].tagName !== "TH" || r.cells[0].scope !== "row")) bad.push("row scope " + t.caption.textContent);
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size !== ids.length) bad.push("ids");
  for (const e of document.querySelectorAll("[aria-labelledby]")) if (!document.getElementById(e.getAttribute("aria-labelledby"))) bad.push(e.id);
  let level = 0;
  for (const h of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const now = +h.tagName[1];
    if (now > level + 1) bad.push(`h${level} to ${h.tagName}: ${h.textContent}`);
    level = now;
  }
  for (const e of ["header", "main", "nav", "footer"]) if (!document.querySelector(e)) bad.push(e);
  return bad;
}
