"""Sources of images: CIFAR-10's binary files, CelebA, COCO, folders; what is wrong with them is said."""

import json

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import crop

from data_tools.cifar10 import CIFAR10_RECORD
from data_tools.decode import FileReader
from data_tools.images import load_images, source_fingerprint
from data_tools.sources import FileSource, open_source
from uvit_dist.config_data import DataConfig
from uvit_dist.errors import ConfigError, DataError, MissingInputError

DRAW = np.random.default_rng(0)


def data_config(**changes):
    values = dict(format="folder", image_size=32, crop="none", index="unused", lanes=1)
    return DataConfig(**{**values, **{key: str(v) if key == "source" else v for key, v in changes.items()}})


def save_image(path, width=32, height=32, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = DRAW.integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def test_class_folders_have_the_labels_of_their_order(tmp_path):
    pixels = {name: save_image(tmp_path / name) for name in ("n02/a.png", "n01/b.2.png", "n01/a.PNG")}
    (tmp_path / ".cache").mkdir()
    source = open_source(data_config(source=tmp_path))
    assert (source.keys, source.labels, source.classes) == (["n01/a", "n01/b_2", "n02/a"], [0, 0, 1], 2)
    assert np.array_equal(source.load(2), pixels["n02/a.png"])


def test_a_folder_of_images_alone_has_no_labels(tmp_path):
    pixels = [save_image(tmp_path / f"{i}.png") for i in range(3)]
    (tmp_path / "empty").mkdir()
    source = open_source(data_config(source=tmp_path))
    assert (source.keys, source.labels, source.classes, source.captions) == (["0", "1", "2"], [-1] * 3, 0, None)
    assert np.array_equal(source.load(1), pixels[1])


def test_folders_whose_labels_would_be_in_doubt_are_refused(tmp_path):
    with pytest.raises(MissingInputError, match=r"no images \(\.bmp, \.jpeg.* in it or in folders of classes"):
        open_source(data_config(source=tmp_path))
    with pytest.raises(MissingInputError, match=r"data\.source .*nowhere: no such folder"):
        open_source(data_config(source=tmp_path / "nowhere"))
    save_image(tmp_path / "n01" / "a.png")
    (tmp_path / "n00").mkdir()
    with pytest.raises(DataError, match=r"no image in n00, one of the folders of classes; labels would be in doubt"):
        open_source(data_config(source=tmp_path))
    (tmp_path / "n00").rmdir()
    save_image(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"1 images \(as b\.png\) lie beside the folders of classes"):
        open_source(data_config(source=tmp_path))


@pytest.mark.parametrize("format", ["celeba", "cifar10", "digits"])
def test_formats_that_are_read_from_local_folders_alone_say_so(format):
    with pytest.raises(ConfigError, match=rf"data\.source s3://b/p: data\.format {format} is read from local folders"):
        open_source(data_config(format=format, source="s3://b/p"))


def test_images_that_cannot_be_used_are_named(tmp_path):
    save_image(tmp_path / "n01" / "pic.0.png", 70, 40)
    with pytest.raises(DataError, match=r"pic\.0\.png: .*70x40 pixels, data\.image_size is 32 .*; set data\.crop: adm"):
        open_source(data_config(source=tmp_path)).load(0)
    with pytest.raises(DataError, match=r"pic\.0\.png: .*70x40 pixels; data\.crop celeba needs 153x185 or more"):
        open_source(data_config(source=tmp_path, crop="celeba")).load(0)
    whole = (tmp_path / "n01" / "pic.0.png").read_bytes()
    for damage in (b"no picture", whole[:300], b""):
        (tmp_path / "n01" / "pic.0.png").write_bytes(damage)
        with pytest.raises(DataError, match=r"pic\.0\.png: unusable, .* \((not an|truncated|empty)"):
            open_source(data_config(source=tmp_path, crop="adm")).load(0)
    (tmp_path / "n01" / "pic_0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"pic\.0\.png and .*pic_0\.jpg: their keys would be the same \(n01/pic_0\)"):
        open_source(data_config(source=tmp_path))


def test_many_keys_are_compared_in_no_time():
    paths = [f"{number % 1000}/{number}.jpg" for number in range(200_000)]
    reader = FileReader(32, "none")
    assert len(FileSource("somewhere", reader, paths, [0] * len(paths), 1).keys) == 200_000
    with pytest.raises(DataError, match=r"keys would be the same \(7/7_m\)"):
        FileSource("somewhere", reader, [*paths, "7/7_m.png"], [0] * 200_001, 1)


def test_images_come_in_order_from_several_threads(tmp_path):
    pixels = [save_image(tmp_path / f"{i:03d}.png") for i in range(40)]
    source = open_source(data_config(source=tmp_path))
    items = [(i, i % 3 == 0) for i in reversed(range(40))]
    for threads in (1, 3):
        loaded = list(load_images(source, items, threads))
        assert all(
            np.array_equal(image, pixels[i][:, ::-1] if mirrored else pixels[i])
            for image, (i, mirrored) in zip(loaded, items, strict=True)
        )


def cifar10(folder, counts=(3, 2, 2, 2, 2), test=4):
    folder.mkdir(parents=True)
    images, labels = [], []
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    for name, count in zip(names, (*counts, test), strict=True):
        records = DRAW.integers(0, 256, (count, CIFAR10_RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
        labels += records[:, 0].tolist()
        images += [record[1:] for record in records]
    return images, labels


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read_from_its_binary_files(tmp_path, below):
    images, labels = cifar10(tmp_path / "c" / below)
    source = open_source(data_config(format="cifar10", source=tmp_path / "c"))
    assert (len(source.keys), source.labels, source.classes) == (11, labels[:11], 10)
    for number in (0, 2, 3, 10):
        red, green, blue = images[number][:1024], images[number][1024:2048], images[number][2048:]
        image = source.load(number)
        assert image.shape == (32, 32, 3)
        assert np.array_equal(image[..., 0].ravel(), red)
        assert np.array_equal(image[..., 1].ravel(), green)
        assert np.array_equal(image[..., 2].ravel(), blue)
    test = open_source(data_config(format="cifar10", source=tmp_path / "c", split="test"))
    assert (test.labels, test.keys[0]) == (labels[11:], "cifar10-test-00000")
    assert np.array_equal(test.load(3)[..., 2].ravel(), images[14][2048:])


def test_what_is_wrong_with_cifar10_is_said(tmp_path):
    cifar10(tmp_path / "c")
    config = data_config(format="cifar10", source=tmp_path / "c")
    with pytest.raises(
        ConfigError, match=r"data\.format cifar10: .*set data\.image_size 32 \(now 64\), data\.crop none"
    ):
        open_source(data_config(format="cifar10", source=tmp_path, image_size=64, crop="adm"))
    file = tmp_path / "c" / "data_batch_2.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_2\.bin: 6145 bytes, not a multiple of 3073"):
        open_source(config)
    file.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(DataError, match=r"data_batch_2\.bin: a label of 10 where 0…9 are"):
        open_source(config)
    file.rename(tmp_path / "c" / "data_batch_2")
    with pytest.raises(
        MissingInputError, match=r"1 of 5 files are missing \(the first: data_batch_2\.bin\).*binary ver"
    ):
        open_source(config)


def celeba(root, parts="010202"):
    faces = {
        f"{i:06d}.jpg": save_image(root / "img_align_celeba" / f"{i:06d}.jpg", 178, 218) for i in range(len(parts))
    }
    lines = [f"{name} {part}" for name, part in zip(faces, parts, strict=True)]
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("size", [64, 128, 50])
def test_celeba_is_cropped_as_torchvision_does(tmp_path, size):
    celeba(tmp_path)
    config = data_config(format="celeba", source=tmp_path, crop="celeba", image_size=size)
    source = open_source(config)
    assert source.keys == [f"img_align_celeba/{i:06d}" for i in (0, 2, 4)]
    assert (source.labels, source.classes) == ([-1] * 3, 0)
    image = Image.open(tmp_path / "img_align_celeba" / "000002.jpg")
    expected = transforms.Resize(size)(crop(image, 121 - 64, 89 - 64, 128, 128))
    assert np.array_equal(source.load(1), np.asarray(expected))
    moved = np.asarray(transforms.Resize(size)(crop(image, 121 - 64, 89 - 63, 128, 128)))
    assert not np.array_equal(source.load(1), moved), "the control: a column further"
    parts = {split: open_source(config.model_copy(update={"split": split})) for split in ("validation", "test")}
    assert {split: len(part.keys) for split, part in parts.items()} == {"validation": 1, "test": 2}


def test_what_is_wrong_with_celeba_is_said(tmp_path):
    celeba(tmp_path, "000")
    config = data_config(format="celeba", source=tmp_path, crop="celeba", image_size=64)
    with pytest.raises(DataError, match=r"no image of data\.split test"):
        open_source(config.model_copy(update={"split": "test"}))
    (tmp_path / "img_align_celeba" / "000001.jpg").unlink()
    with pytest.raises(
        MissingInputError, match=r"1 of 3 files are missing \(the first: img_align_celeba/000001\.jpg\)"
    ):
        open_source(config)
    (tmp_path / "list_eval_partition.txt").write_text("000000.jpg 0\n000001.jpg 3\n")
    with pytest.raises(
        DataError, match=r"list_eval_partition\.txt, line 2: '000001\.jpg 3' is not a file name and 0, 1"
    ):
        open_source(config)
    (tmp_path / "list_eval_partition.txt").unlink()
    with pytest.raises(MissingInputError, match=r"data\.source .*list_eval_partition\.txt beside the folder img_align"):
        open_source(config)


def coco(root, images=((30, "c.png"), (4, "a.png"), (17, "b.png")), captions=None):
    for _, name in images:
        save_image(root / "pictures" / name, 50, 40)
    captions = captions or [(30, "a dog"), (4, "two cats"), (30, "A dog!"), (17, "bread"), (4, "cats "), (30, "дом")]
    tree = {
        "images": [{"id": number, "file_name": name, "height": 40} for number, name in images],
        "annotations": [{"image_id": number, "id": i, "caption": text} for i, (number, text) in enumerate(captions)],
    }
    (root / "captions.json").write_text(json.dumps(tree))
    return data_config(format="coco", source=root / "pictures", captions=str(root / "captions.json"), crop="coco")


def test_coco_is_in_the_order_of_ids_with_captions_as_listed(tmp_path):
    source = open_source(coco(tmp_path))
    assert source.keys == ["a", "b", "c"]
    assert source.captions == [["two cats", "cats "], ["bread"], ["a dog", "A dog!", "дом"]]
    assert (source.labels, source.classes, source.load(0).shape) == ([-1] * 3, 0, (32, 32, 3))
    one = source_fingerprint(source)
    source.captions[1][0] = "Bread"
    assert source_fingerprint(source) != one


def test_what_is_wrong_with_coco_is_said(tmp_path):
    config = coco(tmp_path)
    with pytest.raises(MissingInputError, match=r"data\.captions .*nowhere\.json: no such file"):
        open_source(config.model_copy(update={"captions": str(tmp_path / "nowhere.json")}))
    images = ((1, "a.png"), (2, "b.png"), (3, "c.png"))
    with pytest.raises(DataError, match=r"2 of 3 images have no caption \(as id 2\)"):
        open_source(coco(tmp_path, images, [(1, "a dog")]))
    with pytest.raises(DataError, match=r"1 captions are of images that are not listed"):
        open_source(coco(tmp_path, images, [(1, "x"), (2, "x"), (3, "x"), (9, "x")]))
    with pytest.raises(DataError, match=r"1 images are listed twice"):
        open_source(coco(tmp_path, (*images, (1, "a.png")), [(1, "x"), (2, "x"), (3, "x")]))
    with pytest.raises(DataError, match=r"TypeError a caption is 5"):
        open_source(coco(tmp_path, images, [(1, 5)]))
    for text, what in (("{", "JSONDecodeError"), ("{}", "KeyError 'images'"), ("[]", "TypeError")):
        (tmp_path / "captions.json").write_text(text)
        with pytest.raises(DataError, match=rf"captions\.json: not images .*{what}.*; give COCO's captions_"):
            open_source(config)
    config = coco(tmp_path)
    (tmp_path / "pictures" / "b.png").unlink()
    with pytest.raises(
        MissingInputError, match=r"1 of 3 files are missing \(the first: b\.png\); .*captions\.json lists"
    ):
        open_source(config)
