let data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
let columns = new Map(data.columns.map((column) => [column.name, column]));
const MAX_CURVES = 60,
  MAX_LEGEND_ENTRIES = 24;
const state = { set: 0, view: "groups", filter: "", sort: null, descending: true, x: null, y: null, curve: null };
// The rows that the table and the charts show: {name, index, group, runs, stats: {column: [mean, ci]}}.
let entries = [];

// Formats a figure for people: fractions in %, counts in M or G.
function format(name, value, digits = null) {
  if (value === null || value === undefined) return "";
  const column = columns.get(name) ?? curveColumn(name),
    scaled = value / column.scale;
  if (digits === null)
    digits = column.unit
      ? 2
      : Math.abs(scaled) >= 1000 || Number.isInteger(scaled)
        ? 0
        : Math.abs(scaled) >= 10
          ? 1
          : 3;
  return scaled.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const curveColumn = (name) => data.curveColumns.find((column) => column.name === name) ?? { unit: "", scale: 1 };
const heading = (column) => (column.unit ? `${column.heading} (${column.unit})` : column.heading);
const formatNumber = (number) => number.toLocaleString("en", { maximumSignificantDigits: 4 });

function update() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const groups = data.groups.filter((group) => group.set === data.sets[state.set]);
  const everything = groups.flatMap((group, index) => {
    if (state.view === "groups") return [{ name: group.name, index, group, runs: group.runs, stats: group.stats }];
    return group.runs.map((run) => ({
      name: `${group.name}, seed ${run.seed ?? "unknown"}`,
      index,
      group,
      runs: [run],
      stats: Object.fromEntries(Object.entries(run.values).map(([name, value]) => [name, [value, null]])),
    }));
  });
  entries = everything.filter((entry) => {
    const text = [
      entry.name,
      ...Object.entries(entry.group.key).map((pair) => pair.join("=")),
      ...entry.runs.flatMap((run) => [run.status, run.folder]),
    ];
    return words.every((word) => text.join("\n").toLowerCase().includes(word));
  });
  $("shown").textContent = `${entries.length} of ${everything.length} rows`;
  drawTable();
  drawLegend();
  drawCharts();
}

function drawLegend() {
  const few = entries.length <= MAX_LEGEND_ENTRIES ? entries : [];
  $("legend").replaceChildren(
    ...few.map((entry) => {
      const on = () => light(entry.name),
        off = () => light(null);
      return element(
        "li",
        {},
        element(
          "button",
          {
            type: "button",
            onclick: () => openDetails(entry),
            onpointerenter: on,
            onpointerleave: off,
            onfocus: on,
            onblur: off,
          },
          swatch(entry),
          entry.name,
        ),
      );
    }),
  );
}

const swatch = (entry) =>
  element("span", { class: "swatch", style: `--colour: ${colour(entry.index)}`, "aria-hidden": "true" });

// Highlights one entry in all charts and in the table; `null` removes the highlight.
function light(name) {
  for (const picture of document.querySelectorAll(".charts svg")) picture.classList.toggle("dim", name !== null);
  for (const node of document.querySelectorAll("[data-entry]"))
    node.classList.toggle("lit", node.dataset.entry === name);
}

function drawCharts() {
  const y = columns.get(state.y),
    x = columns.get(state.x);
  if (!x || !y) empty($("costs"), "No run is finished.");
  else {
    const points = entries
      .filter((entry) => entry.stats[x.name] && entry.stats[y.name])
      .map((entry) => {
        const [mean, ci] = entry.stats[y.name],
          cost = entry.stats[x.name][0];
        const line = (column, shown) => `${column.heading} ${shown} ${column.unit}`.trim();
        const text = [entry.name, line(y, value(y.name, [mean, ci])), line(x, format(x.name, cost))].join("\n");
        return { x: cost, y: mean, ci, name: entry.name, index: entry.index, text, open: () => openDetails(entry) };
      });
    // The scales get the numbers that are shown, so that ticks are round in %, M and G.
    for (const p of points) [p.x, p.y, p.ci] = [p.x / x.scale, p.y / y.scale, p.ci && p.ci / y.scale];
    drawCosts($("costs"), points, {
      xTitle: heading(x),
      formatX: formatNumber,
      formatY: formatNumber,
      lowerIsBetter: y.lowerIsBetter,
      bounds: y.unit === "%" ? [0, 100] : [-Infinity, Infinity],
    });
  }
  drawRobustness();
  const lines = curvesOf(entries, state.curve);
  drawCurves($("curves"), lines.slice(0, MAX_CURVES), CURVE_AXES);
  $("curves-note").textContent =
    lines.length > MAX_CURVES
      ? `${MAX_CURVES} of ${lines.length} runs are drawn; the filter chooses others.`
      : "Each line is a run; runs of one colour differ in the seed only.";
}

// Draws the figures of the panels of robustness, if any row has them.
function drawRobustness() {
  const axes = data.columns.filter(
    (column) => column.name.startsWith("test/robust_") && entries.some((entry) => entry.stats[column.name]),
  );
  $("radar-card").hidden = !axes.length;
  if (!axes.length) return;
  const rows = entries.filter((entry) => axes.some((column) => entry.stats[column.name]));
  drawRadar(
    $("radar"),
    ["top1", ...axes.map((column) => column.heading.replace("robust_", ""))],
    rows.map((entry) => ({
      name: entry.name,
      index: entry.index,
      shares: ["test/top1", ...axes.map((column) => column.name)].map((name) => entry.stats[name]?.[0] ?? null),
      open: () => openDetails(entry),
    })),
  );
}

// Returns the curves of this name of all runs of these entries, as `drawCurves` takes them.
function curvesOf(chosenEntries, name) {
  const { scale } = curveColumn(name);
  return chosenEntries.flatMap((entry) =>
    entry.runs
      .filter((run) => run.curves[name])
      .map((run) => ({
        points: run.curves[name].map(([at, number]) => [at, number / scale]),
        index: entry.index,
        entry: entry.name,
        name: state.view === "groups" ? `${entry.name}, seed ${run.seed ?? "unknown"}` : entry.name,
      })),
  );
}

const CURVE_AXES = { xTitle: "epoch", formatY: formatNumber };

function value(name, stat) {
  if (!stat) return "";
  return stat[1] === null || (stat[1] === 0 && columns.get(name).unit !== "%")
    ? format(name, stat[0])
    : `${format(name, stat[0])} ± ${format(name, stat[1])}`;
}

function drawTable() {
  const used = data.columns.filter((column) => entries.some((entry) => entry.stats[column.name]));
  const head = (name, text) =>
    element(
      "th",
      { scope: "col", "aria-sort": state.sort === name ? (state.descending ? "descending" : "ascending") : null },
      element("button", { type: "button", "data-sort": name, onclick: () => sortBy(name) }, text),
    );
  const differences = data.baseline && state.view === "groups";
  const top = Object.fromEntries(
    used.map((column) => {
      const means = entries.filter((entry) => entry.stats[column.name]).map((entry) => entry.stats[column.name][0]);
      return [
        column.name,
        column.figure && new Set(means).size > 1 ? Math[column.lowerIsBetter ? "min" : "max"](...means) : null,
      ];
    }),
  );
  $("table").tHead.replaceChildren(
    element(
      "tr",
      {},
      head("name", "Net"),
      head("runs", state.view === "groups" ? "Runs" : "Status"),
      ...used.map((column) => head(column.name, heading(column))),
      ...(differences ? [element("th", { scope: "col" }, `Difference to ${data.baseline}`)] : []),
    ),
  );
  $("table").tBodies[0].replaceChildren(
    ...sorted().map((entry) =>
      element(
        "tr",
        { "data-entry": entry.name, onclick: () => openDetails(entry) },
        element(
          "td",
          {},
          element(
            "div",
            { class: "name" },
            swatch(entry),
            element("button", { type: "button", class: "open" }, ...breakable(entry.name)),
          ),
        ),
        element("td", {}, ...status(entry.runs)),
        ...used.map((column) => {
          const stat = entry.stats[column.name];
          if (!stat) return element("td", {}, "");
          const [mean, ...rest] = value(column.name, stat).split(" ± ");
          return element(
            "td",
            { class: stat[0] === top[column.name] ? "top" : null },
            mean,
            rest.length ? element("small", {}, ` ± ${rest[0]}`) : "",
          );
        }),
        ...(differences ? [element("td", {}, entry.group.difference)] : []),
      ),
    ),
  );
}

// Returns the text with places for a line break after each _ and =.
const breakable = (text) => text.split(/(?<=[_=])/).flatMap((part, i) => (i ? [element("wbr"), part] : [part]));

const COLOURS = { running: "live", failed: "bad", stopped: "wait", unreadable: "bad" };

// Returns the status of a run, and how far it has come if it is running.
function describeStatus(run) {
  const epoch = Math.max(0, ...Object.values(run.curves).map((points) => points.at(-1)[0]));
  return run.status === "running" && run.epochs ? `running, epoch ${formatNumber(epoch)} of ${run.epochs}` : run.status;
}

function status(runs) {
  if (state.view === "runs") return [element("span", { class: COLOURS[runs[0].status] ?? null }, describeStatus(runs[0]))];
  const finished = runs.filter((run) => run.status === "finished").length;
  const others = Object.keys(COLOURS)
    .map((name) => [name, runs.filter((run) => run.status === name).length])
    .filter((pair) => pair[1]);
  return [
    String(finished),
    ...others.map(([name, count]) => element("span", { class: COLOURS[name] }, ` + ${count} ${name}`)),
  ];
}

function sorted() {
  const key = (entry) =>
    state.sort === "name"
      ? entry.name
      : state.sort === "runs"
        ? entry.runs.filter((run) => run.status === "finished").length
        : entry.stats[state.sort]?.[0];
  const sign = state.descending ? -1 : 1;
  return [...entries].sort((a, b) => {
    const [keyA, keyB] = [key(a), key(b)];
    // Entries without a value come last in both directions.
    if (keyA === undefined || keyB === undefined) return (keyA === undefined) - (keyB === undefined);
    return sign * (typeof keyA === "string" ? keyA.localeCompare(keyB, "en", { numeric: true }) : keyA - keyB);
  });
}

function sortBy(name) {
  state.descending = state.sort === name ? !state.descending : name !== "name" && !columns.get(name)?.lowerIsBetter;
  state.sort = name;
  drawTable();
  document.querySelector(`[data-sort="${CSS.escape(name)}"]`).focus();
}

const dark = () =>
  (document.documentElement.dataset.theme ??
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function showTheme() {
  $("theme").textContent = dark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-pressed", dark());
}

function fillSelect(select, names, texts, chosen) {
  select.replaceChildren(
    ...names.map((name, i) => element("option", { value: name, selected: name === chosen }, texts[i])),
  );
}

function showCounts() {
  const counts = Object.entries(data.counts)
    .map(([name, count]) => `${count} ${name}`)
    .join(", ");
  $("counts").textContent = `${data.folder}: ${counts}. ${data.made}`;
}

function fillSets() {
  fillSelect(
    $("set"),
    data.sets.map((_, i) => i),
    data.sets,
    state.set,
  );
  $("set-field").hidden = data.sets.length < 2;
}

function start() {
  showCounts();
  fillSets();
  $("set").addEventListener("change", (event) => {
    state.set = Number(event.target.value);
    fillMenus();
    update();
  });
  $("filter").addEventListener("input", (event) => {
    state.filter = event.target.value;
    update();
  });
  for (const input of document.getElementsByName("view"))
    input.addEventListener("change", () => {
      state.view = input.value;
      update();
    });
  $("y").addEventListener("change", (event) => {
    state.y = event.target.value;
    drawCharts();
  });
  $("curve").addEventListener("change", (event) => {
    state.curve = event.target.value;
    drawCharts();
  });
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    showTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  $("details").addEventListener("click", (event) => {
    if (event.target === $("details")) $("details").close();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      drawCharts();
      drawSpeed();
    }
  });
  showTheme();
  fillMenus();
  update();
  startSpeed();
}

// Fills the menus with the figures, costs and curves that the runs on the chosen data set have.
function fillMenus() {
  const groups = data.groups.filter((group) => group.set === data.sets[state.set]);
  const measured = data.columns.filter((column) => groups.some((group) => group.stats[column.name]));
  const figures = measured.filter((column) => column.figure),
    costs = measured.filter((column) => column.cost);
  const curves = data.curveColumns.filter((column) =>
    groups.some((group) => group.runs.some((run) => run.curves[column.name])),
  );
  const keep = (offered, name) => (offered.some((column) => column.name === name) ? name : offered[0]?.name);
  [state.y, state.x, state.curve] = [keep(figures, state.y), keep(costs, state.x), keep(curves, state.curve)];
  if (!state.sort) {
    state.sort = state.y ?? "name";
    state.descending = Boolean(state.y) && !columns.get(state.y).lowerIsBetter;
  }
  fillSelect(
    $("y"),
    figures.map((column) => column.name),
    figures.map(heading),
    state.y,
  );
  fillSelect(
    $("curve"),
    curves.map((column) => column.name),
    curves.map(heading),
    state.curve,
  );
  $("x").replaceChildren(
    ...costs.map((column) =>
      element(
        "label",
        {},
        element("input", {
          type: "radio",
          name: "x",
          value: column.name,
          checked: column.name === state.x,
          onchange: () => {
            state.x = column.name;
            drawCharts();
          },
        }),
        element("span", {}, column.heading),
      ),
    ),
  );
}

start();
