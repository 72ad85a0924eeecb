// Speed of the models of benchmark_models.py: throughput against the batch size, and a table.

const SPEED_COLUMNS = [
  ["images_per_s", "Inference, images/s"],
  ["training_images_per_s", "Training, images/s"],
  ["latency_ms", "Latency, ms"],
  ["latency_p99_ms", "99th percentile, ms"],
  ["forward", "Forward, ms"],
  ["backward", "Backward, ms"],
  ["optimizer", "Optimizer, ms"],
  ["joules_per_image", "Energy, J/image"],
  ["peak_mb", "Memory, MB"],
];
const THROUGHPUTS = { throughput: "inference", training_throughput: "training" };

function startSpeed() {
  $("throughput").addEventListener("change", drawSpeed);
  showSpeed();
}

function showSpeed() {
  $("speed-card").hidden = !data.speed.length;
  const measured = Object.keys(THROUGHPUTS).filter((name) => data.speed.some((model) => model[name]));
  const texts = measured.map((name) => THROUGHPUTS[name]);
  fillSelect($("throughput"), measured, texts, $("throughput").value || measured[0]);
  $("throughput-part").hidden = !measured.length;
  drawSpeed();
}

function drawSpeed() {
  if (!data.speed.length) return;
  const conditions = [...new Set(data.speed.map((model) => model.conditions))];
  const name = (model) => (conditions.length > 1 ? `${model.name} (${model.conditions})` : model.name);
  $("speed-conditions").textContent = conditions.length > 1 ? "" : conditions[0];
  const lines = data.speed.flatMap((model, index) =>
    model[$("throughput").value]
      ? [{ points: model[$("throughput").value], name: name(model), index, entry: `speed of ${name(model)}` }]
      : [],
  );
  if (lines.length)
    drawCurves($("speed"), lines, { xTitle: "batch size", formatY: formatNumber, height: 330, mayBeLog: true });
  const cell = (model, column) => model[column] ?? model.parts?.[column];
  const used = SPEED_COLUMNS.filter(([column]) => data.speed.some((model) => cell(model, column) !== undefined));
  $("speed-table").tHead.replaceChildren(
    element("tr", {}, ...["Net", ...used.map((pair) => pair[1])].map((text) => element("th", { scope: "col" }, text))),
  );
  $("speed-table").tBodies[0].replaceChildren(
    ...data.speed.map((model, index) =>
      element(
        "tr",
        {},
        element(
          "td",
          {},
          element("div", { class: "name" }, swatch({ index }), element("span", {}, ...breakable(name(model)))),
        ),
        ...used.map(([column]) => {
          const number = cell(model, column);
          return element("td", {}, number === undefined ? "" : formatNumber(number));
        }),
      ),
    ),
  );
}
