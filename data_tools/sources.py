"""The sources of images that ``data.format`` names: folders, CIFAR-10, CelebA, COCO, scikit-learn's digits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.digits import digits_images
from data_tools.images import ImageSource, Pixels, read_image
from uvit_dist.config import DataConfig
from uvit_dist.data.latents import MIRROR_SUFFIX
from uvit_dist.errors import ConfigError, DataError, MissingInputError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
CIFAR10_FILES = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR10_RECORD = 1 + 3 * 32 * 32
"""Bytes of an image: its label, then the planes of red, green and blue."""
CELEBA_PARTS = {"train": "0", "validation": "1", "test": "2"}
PARTITION = "list_eval_partition.txt"


def open_source(data: DataConfig) -> ImageSource:
    """The images that the data section names.

    Raises ``ConfigError``, ``MissingInputError``, ``DataError``.
    """
    if data.format in ("digits", "cifar10") and (data.image_size, data.crop) != (32, "none"):
        raise ConfigError(
            f"data.format {data.format}: images of 32 pixels; set data.image_size 32 (now {data.image_size}), "
            f"data.crop none (now {data.crop})"
        )
    if data.format == "digits":
        return DigitsSource()
    assert data.source is not None
    if not Path(data.source).is_dir():
        raise MissingInputError(
            f"data.source {data.source}: no such folder; give the local folder of the images, as data.format "
            f"{data.format} has them (docs/shards.md)"
        )
    if data.format == "cifar10":
        return Cifar10Source(data.source, data.split)
    if data.format == "celeba":
        return celeba_source(data)
    if data.format == "coco":
        return coco_source(data)
    return folder_source(data)


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 32x32."""

    def __init__(self) -> None:
        self._images, labels = digits_images()
        self.name, self.classes = "scikit-learn digits", 10
        self.captions: list[list[str]] | None = None
        self.keys = [f"digit-{number:04d}" for number in range(len(labels))]
        self.labels = [int(label) for label in labels]

    def load(self, number: int) -> Pixels:
        """Image ``number``, (32, 32, 3) uint8."""
        return self._images[number]


class FileSource:
    """Images that are files. paths: relative to data.source, with "/"; a key is the path without suffix and dots.

    Raises ``DataError`` where two keys would be the same.
    """

    def __init__(
        self,
        data: DataConfig,
        paths: list[str],
        labels: list[int],
        classes: int,
        captions: list[list[str]] | None = None,
    ) -> None:
        assert data.source is not None
        self._root, self._size, self._crop, self._paths = data.source, data.image_size, data.crop, paths
        self.name, self.labels, self.classes, self.captions = Path(data.source).name, labels, classes, captions
        self.keys = [os.path.splitext(path)[0].replace(".", "_") for path in paths]
        seen: dict[str, int] = {}
        for number, key in enumerate(self.keys):
            other = seen.setdefault(key.removesuffix(MIRROR_SUFFIX), number)
            if other != number:
                raise DataError(
                    f"{os.path.join(self._root, paths[other])} and {os.path.join(self._root, paths[number])}: their "
                    f"keys would be the same ({key}); rename one of them"
                )

    def load(self, number: int) -> Pixels:
        """Image ``number``, cropped: (size, size, 3) uint8. Raises ``DataError`` where it cannot be read."""
        return read_image(os.path.join(self._root, self._paths[number]), self._size, self._crop)


def folder_source(data: DataConfig) -> FileSource:
    """One folder of images for each class, whose label is its index in sorted order; or one folder without labels.

    Raises ``MissingInputError`` where there is no image, ``DataError`` where it is neither of both.
    """
    root = str(data.source)
    with os.scandir(root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    images = {folder: _images_in(os.path.join(root, folder)) for folder in folders}
    loose = _images_in(root)
    empty = [folder for folder in folders if not images[folder]]
    if len(empty) == len(folders):
        if not loose:
            raise MissingInputError(
                f"data.source {root}: no images ({', '.join(SUFFIXES)}) in it or in folders of classes right below it"
            )
        return FileSource(data, loose, [-1] * len(loose), 0)
    if loose or empty:
        wrong = f"{len(loose)} images (as {loose[0]}) lie beside" if loose else f"no image in {empty[0]}, one of"
        raise DataError(
            f"data.source {root}: {wrong} the folders of classes; labels would be in doubt: give a folder that holds "
            "images alone, or folders of images alone"
        )
    paths = [f"{folder}/{name}" for folder in folders for name in images[folder]]
    labels = [label for label, folder in enumerate(folders) for _ in images[folder]]
    return FileSource(data, paths, labels, len(folders))


def _images_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith("."))


class Cifar10Source:
    """CIFAR-10's binary version, 32x32, mapped into memory.

    Raises ``MissingInputError`` where a file is missing, ``DataError`` where one is damaged.
    """

    def __init__(self, root: str, split: str) -> None:
        below = os.path.join(root, "cifar-10-batches-bin")
        folder = below if os.path.isdir(below) else root
        _require_files(
            folder, CIFAR10_FILES[split], "data.source", "the binary version (cifar-10-binary.tar.gz), unpacked"
        )
        self._records = [_cifar10_records(os.path.join(folder, name)) for name in CIFAR10_FILES[split]]
        self._starts = np.cumsum([0, *map(len, self._records)])
        labels = np.concatenate([records[:, 0] for records in self._records])
        self.name, self.classes = f"CIFAR-10 {split}", 10
        self.captions: list[list[str]] | None = None
        self.labels = [int(label) for label in labels]
        self.keys = [f"cifar10-{split}-{number:05d}" for number in range(len(labels))]

    def load(self, number: int) -> Pixels:
        """Image ``number``, (32, 32, 3) uint8."""
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        record = self._records[file][number - self._starts[file]]
        return np.array(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))


def _cifar10_records(path: str) -> Pixels:
    """(images, CIFAR10_RECORD) uint8."""
    size = os.path.getsize(path)
    if size == 0 or size % CIFAR10_RECORD:
        raise DataError(
            f"{path}: {size} bytes, not a multiple of {CIFAR10_RECORD} (an image of CIFAR-10's binary version): "
            "truncated or another file; unpack cifar-10-binary.tar.gz again"
        )
    records = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, CIFAR10_RECORD)
    if records[:, 0].max() > 9:
        raise DataError(f"{path}: a label of {records[:, 0].max()} where 0…9 are; unpack cifar-10-binary.tar.gz again")
    return records


def celeba_source(data: DataConfig) -> FileSource:
    """A part of CelebA, without labels: img_align_celeba and list_eval_partition.txt in data.source.

    Raises ``MissingInputError`` where a file is missing, ``DataError`` where the list is damaged.
    """
    root = str(data.source)
    _require_files(root, [PARTITION], "data.source", f"CelebA's {PARTITION} beside the folder img_align_celeba")
    names = []
    lines = Path(root, PARTITION).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in CELEBA_PARTS.values():
            raise DataError(
                f"{os.path.join(root, PARTITION)}, line {number}: {line!r} is not a file name and 0, 1 or 2; get the "
                "file again"
            )
        if fields[1] == CELEBA_PARTS[data.split]:
            names.append(f"img_align_celeba/{fields[0]}")
    if not names:
        raise DataError(f"{os.path.join(root, PARTITION)}: no image of data.split {data.split}; get the file again")
    _require_files(root, names, "data.source", "all images of img_align_celeba.zip")
    return FileSource(data, names, [-1] * len(names), 0)


def coco_source(data: DataConfig) -> FileSource:
    """COCO's images in the order of their ids, without labels, with all captions, in the order of data.captions.

    Raises ``MissingInputError`` where a file is missing, ``DataError`` where data.captions is damaged.
    """
    root, file = str(data.source), str(data.captions)
    if not os.path.isfile(file):
        raise MissingInputError(f"data.captions {file}: no such file; give COCO's captions_train2014.json or the like")
    try:
        tree = json.loads(Path(file).read_text(encoding="utf-8"))
        images = {int(image["id"]): str(image["file_name"]) for image in tree["images"]}
        captions: dict[int, list[str]] = {number: [] for number in images}
        strays = 0
        for annotation in tree["annotations"]:
            strays += annotation["image_id"] not in images
            captions.setdefault(annotation["image_id"], []).append(_text(annotation["caption"]))
        repeated = len(tree["images"]) - len(images)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"data.captions {file}: not images (id, file_name) and annotations (image_id, caption): "
            f"{type(error).__name__} {error}; give COCO's captions_*.json"
        ) from None
    bare = [number for number in images if not captions[number]]
    wrong = [
        f"{count} {what}"
        for count, what in (
            (len(bare), f"of {len(images)} images have no caption (as id {bare[0] if bare else None})"),
            (repeated, "images are listed twice"),
            (strays, "captions are of images that are not listed"),
        )
        if count
    ]
    if wrong or not images:
        raise DataError(
            f"data.captions {file}: {', '.join(wrong) or 'no images'}; get the file again, or take them out of it"
        )
    order = sorted(images)
    paths = [images[number] for number in order]
    _require_files(root, paths, "data.source", f"the images that {file} lists")
    return FileSource(data, paths, [-1] * len(paths), 0, [captions[number] for number in order])


def _text(caption: Any) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"a caption is {caption!r}")
    return caption


def _require_files(root: str, names: Sequence[str], key: str, wanted: str) -> None:
    """Raises ``MissingInputError`` with how many of the files below the root are missing. One listing per folder."""
    listed = {folder: _listing(os.path.join(root, folder)) for folder in set(map(os.path.dirname, names))}
    missing = [name for name in names if os.path.basename(name) not in listed[os.path.dirname(name)]]
    if missing:
        raise MissingInputError(
            f"{key} {root}: {len(missing)} of {len(names)} files are missing (the first: {missing[0]}); it must hold "
            f"{wanted}"
        )


def _listing(folder: str) -> Iterable[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()
