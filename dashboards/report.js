// Draws each figure when it comes into view, in the colours the reader prefers, and sorts tables. No library but Plotly.
const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plot")];
const template = () => TEMPLATES[dark.matches ? 1 : 0];

function draw(plot) {
  const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
  const config = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" } };
  return Plotly.newPlot(plot, data, { ...layout, template: template() }, config);
}

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries)
    if (isIntersecting) { seen.unobserve(target); draw(target); }
}, { rootMargin: "600px" });
plots.forEach((plot) => seen.observe(plot));
const drawn = () => plots.filter((plot) => plot.classList.contains("js-plotly-plot"));
dark.addEventListener("change", () => drawn().forEach((plot) => Plotly.relayout(plot, { template: template() })));
addEventListener("beforeprint", () => plots.filter((plot) => !drawn().includes(plot)).forEach(draw));

function value(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) || row.cells[column].className === "t" ? text : number;
}

for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => {
    const heading = button.parentElement, table = heading.closest("table"), column = heading.cellIndex;
    const up = heading.getAttribute("aria-sort") === "descending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (a, b) => {
      const [one, two] = [value(a, column), value(b, column)];
      const sign = typeof one === typeof two ? (one > two) - (one < two) : typeof one === "number" ? 1 : -1;
      return up ? sign : -sign;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  });
