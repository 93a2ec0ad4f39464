// Without this the page shows the same: charts with their last values, pictures in a strip.

for (const film of document.querySelectorAll(".film")) {
  const frames = [...film.querySelectorAll("figure")];
  if (frames.length < 2) continue;
  film.classList.add("live");
  const bar = document.createElement("div");
  bar.className = "control";
  bar.innerHTML =
    '<button type="button">Play</button><input type="range" min="0" aria-label="train step"><output></output>';
  const [button, range, output] = bar.children;
  range.max = frames.length - 1;
  film.append(bar);
  const show = (i) => {
    frames.forEach((frame, k) => frame.classList.toggle("on", k === i));
    range.value = i;
    output.textContent = "train step " + frames[i].dataset.step;
  };
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  };
  range.oninput = () => {
    stop();
    show(+range.value);
  };
  button.onclick = () => {
    if (timer) return stop();
    button.textContent = "Pause";
    let i = +range.value >= frames.length - 1 ? -1 : +range.value;
    const next = () => {
      show(++i);
      if (i >= frames.length - 1) stop();
    };
    timer = setInterval(next, 600);
    next();
  };
  show(frames.length - 1);
}

const short = (v) => {
  const size = Math.abs(v);
  return size >= 1e6
    ? (v / 1e6).toPrecision(3) + "M"
    : size >= 1e4
      ? (v / 1e3).toPrecision(4) + "k"
      : String(+v.toPrecision(4));
};

for (const svg of document.querySelectorAll(".chart > svg")) {
  const series = JSON.parse(svg.dataset.probe);
  const mark = svg.querySelector(".probe");
  const values = [...svg.closest("figure").querySelectorAll("b[data-latest]")];
  const remark = svg.nextElementSibling;
  const rest = remark.innerHTML;
  const closest = (points, x) => points.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a));
  svg.onpointerleave = () => {
    mark.innerHTML = "";
    remark.innerHTML = rest;
    values.forEach((value) => (value.textContent = value.dataset.latest));
  };
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
    const hits = series.map((points) => closest(points, x));
    const first = closest(hits, x);
    mark.innerHTML =
      `<line x1="${first[2]}" x2="${first[2]}" y1="12" y2="220"/>` +
      hits.map((hit) => `<circle cx="${hit[2]}" cy="${hit[3]}" r="4"/>`).join("");
    hits.forEach((hit, i) => (values[i].textContent = short(hit[1])));
    remark.textContent = "train step " + first[0].toLocaleString("en");
  };
}
