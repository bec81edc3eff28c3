"use strict";

// Pieces of data are scripts that call shard(name, content): opened from disk, a page may load no other data.

const base = new URL(".", document.currentScript.src);
const pieces = new Map(); // name -> { promise, resolve }

function piece(name) {
  if (!pieces.has(name)) {
    const found = {};
    found.promise = new Promise((resolve, reject) => Object.assign(found, { resolve, reject }));
    pieces.set(name, found);
  }
  return pieces.get(name);
}

globalThis.shard = (name, content) => piece(name).resolve(content);

/** The content of a piece, which is loaded once. */
function load(name) {
  const found = piece(name);
  if (!found.asked) {
    found.asked = true;
    const script = document.createElement("script");
    script.src = new URL(`${name}.js`, base);
    script.onload = () => script.remove();
    script.onerror = () => found.reject(new Error(`${name}.js is missing beside the page`));
    document.head.append(script);
  }
  return found.promise;
}

/** What a piece of a numbered kind has of some numbers: Map(number -> content). */
async function loadAll(kind, numbers) {
  const size = data.sizes[kind];
  const wanted = [...new Set(numbers)];
  const places = [...new Set(wanted.map((n) => Math.floor(n / size)))];
  const loaded = new Map(await Promise.all(places.map(async (place) => [place, await load(`${kind}/${place}`)])));
  return new Map(wanted.map((n) => [n, loaded.get(Math.floor(n / size))[n % size]]));
}

let data, index; // what is there from the start; all live latents
const places = new Map(); // latent -> its place in the index
const started = Promise.all([piece("start").promise, load("index")]).then(([start, found]) => {
  [data, index] = [start, found];
  index.ids.forEach((id, place) => places.set(id, place));
});
