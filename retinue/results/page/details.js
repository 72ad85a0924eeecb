// Shows an entry in a dialog: its runs, and the result, curves, config and commands of the chosen run.

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
        .find((curve) => curve === quantity || curve === `val/${quantity}`);
      return [name, element("div", { class: "chart" })];
    })
    .filter(([name]) => name && entry.runs.some((run) => run.curves[name]));
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
            ...entry.runs.map(({ seed, status }, i) =>
              element("option", { selected: i === chosen }, `seed ${seed ?? "unknown"}: ${status}`),
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
            run.reason ??
              (run.status === "running"
                ? "The run has no result yet; a process trains it."
                : "The run has no result yet; the command resumes it."),
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
            ...charts.map(([name, container]) =>
              element("div", {}, element("div", { class: "muted" }, heading(curveColumn(name))), container),
            ),
          ),
        )
      : []),
    ...(run.pictures.length
      ? section(
          "What the net looks at",
          ...run.pictures.map(({ title, command, src }) =>
            element(
              "figure",
              {},
              element("figcaption", {}, title),
              element("img", { src, alt: title }),
              element("div", { class: "command" }, element("pre", {}, command), copyButton(command)),
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
  for (const [name, container] of charts) {
    drawCurves(container, curvesOf([entry], name), { ...CURVE_AXES, height: 220 });
  }
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
