for (const figure of document.querySelectorAll(".slider")) {
  const images = figure.querySelectorAll("img"), range = figure.querySelector("input");
  const button = figure.querySelector("button"), output = figure.querySelector("output");
  let timer = null;
  const show = k => {
    images.forEach((image, i) => image.hidden = i !== k);
    range.value = k; output.textContent = images[k].dataset.caption;
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  range.addEventListener("input", () => { stop(); show(+range.value); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (+range.value === images.length - 1) show(0);
    button.textContent = "Pause";
    timer = setInterval(() => { +range.value < images.length - 1 ? show(+range.value + 1) : stop(); }, 600);
  });
}
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const series = JSON.parse(svg.dataset.points), box = svg.viewBox.baseVal, make = name => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    element.setAttribute("visibility", "hidden"); return svg.appendChild(element);
  };
  const cursor = make("line"), texts = series.map(() => make("text"));
  cursor.setAttribute("class", "cursor"); cursor.setAttribute("y1", 14); cursor.setAttribute("y2", box.height - 42);
  svg.addEventListener("pointermove", event => {
    const area = svg.getBoundingClientRect(), at = (event.clientX - area.left) / area.width * box.width;
    const near = s => s.x.reduce((best, x, i) => Math.abs(x - at) < Math.abs(s.x[best] - at) ? i : best, 0);
    const x = series[0].x[near(series[0])], left = x > box.width / 2;
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
    series.forEach((s, k) => {
      texts[k].textContent = (series.length > 1 ? s.name + ", " : "") + s.text[near(s)];
      texts[k].setAttribute("x", left ? x - 6 : x + 6); texts[k].setAttribute("y", 26 + 15 * k);
      texts[k].setAttribute("text-anchor", left ? "end" : "start"); texts[k].setAttribute("visibility", "visible");
    });
  });
  svg.addEventListener("pointerleave", () => [cursor, ...texts].forEach(e => e.setAttribute("visibility", "hidden")));
}
