for (const figure of document.querySelectorAll("figure[data-curve]")) {
  const curve = JSON.parse(figure.dataset.curve), svg = figure.querySelector("svg"), out = figure.querySelector("output");
  const to = (value, ends, log) => log ? Math.log(value / ends[0]) / Math.log(ends[1] / ends[0]) : (value - ends[0]) / (ends[1] - ends[0]);
  const size = svg.viewBox.baseVal, [left, top, right, bottom] = curve.box;
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  mark.setAttribute("r", 4);
  mark.setAttribute("class", "mark");
  svg.append(mark);
  const places = curve.xs.map((x) => left + (right - left) * to(x, curve.x, curve.log[0]));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    let nearest = 0;
    places.forEach((place, index) => { if (Math.abs(place - at) < Math.abs(places[nearest] - at)) nearest = index; });
    const y = curve.ys[nearest];
    if (y === null) return;
    mark.setAttribute("cx", size.width * places[nearest]);
    mark.setAttribute("cy", size.height * (bottom - (bottom - top) * to(y, curve.y, curve.log[1])));
    out.textContent = `${curve.xs[nearest].toPrecision(3)}: ${y.toPrecision(4)}`;
  });
}
