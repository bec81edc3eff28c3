"""The report: a self-contained page and a picture."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from PIL import Image

from sparc_fast import explain
from sparc_fast.explain import ModelReport, Report, Row, choose_latents, write_report
from sparc_fast.explain.atlas import atlas, cells, columns
from sparc_fast.explain.latents import SharedWord, top
from sparc_fast.explain.page import page_data, render_page

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \" ' & \\ {{ 7 * 7 }} $x^2$"
CONCEPTS = ["ARROW", "CYRILLIC", "BRAILLE", "GREEK", "ACUTE", "ROMAN"]
STREAMS = {"sans": "its picture", "serif": "its other picture", "name": "its name"}


def model(rows_of: dict[str, list[list[int]]], concept: list[str], name: str, quality: np.ndarray) -> ModelReport:
    n_top = 10
    padded = {
        stream: np.array([(rows + [-1] * n_top)[:n_top] for rows in latents]) for stream, latents in rows_of.items()
    }
    values = {stream: np.where(rows >= 0, np.linspace(2, 1, n_top), 0.0) for stream, rows in padded.items()}
    curves = {"step": [0.0, 10.0, 20.0], "self": [1.0, 0.5, float("nan")], "dead": [0.0, 2.0, 3.0]}
    return ModelReport(name, padded, values, concept, quality, quality / 10, quality / 2, curves)


@pytest.fixture(scope="module")
def report() -> Report:
    """Two faces of 20 characters per concept; latent 2i and 2i+1 bear concept i after, and none before."""
    characters, owner = [], []
    for i, concept in enumerate(CONCEPTS):
        bearing = [c for c in map(chr, range(0x80, 0x2900)) if concept in unicodedata.name(c, "").split()]
        characters += bearing[:20]
        owner += [i] * 20
    n = len(characters)
    names = [unicodedata.name(c) for c in characters]
    rng = np.random.default_rng(0)
    images = {stream: rng.integers(0, 256, (2 * n, 12, 12), dtype=np.uint8) for stream in ("sans", "serif")}
    of = [[row for row in range(n) if owner[row] == i] for i in range(len(CONCEPTS))]
    live = 2 * len(CONCEPTS)
    after_rows = {s: [rng.permutation(of[i // 2]).tolist() for i in range(live)] + [[]] for s in STREAMS}
    before_rows = {s: [rng.permutation(n).tolist() for _ in range(live + 1)] for s in STREAMS}
    quality = np.append(np.linspace(0.9, 0.3, live), np.nan)
    concept = [CONCEPTS[i // 2] for i in range(live)] + [""]
    table = [
        Row("Jaccard", "How alike.", "higher", {"before": "0.02", "after": "0.21", "untrained": "0.01"}, "A", True),
        Row("L0", "How many.", "neither", {"before": "12", "after": "12"}, "B"),
    ]
    return Report(
        before=model(before_rows, concept, "before", quality),
        after=model(after_rows, concept, "after", quality),
        streams=STREAMS,
        characters=characters * 2,
        names=names * 2,
        faces=["regular"] * n + ["bold"] * n,
        images=images,
        table=table,
        settings={"seed": "0", "command": "sparc-fast demo"},
    )


@pytest.fixture(scope="module")
def hostile(report: Report) -> Report:
    """Every text that can come from outside is as bad as text can be."""
    bad = replace(report.after, name=HOSTILE, concept=[HOSTILE, *report.after.concept[1:]])
    rename = {"sans": HOSTILE, "serif": "serif", "name": "name"}

    def renamed(m: ModelReport) -> ModelReport:
        return replace(
            m,
            top_samples={rename[s]: x for s, x in m.top_samples.items()},
            top_values={rename[s]: x for s, x in m.top_values.items()},
        )

    return replace(
        report,
        before=renamed(report.before),
        after=renamed(bad),
        streams={HOSTILE: HOSTILE, "serif": "b", "name": "c"},
        names=[HOSTILE] * len(report.names),
        characters=["<", "&", '"', "\u2028", *report.characters[4:]],
        faces=[HOSTILE] * len(report.faces),
        images={rename[s]: x for s, x in report.images.items()},
        table=[Row(HOSTILE, HOSTILE, "lower", {HOSTILE: HOSTILE, "before": HOSTILE}, HOSTILE, True)],
        settings={HOSTILE: HOSTILE},
    )


def block(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_asks_for_nothing_outside_itself(report):
    page = render_page(report)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", page)
    assert not re.findall(r"url\((?!data:)", page)
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in page


def test_hostile_names_stay_text(hostile):
    page = render_page(hostile)
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "<!--" not in page
    assert "alert(1)</script>" not in page
    assert " 49 " not in page
    data = block(page)
    assert data["streams"][0]["name"] == HOSTILE
    assert data["latents"][0]["concept"] == HOSTILE
    assert {name for _, name in data["characters"]} == {HOSTILE}
    assert "\u2028" not in page.split('id="data">')[1].split("</script>")[0]


def test_hostile_names_can_be_drawn(hostile, tmp_path):
    page = write_report(hostile, tmp_path)
    assert page.stat().st_size > 0


def test_every_live_latent_is_on_the_page_with_its_samples(report):
    data = block(render_page(report))
    assert [latent["id"] for latent in data["latents"]] == np.flatnonzero(report.after.alive()).tolist()
    assert len(data["latents"]) == len(report.after.concept) - 1
    for latent in data["latents"]:
        for side, m in zip(latent["models"], (report.before, report.after), strict=True):
            for s, stream in enumerate(data["streams"]):
                found = [data["characters"][stream["cells"][cell][0]] for cell in side["samples"][s]]
                rows = list(top(report, m, stream["name"], latent["id"]))
                assert found == [[report.characters[row], report.names[row]] for row in rows]
                assert len(side["strength"][s]) == len(rows)
                assert side["strength"][s][0] == 100


def test_the_table_has_every_row_and_a_dash_where_a_model_has_no_number(report):
    page = render_page(report)
    table = page[page.index("<table>") : page.index("</table>")]
    assert re.findall(r"<td[^>]*>(.*?)</td>", table) == ["0.02", "0.21", "0.01", "12", "12", "–"]
    assert all(row.meaning in table and row.section in table for row in report.table)
    assert table.count('is better"') == 1  # L0 is neither
    figures = page[page.index('<dl class="figures">') : page.index("</dl>")]
    assert re.findall(r"<dt>(.*?)</dt>", figures) == ["Jaccard"]


def test_numbers_that_are_not_finite_become_null(report):
    jaccard = report.after.jaccard.copy()
    jaccard[0] = np.nan
    data = block(render_page(replace(report, after=replace(report.after, jaccard=jaccard))))
    assert data["latents"][0]["models"][1]["stats"][2] is None
    assert data["models"][1]["curves"]["self"] == [1.0, 0.5, None]


def test_a_character_is_shown_once_per_stream_in_its_strongest_face(report):
    n = len(report.characters) // 2
    rows = np.array([[3 + n, 3, 5, 5 + n, -1]])
    twice = ModelReport("m", {"sans": rows}, {"sans": np.array([[5.0, 4, 3, 2, 0]])}, [""], *[np.zeros(1)] * 3, {})
    assert top(report, twice, "sans", 0) == {3 + n: 5.0, 5: 3.0}


@pytest.mark.parametrize(("n", "height", "width"), [(1, 40, 40), (7, 12, 12), (10, 9, 14), (5, 60, 48)])
def test_a_picture_in_the_atlas_is_the_one_asked_for(n, height, width):
    images = np.random.default_rng(n).integers(0, 256, (n, height, width), dtype=np.uint8)
    sheet = np.array(Image.open(io.BytesIO(atlas(images))).convert("RGBA"))[..., 3]
    expected = cells(images)
    side = expected.shape[1]
    for i in range(n):
        y, x = (side * p for p in divmod(i, columns(n)))
        found = sheet[y : y + side, x : x + side].astype(int)
        assert np.abs(found - expected[i]).max() <= 9  # 16 levels
    if max(height, width) <= 40:
        y, x = 1 + (side - 2 - height) // 2, 1 + (side - 2 - width) // 2
        np.testing.assert_array_equal(expected[:, y : y + height, x : x + width], images)
    assert expected.sum(axis=(1, 2)).all()


def test_an_atlas_of_nothing_is_still_a_picture():
    assert Image.open(io.BytesIO(atlas(np.zeros((0, 8, 8), np.uint8)))).size[1] > 0


def test_the_cells_of_the_page_are_the_rows_of_its_atlas(report):
    data, rows = page_data(report)
    for stream in data["streams"]:
        for cell, row in zip(stream["cells"], rows[stream["name"]], strict=True):
            assert data["characters"][cell[0]] == (report.characters[row], report.names[row])
            assert data["faces"][cell[1]] == report.faces[row]


def test_the_shared_word_is_in_half_of_the_names_and_rare_elsewhere(report):
    shared_word = SharedWord(report)
    assert shared_word([n for n in report.names if "ARROW" in n.split()][:8]) == "ARROW"
    assert shared_word(["GREEK SMALL LETTER ALPHA", "BRAILLE PATTERN BLANK"]) == ""
    assert shared_word([]) == ""


def test_a_near_tie_goes_to_the_hint(report):
    braille = [n for n in report.names if n.startswith("BRAILLE")][:8]
    assert {SharedWord(report)(braille, hint) for hint in ("BRAILLE", "PATTERN")} == {"BRAILLE", "PATTERN"}


def test_chosen_latents_are_always_the_same_and_of_distinct_concepts(report):
    chosen = choose_latents(report)
    assert chosen == choose_latents(report)
    assert len(chosen) == len(CONCEPTS)
    assert len({report.after.concept[latent] for latent in chosen}) == len(chosen)
    assert chosen[0] == 0  # the most aligned
    assert choose_latents(report, 2) == chosen[:2]


def test_a_latent_that_is_silent_in_a_stream_of_either_model_is_not_chosen(report):
    silent = report.before.top_samples["name"].copy()
    silent[0] = -1
    before = replace(report.before, top_samples=report.before.top_samples | {"name": silent})
    assert 0 not in choose_latents(replace(report, before=before))
    silent[:] = -1
    assert choose_latents(replace(report, before=before)) == []


def test_a_latent_whose_samples_lack_its_concept_is_not_preferred(report):
    concept = ["ROMAN", *report.after.concept[1:]]
    chosen = choose_latents(replace(report, after=replace(report.after, concept=concept)))
    assert chosen[0] != 0


def test_the_report_is_a_page_and_a_picture(report, tmp_path):
    page = write_report(report, tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / explain.PAGE
    assert sorted(p.name for p in page.parent.iterdir()) == [explain.HEADLINE, explain.PAGE]
    picture = Image.open(page.with_name(explain.HEADLINE))
    assert picture.width == 1600
    assert len(np.unique(np.array(picture.convert("L")))) > 50


def test_a_report_without_choosable_latents_is_still_written(report, tmp_path):
    nameless = replace(report, after=replace(report.after, concept=[""] * len(report.after.concept)))
    assert block(write_report(nameless, tmp_path).read_text("utf-8"))["chosen"] == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("No space left on device")])
def test_a_failed_write_leaves_the_previous_report(report, tmp_path, monkeypatch, interruption):
    write_report(report, tmp_path)
    previous = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_):
        raise interruption

    monkeypatch.setattr("sparc_fast.explain.write.os.replace", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_report(replace(report, settings={"seed": "1"}), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == previous


def test_a_folder_that_cannot_be_written_is_one_clear_error(report, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file.*: Not a directory"):
        write_report(report, tmp_path / "file" / "folder")


def test_a_missing_extra_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setattr("sparc_fast.explain.write.find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(ImportError, match=r"jinja2: pip install 'sparc_fast\[demo\]'"):
        write_report(report, tmp_path)


def test_columns_of_different_lengths_are_refused(report):
    with pytest.raises(ValueError, match=r"names must be one per character \(\d+\), got 1"):
        replace(report, names=["A"])
    with pytest.raises(ValueError, match=r"images\['sans'\] must be one per .*, got 3"):
        replace(report, images={"sans": np.zeros((3, 4, 4), np.uint8)})
    with pytest.raises(ValueError, match="agreement of before must be of 13 latents, got 2"):
        replace(report, before=replace(report.before, agreement=np.zeros(2)))
    with pytest.raises(ValueError, match="before must have the streams"):
        replace(report, streams={"sans": ""})


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def browse(url: str, profile: Path) -> tuple[str, str]:
    """The page's elements once its scripts have run, and the browser's log."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@needs_chromium
@pytest.mark.parametrize("which", ["report", "hostile"])
def test_a_browser_fills_the_list_without_errors(which, request, tmp_path):
    report = request.getfixturevalue(which)
    dom, log = browse(write_report(report, tmp_path / "report").as_uri(), tmp_path / "profile")
    assert re.search(r'id="count"[^>]*>12 of 12 live latents<', dom)
    assert len(re.findall(r'<a class="card"', dom)) == 12
    assert len(re.findall(r'<article class="chosen"', dom)) == len(choose_latents(report))
    assert len(re.findall(r"<figure", dom)) == 2
    assert "CONSOLE" not in log


@needs_chromium
def test_a_phone_can_search_and_visit_a_latent_and_come_back(report, tmp_path):
    """In a frame of 390 pixels, for the browser's own window cannot be as narrow as a phone."""
    page = write_report(report, tmp_path)
    steps = """<script>
    const state = () => ({
      home: !document.getElementById("home").hidden,
      heading: document.querySelector("#latent h1")?.textContent,
      glyphs: document.querySelectorAll("#latent .picture").length,
      cards: document.querySelectorAll(".card").length,
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      focus: document.activeElement.getAttribute("href"),
      y: Math.round(scrollY),
    });
    const wait = () => new Promise((done) => setTimeout(done, 100));
    const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    (async () => {
      const seen = [state()];
      const act = async (what) => { what(); await wait(); seen.push(state()); };
      const search = document.getElementById("search");
      await act(() => { search.value = "cyril"; search.dispatchEvent(new Event("input")); });
      await act(() => { scrollTo(0, 300); document.querySelector(".card").click(); });
      await act(() => press("ArrowRight"));
      await act(() => history.back());
      await act(() => history.back());
      await act(() => { location.hash = "latent=12"; });
      await act(() => press("Escape"));
      parent.postMessage(seen, "*");
    })();
    </script></body>"""
    page.write_text(page.read_text("utf-8").replace("</body>", steps), "utf-8")
    host = tmp_path / "phone.html"
    host.write_text("""<iframe src="index.html" style="width: 390px; height: 800px; border: 0"></iframe>
    <pre></pre><script>
    onmessage = ({ data }) => { document.querySelector("pre").textContent = JSON.stringify(data); };
    </script>""")
    dom, log = browse(host.as_uri(), tmp_path / "profile")
    assert "CONSOLE" not in log
    start, found, latent, following, back, home, dead, escaped = json.loads(re.search("<pre>(.*)</pre>", dom)[1])
    assert (start["home"], start["cards"]) == (True, 12)
    assert found["cards"] == 2
    assert (latent["home"], latent["heading"], latent["y"]) == (False, "CYRILLIC", 0)
    assert latent["glyphs"] == 2 * 2 * 10
    assert (following["home"], following["heading"]) == (False, "CYRILLIC")
    assert back == latent
    assert (home["home"], home["cards"], home["y"], home["focus"]) == (True, 2, 300, "#latent=2")
    assert dead["heading"] == "Latent 12 is dead"
    assert escaped["home"]
    assert {state["overflow"] for state in (start, found, latent, dead)} == {0}
