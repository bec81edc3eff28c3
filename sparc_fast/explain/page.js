"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const latents = new Map(data.latents.map((latent) => [latent.id, latent]));
const STATS = ["agreement", "frequency", "held-out Jaccard"];
const SIDES = ["before", "after"];
const BATCH = 24; // cards drawn at a time

/** An element: properties by name, "style" as an object, the rest children. Text is never read as HTML. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "style") for (const [name, x] of Object.entries(value)) node.style.setProperty(name, x);
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

const tokens = (name) => name.split(/(\W+)/);
const bears = (name, concept) => concept !== "" && tokens(name).includes(concept);
const format = (stat, x) => (x === null ? "–" : stat === 1 ? `${(100 * x).toPrecision(2)} %` : x.toFixed(2));
const bar = (share) => el("span", { className: "bar", style: { "--full": `${100 * share}%` } });
const title = (latent) =>
  latent.concept ? latent.concept : el("span", { className: "unnamed" }, "no shared word");

/** The character, its name and its face behind one cell of a stream. */
function sample(stream, cell) {
  const [character, face] = data.streams[stream].cells[cell];
  const [text, name] = data.characters[character];
  return { text, name, face: data.faces[face] };
}

function picture(stream, cell, concept) {
  const { text, name, face } = sample(stream, cell);
  const columns = Math.max(1, Math.ceil(Math.sqrt(data.streams[stream].cells.length)));
  return el("i", {
    className: `picture s${stream}${bears(name, concept) ? " bears" : ""}`,
    title: `${text}  ${name} · ${face}`,
    style: { "--x": cell % columns, "--y": Math.floor(cell / columns) },
  });
}

function nameItem(stream, cell, concept, ...more) {
  const { name } = sample(stream, cell);
  const parts = tokens(name).map((token) => (token === concept ? el("b", {}, token) : token));
  return el("li", { className: bears(name, concept) ? "bears" : "", title: name }, el("span", {}, parts), ...more);
}

/** A latent's samples in one stream: a row of pictures, or a list of names. */
function samples(latent, side, stream, count, bars = false) {
  const { samples, strength } = latent.models[side];
  const cells = samples[stream].slice(0, count);
  if (!cells.length) return el("p", { className: "small" }, "never fires");
  const level = (i) => (bars ? [bar(strength[stream][i] / 100)] : []);
  if (!data.streams[stream].pictures) {
    const names = cells.map((cell, i) => nameItem(stream, cell, latent.concept, ...level(i)));
    return el("ul", { className: "names" }, names);
  }
  const pictures = cells.map((cell, i) => {
    const glyph = picture(stream, cell, latent.concept);
    return bars ? el("span", { className: `sample${glyph.matches(".bears") ? " bears" : ""}` }, glyph, ...level(i)) : glyph;
  });
  const spoken = cells.map((cell) => sample(stream, cell).name).join(", ");
  return el("div", { className: "pictures", role: "img", "aria-label": spoken }, pictures);
}

/** One model's view of a latent: every stream, its shared word and its samples. */
function model(latent, side, pictures, names, detailed = false) {
  const { word, stats } = latent.models[side];
  const rows = data.streams.map(({ name, about, pictures: drawn }, stream) => {
    const shared = word[stream] || "mixed";
    const kind = !word[stream] ? "mixed" : word[stream] === latent.concept ? "bears" : "";
    const label = el("div", { className: "label", title: about }, name, el("b", { className: kind }, shared));
    return el("div", { className: "stream" }, label, samples(latent, side, stream, drawn ? pictures : names, detailed));
  });
  const heading = el(detailed ? "h2" : "h4", { className: "when" }, side ? "After: " : "Before: ", data.models[side].name);
  return el("div", { className: `model ${SIDES[side]}` }, heading, detailed ? statistics(stats) : null, rows);
}

function statistics(stats) {
  const lines = stats.map((x, i) =>
    el("div", {}, el("dt", {}, STATS[i]), el("dd", {}, format(i, x)), i === 1 ? null : bar(x ?? 0)));
  return el("dl", { className: "stats" }, lines);
}

function chosen(latent) {
  const heading = el("h3", {}, el("a", { href: `#latent=${latent.id}` }, title(latent)));
  const [agreement, frequency] = latent.models[1].stats;
  const about = el("div", {}, heading, el("small", {}, `latent ${latent.id}`), statistics([agreement, frequency]));
  return el("article", { className: "chosen" }, about, model(latent, 0, 9, 3), model(latent, 1, 9, 3));
}

function card(latent) {
  const head = el("div", { className: "title" }, el("b", {}, title(latent)), el("span", {}, `latent ${latent.id}`));
  const rows = data.streams.map(({ pictures }, stream) => samples(latent, 1, stream, pictures ? 9 : 2));
  const link = el("a", { className: "card", href: `#latent=${latent.id}` }, head, rows, statistics(latent.models[1].stats));
  return el("li", {}, link);
}

// The browser

const [list, more, search, sort, count] =
  ["list", "more", "search", "sort", "count"].map((id) => document.getElementById(id));
let found = [];

function show() {
  const shown = list.childElementCount;
  list.append(...found.slice(shown, shown + BATCH).map(card));
  more.hidden = list.childElementCount >= found.length;
}

function browse() {
  const query = search.value.trim().toUpperCase();
  const value = (latent) => latent.models[1].stats[sort.value] ?? -1;
  const alphabetical = (a, b) => (a.concept || "\uffff").localeCompare(b.concept || "\uffff");
  const order = sort.value === "concept" ? alphabetical : (a, b) => value(b) - value(a);
  found = data.latents
    .filter(({ concept, id }) => concept.toUpperCase().includes(query) || String(id) === query)
    .sort((a, b) => order(a, b) || a.id - b.id);
  count.value = `${found.length} of ${data.latents.length} live latents`;
  list.replaceChildren();
  show();
}

// A latent's page, at #latent=123

function latentPage(id) {
  const latent = latents.get(id);
  const home = el("a", { href: "#latents" }, "← All latents");
  if (!latent) return [home, el("h1", { tabIndex: -1 }, `Latent ${id} is dead`), el("p", {}, "No sample fires it.")];
  const place = found.indexOf(latent);
  const step = (text, other, key) =>
    other ? el("a", { href: `#latent=${other.id}`, "data-key": key, title: other.concept }, text) : null;
  const steps = el("span", {}, step("← previous", found[place - 1], "ArrowLeft"), step("next →", found[place + 1], "ArrowRight"));
  return [
    el("nav", { className: "way", "aria-label": "Latents" }, home, steps),
    el("p", { className: "kicker" }, `latent ${id}`),
    el("h1", { tabIndex: -1 }, title(latent)),
    el("p", {}, "The characters that fire this latent most, in each stream encoded alone; the bar is how strongly. ",
      el("mark", {}, "In colour"), ": the name bears the concept. On the right of each stream: the word its characters share most."),
    el("div", { className: "models" }, model(latent, 0, 12, 12, true), model(latent, 1, 12, 12, true)),
  ];
}

const [homeView, latentView] = [document.getElementById("home"), document.getElementById("latent")];
let homeScroll = null;

function route() {
  const match = /^#latent=(\d+)$/.exec(location.hash);
  if (match) {
    if (!homeView.hidden) homeScroll = scrollY;
    latentView.replaceChildren(...latentPage(Number(match[1])));
    latentView.dataset.id = match[1];
  }
  const returning = !match && homeView.hidden;
  const seen = latentView.dataset.id;
  homeView.hidden = Boolean(match);
  latentView.hidden = !match;
  if (match) {
    scrollTo(0, 0);
    latentView.querySelector("h1").focus();
  } else if (returning) {
    if (homeScroll === null) document.getElementById("latents").scrollIntoView();
    else scrollTo(0, homeScroll);
    list.querySelector(`[href="#latent=${seen}"]`)?.focus({ preventScroll: true });
  }
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
  const lines = data.models.map(({ curves }, side) => ({
    side,
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
    `${name}: ${lines.map(({ side, points }) => `${data.models[side].name} ends at ${short(points.at(-1)[1])}`).join(", ")}` });
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

// Everything

const key = data.models.map(({ name }, side) => el("span", { className: SIDES[side] }, el("i"), name));
document.getElementById("curves").append(
  el("div", { className: "legend" }, key), ...CURVES.map(chart).filter((figure) => figure !== null));
document.getElementById("chosen").append(
  ...(data.chosen.length ? data.chosen.map((id) => chosen(latents.get(id))) : ["No latent is alive in every stream of both models."]));
search.addEventListener("input", browse);
sort.addEventListener("change", browse);
document.getElementById("browse").addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", show);
addEventListener("keydown", (event) => {
  if (latentView.hidden || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape") location.hash = "latents";
  else if (event.key.startsWith("Arrow")) latentView.querySelector(`[data-key="${event.key}"]`)?.click();
});
addEventListener("hashchange", route);
history.scrollRestoration = "manual";
browse();
route();
