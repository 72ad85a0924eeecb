// What is known of one entry, in a dialog: its runs, their results, curves, config and commands.

function openDetails(entry, chosen = 0) {
  const dialog = $("details"),
    run = entry.runs[chosen];
  const facts = {
    ...Object.fromEntries(
      Object.entries(run.values).map(([name, number]) => [heading(columns.get(name)), format(name, number)]),
    ),
    ...run.facts,
  };
  const charts = ["loss", data.curveFigure]
    .map((quantity) => {
      const name = data.curveColumns
        .map((column) => column.name)
        .find((each) => each === quantity || each === `val/${quantity}`);
      return [name, element("div", { class: "chart" })];
    })
    .filter(([name]) => name && entry.runs.some((each) => each.curves[name]));
  const section = (title, ...content) => [element("h3", {}, title), ...content];
  dialog.replaceChildren(
    element(
      "div",
      { class: "card-head" },
      element("h2", { id: "details-title" }, entry.name),
      element("button", { type: "button", id: "close", onclick: () => dialog.close() }, "Close"),
    ),
    entry.runs.length > 1
      ? element(
          "label",
          { class: "field" },
          "Run",
          element(
            "select",
            {
              id: "run",
              onchange: (event) => {
                openDetails(entry, event.target.selectedIndex);
                $("run").focus();
              },
            },
            ...entry.runs.map((each, i) =>
              element("option", { selected: i === chosen }, `seed ${each.seed ?? "unknown"}: ${each.status}`),
            ),
          ),
        )
      : null,
    ...(run.status === "finished"
      ? []
      : section(
          run.status[0].toUpperCase() + run.status.slice(1),
          element(
            "pre",
            { class: COLOURS[run.status] },
            run.reason ?? "It has left no result yet; the command goes on with it.",
          ),
        )),
    ...section("Folder", element("div", { style: "overflow-wrap: anywhere" }, run.folder)),
    ...run.commands.flatMap(([title, command]) =>
      section(title, element("div", { class: "command" }, element("pre", {}, command), copyButton(command))),
    ),
    ...(Object.keys(facts).length
      ? section(
          "Result",
          element(
            "dl",
            {},
            ...Object.entries(facts).flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]),
          ),
        )
      : []),
    ...(charts.length
      ? section(
          "Learning curves",
          element(
            "div",
            { class: "pair" },
            ...charts.map(([name, place]) =>
              element("div", {}, element("div", { class: "muted" }, heading(curveColumn(name))), place),
            ),
          ),
        )
      : []),
    ...(entry.group.config
      ? section(
          `Config${run.seed === null ? "" : `, with seed: ${run.seed}`}`,
          element("pre", { tabindex: 0, id: "config" }, entry.group.config),
        )
      : []),
  );
  if (!dialog.open) dialog.showModal();
  for (const [name, place] of charts) drawCurves(place, curvesOf([entry], name), { ...CURVE_AXES, height: 220 });
}

function copyButton(text) {
  return element(
    "button",
    {
      type: "button",
      onclick: async (event) => {
        try {
          await navigator.clipboard.writeText(text);
          event.target.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(event.target.previousSibling);
        }
      },
    },
    "Copy",
  );
}
