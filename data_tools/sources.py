"""The sources of images that ``data.format`` names: here those of files; CIFAR-10, digits and tars in their modules."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_tools.cifar10 import CIFAR10_FILES, Cifar10Source
from data_tools.decode import FileReader
from data_tools.digits import DigitsSource
from data_tools.images import Address, ImageSource, Pixels, load_image
from data_tools.keys import as_key, require_unique
from data_tools.tar_sources import imagenet_source, webdataset_source
from uvit_dist import storage
from uvit_dist.config_data import DataConfig
from uvit_dist.errors import ConfigError, DataError, MissingInputError, NoSuchFileError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
LOCAL = ("celeba", "cifar10", "digits")
"""Formats whose source is a local folder alone."""

CELEBA_PARTS = {"train": "0", "validation": "1", "test": "2"}
PARTITION = "list_eval_partition.txt"
LISTINGS = 16
"""Folders listed at once."""


def open_source(
    data: DataConfig, exif_rotation: bool = False, scan_dir: str | None = None, start: int = 0
) -> ImageSource:
    """The images that the data section names.

    exif_rotation: of the precompute section; scan_dir: a folder or URL where workers share what they find in tars;
    start: number of this worker, so that each begins at another tar.
    Raises ``ConfigError``, ``MissingInputError``, ``DataError``.
    """
    if data.format in ("digits", "cifar10") and (data.image_size, data.crop) != (32, "none"):
        raise ConfigError(
            f"data.format {data.format}: images of 32 pixels; set data.image_size 32 (now {data.image_size}), "
            f"data.crop none (now {data.crop})"
        )
    remote = data.source is not None and storage.is_remote(data.source)
    if remote and data.format in LOCAL:
        raise ConfigError(
            f"data.source {data.source}: data.format {data.format} is read from local folders alone; copy it to one"
        )
    if data.format == "digits":
        return DigitsSource()
    assert data.source is not None
    if not remote and not Path(data.source).is_dir():
        raise MissingInputError(
            f"data.source {data.source}: no such folder; give the local folder of the images, as data.format "
            f"{data.format} has them (docs/precompute_sources.md)"
        )
    if data.format == "cifar10":
        return cifar10_source(data)
    reader = FileReader(data.image_size, data.crop, exif_rotation)
    if data.format == "imagenet_tars":
        return imagenet_source(data, reader, scan_dir, start)
    if data.format == "webdataset":
        return webdataset_source(data, reader, scan_dir, start)
    return {"celeba": celeba_source, "coco": coco_source, "folder": folder_source}[data.format](data, reader)


class FileSource:
    """Images that are files. paths: relative to data.source, with "/"; a key is the path without suffix and dots.

    sizes: of the files, bytes, where the listing knew them. Raises ``DataError`` where two keys would be the same.
    """

    def __init__(
        self,
        root: str,
        reader: FileReader,
        paths: list[str],
        labels: list[int],
        classes: int,
        captions: list[list[str]] | None = None,
        sizes: list[int] | None = None,
    ) -> None:
        self._root, self._paths, self._sizes, self.reader = root, paths, sizes, reader
        self.name, self.labels, self.classes, self.captions = Path(root).name, labels, classes, captions
        self.unusable: dict[int, str] = {}
        self.keys = [as_key(os.path.splitext(path)[0]) for path in paths]
        require_unique(self.keys, lambda number: storage.join(root, paths[number]))

    def address(self, number: int) -> Address:
        """The file of image ``number``."""
        size = None if self._sizes is None else self._sizes[number]
        return Address(storage.join(self._root, self._paths[number]), 0, size)

    def load(self, number: int) -> Pixels:
        """Image ``number``, cropped: (size, size, 3) uint8. Raises ``DataError`` where it cannot be used."""
        return load_image(self, number)


def folder_source(data: DataConfig, reader: FileReader) -> FileSource:
    """One folder of images for each class, whose label is its index in sorted order; or one folder without labels.

    Raises ``MissingInputError`` where there is no image, ``DataError`` where it is neither of both.
    """
    root = str(data.source)
    sizes = storage.tree(root) if storage.is_remote(root) else None
    images = _local_images(root) if sizes is None else _listed_images(sizes)
    loose = images.pop("")
    empty = [folder for folder in images if not images[folder]]
    if len(empty) == len(images):
        if not loose:
            raise MissingInputError(
                f"data.source {root}: no images ({', '.join(SUFFIXES)}) in it or in folders of classes right below it; "
                "give the folder that has them"
            )
        return FileSource(root, reader, loose, [-1] * len(loose), 0, sizes=_sizes_of(loose, sizes))
    if loose or empty:
        wrong = f"{len(loose)} images (as {loose[0]}) lie beside" if loose else f"no image in {empty[0]}, one of"
        raise DataError(
            f"data.source {root}: {wrong} the folders of classes; labels would be in doubt: give a folder that holds "
            "images alone, or folders of images alone"
        )
    paths = [f"{folder}/{name}" for folder, names in images.items() for name in names]
    labels = [label for label, names in enumerate(images.values()) for _ in names]
    return FileSource(root, reader, paths, labels, len(images), sizes=_sizes_of(paths, sizes))


def _local_images(root: str) -> dict[str, list[str]]:
    """Folder right below the root ("": the root itself) → names of the images in it, both in order."""
    with os.scandir(root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    with ThreadPoolExecutor(LISTINGS) as pool:
        names = list(pool.map(_images_in, [root, *(os.path.join(root, folder) for folder in folders)]))
    return dict(zip(["", *folders], names, strict=True))


def _images_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir())


def _listed_images(listing: Iterable[str]) -> dict[str, list[str]]:
    """As ``_local_images``, of a listing of all paths."""
    images: dict[str, list[str]] = {"": []}
    for path in listing:
        folder, _, name = path.rpartition("/")
        top = folder.split("/")[0]
        if not top.startswith("."):
            names = images.setdefault(top, [])
            if folder == top and _is_image(name):
                names.append(name)
    return {folder: sorted(images[folder]) for folder in sorted(images)}


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _sizes_of(paths: list[str], sizes: dict[str, int] | None) -> list[int] | None:
    return None if sizes is None else [sizes[path] for path in paths]


def cifar10_source(data: DataConfig) -> Cifar10Source:
    """CIFAR-10's binary version. Raises ``MissingInputError`` where a file is missing, ``DataError`` for damage."""
    root = str(data.source)
    below = os.path.join(root, "cifar-10-batches-bin")
    folder = below if os.path.isdir(below) else root
    wanted = "the binary version (cifar-10-binary.tar.gz), unpacked"
    _require_files(folder, CIFAR10_FILES[data.split], "data.source", wanted)
    return Cifar10Source(folder, data.split)


def celeba_source(data: DataConfig, reader: FileReader) -> FileSource:
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
    return FileSource(root, reader, names, [-1] * len(names), 0)


def coco_source(data: DataConfig, reader: FileReader) -> FileSource:
    """COCO's images in the order of their ids, without labels, with all captions, in the order of data.captions.

    Raises ``MissingInputError`` where a file is missing, ``DataError`` where data.captions is damaged.
    """
    root, file = str(data.source), str(data.captions)
    try:
        content = storage.read_bytes(file)
    except NoSuchFileError:
        wanted = "give COCO's captions_train2014.json or the like"
        raise MissingInputError(f"data.captions {file}: no such file; {wanted}") from None
    try:
        tree = json.loads(content.decode())
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
    sizes = _require_files(root, paths, "data.source", f"the images that {file} lists")
    return FileSource(root, reader, paths, [-1] * len(paths), 0, [captions[number] for number in order], sizes)


def _text(caption: Any) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"a caption is {caption!r}")
    return caption


def _require_files(root: str, names: Sequence[str], key: str, wanted: str) -> list[int] | None:
    """The sizes of these files below the root, where it is a URL. One listing per folder, or of the URL.

    Raises ``MissingInputError`` with how many of the files are missing.
    """
    if storage.is_remote(root):
        sizes = storage.tree(root)
        missing = [name for name in names if name not in sizes]
    else:
        sizes = {}
        listed = {folder: _listing(os.path.join(root, folder)) for folder in set(map(os.path.dirname, names))}
        missing = [name for name in names if os.path.basename(name) not in listed[os.path.dirname(name)]]
    if missing:
        raise MissingInputError(
            f"{key} {root}: {len(missing)} of {len(names)} files are missing (the first: {missing[0]}); give the "
            f"folder that holds {wanted}"
        )
    return [sizes[name] for name in names] if sizes else None


def _listing(folder: str) -> Iterable[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()
