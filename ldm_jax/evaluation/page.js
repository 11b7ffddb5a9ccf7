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
