"use strict";
// The images of a sweep: one length at a time, chosen by a slider or the arrow keys, or all.
for (const viewer of document.querySelectorAll(".images")) {
  const [slider, all] = viewer.querySelectorAll("input");
  const stops = [...viewer.querySelectorAll("figure")];
  const show = () => {
    stops.forEach((stop, index) => { stop.hidden = !all.checked && index !== slider.valueAsNumber; });
    slider.disabled = all.checked;
    slider.setAttribute("aria-valuetext", stops[slider.valueAsNumber].textContent.trim());
    viewer.classList.toggle("all", all.checked);
  };
  slider.addEventListener("input", show);
  all.addEventListener("change", show);
  viewer.querySelector(".controls").hidden = false;
  show();
}
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const slider = document.querySelector(".images input[type=range]:not(:disabled)");
  if (!step || !slider || event.target.tagName === "INPUT") return;
  slider.valueAsNumber += step;
  slider.dispatchEvent(new Event("input"));
  event.preventDefault();
});
