"""Every source of items, in the shape in which people have it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction import picture, write_csv, write_pictures
from PIL import Image

from sparc_fast.data import FeatureFolder
from sparc_fast.extract import Extraction, Item, SourceConfig, StreamConfig, extract
from sparc_fast.extract.items import Failure, load_picture
from sparc_fast.extract.sources import open_source

pa = pytest.importorskip("pyarrow", reason="Parquet and Arrow are read by pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N = 7


def png(n: int) -> bytes:
    file = io.BytesIO()
    picture(n).save(file, "PNG")
    return file.getvalue()


def items(folder: Path, texts: tuple[str, ...] = ("text",), **config: Any) -> list[Item | Failure]:
    """All items of a source, whose pictures can be loaded; read twice, and the same both times."""
    source = open_source(SourceConfig(**config), folder, texts)
    found = list(source.read())
    assert found == list(source.read())
    assert source.total in (None, len(found))
    for item in found:
        if isinstance(item, Item) and item.picture is not None:
            assert load_picture(item.picture, source.root).size == (8, 8)
    return found


def test_a_folder_of_pictures_in_folders_of_classes_with_texts_beside_them(tmp_path: Path) -> None:
    for n in range(12):
        folder = tmp_path / ("kittens" if n % 2 else "rockets")
        folder.mkdir(exist_ok=True)
        picture(n).save(folder / f"{n}.PNG")
        (folder / f"{n}.txt").write_text(f"text {n}\n")
    (tmp_path / "kittens" / "notes.md").write_text("no picture")
    found = items(tmp_path, images=".")
    kittens, rockets = ([f"{name}/{n}.PNG" for n in range(at, 12, 2)] for at, name in ((1, "kittens"), (0, "rockets")))
    assert [item.id for item in found] == kittens + rockets
    assert found[1] == Item("kittens/3.PNG", "kittens/3.PNG", {"text": "text 3"}, ("kittens",), "kittens/3.PNG")


@pytest.mark.parametrize("end", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths_and_texts(end: str, tmp_path: Path) -> None:
    rows = [{**row, "group": f"g{n // 2}", "name": f"Nr. {n}"} for n, row in enumerate(write_pictures(tmp_path, N))]
    path = tmp_path / f"table.{end}"
    if end == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    elif end == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_csv(path, rows, delimiter="\t" if end == "tsv" else ",")
    kind = "csv" if end == "tsv" else end
    found = items(tmp_path, ("text", "name"), **{kind: f"table.{end}"}, text=["text", "name"])
    texts = {"text": "picture b of kitten", "name": "Nr. 1"}
    assert found[1] == Item("p1", "pictures/001.png", texts, ("kitten",), "g0")
    assert len(found) == N


def test_columns_go_by_other_names_and_an_absent_identifier_is_the_path(tmp_path: Path) -> None:
    rows = [{"file": row["path"], "caption": row["text"]} for row in write_pictures(tmp_path, 3)]
    write_csv(tmp_path / "t.csv", rows)
    found = items(tmp_path, ("caption",), csv="t.csv", path="file", text="caption")
    assert [item.id for item in found] == [row["file"] for row in rows]
    assert found[0].texts == {"caption": rows[0]["caption"]}


def test_a_table_that_is_none_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text\na,b\nc," + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"t.csv must be a table, but not in line 2: field larger than field limit"):
        items(tmp_path, csv="t.csv")
    (tmp_path / "t.jsonl").write_text('{"id": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"t.jsonl must hold a JSON object in each line, got list in 2"):
        items(tmp_path, jsonl="t.jsonl")


@pytest.mark.parametrize("every_text", [False, True])
def test_coco_captions_and_instances(every_text: bool, tmp_path: Path) -> None:
    write_pictures(tmp_path, N)
    images = [{"id": 100 + n, "file_name": f"{n:03}.png"} for n in range(N)]
    captions = [{"image_id": 100 + n, "caption": f" caption {i} of {n} "} for i in range(2) for n in range(N)]
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
    instances = [{"image_id": 101, "category_id": category} for category in (9, 3, 3)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": instances}))
    places = {"images": "pictures", "captions": "c.json", "instances": "i.json"}
    found = items(tmp_path, coco=places, every_text=every_text)
    assert len(found) == N * (2 if every_text else 1)
    expected = Item("101", "001.png", {"text": "caption 0 of 1"}, ("cat", "dog"), "101")
    if not every_text:
        assert found[1] == expected
        return
    assert [found[2].id, found[2].group, found[2].texts] == ["101#0", "101", expected.texts]
    assert [found[3].id, found[3].group, found[3].texts] == ["101#1", "101", {"text": "caption 1 of 1"}]


def test_open_images_with_localized_narratives(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        picture(n).save(tmp_path / "pictures" / f"a{n}.jpg")
    for part in range(2):
        lines = [{"image_id": f"a{n}", "annotator_id": part, "caption": f"In {n} there is, {part}. "} for n in range(3)]
        (tmp_path / f"narratives-{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = "ImageID,Source,LabelName,Confidence\na1,v,/m/01,1\na1,v,/m/02,0\na2,v,/m/03,1\n"
    (tmp_path / "labels.csv").write_text(labels)
    (tmp_path / "classes.csv").write_text("/m/01,Cat\n/m/02,Dog\n")
    places = {"narratives": "narratives-*.jsonl", "labels": "labels.csv", "classes": "classes.csv"}
    found = items(tmp_path, open_images={"images": "pictures", **places})
    assert found[1] == Item("a1", "a1.jpg", {"text": "In 1 there is, 0."}, ("Cat",), "a1")
    assert [item.label for item in found] == [(), ("Cat",), ("/m/03",)]


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def test_webdataset_shards_named_by_braces(tmp_path: Path) -> None:
    for shard in range(3):
        members = []
        for n in range(2):
            key = f"{shard:02}{n}"
            about = json.dumps({"name": f"name {key}", "label": ["x", "y"]}).encode()
            members += [(f"{key}.png", png(n)), (f"{key}.json", about), (f"{key}.txt", f"text {key}".encode())]
        write_tar(tmp_path / f"shard-{shard:03}.tar", members)
    write_tar(tmp_path / "more.tgz", [("cats/9.seg.png", png(9)), ("cats/9.cls", b"4")], "w:gz")
    found = items(tmp_path, ("text", "name"), webdataset="shard-{000..002}.tar")
    assert [item.id for item in found] == ["000", "001", "010", "011", "020", "021"]
    assert found[3] == Item("011", png(1), {"text": "text 011", "name": "name 011"}, ("x", "y"), "011")
    assert items(tmp_path, webdataset="{more,more}.tgz")[1] == Item("cats/9", png(9), {}, ("4",), "cats/9")


def test_the_rest_of_a_tar_that_was_cut_short_is_listed_and_the_next_one_read(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}-{n}.png", png(n)) for n in range(4)])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 4])
    found = items(tmp_path, webdataset="{0..1}.tar")
    failures = [item for item in found if isinstance(item, Failure)]
    assert [failure.id for failure in failures] == ["0.tar"]
    assert "cannot be read" in failures[0].reason
    assert [item.id for item in found][-4:] == [f"1-{n}" for n in range(4)]


def test_addresses_and_pipes_are_no_tars(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file of this machine, got the address"):
        items(tmp_path, webdataset="https://example.org/shard-{0..1}.tar")
    with pytest.raises((ValueError, FileNotFoundError), match=r"source.webdataset must"):
        items(tmp_path, webdataset="pipe:touch ran")
    assert not (tmp_path / "ran").exists()


def as_datasets_writes(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The files of `save_to_disk`, without datasets."""
    folder.mkdir(parents=True)
    features = {"label": {"names": ["kitten", "rocket"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string(), "label": pa.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema), max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def with_datasets(folder: Path, rows: list[dict[str, Any]]) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    names = datasets.ClassLabel(names=["kitten", "rocket"])
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), "label": names})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder)


@pytest.mark.parametrize("write", [as_datasets_writes, with_datasets])
@pytest.mark.parametrize("splits", [None, ("train", "test")])
def test_data_sets_that_datasets_saved(
    write: Callable[..., None], splits: tuple[str, ...] | None, tmp_path: Path
) -> None:
    rows = [{"image": {"bytes": png(n), "path": None}, "caption": f"caption {n}", "label": n % 2} for n in range(N)]
    for split in splits or ("",):
        write(tmp_path / "saved" / split, rows)
    if splits:
        (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    found = items(tmp_path, ("caption",), datasets="saved", text="caption")
    assert len(found) == N * len(splits or "x")
    split = splits[0] if splits else ""
    assert found[1] == Item("00000001", png(1), {"caption": "caption 1"}, ("rocket",), "00000001", split)


def test_a_data_set_whose_files_are_elsewhere_is_refused(tmp_path: Path) -> None:
    as_datasets_writes(tmp_path / "saved", [])
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../secret.arrow"}]}))
    with pytest.raises(ValueError, match=r"file of source.datasets must stay below .* got '../../secret.arrow'"):
        items(tmp_path, datasets="saved")


def test_pictures_that_are_in_no_file_have_a_small_copy_in_the_table(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.png", png(n)) for n in range(4)])
    streams = {"colours": StreamConfig(model="extraction:colours")}
    described = Extraction(source=SourceConfig(webdataset="a.tar"), streams=streams, folder=tmp_path)
    extract(described, tmp_path / "features")
    folder = FeatureFolder(tmp_path / "features")
    assert load_picture(folder.column("thumbnail")[2], None).size == (8, 8)
    with pytest.raises(ValueError, match="must say where its pictures are"):
        folder.picture("2.png")


def test_transparent_parts_are_white_and_pictures_are_turned_as_they_say(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert load_picture("clear.png", tmp_path).getpixel((0, 0)) == (255, 255, 255)
    wide = Image.new("RGB", (6, 4))
    exif = wide.getexif()
    exif[0x0112] = 6  # a quarter turn
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert load_picture("turned.jpg", tmp_path).size == (4, 6)
    Image.new("P", (4, 4), 3).save(tmp_path / "palette.gif")
    assert load_picture("palette.gif", tmp_path).mode == "RGB"


def test_pictures_of_16_bits_keep_their_greys_and_others_without_a_range_are_refused(tmp_path: Path) -> None:
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "integers.tiff")
    for name in ("deep.png", "integers.tiff"):
        grey = np.asarray(load_picture(name, tmp_path))
        assert (grey == np.arange(256).reshape(16, 16, 1)).all()
    Image.fromarray(deep / np.float32(65535)).save(tmp_path / "floats.tiff")
    Image.fromarray(deep.astype(np.int32) * 2).save(tmp_path / "large.tiff")
    for name in ("floats.tiff", "large.tiff"):
        with pytest.raises(ValueError, match="it must be a picture of 8 or 16 bits a channel, got"):
            load_picture(name, tmp_path)


def test_what_is_no_picture_or_too_large_a_one_is_an_error_in_words(tmp_path: Path, monkeypatch: Any) -> None:
    Image.new("1", (100, 100)).save(tmp_path / "large.png")
    broken = bytearray((tmp_path / "large.png").read_bytes())
    broken[20:24] = b"\xff" * 4  # the height
    (tmp_path / "broken.png").write_bytes(broken)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("large.png", "broken.png"):
        with pytest.raises((ValueError, OSError)):
            load_picture(name, tmp_path)
