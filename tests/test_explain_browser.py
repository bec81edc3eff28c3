"""The page in a browser: opened from disk, by mouse and keyboard, on a desktop and a phone.

They run where Chromium and its driver are found; with SPARC_FAST_BROWSER=required they fail where not.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import CONCEPTS, HOSTILE, a_report, hostile, with_a_private_latent

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from sparc_fast.explain import Report, choose_latents, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
REQUIRED = os.environ.get("SPARC_FAST_BROWSER") == "required"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER) and not REQUIRED, reason="needs chromium and chromedriver"),
]
PATIENCE = 60  # seconds, of a busy machine


class Browser:
    """A page that waits until it is drawn."""

    def __init__(self, width: int, height: int, profile: Path) -> None:
        from selenium import webdriver

        assert CHROMIUM, "chromium is not installed"
        assert DRIVER, "chromedriver is not installed"
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
            f"--user-data-dir={profile}", f"--window-size={max(width, 500)},{height}",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(PATIENCE)
        if width < 500:  # a window is not as narrow as a phone
            phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)

    def open(self, page: Path) -> None:
        self.driver.get(page.as_uri())
        self.until("'ready' in document.documentElement.dataset")

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def value(self, expression: str) -> Any:
        return self.run(f"return {expression}")

    def until(self, condition: str) -> None:
        limit = time.monotonic() + PATIENCE
        while not self.value(f"Boolean({condition})"):
            assert time.monotonic() < limit, condition
            time.sleep(0.05)

    def visit(self, hash: str) -> None:
        self.run(f"location.hash = '{hash}'")
        self.until(f"view.dataset.hash === '#{hash}' && !view.hidden")

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def log(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int, int], Browser]]:
    browsers: dict[tuple[int, int], Browser] = {}

    def of_size(width: int, height: int) -> Browser:
        if (width, height) not in browsers:
            browsers[width, height] = Browser(width, height, tmp_path_factory.mktemp("profile"))
        return browsers[width, height]

    yield of_size
    for browser in browsers.values():
        browser.driver.quit()


@pytest.fixture(scope="module")
def desktop(opened: Callable[[int, int], Browser]) -> Browser:
    return opened(1280, 900)


@pytest.fixture(scope="module")
def report() -> Report:
    return a_report()


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(report, tmp_path_factory.mktemp("page"))


PAGES = ("latent=0", "latents=0,1", "sample=0")


def test_every_view_is_drawn_from_disk_without_errors_or_anything_but_the_pages_files(
    desktop: Browser, page: Path, report: Report
) -> None:
    desktop.requests()
    desktop.open(page)
    assert desktop.value("count.value") == "12 of 12 live latents"
    assert desktop.value("list.querySelectorAll('.card').length") == 12
    assert desktop.value("document.querySelectorAll('article.chosen').length") == len(choose_latents(report))
    assert desktop.value("document.querySelectorAll('#curves figure').length") == 2
    assert desktop.value("getComputedStyle(document.querySelector('.ink')).maskImage").startswith('url("data:image/png')
    for place in PAGES:
        desktop.visit(place)
    assert desktop.value("view.querySelectorAll('.says').length") == 3
    assert desktop.log() == []
    asked = desktop.requests()
    assert len({url for url in asked if "/report-" in url and url.endswith(".js")}) >= 9
    assert all(url.startswith((page.parent.as_uri(), "data:")) for url in asked)


def test_the_photos_are_loaded_from_the_folder(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    url = desktop.value("getComputedStyle(document.querySelector('.photo')).backgroundImage.slice(5, -2)")
    assert url.startswith(page.parent.as_uri())
    size = desktop.driver.execute_async_script(
        "const [url, done] = arguments; const image = new Image(); image.onload = () => done(image.naturalWidth);"
        "image.onerror = () => done(0); image.src = url;", url,
    )  # fmt: skip
    assert size == 8 * 96


def test_hostile_texts_are_shown_and_never_run(desktop: Browser, report: Report, tmp_path: Path) -> None:
    page = write_report(hostile(report), tmp_path)
    desktop.open(page)
    title = desktop.value("document.title")
    for place in PAGES:
        desktop.visit(place)
        assert "<img src=x" in desktop.value("view.textContent")
        assert desktop.value("document.querySelectorAll('img, script:not([src])').length") == 0
    desktop.visit("latent=0")
    assert desktop.value("view.querySelector('h1').textContent") == HOSTILE
    assert desktop.value("document.title") == title != "run"
    assert desktop.log() == []


def test_the_policy_refuses_a_script_in_the_page_and_another_origin(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    refused = desktop.driver.execute_async_script("""
        const done = arguments[0], refused = [];
        addEventListener("securitypolicyviolation", ({ effectiveDirective }) => {
          refused.push(effectiveDirective);
          if (refused.length === 3) done(refused.sort());
        });
        const script = document.createElement("script");
        script.textContent = "document.title = 'run'";
        document.body.append(script);
        new Image().src = "https://example.invalid/x.png";
        document.body.insertAdjacentHTML("beforeend", "<p onclick='document.title = 1'>");
        document.body.lastChild.click();
    """)
    assert refused == ["img-src", "script-src-attr", "script-src-elem"]
    assert desktop.value("document.title") != "run"
    desktop.log()


def test_names_words_and_numbers_are_found(desktop: Browser, page: Path) -> None:
    desktop.open(page)

    def search(text: str) -> list[str]:
        desktop.run(
            f"search.value = {text!r}; globalThis.done = false; browse().then(() => {{ globalThis.done = true; }})"
        )
        desktop.until("globalThis.done")
        return desktop.value("[...list.querySelectorAll('.title a')].map((a) => a.textContent)")

    assert search("cyril") == ["CYRILLIC"] * 2
    assert search("7") == [CONCEPTS[3]]
    small = search("capital")  # no latent's name, but a word of the texts
    assert small
    assert "more of its energy" in desktop.value("list.textContent")
    assert desktop.value("foundSamples.querySelectorAll('a').length") > 0
    assert search("xyzzy") == []
    assert desktop.value("count.value") == "0 of 12 live latents"
    assert len(search("")) == 12
    desktop.run("sort.value = '2'; sort.dispatchEvent(new Event('change'))")
    desktop.until("list.querySelector('.title span').textContent === 'latent 0'")


def test_the_keyboard_alone_goes_everywhere(desktop: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    desktop.open(page)
    desktop.run("search.focus()")
    desktop.press("cyril")
    desktop.until("list.childElementCount === 2")
    desktop.press(Keys.TAB, Keys.TAB)  # sort, then the samples that were found, then the latents
    while "#latent=" not in (desktop.value("document.activeElement.getAttribute('href')") or ""):
        desktop.press(Keys.TAB)
    first = desktop.value("document.activeElement.getAttribute('href')")
    desktop.press(Keys.ENTER)
    desktop.until(f"view.dataset.hash === '{first}' && document.activeElement.tagName === 'H1'")
    desktop.press(Keys.ARROW_RIGHT)
    desktop.until(f"view.dataset.hash !== '{first}'")
    assert desktop.value("view.querySelector('h1').textContent") == "CYRILLIC"
    while "#sample=" not in (desktop.value("document.activeElement.getAttribute('href')") or ""):
        desktop.press(Keys.TAB)
    desktop.press(Keys.ENTER)
    desktop.until("view.dataset.hash.startsWith('#sample=') && document.activeElement.tagName === 'H1'")
    desktop.press(Keys.ESCAPE)
    desktop.until("view.hidden")
    assert desktop.value("list.childElementCount") == 2


def test_back_returns_to_the_place_and_focus_that_were_left(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    desktop.run("scrollTo(0, 700)")
    link = desktop.value("list.querySelector('.title a').getAttribute('href')")
    desktop.run("list.querySelector('.title a').click()")
    desktop.until("!view.hidden")
    assert desktop.value("scrollY") == 0
    desktop.run("history.back()")
    desktop.until("view.hidden")
    assert desktop.value("Math.round(scrollY)") == 700
    assert desktop.value("document.activeElement.getAttribute('href')") == link


@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_no_view_is_wider_than_the_screen_however_long_the_texts(
    opened: Callable[[int, int], Browser], report: Report, tmp_path: Path, size: tuple[int, int]
) -> None:
    long = [name + " " + "W" * 300 + " كلمة طويلة " * 40 for name in report.items.texts["name"]]
    names = [tuple(word + "_of_a_very_long_class" * 4 for word in several) for several in report.after.names]
    browser, after = opened(*size), replace(report.after, names=names)
    items = replace(report.items, texts={"name": long})
    browser.open(write_report(replace(report, items=items, after=after), tmp_path))
    for place in (None, *PAGES):
        if place is not None:
            browser.visit(place)
        assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.value("getComputedStyle(document.querySelector('#view dd')).unicodeBidi") != ""


def test_what_is_no_text_has_a_label_and_every_link_and_control_a_name(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    for place in (None, *PAGES):
        if place is not None:
            desktop.visit(place)
        nameless = desktop.value("""[...document.querySelectorAll('a, button, input, select, [role=img]')].filter((node) =>
            node.offsetParent !== null && !node.getAttribute("aria-label") && !node.textContent.trim() &&
            !node.labels?.length).map((node) => node.outerHTML)""")
        assert nameless == []
        levels = desktop.value("[...document.querySelectorAll('main:not([hidden]) h1')].length")
        assert levels == 1
    assert desktop.value("document.documentElement.lang") == "en"


def test_a_missing_piece_is_said_on_the_page(desktop: Browser, report: Report, tmp_path: Path) -> None:
    page = write_report(report, tmp_path)
    (lost,) = tmp_path.glob("report-*/samples/0.js")
    lost.unlink()
    desktop.open(page)
    desktop.visit("sample=0")
    assert "samples/0.js is missing beside the page" in desktop.value("view.textContent")
    desktop.log()
    desktop.visit("latent=12")
    assert desktop.value("view.querySelector('h1').textContent") == "Latent 12 is dead"
    desktop.visit("latent=13")
    assert desktop.value("view.querySelector('h1').textContent") == "There is no latent 13"


def test_a_private_latent_shows_its_stream_and_names_the_silent_ones(
    desktop: Browser, report: Report, tmp_path: Path
) -> None:
    report, latent, stream = with_a_private_latent(report)
    desktop.open(write_report(report, tmp_path))
    desktop.visit(f"latent={latent}")
    labels = "[...view.querySelectorAll('.model .label > bdi')].map((node) => node.textContent)"
    assert desktop.value(labels) == [stream]
    others = ", ".join(name for name in report.streams if name != stream)
    text = desktop.value("view.querySelector('.model').textContent")
    assert text.endswith(f"never fires in {others}")
    assert "mixed" not in text


def test_the_words_of_a_text_are_those_that_python_finds(desktop: Browser, page: Path) -> None:
    from sparc_fast.evaluate import as_words

    desktop.open(page)
    for text in ("Grinning CAT’s हिन्दी 笑う猫3匹 don't", "ผู้หญิง мышь_кот 3D", "e\u0301te\u0301 ÇA", "𠀀𠀁x"):
        assert desktop.driver.execute_script("return words(arguments[0])", text) == as_words(text)
