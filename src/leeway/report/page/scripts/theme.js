// Light, dark or system theme, stored if the browser allows storage for local files.

function theme() {
  const choice = document.getElementById("theme");
  const save = (value) => { try { localStorage.setItem("leeway-theme", value); } catch { /* storage may be blocked for local files */ } };
  const saved = () => { try { return localStorage.getItem("leeway-theme") || ""; } catch { return ""; } };
  const show = (value) => {
    if (value) document.documentElement.dataset.theme = value;
    else delete document.documentElement.dataset.theme;
  };
  choice.value = ["light", "dark"].includes(saved()) ? saved() : "";
  show(choice.value);
  choice.addEventListener("change", () => { show(choice.value); save(choice.value); });
}
