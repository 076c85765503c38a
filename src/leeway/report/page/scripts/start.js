// Show the controls that need JavaScript, and set them up.

for (const part of document.querySelectorAll(".needs-script")) part.classList.remove("needs-script");
theme();
tooltips();
charts();
filter();
budgetPicker();
search();
print();
document.documentElement.dataset.ready = "yes";
