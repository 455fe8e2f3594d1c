"use strict";
// Beside what averages are compared with, the samples of one length, chosen by a slider or the
// arrow keys; or of all.
const samples = document.querySelector(".samples");
if (samples) {
  const [slider, all] = document.querySelectorAll(".controls input");
  const lengths = [...samples.querySelectorAll("figure.length")];
  const show = () => {
    lengths.forEach((figure, index) => { figure.hidden = !all.checked && index !== slider.valueAsNumber; });
    slider.disabled = all.checked;
    const name = lengths[slider.valueAsNumber].dataset.name;
    slider.setAttribute("aria-valuetext", name);
    slider.nextElementSibling.value = all.checked ? "" : name;
    samples.classList.toggle("all", all.checked);
  };
  slider.addEventListener("input", show);
  all.addEventListener("change", show);
  document.querySelector(".controls").hidden = false;
  show();
  // Without smoothing where a pixel of the image is larger than one of the screen.
  for (const image of samples.querySelectorAll("img")) {
    image.decode().then(() => image.classList.toggle("small", image.naturalWidth < 200), () => {});
  }
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || slider.disabled || event.target.tagName === "INPUT") return;
    slider.valueAsNumber += step;
    show();
    event.preventDefault();
  });
}
