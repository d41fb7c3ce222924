"""Sources of images that are tars: ImageNet's own files, and webdatasets. Images are read where they lie in them."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from data_tools.decode import FileReader
from data_tools.images import Address, Pixels, load_image
from data_tools.keys import as_key, require_unique
from data_tools.tars import Extent, Member, Table, Window, scan_all, walk
from uvit_dist import storage
from uvit_dist.config_data import DataConfig
from uvit_dist.errors import DataError, MissingInputError

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
CLASS_TAR = re.compile(r"n\d{8}\.tar")
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")


class TarSource:
    """Images in tars. tables: of each extent; keys, labels, captions, unusable: of all samples, in order.

    order: the samples' numbers in the tables, taken together. Raises ``DataError`` where two keys would be the same.
    """

    def __init__(
        self,
        name: str,
        reader: FileReader,
        extents: Sequence[Extent],
        tables: Sequence[Table],
        keys: list[str],
        labels: list[int],
        classes: int,
        captions: list[list[str]] | None = None,
        unusable: dict[int, str] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self.name, self.reader, self.classes = name, reader, classes
        self.keys, self.labels, self.captions, self.unusable = keys, labels, captions, unusable or {}
        self._paths = [extent.path for extent in extents]
        rows = np.arange(len(keys)) if order is None else np.asarray(order, dtype=np.int64)
        self._tars = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table.keys) for table in tables])[rows]
        self._offsets, self._sizes = (
            np.array([value for table in tables for value in getattr(table, column)], dtype=np.int64)[rows]
            for column in ("offsets", "sizes")
        )
        require_unique(keys, lambda number: f"{self.address(number).path} (image {number})")

    def address(self, number: int) -> Address:
        """Where image ``number`` lies in its tar."""
        return Address(self._paths[self._tars[number]], int(self._offsets[number]), int(self._sizes[number]))

    def load(self, number: int) -> Pixels:
        """Image ``number``, cropped: (size, size, 3) uint8. Raises ``DataError`` where it cannot be used."""
        return load_image(self, number)


def imagenet_source(data: DataConfig, reader: FileReader, scan_dir: str | None, start: int) -> TarSource:
    """ImageNet as it is distributed, labels by the sorted ids of its classes (wnids), images in order of their names.

    train: ILSVRC2012_img_train.tar, or the tars of the classes out of it; validation: ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz. Raises ``MissingInputError``, ``DataError``.
    """
    root = str(data.source).rstrip("/")
    files = storage.sizes_in(root)
    name = root.rsplit("/", 1)[-1]
    if data.split == "validation":
        return _imagenet_validation(root, files, name, reader, scan_dir, start)
    if TRAIN_TAR in files:
        whole = _extent(root, TRAIN_TAR, files)
        (table,) = scan_all([whole], scan_tars, scan_dir)
        rows = zip(table.keys, table.offsets, table.sizes, strict=True)
        extents = [Extent(whole.path, offset, size, f"{TRAIN_TAR}/{tar}") for tar, offset, size in rows]
    else:
        extents = [_extent(root, file, files) for file in files]
    classes = {extent.name.rsplit("/", 1)[-1]: extent for extent in extents}
    tars = sorted(tar for tar in classes if CLASS_TAR.fullmatch(tar))
    if not tars:
        raise MissingInputError(
            f"data.source {root}: neither {TRAIN_TAR} with the tars of the classes in it, nor these (n01440764.tar …); "
            "give the folder of ImageNet's own files"
        )
    extents = [classes[tar] for tar in tars]
    tables = scan_all(extents, scan_images, scan_dir, start)
    keys, labels, order, first = [], [], [], 0
    for label, (tar, table) in enumerate(zip(tars, tables, strict=True)):
        if not table.keys:
            raise DataError(f"{extents[label].path}: no image in {tar}; labels would be in doubt: get it again")
        by_name = sorted(range(len(table.keys)), key=table.keys.__getitem__)
        keys += [as_key(f"{tar.removesuffix('.tar')}/{table.keys[row]}") for row in by_name]
        labels += [label] * len(by_name)
        order += [first + row for row in by_name]
        first += len(by_name)
    return TarSource(name, reader, extents, tables, keys, labels, len(tars), order=order)


def _extent(root: str, name: str, files: dict[str, int]) -> Extent:
    return Extent(storage.join(root, name), 0, files[name], name)


def scan_tars(window: Window) -> Table:
    """The tars in a tar, keyed by their names without folder. Raises ``DataError``."""
    table = Table()
    for member in walk(window):
        table.add(member.name.rsplit("/", 1)[-1], member)
    return table


def scan_images(window: Window) -> Table:
    """The images of a tar, keyed by their names without folder and suffix. Raises ``DataError``."""
    table = Table()
    for member in walk(window):
        stem, _, suffix = member.name.rsplit("/", 1)[-1].rpartition(".")
        if suffix.lower() in IMAGE_SUFFIXES and not stem.startswith("."):
            table.add(stem, member)
    return table


def _imagenet_validation(
    root: str, files: dict[str, int], name: str, reader: FileReader, scan_dir: str | None, start: int
) -> TarSource:
    for file in (VALIDATION_TAR, DEVKIT):
        if file not in files:
            raise MissingInputError(f"data.source {root}: no {file}, which data.split validation needs; put it there")
    extent = _extent(root, VALIDATION_TAR, files)
    labels, classes = validation_labels(storage.join(root, DEVKIT))
    (table,) = scan_all([extent], scan_images, scan_dir, start)
    order = sorted(range(len(table.keys)), key=table.keys.__getitem__)
    keys = [table.keys[row] for row in order]
    numbers = [int(found[1]) if (found := VALIDATION_NAME.fullmatch(key)) else 0 for key in keys]
    strange = [key for key, number in zip(keys, numbers, strict=True) if not 1 <= number <= len(labels)]
    if strange or not keys:
        raise DataError(
            f"{extent.path}: {f'{strange[0]} has no label' if strange else 'no images'} in {DEVKIT}, which lists "
            f"{len(labels)}; get both files again"
        )
    return TarSource(name, reader, [extent], [table], keys, [labels[n - 1] for n in numbers], classes, order=order)


def validation_labels(devkit: str) -> tuple[list[int], int]:
    """Labels of ImageNet's validation images, in order, and the number of classes. devkit: its .tar.gz.

    The devkit numbers classes in an order of its own; a label is the place of the class's wnid in sorted order.
    Raises ``DataError``, ``MissingInputError``.
    """
    content = storage.read_bytes(devkit)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            found = {member.name.rsplit("/", 1)[-1]: member for member in tar if member.isreg()}
            mat, truth = (tar.extractfile(found[n]) for n in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
            assert mat is not None
            assert truth is not None
            synsets = loadmat(io.BytesIO(mat.read()), squeeze_me=True)["synsets"]
            ids = [int(line) for line in truth.read().split()]
        leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        place = {wnid: label for label, wnid in enumerate(sorted(leaves.values()))}
        return [place[leaves[number]] for number in ids], len(place)
    except (tarfile.TarError, MatReadError, zlib.error, EOFError, LookupError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{devkit}: not ImageNet's devkit, or damaged ({error}); download it again") from None


def webdataset_source(data: DataConfig, reader: FileReader, scan_dir: str | None, start: int) -> TarSource:
    """All tars below data.source, in sorted order: KEY.jpg (or another image) with KEY.cls, KEY.json, KEY.txt.

    Keys have the name of their tar before them. Labels and captions: all samples have them, or those without are
    unusable. Raises ``MissingInputError`` where there are no tars, ``DataError`` for damaged ones.
    """
    root = str(data.source).rstrip("/")
    tars = {name: size for name, size in storage.tree(root).items() if name.endswith(".tar")}
    if not tars:
        raise MissingInputError(f"data.source {root}: no .tar in it; give the folder of a webdataset's tars")
    extents = [_extent(root, name, tars) for name in tars]
    tables = scan_all(extents, scan_samples, scan_dir, start)
    keys: list[str] = []
    labels: list[int] = []
    captions: list[list[str]] = []
    unusable: dict[int, str] = {}
    labelled = any(label is not None for table in tables for label in table.labels)
    captioned = any(table.captions and any(table.captions) for table in tables)
    for extent, table in zip(extents, tables, strict=True):
        for key, label, texts in zip(table.keys, table.labels, table.captions, strict=True):
            problem = table.problems.get(key)
            if problem is None and labelled and label is None:
                problem = "no label, where others have one"
            if problem is None and captioned and not texts:
                problem = "no caption, where others have some"
            if problem is not None:
                unusable[len(keys)] = problem
            keys.append(as_key(f"{extent.name.removesuffix('.tar')}/{key}"))
            labels.append(-1 if label is None else label)
            if captioned:
                captions.append(texts)
    if len(unusable) == len(keys):
        why = f"of {len(keys)} samples none can be used (the first: {unusable[0]})" if keys else "no samples"
        raise DataError(
            f"data.source {root}: {why} in {len(tars)} tars; it needs KEY.{', KEY.'.join(IMAGE_SUFFIXES)}: "
            "give a folder of such tars, or make these again"
        )
    name, classes = root.rsplit("/", 1)[-1], max(labels) + 1
    return TarSource(name, reader, extents, tables, keys, labels, classes, captions if captioned else None, unusable)


def scan_samples(window: Window) -> Table:
    """The samples of a webdataset's tar, in order. Raises ``DataError`` for a damaged tar.

    Members of a sample have the same name up to the first dot after the last "/".
    """
    images: dict[str, list[Member]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    for member in walk(window):
        folder, slash, file = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = file.partition(".")
        if not stem:
            continue
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        own = images.setdefault(key, [])
        if suffix in IMAGE_SUFFIXES:
            own.append(member)
        elif suffix in ("cls", "json", "txt"):
            texts.setdefault(key, {})[suffix] = window.read(member.offset, member.size)
    table = Table()
    for key, own in images.items():
        try:
            label, captions = _described(texts.get(key, {}))
        except ValueError as error:
            label, captions = None, []
            table.problems[key] = str(error)
        if len(own) != 1:
            table.problems[key] = f"{len(own)} images in the sample" if own else "no image in the sample"
        table.add(key, own[0] if own else None, label, captions)
    return table


def _described(texts: dict[str, bytes]) -> tuple[int | None, list[str]]:
    """Label and captions of a sample, from its members .cls, .json and .txt. Raises ``ValueError`` with the reason."""
    tree: Any = {}
    if "json" in texts:
        try:
            tree = json.loads(texts["json"])
        except ValueError:
            raise ValueError(".json is damaged") from None
        if not isinstance(tree, dict):
            raise ValueError(".json is not an object")
    label = tree.get("label")
    if "cls" in texts:
        try:
            label = int(texts["cls"])
        except ValueError:
            raise ValueError(f".cls is {texts['cls'][:20]!r}, not a whole number") from None
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < -1):
        raise ValueError(f"label {label!r} is not a whole number of 0 or more")
    found = tree.get("captions") or tree.get("caption") or texts.get("txt", b"").decode(errors="replace").strip()
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("captions in .json are not texts")
    return None if label == -1 else label, [caption for caption in captions if caption.strip()]
