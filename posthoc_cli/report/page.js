for (const figure of document.querySelectorAll("figure")) {
  const button = figure.querySelector("button"), out = figure.querySelector("output"), parts = figure.querySelectorAll("[data-curve]");
  button.hidden = false;
  button.addEventListener("click", () => {
    for (const part of parts) part.hidden = !part.hidden;
    button.textContent = button.textContent === "linear" ? "logarithmic" : "linear";
  });
  for (const part of parts) {
    const curve = JSON.parse(part.dataset.curve), svg = part.querySelector("svg");
    const to = (value, ends, log) => log ? Math.log(value / ends[0]) / Math.log(ends[1] / ends[0]) : (value - ends[0]) / (ends[1] - ends[0]);
    const size = svg.viewBox.baseVal, [left, top, right, bottom] = curve.box;
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    mark.setAttribute("r", 4);
    mark.setAttribute("class", "mark");
    const places = curve.xs.map((x) => left + (right - left) * to(x, curve.x, curve.log[0]));
    const read = (event) => {
      const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
      let nearest = 0;
      places.forEach((place, index) => { if (Math.abs(place - at) < Math.abs(places[nearest] - at)) nearest = index; });
      const y = curve.ys[nearest];
      if (y === null) return;
      mark.setAttribute("cx", size.width * places[nearest]);
      mark.setAttribute("cy", size.height * (bottom - (bottom - top) * Math.min(1, Math.max(0, to(y, curve.y, curve.log[1])))));
      svg.append(mark);
      out.textContent = `${curve.words[0]} ${+curve.xs[nearest].toPrecision(4)}: ${y.toPrecision(4)} ${curve.words[1]}`;
    };
    for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, read); // a tap makes no pointermove
  }
}
for (const button of document.querySelectorAll("[data-csv]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    // navigator.clipboard needs an encrypted connection.
    const put = (event) => { event.clipboardData.setData("text/plain", button.dataset.csv); event.preventDefault(); };
    document.addEventListener("copy", put, { once: true });
    if (document.execCommand("copy")) button.textContent = "copied";
  });
}
