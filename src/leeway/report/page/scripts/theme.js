// Light, dark, or as the system has it; kept where the browser lets a file keep something.

function theme() {
  const choice = document.getElementById("theme");
  const keep = (value) => { try { localStorage.setItem("leeway-theme", value); } catch { /* a file may keep nothing */ } };
  const kept = () => { try { return localStorage.getItem("leeway-theme") || ""; } catch { return ""; } };
  const show = (value) => {
    if (value) document.documentElement.dataset.theme = value;
    else delete document.documentElement.dataset.theme;
  };
  choice.value = ["light", "dark"].includes(kept()) ? kept() : "";
  show(choice.value);
  choice.addEventListener("change", () => { show(choice.value); keep(choice.value); });
}
