"use strict";

// How samples look. Text is never read as HTML, and names from the data are never used as code.

const SIDES = ["before", "after"];
const WORD = /([\p{L}\p{M}\p{N}]+)/u;
const SPACELESS = /[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{3ffff}]+/gu;

/** An element: properties by name, "style" as an object, the rest children. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "style") for (const [name, x] of Object.entries(value)) node.style.setProperty(name, x);
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null));
  return node;
}

const bar = (share) => el("span", { className: "bar", style: { "--full": `${100 * share}%` } });
const percent = (share) => `${share >= 0.0995 ? (100 * share).toFixed(0) : Number((100 * share).toPrecision(2))} %`;
const sideOf = (model) => (data.models.length === 1 ? 1 : model); // a model alone is what is after

/** The words of a text as the index has them: of scripts without spaces every two neighbours. */
function words(text) {
  const found = [];
  for (const run of text.normalize("NFC").toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu) ?? []) {
    let place = 0;
    for (const { 0: part, index: start } of run.matchAll(SPACELESS)) {
      if (start > place) found.push(run.slice(place, start));
      const letters = [...part];
      for (let i = 0; i < Math.max(1, letters.length - 1); i++) found.push(letters.slice(i, i + 2).join(""));
      place = start + part.length;
    }
    if (place < run.length) found.push(run.slice(place));
  }
  return found;
}

/** A text, the concept's word in it marked, in its own direction. */
function marked(text, concept) {
  const word = concept.toLowerCase();
  const spaceless = word !== "" && word.match(SPACELESS)?.[0] === word;
  const is = (token) => word !== "" && (spaceless ? token.includes(word) : token.toLowerCase() === word);
  return el("bdi", {}, text.split(WORD).map((token) => (is(token) ? el("b", {}, token) : token)));
}

// A sample's entry: [id, held out, which pictures it has, texts in brief]

const titleOf = ([id, , , texts]) => texts.find((text) => text !== "") ?? id;
const fullTitle = (entry) =>
  [titleOf(entry), titleOf(entry) === entry[0] ? null : entry[0], entry[1] ? "kept from training" : null]
    .filter((part) => part !== null).join(" · ");

const inks = new CSSStyleSheet();
document.adoptedStyleSheets = [...document.adoptedStyleSheets, inks];
const inked = new Set();

/** The class whose mask is a sheet of ink, which is loaded once. */
function ink(p, sheet) {
  const name = `ink${p}_${sheet}`;
  if (!inked.has(name)) {
    inked.add(name);
    load(`pictures/${p}/${sheet}`).then((url) =>
      inks.insertRule(`.${name} { -webkit-mask-image: url("${url}"); mask-image: url("${url}"); }`), console.error);
  }
  return name;
}

/** A sample's picture: ink is a mask over the current colour, thumbnails are as they are. */
function picture(p, n, entry, kind = "") {
  const { sheet, columns, ink: isInk } = data.pictures[p];
  const [file, cell] = [Math.floor(n / sheet), n % sheet];
  const missing = !(entry[2] & (1 << p));
  const style = { "--columns": columns, "--x": cell % columns, "--y": Math.floor(cell / columns) };
  const look = missing ? null : el("i", { className: isInk ? `ink ${ink(p, file)}` : "photo", style });
  if (look && !isInk) look.style.backgroundImage = `url("${new URL(`pictures/${p}/${file}.webp`, base)}")`;
  return el("i", { className: `picture${missing ? " missing" : ""}${kind}${entry[1] ? " held" : ""}`, title: fullTitle(entry) }, look);
}

/** What a stream shows of a sample by itself. */
function seen(stream, n, entry, concept, kind) {
  const { text, picture: p } = data.streams[stream];
  const small = p >= 0 ? picture(p, n, entry, kind) : null;
  if (text < 0) return small ?? el("span", {}, entry[0]);
  const words = entry[3][text];
  const shown = words === "" ? el("span", { className: "unnamed" }, "no text") : marked(words, concept);
  return el("span", { className: `said${entry[1] && !small ? " held" : ""}` }, small, el("span", { className: "words" }, shown));
}

const drawn = (stream) => data.streams[stream].text < 0 && data.streams[stream].picture >= 0;

/** A latent's samples in one stream: pictures in a row, or texts in a list; in detail each is a link with a bar. */
function samples(stream, [numbers, strength, bears], entries, concept, count, detailed = false) {
  if (!numbers.length) return el("p", { className: "small" }, "never fires");
  const shown = numbers.slice(0, count);
  const kind = (i) => (bears[i] ? " bears" : "");
  const look = (n, i) => seen(stream, n, entries.get(n), concept, kind(i));
  const link = (n, i, ...more) => el("a", { href: `#sample=${n}`, title: fullTitle(entries.get(n)),
    "aria-label": fullTitle(entries.get(n)), className: `sample${kind(i)}` }, look(n, i), ...more);
  if (!drawn(stream)) {
    return el("ul", { className: "names" }, shown.map((n, i) => el("li", { className: kind(i) },
      detailed ? link(n, i, bar(strength[i] / 100)) : go(look(n, i), n))));
  }
  if (detailed) return el("ul", { className: "pictures" }, shown.map((n, i) => el("li", {}, link(n, i, bar(strength[i] / 100)))));
  const spoken = shown.map((n) => titleOf(entries.get(n))).join(", ");
  return el("div", { className: "pictures", role: "img", "aria-label": spoken }, shown.map((n, i) => go(look(n, i), n)));
}

/** In an overview a click goes to a sample; by keyboard the latent's page has links to them all. */
function go(node, n) {
  node.addEventListener("click", (event) => {
    event.preventDefault();
    event.stopPropagation();
    location.hash = `sample=${n}`;
  });
  return node;
}

// Training curves

const CURVES = [
  ["loss", "Loss", "What training minimises."],
  ["self", "Self NMSE", "Error of each stream rebuilt from its own latents; 0 is perfect, 1 is its mean."],
  ["cross", "Cross NMSE", "Error of each stream rebuilt from another stream’s latents."],
  ["dead", "Dead latents", "Latents that no sample fires any more."],
];

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Round numbers from 0 to at least `top`. */
function ticks(top) {
  const rough = top / 3;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= rough);
  return Array.from({ length: Math.ceil(top / step - 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(6)));
}

function chart([key, name, meaning]) {
  const lines = data.models.map(({ curves: pairs }, side) => [Object.fromEntries(pairs), side]).map(([curves, side]) => ({
    side: sideOf(side), whose: data.models[side].name,
    points: (curves[key] ?? []).map((y, i) => [curves.step[i], y]).filter(([, y]) => y !== null),
  })).filter(({ points }) => points.length);
  if (!lines.length) return null;
  const [width, height, left, bottom] = [270, 180, 32, 22];
  const all = lines.flatMap(({ points }) => points);
  const marks = ticks(Math.max(...all.map(([, y]) => y)) || 1);
  const [lastStep, top] = [Math.max(...all.map(([x]) => x)) || 1, marks.at(-1)];
  const x = (step) => left + (step / lastStep) * (width - left - 42);
  const y = (value) => 8 + (1 - value / top) * (height - bottom - 8);
  const short = (value) => (Math.abs(value) >= 10 ? value.toFixed(0) : String(Number(value.toPrecision(2))));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
    `${name}: ${lines.map(({ whose, points }) => `${whose} ends at ${short(points.at(-1)[1])}`).join(", ")}` });
  for (const mark of marks) {
    drawing.append(svg("line", { class: "grid", x1: left, x2: x(lastStep), y1: y(mark), y2: y(mark) }),
      svg("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, String(mark)));
  }
  drawing.append(svg("text", { x: left, y: height - 4 }, "0"),
    svg("text", { x: x(lastStep), y: height - 4, "text-anchor": "end" }, `${lastStep} steps`));
  // the two end labels keep a line's height apart
  const ends = lines.map(({ points }) => y(points.at(-1)[1]) + 4);
  if (ends.length === 2 && Math.abs(ends[0] - ends[1]) < 13) {
    const [upper, middle] = [ends[0] <= ends[1] ? 0 : 1, (ends[0] + ends[1]) / 2];
    ends[upper] = middle - 6.5;
    ends[1 - upper] = middle + 6.5;
  }
  lines.forEach(({ side, points }, i) => {
    const path = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L");
    drawing.append(svg("path", { class: SIDES[side], d: `M${path}` }),
      svg("text", { class: `value ${SIDES[side]}`, x: x(lastStep) + 6, y: ends[i] }, short(points.at(-1)[1])));
  });
  return el("figure", {}, el("figcaption", {}, el("b", {}, name), meaning), drawing);
}

