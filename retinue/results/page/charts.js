"use strict";
// Charts as inline SVG. Text from a run is always set as text and never parsed as HTML.

function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Returns a function from values to pixels, with round `ticks`. The scale is logarithmic if `mayBeLog` holds and the
// values span more than a factor of 20. `space` is the distance of linear ticks in pixels.
function makeScale(values, from, to, mayBeLog, space) {
  let low = Math.min(...values),
    high = Math.max(...values);
  const log = mayBeLog && low > 0 && high / low > 20;
  const transform = log ? Math.log10 : (value) => value;
  [low, high] = [transform(low), transform(high)];
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  [low, high] = [low - margin, high + margin];
  const scale = (value) => from + ((transform(value) - low) / (high - low)) * (to - from);
  scale.ticks = log ? logTicks(low, high) : linearTicks(low, high, Math.max(2, Math.abs(to - from) / space));
  return scale;
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const factors = high - low > 2.5 ? [1] : [1, 2, 5],
    ticks = [];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (Math.log10(tick) >= low && Math.log10(tick) <= high) ticks.push(tick);
    }
  }
  return ticks;
}

// Returns an empty chart with axes: its SVG (`picture`), the two scales, and the area of the plot in pixels.
function frame(container, height, xs, ys, xTitle, formatX, formatY, mayBeLog) {
  const width = Math.max(240, container.clientWidth);
  const box = { left: 52, right: width - 14, top: 12, bottom: height - 42 };
  const x = makeScale(xs, box.left, box.right, mayBeLog, 60),
    y = makeScale(ys, box.bottom, box.top, false, 50);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height });
  for (const tick of y.ticks) {
    picture.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
    picture.append(svg("text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, formatY(tick)));
  }
  for (const tick of x.ticks) {
    picture.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 5 }));
    picture.append(svg("text", { x: x(tick), y: box.bottom + 19, "text-anchor": "middle" }, formatX(tick)));
  }
  picture.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  picture.append(svg("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, xTitle));
  return { picture, x, y, box };
}

function empty(container, text) {
  container.replaceChildren(element("div", { class: "empty" }, text));
}

// Shows `text` near a point of the chart in `container`; without text the tooltip is removed.
function tip(container, text, x = 0, y = 0) {
  container.querySelector(".tip")?.remove();
  if (!text) return;
  const node = element("div", { class: "tip", role: "tooltip" }, text);
  container.append(node);
  const left = Math.min(Math.max(0, x - node.offsetWidth / 2), container.clientWidth - node.offsetWidth);
  node.style.left = `${left}px`;
  node.style.top = `${y > node.offsetHeight + 16 ? y - node.offsetHeight - 14 : y + 16}px`;
}

// Returns the points for which no other point has both a lower cost and a better figure, sorted by cost.
function paretoFront(points, lowerIsBetter) {
  const sign = lowerIsBetter ? -1 : 1,
    front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || sign * (b.y - a.y))) {
    if (!front.length || sign * (point.y - front.at(-1).y) > 0) front.push(point);
  }
  return front;
}

// Paths of markers around (0, 0). There are eight colours, so eight nets in turn share a shape.
const SHAPES = [
  "M0-6A6 6 0 1 1 0 6A6 6 0 1 1 0-6Z",
  "M-5.5-5.5H5.5V5.5H-5.5Z",
  "M0-7.5L7.5 0L0 7.5L-7.5 0Z",
  "M0-7L6.8 5H-6.8Z",
];

// Draws quality against cost. Each point is {x, y, ci, name, index, text, open()}: `ci` is half the width of the 95 %
// interval or null, `text` the tooltip.
function drawCosts(container, points, { xTitle, formatX, formatY, lowerIsBetter, bounds }) {
  if (!points.length) return empty(container, "No finished run has both figures.");
  const ys = points.flatMap((p) => (p.ci ? [p.y - p.ci, p.y + p.ci] : [p.y]));
  const values = points.map((p) => p.y),
    spread = Math.max(...values) - Math.min(...values) || Math.abs(values[0]) || 1;
  // The wide interval of a net with two seeds must not compress all points to one line.
  const limits = [
    Math.max(bounds[0], Math.min(...ys), Math.min(...values) - spread),
    Math.min(bounds[1], Math.max(...ys), Math.max(...values) + spread),
  ];
  const { picture, x, y, box } = frame(
    container,
    330,
    points.map((p) => p.x),
    [...values, ...limits],
    xTitle,
    formatX,
    formatY,
    true,
  );
  const front = paretoFront(points, lowerIsBetter);
  picture.append(
    svg("path", {
      class: "front",
      d: front.map((p, i) => (i ? `H${x(p.x)}V${y(p.y)}` : `M${x(p.x)} ${y(p.y)}`)).join(""),
    }),
  );
  const within = (value) => Math.min(box.bottom, Math.max(box.top, y(value)));
  const occupied = points.map((p) => [x(p.x) - 7, x(p.x) + 7, y(p.y) - 7, y(p.y) + 7]);
  for (const p of [...points].sort((a, b) => front.includes(b) - front.includes(a))) {
    const at = [x(p.x), y(p.y)];
    const show = () => tip(container, p.text, ...at),
      hide = () => tip(container, "");
    const mark = svg("g", {
      class: `mark${front.includes(p) ? " best" : ""}`,
      style: `--colour: ${colour(p.index)}`,
      tabindex: 0,
      role: "button",
      "aria-label": p.text.replaceAll("\n", ", "),
      "data-entry": p.name,
      onclick: p.open,
      onpointerenter: show,
      onpointerleave: hide,
      onfocus: show,
      onblur: hide,
      onkeydown: (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          p.open();
        }
        if (event.key === "Escape") hide();
      },
    });
    if (p.ci)
      mark.append(svg("line", { class: "bar", x1: at[0], x2: at[0], y1: within(p.y - p.ci), y2: within(p.y + p.ci) }));
    mark.append(svg("circle", { class: "halo", cx: at[0], cy: at[1], r: 15 }));
    mark.append(
      svg("path", {
        class: "shape",
        transform: `translate(${at})`,
        d: SHAPES[Math.floor(p.index / 8) % SHAPES.length],
      }),
    );
    picture.append(mark);
    // Draw the label above or below its point, if it overlaps no point and no other label there.
    const half = Math.min(p.name.length, 32) * 3.5,
      middle = Math.min(Math.max(at[0], box.left + half), box.right - half);
    const area = [-11, 21]
      .map((dy) => [middle - half, middle + half, at[1] + dy - 11, at[1] + dy + 3])
      .find((s) => s[2] > 0 && !occupied.some((t) => s[0] < t[1] && s[1] > t[0] && s[2] < t[3] && s[3] > t[2]));
    if (area && half * 2 < box.right - box.left) {
      occupied.push(area);
      const text = p.name.length > 32 ? `${p.name.slice(0, 31)}…` : p.name;
      picture.append(
        svg(
          "text",
          { class: "label", x: middle, y: area[3] - 3, "text-anchor": "middle", "pointer-events": "none" },
          text,
        ),
      );
    }
  }
  container.replaceChildren(picture);
}

// Draws learning curves. Each line is {points: [[x, y], ...], name, index, entry}.
function drawCurves(container, lines, { xTitle, formatY, height = 372, mayBeLog = false }) {
  if (!lines.length) return empty(container, "No run has such a curve.");
  const all = lines.flatMap((line) => line.points);
  const formatX = (value) => value.toLocaleString("en");
  const { picture, x, y } = frame(
    container,
    height,
    all.map((p) => p[0]),
    all.map((p) => p[1]),
    xTitle,
    formatX,
    formatY,
    mayBeLog,
  );
  const paths = lines.map((line) =>
    svg("path", {
      class: line.points.length > 1 ? "curve" : "curve dot",
      style: `--colour: ${colour(line.index)}`,
      "data-entry": line.entry,
      // The last part has no length: it shows a line of one point as a dot.
      d: `${line.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("")}h0`,
    }),
  );
  picture.append(...paths);
  const leave = () => {
    tip(container, "");
    picture.classList.remove("dim");
    for (const path of paths) path.classList.remove("lit");
  };
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("pointermove", (event) => {
    const edge = picture.getBoundingClientRect(),
      px = event.clientX - edge.left,
      py = event.clientY - edge.top;
    // The nearest point of all lines within 24 pixels: [squared distance, index of the line, point].
    let best = [24 ** 2];
    lines.forEach((line, i) => {
      for (const p of line.points) {
        const distance = (x(p[0]) - px) ** 2 + (y(p[1]) - py) ** 2;
        if (distance < best[0]) best = [distance, i, p];
      }
    });
    leave();
    if (best.length === 1) return;
    const [, i, p] = best;
    picture.classList.add("dim");
    paths[i].classList.add("lit");
    tip(container, `${lines[i].name}\n${formatY(p[1])} at ${xTitle} ${formatX(p[0])}`, x(p[0]), y(p[1]));
  });
  container.replaceChildren(picture);
}

const colour = (index) => `var(--s${index % 8})`;
