// The page of report.py: plain JavaScript, no library. It loads nothing; tokens enter it as text, never as markup.
//
//   words, numbers, colours    what a token, a number and a weight look like
//   chosen                     the head and the position that are selected: choose() tells every panel
//   strip, grid, chart         what panels are made of: tokens, cells on a canvas, shapes in SVG
//   KINDS                      a function a kind of panel: (data, say) -> {body, rows, picture}
//   selftest                   with #selftest the page uses itself and writes down what it saw
"use strict";

const on = (node, names, listen) => names.split(" ").forEach((name) => node.addEventListener(name, listen));
const root = document.documentElement;
on(window, "error unhandledrejection", (event) => { root.dataset.error = event.message || event.reason; });
on(document, "securitypolicyviolation", (event) => { root.dataset.csp = event.violatedDirective; });

const byId = (name) => document.getElementById(name);
const json = byId("data").textContent, page = JSON.parse(json);
const range = (n) => Array.from({ length: n }, (_, i) => i);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const none = (x) => x == null;  // or undefined

// An element with attributes, listeners (onclick: f) and children; strings become text nodes.
function el(tag, given = {}, ...children) {
  const [name, shape] = tag.split(":").reverse();  // svg:rect
  const node = shape ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (typeof value === "function") on(node, key.slice(2), value);
    else if (!none(value)) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const note = (text) => el("p", { class: "note" }, text);
const told = ([token, p]) => `${quoted(token)} ${percent(p)}`;

// -------------------------------------------------------------------------------------- words, numbers, colours

// What cannot be seen, or would reorder the line: controls, separators, lone halves, bidirectional marks; no joiner.
const UNSEEN = /(?!\u200d)[\p{C}\p{Zl}\p{Zp}]/u;

function glyph(letter) {
  if (letter === "\n") return "⏎";
  if (letter === "\t") return "⇥";
  if (!UNSEEN.test(letter)) return letter;
  const code = letter.codePointAt(0), hex = (x) => x.toString(16).toUpperCase();
  if (code >= 0xdc80 && code <= 0xdcff) return `<0x${hex(code - 0xdc00)}>`;  // how Python escapes a lone byte
  return `U+${hex(code).padStart(4, "0")}`;
}

function glyphs(text, most = 16) {
  const seen = [...text.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length))].slice(0, most + 1).map(glyph);
  return (seen.length > most ? [...seen.slice(0, most), "…"] : seen).join("") || "∅";
}

const quoted = (text) => `‘${glyphs(text, 60)}’`;
const signed = (text) => text.replace("-", parseFloat(text) ? "−" : "");
const fixed = (x, digits = 2) => (none(x) ? "–" : signed(x.toFixed(digits)));
const num = (x) => (none(x) ? "–" : Number.isInteger(x) ? signed(x.toLocaleString("en")) : signed(x.toPrecision(3)));
const percent = (p) => (none(p) ? "–" : signed(`${(100 * p).toFixed(Math.abs(p) < 0.0995 ? 1 : 0)} %`));
const interval = (low, high, show) => (none(low) ? "" : ` (95 %: ${show(low)} to ${show(high)})`);
const headName = ([layer, head]) => `L${layer}H${head}`;

// The colours of report.css as they hold now.
let theme;
function readTheme() {
  const style = getComputedStyle(root), get = (name) => style.getPropertyValue(`--${name}`).trim();
  const stops = (name) => get(name).split(" ").map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  theme = { one: stops("one"), less: stops("less") };
  for (const name of ["card", "ink", "muted", "line", "accent", "mono", "sans"]) theme[name] = get(name);
}

// The colour of t in [-1, 1] as [r, g, b]: straight lines between the stops.
function scale(t) {
  const stops = t < 0 ? theme.less : theme.one, at = clamp(Math.abs(t), 0, 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((x, j) => Math.round(x + (at - i) * (stops[i + 1][j] - x)));
}

const css = (rgb) => `rgb(${rgb})`;

function inkOn(rgb) {  // black or white, whichever contrasts more, which is never below 4.5
  const [r, g, b] = rgb.map((x) => ((x / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

// -------------------------------------------------------------------------------------- what is chosen

const chosen = { head: null, text: 0, position: null };
const listeners = [];  // called when something else is chosen
const drawings = [];  // called when the theme or the width changes

function choose(change) {
  Object.assign(chosen, change);
  for (const listen of listeners) listen(change);
}

function drawAll() {
  readTheme();
  for (const draw of drawings) draw();
}

const here = (data) => (chosen.text === data.text ? chosen.position : null);
const pick = (data) => (_, position) => choose({ text: data.text, position });
const column = (data, rows) => () => (here(data) === null ? [] : [[0, here(data), rows.length, 1]]);

// -------------------------------------------------------------------------------------- controls

// Where an arrow key leads from i of n; undefined for other keys.
function step(key, i, n) {
  return { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: n - 1 }[key];
}


const vertical = ({ key }) => key === "ArrowUp" || key === "ArrowDown";

const stop = (name) => ({ tabindex: 0, role: "application", "aria-label": name });

// Moves the focus, and with it the one tab stop of several.
function move(event, to) {
  if (!to) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

let nChoices = 0;
function choice(legend, words, change) {  // words: {value: what stands there}
  const name = `choice-${nChoices++}`;
  return el("fieldset", {}, el("legend", {}, legend), ...Object.entries(words).map(([value, word], i) => {
    const input = el("input", { type: "radio", name, checked: i ? null : "", onchange: () => change(value) });
    return el("label", {}, input, el("span", {}, word));
  }));
}

// A bar of colours with a word at either end.
function legend(low, high, from = 0) {
  const ramp = el("i");
  drawings.push(() => {
    const stops = range(9).map((i) => css(scale(from + (1 - from) * i / 8)));
    ramp.style.background = `linear-gradient(90deg,${stops})`;
  });
  return el("div", { class: "legend" }, low, ramp, high);
}

// The tokens of a text as buttons, one tab stop; the chosen position is pressed in every strip of its text.
function strip(data, name, show) {
  const buttons = data.tokens.map((token, i) => el("button", {
    tabindex: i ? -1 : 0, "aria-label": `${i}: ${glyphs(token)}`,
    onclick: () => pick(data)(0, i), onfocus: () => show?.(i), onpointerenter: () => show?.(i),
  }, glyphs(token)));
  const node = el("div", { class: "strip", role: "group", "aria-label": name, 
    onkeydown: (event) => move(event, buttons[step(event.key, buttons.indexOf(event.target), buttons.length)]),
  }, ...buttons);
  const press = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed", here(data) === i));
  listeners.push(press);
  press();
  const shade = (values) => buttons.forEach((button, i) => {  // [-1, 1], or null for none
    const rgb = none(values[i]) ? null : scale(values[i]);
    Object.assign(button.style, { backgroundColor: rgb ? css(rgb) : "", color: rgb ? inkOn(rgb) : "" });
  });
  return { node, shade };
}

function table([head, ...body], most = 1000) {
  const text = (cell) => (typeof cell === "string" ? glyphs(cell, 60) : num(cell));
  const row = (tag) => (cells) => el("tr", {}, ...cells.map((cell) => el(tag, {}, text(cell))));
  const left = body.length > most ? [note(`${num(body.length - most)} more rows are in the CSV.`)] : [];
  return el("div", { class: "scroll", tabindex: 0 },
    el("table", {}, el("thead", {}, row("th")(head)), el("tbody", {}, ...body.slice(0, most).map(row("td")))), ...left);
}

// -------------------------------------------------------------------------------------- cells on a canvas

// spec: name, rows, columns (labels), cell [narrowest, widest, height or 0 for square], say(r, c), pick(r, c),
// paint(context, r, c, x, y, w, h), marks() -> boxes [r, c, rows, columns] to frame, exists(r, c), live: moving picks.
function grid(spec) {
  const canvas = el("canvas", stop(`${spec.name}; arrow keys move, Enter selects`));
  const gutter = el("canvas", { class: "gutter", "aria-hidden": "true" });
  const mark = el("div", { class: "mark" });
  const plot = el("div", { class: "plot" }, canvas, mark), node = el("div", { class: "grid" }, gutter, plot);
  const nRows = spec.rows.length, nColumns = spec.columns.length, [narrow, widest, tall] = spec.cell;
  const self = { node, canvas, at: [0, 0], go, draw, picture };
  let w = 1, h = 1, top = 0;

  function surface(target, width, height) {
    const sharp = Math.min(devicePixelRatio, 16000 / width, 16000 / height), context = target.getContext("2d");
    target.width = width * sharp;
    target.height = height * sharp;
    Object.assign(target.style, { width: `${width}px`, height: `${height}px` });
    context.scale(sharp, sharp);
    context.fillStyle = theme.card;
    context.fillRect(0, 0, width, height);
    Object.assign(context, { fillStyle: theme.muted, font: `12px ${theme.mono}` });
    Object.assign(context, { textBaseline: "middle", textAlign: "center" });
    self.sharp = sharp;
    return context;
  }

  // Left, top, width and height of a box of cells, on whole pixels.
  function bounds(r, c, rows = 1, columns = 1) {
    const [x, y] = [Math.round(c * w), Math.round(r * h)];
    return [x, top + y, Math.round((c + columns) * w) - x, Math.round((r + rows) * h) - y];
  }

  function place(target, cells) {
    ["left", "top", "width", "height"].forEach((side, i) => { target.style[side] = `${bounds(...cells)[i]}px`; });
  }

  function draw() {
    let context = surface(gutter, 1, 1);
    const wide = (words) => Math.max(...words.map((word) => context.measureText(word).width));
    const labels = spec.columns.map((label) => [label].flat()), longest = wide(labels.flat());
    const roomy = tall || node.clientWidth > 14 * nColumns;  // else labels are left out
    const left = roomy ? Math.ceil(Math.min(110, 10 + wide(spec.rows))) : 8;
    const least = "print" in root.dataset ? 1 : narrow;  // paper does not scroll
    w = clamp((node.clientWidth - left - 8) / nColumns, least, widest);
    h = tall || w;
    const upright = w < 60 && longest > w - 6;  // labels that do not fit are turned; in tiny cells there are none
    const lines = Math.max(...labels.map((label) => label.length)), long = wide(labels.map((label) => label.join(" ")));
    top = w < 11 ? 4 : upright ? Math.min(96, 10 + long) : 6 + 16 * lines;
    const height = top + Math.round(nRows * h);
    context = surface(gutter, left, height);
    context.textAlign = "right";
    if (h >= 11) spec.rows.forEach((word, r) => {
      context.fillText(word, left - 7, top + (r + 0.5) * h, left - 8);
    });
    context = surface(canvas, Math.round(nColumns * w), height);
    if (w >= 11) labels.forEach((label, c) => {
      context.save();
      context.translate((c + 0.5) * w, top - 6);
      if (upright) {
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        context.fillText(label.join(" "), 0, 0, 88);
      } else label.forEach((word, i) => context.fillText(word, 0, 16 * (i - label.length) + 10, w - 6));
      context.restore();
    });
    for (const r of range(nRows)) for (const c of range(nColumns)) {
      if (exists(r, c)) spec.paint(context, r, c, ...bounds(r, c));
    }
    frame();
    place(mark, self.at);
  }

  function frame() {
    plot.querySelectorAll(".band").forEach((band) => band.remove());
    for (const cells of spec.marks()) {
      plot.append(el("div", { class: "band" }));
      place(plot.lastChild, cells);
    }
  }

  const exists = (r, c) => r >= 0 && c >= 0 && r < nRows && c < nColumns && (!spec.exists || spec.exists(r, c));
  function go(r, c) {
    if (!exists(r, c)) return;
    self.at = [r, c];
    place(mark, self.at);
    spec.say(r, c);
  }

  function picture() {  // labels and cells side by side, without the marks
    const both = el("canvas", { width: gutter.width + canvas.width, height: canvas.height });
    const context = both.getContext("2d");
    context.drawImage(gutter, 0, 0);
    context.drawImage(canvas, gutter.width, 0);
    return both;
  }

  const under = (event) => go(Math.floor((event.offsetY - top) / h), Math.floor(event.offsetX / w));
  on(canvas, "focus", () => go(...self.at));
  on(canvas, "pointermove click", under);
  on(canvas, "click", () => spec.pick(...self.at));
  on(canvas, "keydown", (event) => {
    const [r, c] = self.at;
    const next = vertical(event) ? [step(event.key, r, nRows), c] : [r, step(event.key, c, nColumns)];
    if (next[1] === undefined && event.key !== "Enter") return;
    event.preventDefault();
    go(...next);
    if (spec.live || event.key === "Enter") spec.pick(...self.at);
    const x = self.at[1] * w;  // a cell beside the window is scrolled into it
    node.scrollLeft = clamp(node.scrollLeft, x + 2 * w + gutter.clientWidth - node.clientWidth, Math.max(0, x - w));
  });
  drawings.push(draw);
  listeners.push(frame);
  return self;
}

// A cell of the colour of t, with a word on it. Without a value it is hatched: no colour may pass for a number.
function tile(context, t, x, y, w, h, word = "") {
  const rgb = scale(t ?? 0);
  context.fillStyle = css(rgb);
  context.fillRect(x, y, w, h);
  if (none(t)) for (let i = 2; i < w + h; i += 6) {
    const from = Math.min(i, w), to = Math.max(0, i - h);
    context.strokeStyle = theme.muted;
    context.stroke(new Path2D(`M${x + from} ${y + i - from}L${x + to} ${y + i - to}`));
  }
  context.fillStyle = inkOn(rgb);
  context.fillText(word, x + w / 2, y + h / 2, w - 8);
  return Math.min(w - 8, context.measureText(word).width);
}

// -------------------------------------------------------------------------------------- shapes in SVG

// draw(width) -> {height, shapes, stops: boxes [x, y, w, h] that are told of}; say(i). One tab stop with arrow keys.
function chart(name, draw, say) {
  const mark = el("svg:rect", { class: "stop", fill: "none", rx: 3 });
  const svg = el("svg:svg", stop(`${name}; arrow keys move`)), node = el("div", {}, svg);
  let stops = [], at = 0, width = 1;
  function go(i) {
    if (!stops[i]) return;
    at = i;
    const [x, y, w, h] = stops[i];
    [x - 2, y - 2, w + 4, h + 4].forEach((v, j) => mark.setAttribute(["x", "y", "width", "height"][j], v));
    say(i);
  }
  on(svg, "focus", () => go(at));
  on(svg, "keydown", (event) => {
    const next = step(event.key, at, stops.length);
    if (next === undefined) return;
    event.preventDefault();
    go(next);
  });
  on(svg, "pointermove", (event) => {  // the nearest
    const edge = svg.getBoundingClientRect(), zoom = width / edge.width;
    const [px, py] = [zoom * (event.clientX - edge.left), zoom * (event.clientY - edge.top)];
    const far = stops.map(([x, y, w, h]) => Math.hypot(px - clamp(px, x, x + w), py - clamp(py, y, y + h)));
    go(far.indexOf(Math.min(...far)));
  });
  function redraw() {
    width = Math.max(280, node.clientWidth);
    const made = draw(width);
    stops = made.stops;
    svg.setAttribute("viewBox", `0 0 ${width} ${made.height}`);
    svg.replaceChildren(box(0, 0, width, made.height, { fill: theme.card }), ...made.shapes, mark);
  }
  drawings.push(redraw);
  return { node, redraw, picture: () => svg };
}

const write = (x, y, text, more) => el("svg:text", { x, y, fill: theme.ink, "font-size": 12, ...more }, text);
const small = (x, y, text, anchor) => write(x, y, text, { fill: theme.muted, "font-size": 11, "text-anchor": anchor });
const line = (x1, y1, x2, y2, more) => el("svg:line", { x1, y1, x2, y2, stroke: theme.line, ...more });
const dashed = (x1, y1, x2, y2) => line(x1, y1, x2, y2, { stroke: theme.muted, "stroke-dasharray": "4 3" });
const dot = (cx, cy, r, fill) => el("svg:circle", { cx, cy, r, fill, stroke: theme.card });
function box(x, y, width, height, more) {
  return el("svg:rect", { x, y, width: Math.max(1, width), height: Math.max(1, height), fill: theme.accent, ...more });
}
const push = (value) => css(scale(value < 0 ? -0.72 : 0.72));  // blue for more, orange for less

// -------------------------------------------------------------------------------------- the panels

// (data, say) -> {controls, body, rows(), picture()}; say tells the reader, rows and picture are what can be saved.
const KINDS = {};

KINDS.about = (data) => ({ body: [], rows: () => [["name", "value"], ...data.facts, ...data.rows] });

KINDS.scores = (data, say) => {
  const names = Object.keys(data.scores), { heads } = data, order = [...heads.keys()], id = (i) => heads[i].join(".");
  let by = "", sign = 1;
  const cell = (name, i) => {
    const { value, corrected, low, high, chance } = data.scores[name], share = (x) => `${100 * clamp(x, 0, 1)}%`;
    const bar = el("i"), span = el("u");
    const show = () => say(`${headName(heads[i])}, ${name}: ${fixed(corrected[i])} beyond chance`
      + `${interval(low?.[i], high?.[i], fixed)}. Measured ${fixed(value[i], 3)}, by chance ${fixed(chance?.[i], 3)}. `
      + (data.words[name] || ""));
    bar.style.width = share(corrected[i]);
    if (!none(low?.[i])) Object.assign(span.style, { left: share(low[i]), right: share(1 - high[i]) });
    const text = [fixed(corrected[i]), el("span", { class: "bar" }, bar, span)];
    return el("td", { tabindex: -1, onfocus: show, onpointerenter: show }, ...text);
  };
  const open = (i) => {
    choose({ head: id(i) });
    page.seen?.all.node.scrollIntoView({ block: "center" });
  };
  const lines = heads.map((head, i) => el("tr", { onclick: () => open(i) },
    el("td", {}, headName(head)), ...names.map((name) => cell(name, i)),
    el("td", {}, ...data.labels[i].map((label) => el("span", { class: "tag" }, label.replace("_", " "))))));
  const titles = names.map((name) => el("th", {}, el("button", { onclick: () => sort(name) }, name)));
  const body = el("tbody", { onkeydown: (event) => {
    const at = event.target, row = at.parentNode, column = clamp(step(event.key, at.cellIndex, 9), 1, names.length);
    if (event.key === "Enter") row.click();
    const next = body.rows[step(event.key, row.sectionRowIndex, 1)];
    move(event, vertical(event) ? next?.cells[at.cellIndex] : row.cells[column]);
  } });
  function sort(name) {
    sign = by === name ? -sign : -1;
    by = name;
    const value = (i) => data.scores[name].corrected[i] ?? -9;
    order.sort((a, b) => sign * (value(a) - value(b)) || a - b);
    titles.forEach((title, i) => {
      title.ariaSort = names[i] !== name ? "none" : sign < 0 ? "descending" : "ascending";
    });
    body.replaceChildren(...order.map((i) => lines[i]));
  }
  sort(names[0]);
  body.rows[0].cells[1].tabIndex = 0;
  listeners.push(() => lines.forEach((row, i) => { row.ariaSelected = chosen.head === id(i); }));
  const keys = ["corrected", "low", "high", "value", "chance"];
  const top = el("thead", {}, el("tr", {}, el("th", {}, "head"), ...titles, el("th", {}, "labels")));
  return {
    body: [el("div", { class: "scroll scores" }, el("table", { role: "grid" }, top, body))],
    rows: () => [["layer", "head", "score", ...keys], ...names.flatMap((name) => heads.map((head, i) =>
      [...head, name, ...keys.map((key) => data.scores[name][key]?.[i])]))],
  };
};

KINDS.heads = (data, say) => {
  const { tokens, heads } = data, n = tokens.length, names = heads.map((head) => head.join("."));
  const bytes = Uint8Array.from(atob(data.patterns), (letter) => letter.charCodeAt(0)), start = (q) => q * (q + 1) / 2;
  let carried = false, from = true, kept = {};
  // The weights of a head: the lower triangle, key k of query q at q(q+1)/2 + k. As carried: times the size of what
  // each key moves, and every row sums to 1 again.
  function pattern(i) {
    if (kept[i]) return kept[i];
    const a = Float32Array.from(bytes.subarray(i * start(n), (i + 1) * start(n)), (x) => x / 255);
    if (carried) for (const q of range(n)) {
      const row = a.subarray(start(q), start(q + 1)).map((x, k) => x * data.norms[i][k]);
      const sum = row.reduce((x, y) => x + y);
      a.set(row.map((x) => x / (sum || 1)), start(q));
    }
    return (kept[i] = a);
  }
  const now = () => Math.max(0, names.indexOf(chosen.head)), weight = (q, k) => pattern(now())[start(q) + k];
  const layers = [...new Set(heads.map(([layer]) => layer))], index = (r, c) => names.indexOf(`${layers[r]}.${c}`);
  const at = () => [layers.indexOf(heads[now()][0]), heads[now()][1]];
  const title = (i) => [headName(heads[i]), ...data.labels[i]].join(" · ").replaceAll("_", " ");
  const all = grid({
    name: "All heads, a layer a row", rows: layers.map((l) => `L${l}`), cell: [22, 108, 0], live: true,
    columns: range(1 + Math.max(...heads.map(([, head]) => head))).map((h) => `H${h}`), marks: () => [at()],
    exists: (r, c) => index(r, c) >= 0, say: (r, c) => say(title(index(r, c))),
    pick: (r, c) => choose({ head: names[index(r, c)] }),
    paint(context, r, c, x, y, w) {  // each pixel shows the largest weight that it covers, so that thin stripes stay
      const side = Math.round(clamp((w - 4) * all.sharp, 1, n)), most = {}, a = pattern(index(r, c));
      const small = el("canvas", { width: side, height: side }), image = new ImageData(side, side);
      for (const q of range(n)) for (const k of range(q + 1)) {
        const pixel = Math.floor(q * side / n) * side + Math.floor(k * side / n);
        most[pixel] = Math.max(most[pixel] || 0, a[start(q) + k]);
      }
      for (const i in most) image.data.set([...scale(Math.sqrt(most[i])), 255], 4 * i);
      small.getContext("2d").putImageData(image, 0, 0);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, x + 2, y + 2, w - 4, w - 4);
    },
  });
  const words = tokens.map((token) => glyphs(token, 12));
  const tell = (q, k) => k <= q && say(`${headName(heads[now()])}: ${quoted(tokens[q])} (${q}) looks at `
    + `${quoted(tokens[k])} (${k}) with weight ${fixed(weight(q, k), 3)}.`);
  const one = grid({
    name: "The chosen head; a row looks at columns", rows: words, columns: words, cell: [1, 34, 0], say: tell,
    exists: (q, k) => k <= q, pick: (q) => pick(data)(0, q),
    marks: () => (none(here(data)) ? [] : [[here(data), 0, 1, here(data) + 1]]),
    paint: (context, q, k, x, y, w, h) => tile(context, Math.sqrt(weight(q, k)), x, y, w - (w > 7), h - (h > 7)),
  });
  const heading = el("h3"), caption = note(""), query = () => here(data) ?? n - 1;
  const text = strip(data, "Tokens by the chosen head", (i) => (from ? tell(query(), i) : tell(i, query())));
  function update() {
    const q = query();
    heading.textContent = title(now());
    text.shade(tokens.map((_, k) => ((from ? k <= q : k >= q) ? Math.sqrt(from ? weight(q, k) : weight(k, q)) : null)));
    const token = `${quoted(tokens[q])} (${q})`;
    caption.textContent = `${from ? `What ${token} looks at` : `Who looks at ${token}`}; choose another in the text.`;
  }
  listeners.push((change) => {
    if (change.head) { all.at = at(); one.draw(); }
    update();
  });
  drawings.push(update);
  const carry = (event) => { carried = event.target.checked; kept = {}; drawAll(); };
  const box = el("label", {}, el("input", { type: "checkbox", onchange: carry }), " weigh by what is carried");
  page.seen = { all, one, weight, names };  // for the self-test
  const turn = (value) => { from = value === "from"; update(); };
  const cells = (i) => range(n).flatMap((q) => range(q + 1).map((k) => [...heads[i], q, k, pattern(i)[start(q) + k]]));
  return {
    controls: [choice("Colour by", { from: "looks at", to: "is looked at by" }, turn), data.norms ? box : ""],
    body: [el("div", { class: "two" }, el("div", {}, el("h3", {}, "All heads"), all.node),
      el("div", {}, heading, one.node)), legend("0", "1"), caption, text.node],
    rows: (every) => [["layer", "head", "query", "key", "weight"],
      ...(every ? range(heads.length) : [now()]).flatMap(cells)],
    picture: one.picture,
  };
};

KINDS.lens = (data, say) => {
  const { tokens, rows, targets, lenses } = data, kinds = Object.keys(lenses);
  let lens = lenses[kinds[0]], measure = "p";
  const most = (key) => Math.max(1e-9, ...kinds.flatMap((kind) => lenses[kind][key].flat()));
  const falls = (key, f = (x) => x) => (r, q) => (none(lens[key][r][q]) ? null : 1 - f(lens[key][r][q]) / f(most(key)));
  const MEASURES = {  // what is coloured, its t in [0, 1], and the words at the ends; 1 is always surest
    p: ["probability", (r, q) => lens.p[r][q][0], "0 %", "100 %"],
    rank: ["rank of the next token", falls("rank", Math.log1p), "last", "first"],
    entropy: ["entropy", falls("entropy"), "undecided", "sure"],
    kl: ["distance from the end", falls("kl"), "far", "none"],
  };
  const show = (r, q) => {
    const guesses = lens.top[r][q].map((token, i) => told([token, lens.p[r][q][i]])).join(", ");
    const came = () => `Next came ${told([targets[q], lens.target_p[r][q]])}, rank ${num(lens.rank[r][q])}. `;
    say(`${rows[r]}, after ${quoted(tokens[q])} (${q}): ${guesses}. ${none(targets[q]) ? "" : came()}`
      + `Entropy ${fixed(lens.entropy[r][q])} nats, ${fixed(lens.kl[r][q])} nats from the end.`);
  };
  const cells = grid({
    name: "Lens, a layer a row", rows, columns: tokens.map((token) => glyphs(token, 11)), cell: [76, 120, 28],
    say: show, pick: pick(data), marks: column(data, rows),
    paint(context, r, q, x, y, w, h) {
      const guess = lens.top[r][q][0], t = MEASURES[measure][1](r, q);
      const wide = tile(context, t, x, y, w - 1, h - 1, glyphs(guess, 11));
      if (guess === targets[q]) context.fillRect(x + (w - 1 - wide) / 2, y + h - 7, wide, 1.5);
    },
  });
  const ends = Object.entries(MEASURES).map(([key, [, , low, high]]) => [key, legend(low, high)]);
  const hide = () => { for (const [key, node] of ends) node.hidden = key !== measure; };
  hide();
  const words = Object.fromEntries(Object.entries(MEASURES).map(([key, [word]]) => [key, word]));
  const which = kinds[1] ? choice("Lens", kinds, (i) => { lens = lenses[kinds[i]]; cells.draw(); }) : "";
  const keys = ["target_p", "rank", "entropy", "kl"];
  const line = ({ top, p, ...more }, r, q) =>
    [tokens[q], top[r][q][0], p[r][q][0], targets[q], ...keys.map((key) => more[key][r][q])];
  return {
    controls: [choice("Colour", words, (value) => { measure = value; hide(); cells.draw(); }), which],
    body: [cells.node, ...ends.map(([, node]) => node)],
    rows: () => [["lens", "row", "position", "token", "guess", "p", "next", ...keys], ...kinds.flatMap((kind) =>
      rows.flatMap((row, r) => tokens.map((_, q) => [kind, row, q, ...line(lenses[kind], r, q)])))],
    picture: cells.picture,
  };
};

KINDS.waterfall = (data, say) => {
  const what = quoted(data.target) + (data.foil ? ` rather than ${quoted(data.foil)}` : "");
  let bars = data.bars.network;  // [name, from, to]
  const plot = chart(`What adds up to the logit of ${what}`, (width) => {
    const all = bars.flatMap(([, from, to]) => [from, to]), low = Math.min(...all), top = Math.max(...all);
    const x = (v) => 90 + (v - low) / (top - low || 1) * (width - 146), height = bars.length * 21 + 10;
    const stops = bars.map(([, from, to], i) => [x(Math.min(from, to)), 4 + i * 21, Math.abs(x(to) - x(from)), 15]);
    return { height, stops, shapes: [dashed(x(0), 0, x(0), height), ...bars.flatMap(([name, from, to], i) => {
      const [left, y, wide, high] = stops[i], by = to - from;
      return [write(80, y + 12, name, { "text-anchor": "end" }), box(left, y, wide, high, { fill: push(by), rx: 2 }),
        write(left + wide + 6, y + 12, (by > 0 ? "+" : "") + fixed(by))];
    })] };
  }, (i) => { const [name, from, to] = bars[i]; say(`${name}: ${num(to - from)}; from ${num(from)} to ${num(to)}.`); });
  const order = (value) => { bars = data.bars[value]; plot.redraw(); };
  return {
    controls: [choice("Order", { network: "as in the network", size: "by size" }, order),
      `After ${quoted(data.tokens[data.position])} (${data.position}): ${what}`],
    body: [plot.node],
    rows: () => [["part", "value"], ...data.parts], picture: plot.picture,
  };
};

KINDS.patching = (data, say) => {
  const { tokens, corrupted, maps } = data;
  const pair = (token, i) => (none(corrupted[i]) || corrupted[i] === token ? [token] : [token, corrupted[i]]);
  const names = tokens.map((token, i) => pair(token, i).map((word) => glyphs(word, 12)));
  let now = 0;
  const made = maps.map(({ site, rows, columns, cells }) => {
    const say1 = (r, c) => {
      const share = none(cells[r][c]) ? "not defined" : `brings back ${percent(cells[r][c])} of the clean answer`;
      say(`${site}, ${rows[r]}, ${columns ? columns[c] : `${quoted(tokens[c])} (${c})`}: ${share}.`);
    };
    return grid({
      name: `Recovery at ${site}`, rows, columns: columns || names, cell: [36, 84, 28], say: say1,
      pick: columns ? () => {} : pick(data), marks: columns ? () => [] : column(data, rows),
      paint(context, r, c, x, y, w, h) {
        const v = cells[r][c];
        tile(context, v, x, y, w - 1, h - 1, none(v) ? "" : fixed(100 * v, 0));
      },
    });
  });
  const open = (i) => { now = i; made.forEach(({ node }, j) => { node.hidden = j !== +i; }); };
  open(0);
  const sites = maps.map(({ site }) => site), against = data.foil ? ` against ${quoted(data.foil)}` : "";
  const layers = data.table ? table(data.table) : "";
  const tops = Object.entries(data.top).map(([run, guesses]) => note(`${run}: ${guesses.map(told).join(", ")}`));
  return {
    controls: [maps[1] ? choice("Site", sites, (i) => { open(i); made[i].draw(); }) : "",
      `${data.metric} of ${quoted(data.target)}${against}: clean ${num(data.clean)}, corrupted ${num(data.corrupt)}`],
    body: [...made.map(({ node }) => node), legend("−100 %", "+100 %", -1), layers, ...tops],
    rows: () => [["site", "row", "column", "recovery"], ...maps.flatMap(({ site, rows, columns, cells }) =>
      cells.flatMap((row, r) => row.map((v, c) => [site, rows[r], columns ? columns[c] : c, v])))],
    picture: () => made[now].picture(),
  };
};

KINDS.losses = (data, say) => {
  const { tokens, nats, mean } = data, top = Math.max(...nats, 1e-9);
  const show = (i) => say(`${quoted(tokens[i])} (${i}): ${none(nats[i]) ? "nothing came before it"
    : `${fixed(nats[i])} nats; the model had given it ${percent(Math.exp(-nats[i]))}`}.`);
  const plot = chart("Surprise at each token", (width) => {
    const each = (width - 30) / tokens.length, y = (v) => 130 - v / top * 116;
    const fill = (v) => css(scale(0.25 + 0.75 * v / top));
    const bar = (v, i) => box(30 + (i + 0.1) * each, y(v), each * 0.8, y(0) - y(v), { fill: fill(v) });
    return { height: 140, stops: tokens.map((_, i) => [30 + i * each, 14, each, 116]), shapes: [
      ...[0, top / 2, top].flatMap((v) => [line(30, y(v), width, y(v)), small(24, y(v) + 4, v.toFixed(1), "end")]),
      ...nats.map((v, i) => (none(v) ? "" : bar(v, i))),
      dashed(30, y(mean), width, y(mean))] };
  }, show);
  const text = strip(data, "Tokens by surprise", show);
  drawings.push(() => text.shade(nats.map((v) => (none(v) ? null : v / top))));
  return {
    body: [plot.node, text.node, legend("expected", "surprising")],
    rows: () => [["token", "nats"], ...tokens.map((token, i) => [token, nats[i]])], picture: plot.picture,
  };
};

KINDS.comparison = (data, say) => {
  const { intervals, documents, models: [first, second], unit, margin } = data;
  const ends = intervals.flatMap(({ value, low, high }) => [value, low ?? 0, high ?? 0]), every = documents.flat();
  const least = Math.min(-margin, ...ends), most = Math.max(margin, ...ends);
  const floor = Math.min(...every), roof = Math.max(...every);
  const plot = chart(`${second} against ${first}`, (width) => {
    const x = (v) => 16 + (v - least) / (most - least) * (width - 32), under = intervals.length * 44, base = under + 34;
    const side = Math.min(width - 32, 380), at = (v) => 12 + (v - floor) / (roof - floor || 1) * (side - 24);
    const span = (low, high, y) => [x(low), y, x(high) - x(low), 4];
    const spans = intervals.map(({ value, low, high }, i) => span(low ?? value, high ?? value, i * 44 + 28));
    const dots = documents.map(([a, b]) => [16 + at(a), base + side - at(b)]);
    return { height: base + side + 24, stops: [...spans, ...dots.map(([cx, cy]) => [cx - 4, cy - 4, 8, 8])], shapes: [
      box(x(-margin), 0, x(margin) - x(-margin), under, { fill: theme.line }), dashed(x(0), 0, x(0), under),
      ...intervals.flatMap(({ name, word, value }, i) =>
        [write(16, i * 44 + 16, `${name}: ${word}`), box(...spans[i]), dot(x(value), i * 44 + 30, 6, theme.accent)]),
      small(16, under + 18, `${num(least)} ${unit}`), small(x(0), under + 18, 0, "middle"),
      small(width - 16, under + 18, num(most), "end"), dashed(16, base + side, 16 + side, base),
      ...dots.map(([cx, cy], i) => dot(cx, cy, 4, push(documents[i][0] - documents[i][1]))),
      small(16, base + side + 16, num(floor)), small(16 + side, base + side + 16, num(roof), "end")] };
  }, (i) => {
    const { name, value, low, high, p, word } = intervals[i] || {}, [a, b] = documents[i - intervals.length] || [];
    say(name ? `${name}: ${num(value)} ${unit}${interval(low, high, num)}, p = ${num(p)}: ${word}.`
      : `${first} ${num(a)}, ${second} ${num(b)} ${unit}.`);
  });
  return { body: [plot.node], rows: () => [[first, second], ...documents], picture: plot.picture };
};

KINDS.reliability = (data, say) => {
  const { n, confidence, accuracy, low, high } = data, bins = range(n.length), most = Math.max(...n);
  const plot = chart("Said against came true", (width) => {
    const side = Math.min(width - 60, 360), x = (v) => 44 + v * side, y = (v) => 10 + (1 - v) * side, floor = side + 92;
    const stops = bins.map((i) => [x(confidence[i]) - 6, y(accuracy[i]) - 6, 12, 12]);
    const scales = [0, 0.25, 0.5, 0.75, 1].flatMap((v) =>
      [line(44, y(v), x(1), y(v)), small(36, y(v) + 4, 100 * v, "end"), small(x(v), side + 28, 100 * v, "middle")]);
    return { height: floor + 8, stops, shapes: [...scales, dashed(x(0), y(0), x(1), y(1)), ...bins.flatMap((i) => {
      const cx = x(confidence[i]), tall = 44 * n[i] / most;
      return [box(cx - 1, y(high[i]), 2, y(low[i]) - y(high[i])), dot(cx, y(accuracy[i]), 5, theme.accent),
        box(cx - 5, floor - tall, 10, tall, { fill: theme.muted })];
    })] };
  }, (i) => say(`Said ${percent(confidence[i])}, came true ${percent(accuracy[i])}`
    + `${interval(low[i], high[i], percent)}, in ${num(n[i])} forecasts.`));
  const keys = ["n", "confidence", "accuracy", "low", "high"], rows = bins.map((i) => keys.map((key) => data[key][i]));
  return { body: [plot.node], rows: () => [keys, ...rows], picture: plot.picture };
};

// -------------------------------------------------------------------------------------- what can be saved

function save(name, type, content) {
  const link = el("a", { download: name, href: URL.createObjectURL(new Blob([content], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const quote = (cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
const csv = (rows) => rows.map((row) => row.map((cell) => quote(String(cell ?? ""))).join(",")).join("\r\n");
const isSvg = (picture) => picture instanceof SVGElement;

function svgText(svg) {
  const copy = svg.cloneNode(true);
  copy.lastChild.remove();  // the mark
  return new XMLSerializer().serializeToString(copy);
}

function footer({ rows, picture, title }, name) {
  const details = el("details", {}, el("summary", {}, "The numbers as a table"));
  details.addEventListener("toggle", () => details.append(table(rows(false))), { once: true });
  const act = (word, run) => el("button", { class: "act", "aria-label": `${word} of ${title}`, onclick: run }, word);
  const svg = () => save(`${name}.svg`, "image/svg+xml", svgText(picture()));
  const png = () => picture().toBlob((blob) => save(`${name}.png`, "image/png", blob));
  const lines = act("CSV", () => save(`${name}.csv`, "text/csv", csv(rows(true))));
  return el("footer", {}, lines, picture ? (isSvg(picture()) ? act("SVG", svg) : act("PNG", png)) : "", details);
}

// -------------------------------------------------------------------------------------- the page

const panels = page.panels.map(({ kind, title, data }, i) => {
  const section = byId(`panel-${i + 1}`), find = (name) => section.querySelector(`.${name}`);
  data.tokens = page.texts[data.text];
  const panel = KINDS[kind](data, (text) => { find("readout").textContent = text; });
  find("controls").append(...(panel.controls || []));
  find("body").append(...panel.body);
  return { kind, title, section, ...panel };
});
byId("json").onclick = () => save("report.json", "application/json", json);
for (const tokens of page.texts.slice(0, 1)) byId("text").append(strip({ text: 0, tokens }, "The text").node);
drawAll();
panels.forEach((panel, i) => panel.section.append(footer(panel, `${panel.kind}-${i + 1}`)));
if (page.seen) choose({ head: page.head ?? page.seen.names[0] });

let wide = innerWidth;
on(window, "resize", () => { if (innerWidth !== wide) { wide = innerWidth; drawAll(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
on(window, "beforeprint", () => { root.dataset.print = ""; drawAll(); });  // on paper it is always light
on(window, "afterprint", () => { delete root.dataset.print; drawAll(); });
if (location.hash === "#selftest") selftest();
root.dataset.state = "ready";

// Every control clicked, every grid and chart walked with the arrow keys; what was seen stands in data-selftest.
function selftest() {
  const press = (node, ...keys) => {
    node.focus();
    for (const key of keys) node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  };
  const seen = { said: [], sizes: [], canvases: document.querySelectorAll(".plot canvas").length };
  for (const { section, rows, picture } of panels) {
    const find = (what) => [...section.querySelectorAll(what)].reverse();  // so that the first choice is the last click
    find("input, button:not(.act), .scores tr, summary").forEach((control) => control.click());
    find("[type=checkbox]").forEach((control) => control.click());
    find("[role=application], .scores td:nth-child(2), .strip button").forEach((node) => {
      press(node, "ArrowDown", "ArrowRight", "Enter");
    });
    const image = picture?.();
    seen.said.push(section.querySelector(".readout").textContent);
    seen.sizes.push([csv(rows(true)).length, isSvg(image) ? svgText(image).length : image?.toDataURL().length]);
  }
  if (page.seen) {
    const { all, one, weight, names } = page.seen;
    press(all.canvas, ...names.flatMap(() => ["ArrowDown", "ArrowRight"]));
    one.go(0, 0);
    press(one.canvas, "ArrowDown", "ArrowDown", "ArrowRight");
    const { left, top } = one.node.querySelector(".mark").style;
    const [x, y] = [left, top].map((side) => (parseInt(side) + 1) * one.sharp);
    const pixel = [...one.canvas.getContext("2d").getImageData(x, y, 1, 1).data];
    Object.assign(seen, { head: chosen.head, cell: one.at, value: weight(...one.at), pixel });
  }
  root.dataset.selftest = JSON.stringify(seen);
}
