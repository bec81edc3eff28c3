"""The report: a folder that opens from disk, and a picture."""

from __future__ import annotations

import base64
import io
import itertools
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from reports import CONCEPTS, HOSTILE, OF_CONCEPT, STREAMS, a_report, hostile, pieces, with_a_private_latent

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from PIL import Image

from sparc_fast import explain
from sparc_fast.explain import Ink, Items, Latent, ModelReport, Report, Stream, Thumbnails, choose_latents, write_report
from sparc_fast.explain.latents import Shown, tops_of
from sparc_fast.explain.pictures import columns
from sparc_fast.explain.relations import energy, fire_together, latents_of_words
from sparc_fast.explain.shards import Shards
from sparc_fast.explain.write import render_page


@pytest.fixture(scope="module")
def report() -> Report:
    return a_report()


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    return write_report(report, tmp_path_factory.mktemp("report") / "new" / "folder")


# --- safety ---


def test_the_page_asks_for_nothing_outside_its_folder(written):
    page = written.read_text("utf-8")
    (folder,) = written.parent.glob("report-*")
    asked = set(re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']*)""", page))
    assert asked == {f"{folder.name}/{name}" for name in ("page.css", "load.js", "start.js", "draw.js", "page.js")}
    for text in (page, *(path.read_text("utf-8") for path in folder.iterdir() if path.suffix in (".js", ".css"))):
        assert set(re.findall(r"(?:https?:)?//[a-z][^\s\"'<)]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"\beval\(|innerHTML|insertAdjacentHTML|document\.write|new Function", text)


def test_the_content_security_policy_allows_files_of_the_page_alone(written):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', written.read_text("utf-8"))
    assert policy == (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; base-uri 'none'; "
        "form-action 'none'"
    )


def test_hostile_texts_stay_text(report, tmp_path):
    bad = hostile(report)
    page = write_report(bad, tmp_path)
    text = page.read_text("utf-8")
    assert text.count("<script") == text.count("</script") == 4
    assert "<!--" not in text
    assert "<img" not in text
    assert " 49 " not in text
    start = pieces(page, "start")
    assert [stream["name"] for stream in start["streams"]] == [HOSTILE, "__proto__", "constructor"]
    assert start["models"][1]["name"] == HOSTILE
    assert HOSTILE in pieces(page, "index")["words"]
    assert {texts[0].rstrip("?") for *_, texts in pieces(page, "texts")} == {HOSTILE}
    assert pieces(page, "samples")[0]["about"][1].rstrip("?") == HOSTILE


# --- what is on the page ---


def test_every_live_latent_is_on_the_page_with_its_samples_in_every_stream(report, written):
    index, latents, texts = (pieces(written, kind) for kind in ("index", "latents", "texts"))
    assert sorted(index["ids"]) == list(range(2 * len(CONCEPTS)))  # the last is dead
    assert index["stats"][0] == sorted(index["stats"][0], reverse=True)
    for id, latent in zip(index["ids"], latents, strict=True):
        for side, model in zip(latent["models"], (report.before, report.after), strict=True):
            tops = tops_of(report, model)
            for s in range(len(STREAMS)):
                numbers, strength, bears, _ = side["streams"][s]
                assert [texts[n][0] for n in numbers] == [report.items.ids[row] for row in tops.of(s, id)]
                assert strength[0] == 100
                concept = report.after.concept(id)
                assert bears == [int(concept in report.items.texts["name"][row].split()) for row in tops.of(s, id)]
        assert [shared for *_, shared in latent["models"][1]["streams"]] == [CONCEPTS[id // 2]] * len(STREAMS)
    names = [index["words"][several[0]] for several in index["names"]]
    assert names == [CONCEPTS[id // 2] for id in index["ids"]]


def test_samples_are_numbered_as_the_page_shows_them(report, written):
    start, index, latents = (pieces(written, kind) for kind in ("start", "index", "latents"))
    first = latents[index["ids"].index(start["chosen"][0])]
    assert first["models"][1]["streams"][0][0] == list(range(12))
    entries = pieces(written, "texts")
    assert sorted(id for id, *_ in entries) == sorted(report.items.ids)
    held_out = dict(zip(report.items.ids, report.items.held_out.tolist(), strict=True))
    assert all(bool(held) == held_out[id] for id, held, *_ in entries)


def test_a_missing_picture_is_marked_and_leaves_the_others_in_place(report, written):
    there = {id: flags for id, _, flags, _ in pieces(written, "texts")}
    assert there.pop(report.items.ids[3]) == 1  # ink, but no photo
    assert set(there.values()) == {3}
    (folder,) = written.parent.glob("report-*")
    order = [report.items.ids.index(id) for id, *_ in pieces(written, "texts")]
    photos = report.items.pictures["photo"]
    for sheet in range(2):
        drawn = np.asarray(Image.open(folder / f"pictures/1/{sheet}.webp").convert("RGBA")).astype(int)
        for cell, row in enumerate(order[64 * sheet : 64 * (sheet + 1)]):
            y, x = (96 * p for p in divmod(cell, 8))
            expected = photos.draw(row)
            found = drawn[y : y + 96, x : x + 96]
            if expected is None:
                assert not found[..., 3].any()
            else:
                assert np.abs(found[48, 48] - np.asarray(expected)[48, 48].astype(int)).max() < 12


def test_a_samples_page_has_its_texts_and_its_latents_by_share_of_energy(report, written):
    order = [id for id, *_ in pieces(written, "texts")]
    for n, sample in enumerate(pieces(written, "samples")):
        row = report.items.ids.index(order[n])
        assert sample["texts"] == [report.items.texts["name"][row]]
        assert sample["about"] == [report.items.about["point"][row]]
        for (values, indices), shown in zip(report.after.codes.values(), sample["codes"], strict=True):
            squares = {int(l): float(v) ** 2 for v, l in zip(values[row], indices[row], strict=True) if v > 0}
            shares = {l: round(1000 * x / sum(squares.values())) for l, x in squares.items()}
            assert dict(shown) == pytest.approx(shares, abs=1)
            assert [x for _, x in shown] == sorted((x for _, x in shown), reverse=True)


def test_words_lead_to_latents_and_samples(report, written):
    known = pieces(written, "words")
    place = known["words"].index("cyrillic")
    assert {l for l, _ in known["latents"][place][:2]} == {2, 3}
    texts = pieces(written, "texts")
    assert all("CYRILLIC" in texts[n][3][0] for n in known["samples"][place])


def test_the_table_has_every_row_and_a_dash_where_a_model_has_no_number(report):
    page = render_page(report, "pieces").decode()
    table = page[page.index("<table>") : page.index("</table>")]
    assert re.findall(r"<td[^>]*>(.*?)</td>", table) == ["0.02", "0.21", "0.01", "12", "12", "–"]
    assert all(row.meaning in table and row.section in table for row in report.table)
    assert table.count('is better"') == 1  # L0 is neither
    figures = page[page.index('<dl class="figures">') : page.index("</dl>")]
    assert re.findall(r"<dt>(.*?)</dt>", figures) == ["Jaccard"]


def test_numbers_that_are_not_finite_become_null(report):
    jaccard = report.after.jaccard.copy()
    jaccard[0] = np.nan
    shards = Shards(replace(report, after=replace(report.after, jaccard=jaccard)))
    index = shards.index()
    assert index["stats"][2][index["ids"].index(0)] is None
    assert dict(shards.start()["models"][1]["curves"])["self"] == [1.0, 0.5, None]


def test_a_report_without_labels_pictures_texts_or_another_model_is_written(report, tmp_path):
    bare = Report(
        after=replace(report.after, names=[()] * report.n_latents, jaccard=None, curves={}),
        before=None,
        streams=dict.fromkeys(STREAMS, Stream()),
        items=Items(ids=report.items.ids),
    )
    page = write_report(bare, tmp_path)
    assert len(pieces(page, "start")["chosen"]) == len(CONCEPTS) * 2
    assert pieces(page, "words") == {"words": [], "latents": [], "samples": []}
    assert "Before" not in page.read_text("utf-8")


# --- pictures ---


@pytest.mark.parametrize(("n", "height", "width"), [(1, 40, 40), (7, 12, 12), (300, 9, 14), (5, 60, 48)])
def test_an_ink_picture_in_the_sheet_is_the_one_asked_for(n, height, width):
    ink = Ink(np.random.default_rng(n).integers(0, 256, (n, height, width), dtype=np.uint8))
    rows = list(range(n))[::-1][:256]
    suffix, url, there = ink.write(rows)
    assert suffix == "js"
    assert there == [True] * len(rows)
    sheet = np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))[..., 3]
    for cell, row in enumerate(rows):
        y, x = (ink.side * p for p in divmod(cell, columns(ink.sheet)))
        expected = np.asarray(ink.draw(row)).astype(int)
        found = sheet[y : y + ink.side, x : x + ink.side].astype(int)
        assert np.abs(found - expected).max() <= 9  # 16 levels
        assert expected.any()


def test_a_thumbnail_is_the_whole_picture_in_the_middle_of_a_square():
    picture = Thumbnails(1, lambda _: Image.new("RGB", (30, 10), "red")).draw(0)
    alpha = np.asarray(picture)[..., 3]
    assert picture.size == (96, 96)
    assert np.flatnonzero(alpha.any(1)).tolist() == list(range(32, 64))
    assert alpha.any(0).all()


# --- choice ---


def test_of_samples_of_one_group_the_strongest_is_shown(report):
    groups = [str(row // 2) for row in range(len(report.items))]
    tops = tops_of(replace(report, items=replace(report.items, groups=groups)), report.after)
    plain = tops_of(report, report.after)
    for latent in range(report.n_latents - 1):
        shown, every = tops.of(0, latent), plain.of(0, latent)
        seen = set()
        expected = [row for row in every if not (row // 2 in seen or seen.add(row // 2))]
        assert shown[: len(expected)] == expected
        assert len({row // 2 for row in shown}) == len(shown)


def test_the_shared_concept_is_in_half_of_the_samples_and_rare_elsewhere(report):
    shown = Shown(report)
    assert shown.shared(list(range(8))) == "ARROW"
    assert shown.shared([0, OF_CONCEPT, 2 * OF_CONCEPT, 3 * OF_CONCEPT, 4 * OF_CONCEPT]) == ""
    assert shown.shared([]) == ""


def test_chosen_latents_are_always_the_same_and_of_distinct_concepts(report):
    chosen = choose_latents(report)
    assert chosen == choose_latents(report)
    assert len(chosen) == len(CONCEPTS)
    assert len({report.after.concept(latent) for latent in chosen}) == len(chosen)
    assert choose_latents(report, n=2) == chosen[:2]


def test_latents_of_the_concepts_asked_for_come_first(report):
    plain = [report.after.concept(latent) for latent in choose_latents(report)]
    asked = choose_latents(replace(report, first=[plain[3], "NO SUCH", plain[1], plain[3]]))
    assert [report.after.concept(latent) for latent in asked[:2]] == [plain[3], plain[1]]
    assert {report.after.concept(latent) for latent in asked} == set(plain)


def test_a_latent_that_is_silent_in_a_stream_of_either_model_is_not_chosen(report):
    first = choose_latents(report)[0]
    values, indices = report.before.codes["name"]
    silent = {**report.before.codes, "name": (values.masked_fill(indices == first, 0), indices)}
    assert first not in choose_latents(replace(report, before=replace(report.before, codes=silent)))
    silent["name"] = (torch.zeros_like(values), indices)
    assert choose_latents(replace(report, before=replace(report.before, codes=silent))) == []


def test_a_latent_whose_samples_lack_its_concept_is_not_chosen(report):
    first = choose_latents(report)[0]
    names = list(report.after.names)
    names[first] = (next(concept for concept in CONCEPTS if concept not in names[first]),)
    assert first not in choose_latents(replace(report, after=replace(report.after, names=names)))


def test_codes_come_as_encode_gives_them(report):
    followed = {s: (values.clone().requires_grad_(), indices) for s, (values, indices) in report.after.codes.items()}
    after = ModelReport.of("after", followed, report.n_latents, report.items)
    assert after.names == report.after.names
    assert Shards(replace(report, after=after)).chosen


def test_a_private_latent_has_the_frequency_of_its_stream_and_no_agreement(report):
    report, latent, stream = with_a_private_latent(report)
    model, (values, indices) = report.after, report.after.codes[stream]
    assert model.names[latent][-1] == "private to name"
    assert model.frequency[latent] == pytest.approx(((indices == latent) & (values > 0)).sum().item() / len(values))
    assert np.isnan(model.agreement[latent])
    index = Shards(report).index()
    place = index["ids"].index(latent)
    assert [index["stats"][i][place] for i in (0, 1)] == [None, pytest.approx(model.frequency[latent])]
    assert "agreement" not in repr(Latent(report, latent))


# --- relations ---


def test_what_fires_together_equals_counting(report):
    others, shares = fire_together(report.after.codes, report.after.frequency, n=3)
    dense = []
    for values, indices in report.after.codes.values():
        fires = torch.zeros(len(values), report.n_latents, dtype=torch.bool)
        dense.append(fires.scatter_(1, indices.long(), values > 0))
    fires = torch.cat(dense).double()
    share = (fires.T @ fires) / fires.sum(0).clamp_min(1)[:, None]
    excess = share - torch.as_tensor(report.after.frequency).double()
    for l in range(report.n_latents):
        excess[l, l] = -1
        for other, found in zip(others[l].tolist(), shares[l].tolist(), strict=True):
            assert other < 0 or found == pytest.approx(float(share[l, other]))
        best = [float(x) for x in excess[l].topk(3).values if x > 0]
        assert [float(excess[l, other]) for other in others[l].tolist() if other >= 0] == pytest.approx(best, abs=1e-6)


def test_a_samples_page_has_the_samples_of_largest_cosine_of_every_other_stream(report, written):
    shards, pages = Shards(report), pieces(written, "samples")
    codes = list(report.after.codes.values())
    dense = [torch.zeros(len(v), report.n_latents).scatter_(1, i.long(), v.clamp_min(0)) for v, i in codes]
    unit = [torch.nn.functional.normalize(x.double()) for x in dense]
    assert len(pages) == len(report.items)
    for row, sample in zip(shards.rows.tolist(), pages, strict=True):
        assert all(sample["near"][s][s] == [] for s in range(len(codes)))
        for s, t in itertools.permutations(range(len(codes)), 2):
            cosines = unit[t] @ unit[s][row]
            best = cosines.sort(descending=True).values[:6]
            found = [float(cosines[shards.rows[number]]) for number in sample["near"][s][t]]
            assert found == pytest.approx(best[best > 0].tolist(), abs=1e-6)


def test_a_word_speaks_of_the_latents_that_take_energy_where_it_is(report):
    latents, rises = latents_of_words(list(report.after.codes.values()), report.items.carried, report.n_latents, n=2)
    for concept, (found, rise) in enumerate(zip(latents.tolist(), rises.tolist(), strict=True)):
        assert set(found) == {2 * concept, 2 * concept + 1}
        assert rise == sorted(rise, reverse=True)
        mean = []
        for code in report.after.codes.values():
            at = (code[1] == found[0]) * energy(code)
            mean.append(at.sum(1)[OF_CONCEPT * concept :][:OF_CONCEPT].mean() - at.sum(1).mean())
        assert rise[0] == pytest.approx(float(sum(mean)) / 3, abs=1e-5)


# --- files ---


def test_the_report_is_a_page_its_pieces_and_a_picture(written):
    assert written.relative_to(written.parents[2]).as_posix() == f"new/folder/{explain.PAGE}"
    names = sorted(p.name for p in written.parent.iterdir())
    assert names[:2] == [explain.HEADLINE, explain.PAGE]
    assert len(names) == 3
    picture = Image.open(written.with_name(explain.HEADLINE))
    assert picture.width == 1600
    assert len(np.unique(np.array(picture.convert("L")))) > 50


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_report_gives_the_same_files_and_another_one_replaces_them(written, tmp_path):
    write_report(a_report(), tmp_path)
    assert files(tmp_path) == files(written.parent)
    write_report(a_report(seed=1), tmp_path)
    assert len(list(tmp_path.glob("report-*"))) == 1
    assert files(tmp_path).keys() != files(written.parent).keys()


@pytest.mark.parametrize(
    ("where", "interruption"),
    [("headline.render_headline", KeyboardInterrupt), ("shards.Shards.vocabulary", OSError("No space left on device"))],
)
def test_a_failed_write_leaves_the_previous_report(report, written, tmp_path, monkeypatch, where, interruption):
    folder = shutil.copytree(written.parent, tmp_path / "page")

    def fail(*_):
        raise interruption

    monkeypatch.setattr(f"sparc_fast.explain.{where}", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_report(replace(report, items=replace(report.items, ids=report.items.ids[::-1])), folder)
    assert files(written.parent).items() <= files(folder).items()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_folder_that_cannot_be_written_is_one_clear_error(report, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file.*: Not a directory"):
        write_report(report, tmp_path / "file" / "folder")


def test_a_missing_extra_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setattr("sparc_fast.explain.write.find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(ImportError, match=r"jinja2: pip install 'sparc_fast\[demo\]'"):
        write_report(report, tmp_path)


def test_columns_of_different_lengths_are_refused(report):
    items, before = report.items, report.before
    for whole, wrong, message in (
        (items, {"texts": {"name": ["A"]}}, r"texts\['name'\] must be one per sample \(\d+\), got 1"),
        (items, {"pictures": {"sans": Ink(np.zeros((3, 4, 4), np.uint8))}}, r"pictures\['sans'\] must be .*, got 3"),
        (
            report,
            {"before": replace(before, agreement=np.zeros(2))},
            "agreement of before must be of 13 latents, got 2",
        ),
        (report, {"before": replace(before, codes={"sans": before.codes["sans"]})}, "before must have the streams"),
        (report, {"streams": {**STREAMS, "sans": Stream(text="caption")}}, "text of stream 'sans' must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(whole, **wrong)


def test_the_atlas_has_a_row_a_sample_with_texts_latents_and_places(report, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from sparc_fast.explain.embedding_atlas import write_atlas

    write_atlas(report, tmp_path / "atlas.parquet")
    table = parquet.read_table(tmp_path / "atlas.parquet").to_pydict()
    assert table["id"] == report.items.ids
    assert table["name"] == report.items.texts["name"]
    assert all(latents.split(", ")[0] == "ARROW" for latents in table["latents of sans"][:OF_CONCEPT] if latents)
    places = np.stack([table["projection_x"], table["projection_y"]], 1)
    codes = torch.zeros(len(report.items), report.n_latents)
    for code in report.after.codes.values():
        codes.scatter_add_(1, code[1].long(), energy(code).sqrt())
    singular = torch.linalg.svdvals((codes - codes.mean(0)).double())
    assert np.linalg.norm(places) ** 2 == pytest.approx(float(singular[:2].square().sum()), rel=0.1)


def test_pieces_are_of_few_samples_and_latents_each(report, monkeypatch):
    monkeypatch.setattr("sparc_fast.explain.shards.TEXTS", 50)
    names = [name for name, _ in Shards(report).pieces() if name.startswith("texts/")]
    assert names == ["texts/0.js", "texts/1.js", "texts/2.js"]
