// Draws shares from 0 to 1 on axes from the centre. Each row is {name, index, shares, open()}; a share may be null.
function drawRadar(container, axes, rows) {
  const width = Math.max(240, container.clientWidth),
    height = 372,
    radius = Math.min(width - 160, height - 60) / 2;
  const place = (axis, share) => {
    const angle = (2 * Math.PI * axis) / axes.length;
    return [width / 2 + radius * share * Math.sin(angle), height / 2 - radius * share * Math.cos(angle)];
  };
  const ring = (share) => `M${axes.map((_, axis) => place(axis, share).map((at) => at.toFixed(1)).join(" ")).join("L")}Z`;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height });
  for (const share of [0.25, 0.5, 0.75, 1]) picture.append(svg("path", { class: "grid", fill: "none", d: ring(share) }));
  axes.forEach((name, axis) => {
    const [x, y] = place(axis, 1),
      [labelX, labelY] = place(axis, 1.08),
      side = Math.sign(Math.round(labelX - width / 2));
    picture.append(svg("line", { class: "grid", x1: width / 2, y1: height / 2, x2: x, y2: y }));
    const anchor = side === 0 ? "middle" : side > 0 ? "start" : "end";
    picture.append(svg("text", { x: labelX, y: labelY + 4, "text-anchor": anchor }, name));
  });
  for (const row of rows) {
    const points = row.shares.map((share, axis) => (share === null ? null : place(axis, share))).filter(Boolean);
    const text = [row.name, ...axes.map((name, axis) => `${name} ${percent(row.shares[axis])}`)].join("\n");
    picture.append(
      svg("path", {
        class: "curve",
        style: `--colour: ${colour(row.index)}`,
        "data-entry": row.name,
        d: `M${points.map((at) => at.map((number) => number.toFixed(1)).join(" ")).join("L")}Z`,
        tabindex: 0,
        role: "button",
        "aria-label": text.replaceAll("\n", ", "),
        onclick: row.open,
        onpointerenter: () => tip(container, text, ...points[0]),
        onpointerleave: () => tip(container, ""),
        onfocus: () => tip(container, text, ...points[0]),
        onblur: () => tip(container, ""),
        onkeydown: (event) => {
          if (event.key === "Enter" || event.key === " ") {
            event.preventDefault();
            row.open();
          }
        },
      }),
    );
  }
  container.replaceChildren(picture);
}

const percent = (share) => (share === null ? "not measured" : `${(100 * share).toFixed(1)} %`);
