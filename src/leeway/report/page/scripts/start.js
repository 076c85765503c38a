// Everything that works without this page's script works before it; what needs it appears now.

for (const part of document.querySelectorAll(".needs-script")) part.classList.remove("needs-script");
theme();
tips();
pick();
budgets();
audit();
print();
document.documentElement.dataset.ready = "yes";
