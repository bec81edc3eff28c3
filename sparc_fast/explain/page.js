"use strict";

const STATS = ["agreement", "frequency", "held-out Jaccard"];
const BATCH = 24; // cards drawn at a time
const OVERVIEW = { pictures: 9, texts: 3 };
const byId = (id) => document.getElementById(id);
const [homeView, view, list, more, search, sort, count, foundSamples] =
  ["home", "view", "list", "more", "search", "sort", "count", "found"].map(byId);

// Latents

const names = (place) => index.names[place].map((word) => index.words[word]);
const nameOf = (id) => (places.has(id) ? (names(places.get(id))[0] ?? "") : "");
const unnamed = () => el("span", { className: "unnamed" }, data.named ? "no shared concept" : "unnamed");
const title = (id) => (nameOf(id) ? el("bdi", {}, nameOf(id)) : unnamed());
const spoken = (id) => nameOf(id) || `latent ${id}`;
const format = (stat, x) => (x === null ? "–" : stat === 1 ? percent(x) : x.toFixed(2));
const otherNames = (id) => names(places.get(id)).slice(1).join(", ");
const statsOf = (id) => index.stats.map((column) => column[places.get(id)]);

function statistics(stats, shown = data.jaccard ? 3 : 2) {
  const lines = stats.slice(0, shown).map((x, i) =>
    el("div", {}, el("dt", {}, STATS[i]), el("dd", {}, format(i, x)), i === 1 ? null : bar(x ?? 0)));
  return el("dl", { className: "stats" }, lines);
}

/** Of some latents what is drawn, and the entries of the samples in it. */
async function latentsWith(ids, sides, count) {
  const found = await loadAll("latents", ids.map((id) => places.get(id)));
  const latents = new Map(ids.map((id) => [id, found.get(places.get(id))]));
  const numbers = [...latents.values()].flatMap(({ models }) =>
    sides.flatMap((side) => models[side].streams.flatMap(([numbers]) => numbers.slice(0, count))));
  return [latents, await loadAll("texts", numbers)];
}

const everySide = () => data.models.map((_, side) => side);
const after = () => data.models.length - 1;

/** One model's view of a latent: every stream, the concept its samples share, and the samples. */
function model(id, { models }, side, entries, detailed = false, heading = null) {
  const { stats, streams } = models[side];
  const silent = data.streams.filter((_, s) => !streams[s][0].length);
  const rows = data.streams.map(({ name, about }, s) => {
    const [{ length }, , , shared] = streams[s];
    if (detailed && !length) return null;
    const kind = !shared ? "mixed" : shared === nameOf(id) ? "bears" : "";
    const concept = data.named && length ? el("b", { className: kind }, shared || "mixed") : null;
    const label = el("div", { className: "label", title: about }, el("bdi", {}, name), concept);
    const count = detailed ? Infinity : drawn(s) ? OVERVIEW.pictures : OVERVIEW.texts;
    return el("div", { className: `stream${drawn(s) ? "" : " texts"}` }, label,
      samples(s, streams[s], entries, nameOf(id), count, detailed));
  });
  if (detailed && silent.length) {
    const those = silent.flatMap(({ name }, i) => [i ? ", " : "", el("bdi", {}, name)]);
    rows.push(el("div", { className: "stream" }, el("p", { className: "small" }, "never fires in ", those)));
  }
  const when = data.models.length === 1 ? "" : ["Before: ", "After: "][side];
  const head = heading ?? [when, el("bdi", {}, data.models[side].name)];
  return el("div", { className: `model ${SIDES[sideOf(side)]}` },
    el(detailed ? "h2" : "h4", { className: "when" }, head), detailed ? statistics(stats) : null, rows);
}

async function chosen() {
  const home = byId("chosen");
  if (!data.chosen.length) {
    home.append("No latent is alive in every stream.");
    return;
  }
  const [latents, entries] = await latentsWith(data.chosen, everySide(), OVERVIEW.pictures);
  home.append(...data.chosen.map((id) => {
    const heading = el("h3", {}, el("a", { href: `#latent=${id}` }, title(id)));
    const also = otherNames(id) ? el("p", { className: "also" }, el("bdi", {}, otherNames(id))) : null;
    const about = el("div", {}, heading, also, el("small", {}, `latent ${id}`), statistics(statsOf(id), 2));
    return el("article", { className: `chosen${data.models.length === 1 ? " alone" : ""}` }, about,
      everySide().map((side) => model(id, latents.get(id), side, entries)));
  }));
}

function card(id, latent, entries, note) {
  const head = el("div", { className: "title" }, el("a", { href: `#latent=${id}` }, title(id)), el("span", {}, `latent ${id}`));
  const also = note ?? (otherNames(id) ? el("bdi", {}, otherNames(id)) : null);
  const rows = data.streams.map((_, s) =>
    samples(s, latent.models[after()].streams[s], entries, nameOf(id), drawn(s) ? OVERVIEW.pictures : 2));
  return el("li", { className: "card" }, head, data.named || note ? el("p", { className: "also" }, also ?? "\u00a0") : null, rows,
    statistics(statsOf(id)));
}

// Browsing and searching: by name and number, and by the words that the items' texts have

let found = []; // [latent, note] in the order shown
let asked = 0;
let vocabulary = null; // word -> its place
const byName = (a, b) => (nameOf(index.ids[a]) || "\uffff").localeCompare(nameOf(index.ids[b]) || "\uffff");
const byStat = (a, b) => (index.stats[sort.value][b] ?? -1) - (index.stats[sort.value][a] ?? -1);

/** What a text speaks of: Map(latent -> thousandths of energy), and samples that have its words. */
async function evidence(text) {
  const known = await load("words");
  vocabulary ??= new Map(known.words.map((word, place) => [word, place]));
  const tokens = words(text);
  const at = tokens.flatMap((token, i) => {
    if (vocabulary.has(token)) return [vocabulary.get(token)];
    if (i < tokens.length - 1 || token.length < 2) return [];
    const begun = known.words.findIndex((word) => word.startsWith(token)); // the most frequent one
    return begun < 0 ? [] : [begun];
  });
  const weights = new Map();
  for (const place of at) {
    for (const [id, x] of known.latents[place]) weights.set(id, (weights.get(id) ?? 0) + x / at.length);
  }
  const times = new Map();
  for (const place of at) for (const n of known.samples[place]) times.set(n, (times.get(n) ?? 0) + 1);
  const samples = [...times].sort(([a, x], [b, y]) => y - x || a - b).slice(0, 12).map(([n]) => n);
  return { weights, samples, read: at.map((place) => known.words[place]).join(" ") };
}

async function browse() {
  const [mine, query] = [++asked, search.value.trim()];
  const all = [...index.ids.keys()].sort(sort.value === "name" ? byName : byStat);
  if (query === "") {
    found = all.map((place) => [index.ids[place], null]);
    foundSamples.hidden = true;
  } else {
    const { weights, samples, read } = await evidence(query);
    if (mine !== asked) return;
    const wanted = query.toLowerCase();
    const named = all.filter((place) => String(index.ids[place]) === query || names(place).some((name) => name.toLowerCase().includes(wanted)));
    const first = named.filter((place) => (names(place)[0] ?? "").toLowerCase() === wanted);
    const head = new Set([...first, ...named]);
    const told = [...weights].filter(([id]) => places.has(id) && !head.has(places.get(id))).sort(([, x], [, y]) => y - x);
    const note = (x) => ["“", el("bdi", {}, read), `”: ${percent(x / 1000)} more of its energy`];
    found = [...[...head].map((place) => [index.ids[place], null]), ...told.map(([id, x]) => [id, note(x)])];
    const entries = await loadAll("texts", samples);
    if (mine !== asked) return;
    foundSamples.hidden = !samples.length;
    foundSamples.replaceChildren(el("h3", {}, "Samples with “", el("bdi", {}, read), "”"), chips(samples, entries));
  }
  count.value = `${found.length.toLocaleString("en")} of ${index.ids.length.toLocaleString("en")} live latents`;
  list.replaceChildren();
  await show();
}

/** Samples as a list of links: a picture, where there is one, and the title. */
function chips(numbers, entries, own = -1) {
  return el("ul", { className: "chips" }, numbers.map((n) => {
    const entry = entries.get(n);
    const p = data.pictures.findIndex((_, i) => entry[2] & (1 << i));
    return el("li", {}, el("a", { href: `#sample=${n}`, className: n === own ? "bears" : "", title: fullTitle(entry) },
      p >= 0 ? picture(p, n, entry) : null, el("span", { className: "words" }, el("bdi", {}, titleOf(entry)))));
  }));
}

async function show() {
  const mine = asked;
  const shown = list.childElementCount;
  const next = found.slice(shown, shown + BATCH);
  const [latents, entries] = await latentsWith(next.map(([id]) => id), [after()], OVERVIEW.pictures);
  if (mine !== asked || list.childElementCount !== shown) return;
  list.append(...next.map(([id, note]) => card(id, latents.get(id), entries, note)));
  more.hidden = list.childElementCount >= found.length;
}

// Pages: #latent=3, #latents=3,7 compared, #sample=12

const way = (label, ...steps) =>
  el("nav", { className: "way", "aria-label": label }, el("a", { href: "#latents" }, "← All latents"), el("span", {}, steps));
const heading = (...children) => el("h1", { tabIndex: -1 }, ...children);
const kicker = (...children) => el("p", { className: "kicker" }, ...children);
const dead = (id) => (id < data.latents ? [way("Latents"), heading(`Latent ${id} is dead`), el("p", {}, "No sample fires it.")]
  : [way("Latents"), heading(`There is no latent ${id}`)]);

async function latentPage(id) {
  if (!places.has(id)) return dead(id);
  const [latents, entries] = await latentsWith([id], everySide(), Infinity);
  const latent = latents.get(id);
  const at = found.findIndex(([other]) => other === id);
  const step = (text, [other] = [], key = "") =>
    other === undefined ? null : el("a", { href: `#latent=${other}`, "data-key": key, title: spoken(other) }, text);
  return [
    way("Latents", step("← previous", found[at - 1], "ArrowLeft"), at < 0 ? null : step("next →", found[at + 1], "ArrowRight")),
    kicker(`latent ${id}`),
    heading(title(id)),
    otherNames(id) ? el("p", { className: "lead" }, "also: ", el("bdi", {}, otherNames(id))) : null,
    el("p", {}, "The samples that fire this latent most, in each stream encoded alone; the bar is how strongly.",
      data.named ? [" ", el("mark", {}, "In colour"), ": it bears the concept. Beside each stream’s name: the concept its samples share most."] : null),
    el("div", { className: `models${data.models.length === 1 ? " alone" : ""}` }, everySide().map((side) => model(id, latent, side, entries, true))),
    latent.together.length ? together(id, latent.together) : null,
  ];
}

function together(id, others) {
  return el("section", { className: "together" }, el("h2", {}, "Fires together with"),
    el("p", {}, "How many of the samples that fire this latent most fire the other one too, and how many of all samples do."),
    el("ul", {}, others.filter(([other]) => places.has(other)).map(([other, share]) => el("li", {},
      el("a", { href: `#latent=${other}` }, title(other)), el("span", { className: "small" }, `latent ${other}`),
      bar(share / 100), el("span", { className: "small" }, `${share} % (of all: ${percent(statsOf(other)[1])})`),
      el("a", { href: `#latents=${id},${other}`, "aria-label": `compare with ${spoken(other)}` }, "compare")))));
}

async function pairPage(a, b) {
  const lost = [a, b].find((id) => !places.has(id));
  if (lost !== undefined) return dead(lost);
  const [latents, entries] = await latentsWith([a, b], [after()], Infinity);
  const [one, other] = [a, b].map((id) => latents.get(id).models[after()].streams.map(([numbers]) => numbers));
  const both = data.streams.map(({ name }, s) => el("div", {}, el("dt", {}, el("bdi", {}, name)),
    el("dd", {}, String(one[s].filter((n) => other[s].includes(n)).length))));
  const share = (from, to) => latents.get(from).together.find(([id]) => id === to)?.[1];
  const told = [[a, b], [b, a]].filter(([from, to]) => share(from, to) !== undefined).map(([from, to]) =>
    el("p", {}, "Of the samples that fire ", el("b", {}, title(from)), ` most, ${share(from, to)} % fire `, el("b", {}, title(to)), "."));
  return [
    way("Latents"), kicker(`latents ${a} and ${b}`), heading(title(a), el("span", { className: "unnamed" }, " and "), title(b)),
    told, el("p", {}, "Samples among the strongest of both:"), el("dl", { className: "both" }, both),
    el("div", { className: "models" }, [a, b].map((id) => model(id, latents.get(id), after(), entries, true,
      el("a", { href: `#latent=${id}` }, title(id), ` · latent ${id}`)))),
  ];
}

async function samplePage(n) {
  if (!(n < data.samples)) return [way("Samples"), heading(`There is no sample ${n}`)];
  const sample = (await loadAll("samples", [n])).get(n);
  const near = sample.near.flat(2);
  const entries = await loadAll("texts", [n, ...near]);
  const entry = entries.get(n);
  const times = new Map();
  for (const code of sample.codes) for (const [id] of code) times.set(id, (times.get(id) ?? 0) + 1);
  const pictures = data.pictures.map((kind, p) => ({ ...kind, p })).filter(({ p }) => entry[2] & (1 << p));
  const lines = [...data.texts.map((name, i) => [name, sample.texts[i]]), ...data.about.map((name, i) => [name, sample.about[i]])];
  return [
    way("Samples"), kicker(el("bdi", {}, entry[0]), entry[1] ? " · kept from training" : ""),
    el("h1", { tabIndex: -1, className: titleOf(entry).length > 60 ? "long" : "" }, el("bdi", {}, titleOf(entry))),
    el("div", { className: "sample-head" },
      pictures.map(({ p, title }) => el("figure", { role: "img", "aria-label": `${title}: ${titleOf(entry)}` }, picture(p, n, entry),
        data.pictures.length > 1 ? el("figcaption", {}, title) : null)),
      el("dl", { className: "lines" }, lines.filter(([, text]) => text !== "").map(([name, text]) =>
        el("div", {}, el("dt", {}, el("bdi", {}, name)), el("dd", { dir: "auto" }, text))))),
    el("p", {}, "The latents that each stream, encoded alone, describes this sample with, by their share of the code’s energy. ",
      el("mark", {}, "In colour"), ": latents of more than one stream."),
    el("div", { className: "streams" }, data.streams.map(({ name, about }, s) => el("section", { className: "says" },
      el("h2", {}, el("bdi", {}, name)), about ? el("p", { className: "small" }, about) : null,
      sample.codes[s].length ? el("ol", { className: "codes" }, sample.codes[s].map(([id, x]) => el("li", { className: times.get(id) > 1 ? "bears" : "" },
        el("a", { href: `#latent=${id}` }, title(id), el("small", {}, ` ${id}`)), bar(x / 1000), el("span", { className: "small" }, percent(x / 1000)))))
        : el("p", { className: "small" }, "Nothing: the stream lacks this sample, or no latent fires."),
      sample.near[s].map((numbers, t) => (numbers.length
        ? [el("h3", {}, "Nearest in ", el("bdi", {}, data.streams[t].name)), chips(numbers, entries, n)] : null)),
    ))),
  ];
}

const PAGES = [
  [/^#latent=(\d+)$/, latentPage],
  [/^#latents=(\d+),(\d+)$/, pairPage],
  [/^#sample=(\d+)$/, samplePage],
];
let homeScroll = null;
let routed = 0;

async function route() {
  const mine = ++routed;
  const { hash } = location;
  const [match, page] = PAGES.map(([form, page]) => [form.exec(hash), page]).find(([match]) => match) ?? [null];
  if (match) {
    if (!homeView.hidden) homeScroll = scrollY;
    const content = await page(...match.slice(1).map(Number)).catch(failed);
    if (mine !== routed) return;
    view.replaceChildren(...content.flat(Infinity).filter((node) => node !== null));
    view.dataset.hash = hash;
  }
  const returning = !match && homeView.hidden;
  homeView.hidden = Boolean(match);
  view.hidden = !match;
  if (match) {
    scrollTo(0, 0);
    view.querySelector("h1").focus();
  } else if (returning) {
    if (homeScroll === null) byId("latents").scrollIntoView();
    else scrollTo(0, homeScroll);
    list.querySelector(`[href="${CSS.escape(view.dataset.hash)}"]`)?.focus({ preventScroll: true });
  }
}

/** A page that says what is missing. */
function failed(error) {
  console.error(error);
  return [way("Latents"), heading("This cannot be shown"), el("p", {}, `${error.message}. The page needs the folder that it was written with.`)];
}

// Everything

started.then(async () => {
  const curves = byId("curves");
  if (curves) {
    const key = data.models.map(({ name }, side) => el("span", { className: SIDES[sideOf(side)] }, el("i"), name));
    curves.append(el("div", { className: "legend" }, key), ...CURVES.map(chart).filter((figure) => figure !== null));
  }
  search.placeholder = data.named && index.words.length ? `${index.words.slice(0, 2).join(", ")}, 123 …` : "123 …";
  search.addEventListener("input", () => browse().catch(console.error));
  search.addEventListener("focus", () => load("words"), { once: true });
  sort.addEventListener("change", () => browse().catch(console.error));
  byId("browse").addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => show().catch(console.error));
  addEventListener("keydown", (event) => {
    if (view.hidden || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") location.hash = "latents";
    else if (event.key.startsWith("Arrow")) view.querySelector(`[data-key="${event.key}"]`)?.click();
  });
  addEventListener("hashchange", route);
  history.scrollRestoration = "manual";
  await Promise.all([chosen(), browse()]);
  await route();
  document.documentElement.dataset.ready = "";
}).catch((error) => {
  document.body.prepend(el("main", {}, failed(error)));
});
