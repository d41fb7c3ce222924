"""Tars as sources: ImageNet's own files and webdatasets; their members found by headers alone, and found once."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_tools import tar_sources, tars
from data_tools.images import load_images, source_fingerprint
from data_tools.sources import open_source
from data_tools.tar_sources import scan_images
from data_tools.tars import Extent, Window, walk
from uvit_dist.config_data import DataConfig
from uvit_dist.errors import DataError, MissingInputError

DRAW = np.random.default_rng(0)
WNIDS = ["n01440764", "n02119789", "n03028079"]


def config(root, format, **changes):
    values = dict(format=format, source=str(root), image_size=32, crop="none", index="unused", lanes=1)
    return DataConfig(**{**values, **changes})


def image(kind="PNG"):
    """The bytes of an image of 32 x 32, and its pixels."""
    out = io.BytesIO()
    Image.fromarray(DRAW.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue(), np.asarray(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))


def tar_of(members, format=tarfile.GNU_FORMAT):
    """The bytes of a tar. members: name → content; None: a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def imagenet_train(root, nested):
    """Three classes, whose tars are not in order. Returns key → pixels."""
    root.mkdir(parents=True, exist_ok=True)
    expected, class_tars = {}, {}
    for wnid in (WNIDS[2], WNIDS[0], WNIDS[1]):
        members = {}
        for number in (10026, 7, 1234):
            content, pixels = image("JPEG")
            members[f"{wnid}_{number}.JPEG"] = content
            expected[f"{wnid}/{wnid}_{number}"] = pixels
        class_tars[f"{wnid}.tar"] = tar_of(members)
    if nested:
        (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(class_tars))
    else:
        for name, content in class_tars.items():
            (root / name).write_bytes(content)
    return expected


def devkit(root, ground_truth):
    """The devkit: three leaves numbered against the order of their wnids, and a class above them."""
    rows = [(1, WNIDS[1], 0), (2, WNIDS[2], 0), (3, WNIDS[0], 0), (4, "n00001740", 3)]
    types = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    synsets = np.empty((len(rows), 1), dtype=[*types, ("wordnet_height", object), ("num_train_images", object)])
    for row, (number, wnid, below) in enumerate(rows):
        children = np.arange(below, dtype=np.uint16)
        synsets[row, 0] = (np.uint16(number), wnid, "a, b", "what", np.uint8(below), children, np.uint8(0), 1300)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12"
    truth = "".join(f"{number}\n" for number in ground_truth).encode()
    files = {
        f"{folder}/readme.txt": b"read me",
        f"{folder}/data": None,
        f"{folder}/data/meta.mat": mat.getvalue(),
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": truth,
    }
    with tarfile.open(root / f"{folder}.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content or b""), tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(content or b""))


def check_pixels(source, expected):
    assert [n for n in range(len(source.keys)) if n not in source.unusable] == [
        n for n, key in enumerate(source.keys) if key in expected
    ]
    for number, key in enumerate(source.keys):
        if number not in source.unusable:
            assert np.array_equal(source.load(number), expected[key]), key
            address = source.address(number)
            content = Path(address.path).read_bytes()[address.offset : address.offset + address.size]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), expected[key])


@pytest.mark.parametrize("nested", [True, False])
def test_imagenet_is_read_from_the_tars_it_comes_in(tmp_path, nested):
    expected = imagenet_train(tmp_path, nested)
    source = open_source(config(tmp_path, "imagenet_tars"))
    assert source.keys == sorted(expected)
    assert (source.labels, source.classes) == ([0] * 3 + [1] * 3 + [2] * 3, 3)
    assert (source.captions, source.unusable) == (None, {})
    check_pixels(source, expected)
    items = [(n, n % 2 == 1) for n in (8, 0, 5, 3)]
    loaded = list(load_images(source, items, 2))
    assert np.array_equal(loaded[1], expected[source.keys[0]])
    assert np.array_equal(loaded[2], expected[source.keys[5]][:, ::-1])


def test_imagenets_tars_and_its_folders_are_the_same_source(tmp_path):
    """Keys, labels and order are those of the unpacked folders, as the fingerprint in the index says."""
    imagenet_train(tmp_path / "tars", nested=False)
    imagenet_train(tmp_path / "nested", nested=True)
    for tar in (tmp_path / "tars").iterdir():
        with tarfile.open(tar) as unpacked:
            unpacked.extractall(tmp_path / "folders" / tar.stem, filter="data")
    forms = {"tars": "imagenet_tars", "nested": "imagenet_tars", "folders": "folder"}
    opened = [open_source(config(tmp_path / name, format)) for name, format in forms.items()]
    assert len({source_fingerprint(source) for source in opened}) == 1


def test_imagenets_validation_images_have_the_labels_of_the_devkit(tmp_path):
    expected, members = {}, {}
    for number in (3, 1, 2, 5, 4):
        content, expected[f"ILSVRC2012_val_{number:08d}"] = image("JPEG")
        members[f"ILSVRC2012_val_{number:08d}.JPEG"] = content
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(members))
    settings = config(tmp_path, "imagenet_tars", split="validation")
    with pytest.raises(MissingInputError, match=r"no ILSVRC2012_devkit_t12\.tar\.gz, which data\.split validation"):
        open_source(settings)
    devkit(tmp_path, [3, 1, 2, 2, 3])
    source = open_source(settings)
    assert source.keys == sorted(expected)
    assert (source.labels, source.classes) == ([0, 1, 2, 2, 0], 3), "places among sorted wnids, not the devkit's ids"
    check_pixels(source, expected)
    devkit(tmp_path, [3, 1, 2, 2])
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000005 has no label in ILSVRC2012_devkit.* lists 4"):
        open_source(settings)
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    for damage in (kit.read_bytes()[:300], b"nothing"):
        kit.write_bytes(damage)
        with pytest.raises(DataError, match=r"not ImageNet's devkit, or damaged .*; download it again"):
            open_source(settings)


def test_what_is_wrong_with_imagenets_tars_is_said(tmp_path):
    (tmp_path / "other.tar").write_bytes(tar_of({"a.txt": b"x"}))
    with pytest.raises(MissingInputError, match=r"neither ILSVRC2012_img_train\.tar .* nor these \(n01440764\.tar …\)"):
        open_source(config(tmp_path, "imagenet_tars"))
    (tmp_path / f"{WNIDS[0]}.tar").write_bytes(tar_of({"a.txt": b"x"}))
    with pytest.raises(DataError, match=r"no image in n01440764\.tar; labels would be in doubt"):
        open_source(config(tmp_path, "imagenet_tars"))


def test_a_webdataset_with_labels(tmp_path):
    expected, first, second = {}, {}, {}
    for number, kind in enumerate(["jpg", "PNG", "webp", "bmp", "gif", "tiff"]):
        content, pixels = image({"jpg": "JPEG"}.get(kind, kind.upper()))
        first[f"./train/{number}.{kind}"], first[f"./train/{number}.cls"] = content, f"{number % 4}\n".encode()
        expected[f"a_b/part-0/train/{number}"] = pixels
    second["x.json"] = b'{"label": 7, "other": [1]}'
    second["x.seg.png"] = b"another image, not the sample's"
    second["x.jpeg"], expected["part-0/x"] = image("JPEG")
    (tmp_path / "a.b").mkdir()
    (tmp_path / "a.b" / "part-0.tar").write_bytes(tar_of(first))
    (tmp_path / "part-0.tar").write_bytes(tar_of({"folder": None, **second}))
    source = open_source(config(tmp_path, "webdataset"))
    assert source.keys == [f"a_b/part-0/train/{n}" for n in range(6)] + ["part-0/x"]
    assert (source.labels, source.classes, source.captions) == ([0, 1, 2, 3, 0, 1, 7], 8, None)
    assert source.unusable == {}
    check_pixels(source, expected)


def test_img2datasets_output_has_captions(tmp_path):
    """NNNNN.tar of KEY.jpg, KEY.txt, KEY.json, beside tables and statistics that are not read."""
    expected, captions = {}, []
    for shard in range(2):
        members = {}
        for number in range(3):
            key = f"{shard:05d}{number:04d}"
            members[f"{key}.jpg"], expected[f"{shard:05d}/{key}"] = image("JPEG")
            text = f"картина {key}"
            members[f"{key}.txt"] = text.encode()
            members[f"{key}.json"] = json.dumps({"caption": text, "status": "success", "url": "http://a/b"}).encode()
            captions.append([text])
        (tmp_path / f"{shard:05d}.tar").write_bytes(tar_of(members))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    source = open_source(config(tmp_path, "webdataset"))
    assert (source.keys, source.captions) == (sorted(expected), captions)
    assert (source.labels, source.classes, source.unusable) == ([-1] * 6, 0, {})
    check_pixels(source, expected)


@pytest.mark.parametrize(
    ("members", "outcome"),
    [
        ({"json": {"caption": "from json"}, "txt": b"from txt"}, ["from json"]),
        ({"json": {"caption": None, "status": "success"}, "txt": b" a text \n"}, ["a text"]),
        ({"json": {"captions": ["one", " ", "two"]}}, ["one", "two"]),
        ({"json": {"caption": None}}, "no caption, where others have some"),
        ({"txt": b"  \n"}, "no caption, where others have some"),
        ({"json": {"captions": [1]}}, "captions in .json are not texts"),
        ({"json": b"{", "txt": b"a text"}, ".json is damaged"),
        ({"json": b"[]", "txt": b"a text"}, ".json is not an object"),
        ({"txt": b"a text", "png": b"another"}, "2 images in the sample"),
        ({"txt": b"a text", "jpg": None}, "no image in the sample"),
    ],
)
def test_captions_of_a_webdataset(tmp_path, members, outcome):
    whole = {"jpg": image("JPEG")[0], **members}
    parts = {k: json.dumps(v).encode() if isinstance(v, dict) else v for k, v in whole.items() if v is not None}
    good = {"good.jpg": image("JPEG")[0], "good.txt": b"good"}
    (tmp_path / "0.tar").write_bytes(tar_of({**good, **{f"k.{suffix}": content for suffix, content in parts.items()}}))
    source = open_source(config(tmp_path, "webdataset"))
    assert source.keys == ["0/good", "0/k"]
    assert source.unusable == ({} if isinstance(outcome, list) else {1: outcome})
    if isinstance(outcome, list):
        assert source.captions == [["good"], outcome]
    else:
        with pytest.raises(DataError, match=r"0\.tar.*: unusable, mend or remove it \("):
            source.load(1)


@pytest.mark.parametrize(
    ("members", "outcome"),
    [
        ({"cls": b"-1"}, "no label, where others have one"),
        ({}, "no label, where others have one"),
        ({"cls": b"cat"}, ".cls is b'cat', not a whole number"),
        ({"json": b'{"label": "3"}'}, "label '3' is not a whole number of 0 or more"),
        ({"json": b'{"label": -7}'}, "label -7 is not a whole number of 0 or more"),
        ({"cls": b"2", "json": b'{"label": 5}'}, 2),
    ],
)
def test_labels_of_a_webdataset(tmp_path, members, outcome):
    good = {"good.jpg": image("JPEG")[0], "good.cls": b"0"}
    bad = {"k.jpg": image("JPEG")[0], **{f"k.{suffix}": content for suffix, content in members.items()}}
    (tmp_path / "0.tar").write_bytes(tar_of({**good, **bad}))
    source = open_source(config(tmp_path, "webdataset"))
    assert source.unusable == ({} if isinstance(outcome, int) else {1: outcome})
    assert source.labels == [0, outcome if isinstance(outcome, int) else -1]


def test_a_webdataset_without_anything_to_use_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match=r"no \.tar in it; give the folder of a webdataset's tars"):
        open_source(config(tmp_path, "webdataset"))
    (tmp_path / "0.tar").write_bytes(tar_of({}))
    with pytest.raises(DataError, match=r"no samples in 1 tars"):
        open_source(config(tmp_path, "webdataset"))
    (tmp_path / "0.tar").write_bytes(tar_of({"a.npy": b"x", "a.cls": b"1"}))
    with pytest.raises(DataError, match=r"of 1 samples none can be used \(the first: no image in the sample\)"):
        open_source(config(tmp_path, "webdataset"))
    (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": b"x", "a_m.jpg": b"x"}))
    with pytest.raises(DataError, match=r"their keys would be the same \(0/a_m\)"):
        open_source(config(tmp_path, "webdataset"))


def test_what_a_scan_found_is_kept_and_shared(tmp_path, monkeypatch):
    expected = imagenet_train(tmp_path / "tars", nested=False)
    settings, scan_dir = config(tmp_path / "tars", "imagenet_tars"), str(tmp_path / "work" / "scan")
    one = open_source(settings, scan_dir=scan_dir)
    assert len(os.listdir(scan_dir)) == 3

    def scanned(window):
        seen.append(window.extent.name)
        return scan_images(window)

    scanned.__name__ = "scan_images"
    seen = []
    monkeypatch.setattr(tar_sources, "scan_images", scanned)
    times = {}
    for tar in (tmp_path / "tars").iterdir():  # nothing to be found in them any more
        times[tar] = os.stat(tar).st_mtime_ns, tar.read_bytes()
        tar.write_bytes(bytes(tar.stat().st_size))
        os.utime(tar, ns=(times[tar][0], times[tar][0]))
    other = open_source(settings, scan_dir=scan_dir, start=1)
    assert seen == []
    assert (other.keys, other.labels) == (one.keys, one.labels)
    assert [other.address(n) for n in range(9)] == [one.address(n) for n in range(9)]
    for tar, (time, content) in times.items():
        tar.write_bytes(content)
        os.utime(tar, ns=(time, time))
    check_pixels(other, expected)
    os.utime(tmp_path / "tars" / f"{WNIDS[1]}.tar", ns=(5, 5))
    Path(scan_dir, next(name for name in os.listdir(scan_dir) if WNIDS[0] in name)).write_bytes(b'{"keys": ')
    assert open_source(settings, scan_dir=scan_dir).keys == one.keys
    assert sorted(seen) == [f"{WNIDS[0]}.tar", f"{WNIDS[1]}.tar"], "a tar that changed, and a table cut short"


def test_workers_start_at_different_tars_and_miss_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "SCANS", 1)
    for number in range(20):
        (tmp_path / f"{number:02d}.tar").write_bytes(tar_of({"a.jpg": b"x"}))
    extents = [Extent(str(tmp_path / f"{n:02d}.tar"), 0, 10240, f"{n:02d}.tar") for n in range(20)]
    firsts = set()
    for start in range(4):
        seen = []

        def scan(window, seen=seen):
            seen.append(window.extent.name)
            return scan_images(window)

        tables = tars.scan_all(extents, scan, None, start)
        assert [table.keys for table in tables] == [["a"]] * 20
        assert sorted(seen) == [extent.name for extent in extents]
        firsts.add(seen[0])
    assert len(firsts) == 4


LONG = "a" * 90 + "/" + "b" * 120


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    members = {"a.jpg": b"x" * 512, "empty": b"", "folder": None, "big": bytes(30_000), "z": b"y" * 513}
    members |= {"d" * 60 + "/" + "e" * 80 + ".jpg": b"prefix"}
    if format != tarfile.USTAR_FORMAT:
        members |= {LONG: b"long", "имя.jpg": b"unicode", "q": b"after"}
    file = tmp_path / "a.tar"
    file.write_bytes(tar_of(members, format))
    with tarfile.open(file) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    extent = Extent(str(file), 0, file.stat().st_size, "a.tar")
    with Window(extent) as window:
        assert [(m.name, m.offset, m.size) for m in walk(window)] == expected
    assert len(expected) == len(members) - 1


def test_damaged_tars_are_named_with_the_byte(tmp_path):
    whole = tar_of({f"{n}.jpg": bytes([n]) * 3000 for n in range(1, 6)})
    file = tmp_path / "0.tar"
    place = 512 + 3072
    cases = [
        (whole[:1000], r"0\.tar: damaged at byte 1000 \(the tar 0\.tar ends there, in a member\); copy or download"),
        (whole[: place + 100], rf"damaged at byte {place + 100} \(.*in a member\)"),
        (whole[: 2 * place], rf"damaged at byte {2 * place} \(the tar 0\.tar ends there, without its end mark\)"),
        (whole[:place] + b"\1" * 512 + whole[place + 512 :], rf"damaged at byte {place} \(no header of a member"),
        (b"\x1f\x8b" * 5000, r"damaged at byte 0 \(not a tar\)"),
        (b"", r"damaged at byte 0 \(the tar 0\.tar ends there, without its end mark\)"),
    ]
    for content, reason in cases:
        file.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            open_source(config(tmp_path, "webdataset"))
    nested = tar_of({f"{WNIDS[0]}.tar": whole[:4000]})
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(nested)
    with pytest.raises(DataError, match=r"img_train\.tar: damaged at byte 4512 .*/n01440764\.tar ends there"):
        open_source(config(tmp_path, "imagenet_tars"))


@pytest.mark.parametrize(("size", "streamed"), [(3000, True), (40_000, False)])
def test_behind_urls_what_is_near_is_streamed_and_what_is_far_is_skipped(tmp_path, monkeypatch, size, streamed):
    file = tmp_path / "a.tar"
    file.write_bytes(tar_of({f"{n}.jpg": bytes(size) for n in range(20)}))
    extent, asked = Extent(str(file), 0, file.stat().st_size, "a.tar"), []
    with Window(extent) as window:
        expected = list(walk(window))

    def read_range(path, offset, length):
        asked.append(length)
        with open(path, "rb") as opened:
            opened.seek(offset)
            return opened.read(length)

    monkeypatch.setattr(tars.storage, "is_remote", lambda path: True)
    monkeypatch.setattr(tars.storage, "read_range", read_range)
    monkeypatch.setattr(tars, "FAR", 16_384)
    with Window(extent) as window:
        assert list(walk(window)) == expected
    assert len(expected) == 20
    assert (len(asked) < 10, sum(asked) > 20 * size) == (streamed, streamed)


def test_headers_alone_are_read(tmp_path, monkeypatch):
    (tmp_path / f"{WNIDS[0]}.tar").write_bytes(tar_of({f"{n}.jpg": bytes(300_000) for n in range(20)}))
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, at: read.append(length) or pread(file, length, at))
    assert len(open_source(config(tmp_path, "imagenet_tars")).keys) == 20
    assert 0 < sum(read) <= 21 * tars.NEAR < 0.02 * 20 * 300_000
