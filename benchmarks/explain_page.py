"""How fast the page of latents is written, opened and looked through in a browser, at any size.

    python -m benchmarks.explain_page --samples 100000 --latents 32768 --out /tmp/page

Samples, codes and pictures are made up. Needs selenium, Chromium and its driver.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparc_fast.evaluate import Carried, firing_agreement, latent_use
from sparc_fast.explain import Items, ModelReport, Report, Stream, Thumbnails, write_report

STREAMS, WORDS, K = 4, 3000, 16
PATIENCE = 60  # seconds


def made_up(n: int, n_latents: int, seed: int = 0) -> Report:
    """A report of samples whose streams share three of four latents."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    concept = rng.integers(0, n_latents, n)
    shared = (concept[:, None] + np.arange(K) * 7919) % n_latents
    codes = {}
    for s in range(STREAMS):
        own = (concept[:, None] * 31 + np.arange(K) * 104729 + s) % n_latents
        indices = np.where(np.arange(K) % 4 == 3, own, shared).astype(np.int32)
        values = rng.gamma(2.0, 1.0, (n, K)).astype(np.float32) / (1 + np.arange(K, dtype=np.float32))
        codes[f"stream {s}"] = torch.from_numpy(values), torch.from_numpy(indices)
    words = [f"word{i}" for i in range(WORDS)]
    said = np.sort(shared[:, :8] * 3 % WORDS)  # the first name of each of eight latents
    texts = [" ".join(words[w] for w in row) for row in said.tolist()]
    carried = Carried(torch.arange(0, 8 * n + 1, 8), torch.from_numpy(said.ravel()), WORDS)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((96, 96)) for _ in range(97)]
    items = Items(
        ids=[f"sample {row}" for row in range(n)],
        texts={"caption": texts},
        carried=carried,
        concepts=words,
        pictures={"picture": Thumbnails(n, lambda row: pictures[row % len(pictures)])},
    )
    names = [tuple(words[(l * 3 + i) % WORDS] for i in range(3)) for l in range(n_latents)]
    frequency = latent_use(codes, n_latents).frequency.mean(0).numpy()
    model = ModelReport("made up", codes, names, firing_agreement(codes, n_latents).numpy(), frequency)
    streams = {
        name: Stream("made up", text="caption" if s >= STREAMS // 2 else None, picture="picture")
        for s, name in enumerate(codes)
    }
    return Report(after=model, before=model, streams=streams, items=items)


def measure(page: Path, width: int, height: int, tries: int = 5) -> dict[str, Any]:
    """Seconds, medians of `tries`, in a headless browser that draws on the CPU; each opened in a new one."""
    from selenium import webdriver

    found: dict[str, list[float]] = {}
    for _ in range(tries):
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument(f"--window-size={max(width, 500)},{height}")
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.set_script_timeout(PATIENCE)
            driver.set_page_load_timeout(PATIENCE)
            if width < 500:
                phone = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
            began = time.perf_counter()
            driver.get(page.as_uri())
            while not driver.execute_script("return 'ready' in document.documentElement.dataset"):
                if time.perf_counter() - began > PATIENCE:
                    raise TimeoutError(f"{page} is not drawn after {PATIENCE} s: {driver.get_log('browser')}")
                time.sleep(0.01)
            found.setdefault("opened", []).append(time.perf_counter() - began)
            for what, script in STEPS.items():
                found.setdefault(what, []).append(_seconds(driver.execute_async_script(TIMED % script)))
            frames = driver.execute_async_script(SCROLL)
            found.setdefault("frame while scrolling, median", []).append(statistics.median(frames) / 1000)
            found.setdefault("frame while scrolling, 95 %", []).append(sorted(frames)[int(0.95 * len(frames))] / 1000)
            heap = driver.execute_script("return performance.memory.usedJSHeapSize")
            found.setdefault("heap, GB", []).append(heap / 1e9)
        finally:
            driver.quit()
    return {what: round(statistics.median(seconds), 3) for what, seconds in found.items()}


def _seconds(milliseconds: float | str) -> float:
    if isinstance(milliseconds, str):
        raise RuntimeError(milliseconds)
    return milliseconds / 1000


TIMED = """const done = arguments[0], began = performance.now();
(async () => { %s; await new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)));
done(performance.now() - began); })().catch((error) => done(String(error)));"""
STEPS = {
    "first search": "search.value = 'word17'; await browse()",
    "search": "search.value = 'word2991'; await browse()",
    "all again": "search.value = ''; await browse()",
    "sorted by name": "sort.value = 'name'; await browse()",
    "more": "await show()",
    "a latent": "location.hash = 'latent=77'; await route()",
    "a sample": "location.hash = 'sample=99999'; await route()",
    "back": "location.hash = 'latents'; await route()",
}
SCROLL = """const done = arguments[0], frames = []; let last = performance.now();
function frame(now) { frames.push(now - last); last = now; scrollBy(0, 40);
  if (frames.length < 120) requestAnimationFrame(frame); else done(frames.slice(1)); }
scrollTo(0, 0); requestAnimationFrame(frame);"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--latents", type=int, default=32_768)
    parser.add_argument("--out", type=Path, required=True, help="a page that is there is measured as it is")
    arguments = parser.parse_args()
    page = arguments.out.resolve() / "index.html"
    if not page.is_file():
        began = time.perf_counter()
        report = made_up(arguments.samples, arguments.latents)
        made = time.perf_counter()
        write_report(report, arguments.out)
        print(f"written in {time.perf_counter() - made:.0f} s, after {made - began:.0f} s to make it up")
    files = [path for path in arguments.out.rglob("*") if path.is_file()]
    print(f"{len(files):,} files, {sum(path.stat().st_size for path in files) / 1e6:,.0f} MB")
    for name, size in (("desktop", (1280, 900)), ("phone", (390, 844))):
        print(name, measure(page, *size), flush=True)


if __name__ == "__main__":
    main()
