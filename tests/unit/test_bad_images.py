"""What becomes of bad and odd images: a table of files, each with its pixels or the reason why it cannot be used.

The picture is a piece of a photograph, 64 x 64. Pixels are compared after data.crop none; ``near`` is the greatest mean
difference, in grey levels, from what is expected; where there is none, no pixel differs by more than one level.
"""

import errno
import io
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from data_tools import decode
from data_tools.decode import FileReader, decode_image
from data_tools.images import Address, BadImageError
from tests.systems import photographs
from uvit_dist.errors import MissingInputError, UnavailableError

SIDE = 64
PHOTO = photographs(1, SIDE, SIDE, seed=1)[0]
OTHER = photographs(2, SIDE, SIDE, seed=2)[1]
RGB = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))
ALPHA = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (SIDE, 1)))
DEEP = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 16 + 5).astype(np.uint16)
"""16 bits: 5 … 65,525, most of it beyond what 8 bits hold."""


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def three(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def rounded(deep, most=65535):
    """16 bits in 8, rounded."""
    return three(np.rint(deep * (255 / most)).astype(np.uint8))


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, depth, colour, rows, *chunks):
    """A PNG written by hand: what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def deep_png(values, colour):
    """(H, W, channels) uint16 as a PNG of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(values.shape[1], values.shape[0], 16, colour, rows)


def text_bomb():
    """A compressed text of 100 MB in 100 kB."""
    packed = zlib.compress(bytes(100 << 20), 9)
    row = b"\0" + bytes(SIDE)
    return png_of(SIDE, SIDE, 8, 0, row * SIDE, png_chunk(b"zTXt", b"Comment\0\0" + packed))


def text_after_the_pixels():
    whole = saved(PHOTO, "PNG")
    chunk = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20)))
    return whole[:-12] + chunk + whole[-12:]


def exif(orientation):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def palette_image(**options):
    return saved(PHOTO.quantize(256), "PNG", **options)


def palette_pixels():
    return np.asarray(PHOTO.quantize(256).convert("RGB"))


def broken(data, at, piece):
    return data[:at] + piece + data[at + len(piece) :]


def animated(kind):
    return saved(PHOTO, kind, save_all=True, append_images=[OTHER], **({"lossless": True} if kind == "WEBP" else {}))


def multi_picture():
    return saved(PHOTO, "MPO", save_all=True, append_images=[OTHER], quality=95)


def cmyk():
    """A CMYK JPEG, as Adobe writes them: inks inverted."""
    return saved(PHOTO.convert("CMYK"), "JPEG", quality=95)


def ycck():
    """A YCCK JPEG: the inks but black stored as YCbCr, which Adobe's marker says. Pillow writes none."""
    cyan, magenta, yellow, black = PHOTO.convert("CMYK").split()
    turned = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    stored = Image.merge("CMYK", (*(plane.point(lambda v: 255 - v) for plane in turned), black))
    content = saved(stored, "JPEG", quality=95)
    transform = content.index(b"Adobe") + 11
    assert content[transform] == 0
    return broken(content, transform, b"\2")


def turned_tiff():
    return saved(PHOTO, "TIFF", tiffinfo={ExifTags.Base.Orientation: 6})


def big_tiff(dtype):
    return saved(Image.fromarray(np.arange(SIDE * SIDE, dtype=dtype).reshape(SIDE, SIDE)), "TIFF")


@dataclass
class Case:
    name: str
    content: bytes
    expected: object
    """Pixels, or a pattern of the reason."""
    near: float | None = None
    crop: str = "none"


JPEG = saved(PHOTO, "JPEG", quality=95, subsampling=0)
PNG = saved(PHOTO, "PNG")
DECODED_JPEG = np.asarray(Image.open(io.BytesIO(JPEG)))
LAB = Image.merge("LAB", PHOTO.split())
WIDE = Image.new("RGB", (60000, 1), (9, 9, 9))

CASES = [
    # what is not there, or no image
    Case("0 bytes", b"", "not an image"),
    Case("a text called .jpg", b"404: not found\n" * 20, "not an image"),
    Case("a web page called .jpg", b"<!DOCTYPE html><html><body>gone</body></html>", "not an image"),
    Case("an SVG called .png", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    Case("an EPS, which would start Ghostscript", saved(PHOTO, "EPS"), "not an image"),
    Case("a PDF", saved(PHOTO, "PDF"), "not an image"),
    Case("zeros as long as a JPEG", bytes(len(JPEG)), "not an image"),
    Case("a signature alone", PNG[:8], "not an image|truncated"),
    # damaged
    Case("a JPEG cut in its header", JPEG[:100], "not an image|truncated"),
    Case("a JPEG cut in its pixels", JPEG[: len(JPEG) // 2], "truncated"),
    Case("a JPEG without its last kilobyte", JPEG[:-1024], "truncated"),
    Case("a PNG cut in its pixels", PNG[: len(PNG) // 2], "truncated"),
    Case("a PNG whose header has another checksum", broken(PNG, 20, b"\1"), "not an image|damaged"),
    Case("a PNG whose pixels have another checksum", broken(PNG, 200, b"\1\2\3"), "damaged|truncated"),
    Case("a PNG of no width", png_of(0, SIDE, 8, 2, b""), "not an image|damaged"),
    Case("a GIF cut in its pixels", saved(PHOTO, "GIF")[:1200], "truncated|damaged"),
    Case("a WebP cut in its pixels", saved(PHOTO, "WEBP", lossless=True)[:2000], "not an image|truncated|damaged"),
    Case("a BMP cut in its pixels", saved(PHOTO, "BMP")[:2000], "truncated"),
    Case("a TIFF cut in its pixels", saved(PHOTO, "TIFF")[:3000], "not an image|truncated|damaged"),
    # too much
    Case("a bomb: 14,000 x 14,000 in 24 kB", png_of(14000, 14000, 1, 0, bytes(1751 * 14000)), "178,956,970 pixels"),
    Case("a header of 65,500 x 65,500", broken(saved(PHOTO, "BMP"), 18, struct.pack("<ii", 65500, 65500)), "bomb"),
    Case("a bomb of text before the pixels", text_bomb(), "damaged .*too large"),
    Case("a bomb of text after the pixels", text_after_the_pixels(), "damaged .*too large"),
    Case("60,000 x 1, whose resized image would be immense", saved(WIDE, "PNG"), "60000x1 pixels: resized", crop="adm"),
    Case("1 x 60,000", saved(WIDE.transpose(Image.Transpose.ROTATE_90), "PNG"), "1x60000 pixels", crop="adm"),
    Case("60,000 x 1, a square of which is taken", saved(WIDE, "PNG"), np.full((SIDE, SIDE, 3), 9), crop="coco"),
    Case("1 x 1", saved(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG"), np.tile([7, 8, 9], (SIDE, SIDE, 1)), crop="adm"),
    Case("another size than crop none takes", saved(PHOTO.resize((70, 40)), "PNG"), "70x40 pixels, data.image_size"),
    Case("smaller than the celeba crop", PNG, "64x64 pixels; data.crop celeba needs", crop="celeba"),
    # colours: as Pillow's convert("RGB"), which the official code calls
    Case("RGB", PNG, RGB),
    Case("a JPEG", JPEG, DECODED_JPEG),
    Case("a progressive JPEG", saved(PHOTO, "JPEG", quality=95, subsampling=0, progressive=True), DECODED_JPEG),
    Case("a grey JPEG", saved(PHOTO.convert("L"), "JPEG", quality=95), three(GREY), near=1.5),
    Case("a CMYK JPEG", cmyk(), RGB, near=3),
    Case("a YCCK JPEG", ycck(), RGB, near=3),
    Case("a CMYK TIFF", saved(PHOTO.convert("CMYK"), "TIFF"), RGB),
    Case("grey", saved(PHOTO.convert("L"), "PNG"), three(GREY)),
    Case("grey and alpha: alpha is dropped", saved(Image.merge("LA", (PHOTO.convert("L"), ALPHA)), "PNG"), three(GREY)),
    Case("RGBA: alpha is dropped", saved(Image.merge("RGBA", (*PHOTO.split(), ALPHA)), "PNG"), RGB),
    Case("1 bit", saved(PHOTO.convert("1"), "PNG"), three(np.asarray(PHOTO.convert("1")) * np.uint8(255))),
    Case("a palette", palette_image(), palette_pixels()),
    Case("a palette, one colour transparent", palette_image(transparency=3), palette_pixels()),
    Case("a palette, each colour with its alpha", palette_image(transparency=bytes(range(256))), palette_pixels()),
    Case("YCbCr TIFF", saved(PHOTO.convert("YCbCr"), "TIFF"), RGB, near=1.5),
    Case("Lab TIFF", saved(LAB, "TIFF"), np.asarray(LAB.convert("RGB"))),
    # 16 bits are scaled, never clipped
    Case("16-bit grey PNG", saved(Image.fromarray(DEEP), "PNG"), rounded(DEEP)),
    Case("16-bit grey TIFF", saved(Image.fromarray(DEEP), "TIFF"), rounded(DEEP)),
    Case("16-bit grey TIFF, big endian", saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), rounded(DEEP)),
    Case("16-bit grey PGM", b"P5 64 64 65535\n" + DEEP.astype(">u2").tobytes(), rounded(DEEP)),
    Case("16-bit RGB PNG", deep_png(RGB.astype(np.uint16) * 257, 2), RGB),
    Case("16-bit RGBA PNG", deep_png(np.dstack([RGB.astype(np.uint16) * 257, DEEP]), 6), RGB),
    Case("floating point TIFF", big_tiff(np.float32), "floating point, whose range is unknown"),
    Case("32-bit integer TIFF", big_tiff(np.int32), "32-bit integers, whose range is unknown"),
    # several pictures: the first
    Case("an animated GIF", animated("GIF"), np.asarray(Image.open(io.BytesIO(animated("GIF"))).convert("RGB"))),
    Case("an animated WebP", animated("WEBP"), RGB),
    Case("an animated PNG", animated("PNG"), RGB),
    Case("a TIFF of two pages", animated("TIFF"), RGB),
    Case("a multi-picture JPEG (MPO)", multi_picture(), RGB, near=4),
    # other formats, whatever the name
    Case("WebP, lossless", saved(PHOTO, "WEBP", lossless=True), RGB),
    Case("JPEG 2000, lossless", saved(PHOTO, "JPEG2000"), RGB),
    Case("BMP", saved(PHOTO, "BMP"), RGB),
    Case("a palette of 16 in a BMP", saved(PHOTO.quantize(16), "BMP"), np.asarray(PHOTO.quantize(16).convert("RGB"))),
    # EXIF
    Case("EXIF orientation, ignored", saved(PHOTO, "PNG", exif=exif(6)), RGB),
    Case("a TIFF's own orientation, applied", turned_tiff(), np.rot90(RGB, -1)),
    Case("EXIF of nonsense", saved(PHOTO, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), RGB),
    Case("rubbish after the end", PNG + b"rubbish" * 100, RGB),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_file_has_its_documented_outcome(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if isinstance(case.expected, str):
            with pytest.raises(BadImageError, match=case.expected) as caught:
                decode_image(case.content, SIDE, case.crop)
            reason = str(caught.value)
            assert len(reason) < 200
            assert "\n" not in reason
            assert "0x" not in reason.replace("70x40", "").replace("60000x1", ""), "the same in every process"
            return
        pixels = decode_image(case.content, SIDE, case.crop)
    assert (pixels.shape, pixels.dtype) == ((SIDE, SIDE, 3), np.uint8)
    difference = np.abs(pixels.astype(int) - np.asarray(case.expected).astype(int))
    if case.near is None:
        assert difference.max() <= 1
    else:
        assert difference.mean() <= case.near
    assert len(np.unique(pixels)) > 100 or case.name.startswith(("1", "60,000", "a palette")), "the control: a picture"


def test_the_table_has_as_many_kinds_as_it_says():
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert len({case.content for case in CASES if case.crop == "none"}) >= 40


def test_16_bits_are_rounded_where_pillow_would_make_them_white():
    """Every value of 16 bits: within half a level of its place in 8; Pillow's own conversion clips all above 255."""
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    content = saved(Image.fromarray(every), "PNG")
    pixels = decode_image(content, 256, "none")
    assert np.abs(pixels[..., 0] - every * (255 / 65535)).max() <= 0.5 + 1e-9
    clipped = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert (clipped == 255).mean() > 0.99, "the control"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_rotation_brings_images_upright(orientation, kind):
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[kind]
    content = saved(PHOTO, kind, exif=exif(orientation), **options)
    stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert np.array_equal(decode_image(content, SIDE, "none"), stored)
    assert np.array_equal(decode_image(content, SIDE, "none", exif_rotation=True), upright)
    assert orientation == 1 or not np.array_equal(stored, upright), "the control"


def test_exif_rotation_comes_before_the_crop_and_damaged_exif_is_ignored():
    wide = photographs(1, 80, 128, seed=4)[0]
    content = saved(wide, "PNG", exif=exif(6))
    upright = decode_image(saved(wide.transpose(Image.Transpose.ROTATE_270), "PNG"), SIDE, "adm")
    assert np.array_equal(decode_image(content, SIDE, "adm", exif_rotation=True), upright)
    nonsense = saved(PHOTO, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode_image(nonsense, SIDE, "none", exif_rotation=True), RGB)
    deep = saved(Image.fromarray(DEEP), "PNG", exif=exif(3))
    turned = decode_image(deep, SIDE, "none", exif_rotation=True)
    assert np.abs(turned.astype(int) - rounded(DEEP)[::-1, ::-1]).max() <= 1


def test_no_damage_raises_anything_else():
    """2,000 files with bytes altered or cut: pixels or a reason, without a warning."""
    random = np.random.default_rng(0)
    kinds = [JPEG, PNG, palette_image(), ycck(), animated("GIF"), saved(PHOTO, "WEBP"), saved(PHOTO, "TIFF")]
    kinds += [saved(PHOTO, "PNG", exif=exif(6)), saved(PHOTO, "JPEG", exif=exif(6)), saved(PHOTO, "JPEG2000")]
    outcomes = {"pixels": 0, "reason": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(2000):
            content = bytearray(kinds[number % len(kinds)])
            for _ in range(random.integers(1, 6)):
                reach = min(len(content), 300) if random.random() < 0.7 else len(content)
                content[random.integers(reach)] = random.integers(256)
            if random.random() < 0.1:
                content = content[: random.integers(len(content))]
            try:
                pixels = decode_image(bytes(content), 32, "adm", exif_rotation=bool(number % 2))
                assert pixels.shape == (32, 32, 3)
                outcomes["pixels"] += 1
            except BadImageError:
                outcomes["reason"] += 1
    assert min(outcomes.values()) > 200


def test_what_pillow_warns_of_is_no_news(monkeypatch):
    content = palette_image(transparency=bytes(range(256)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(io.BytesIO(content)) as image:
        image.load()
    with pytest.warns(UserWarning, match="Palette images with Transparency"):
        image.convert("RGB")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(content, SIDE, "none")
    assert caught == []


def test_memory_that_is_not_there_is_a_reason(monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "_in_8_bits", refuse)
    with pytest.raises(BadImageError, match="takes more memory than there is"):
        decode_image(PNG, SIDE, "none")


def test_files_that_vanish_are_empty_or_change_are_bad_and_refused_ones_end_the_job(tmp_path, monkeypatch):
    reader = FileReader(SIDE, "none")
    file = tmp_path / "a.png"
    with pytest.raises(BadImageError, match=r"^missing$"):
        reader.read(Address(str(file)))
    file.write_bytes(b"")
    for address in (Address(str(file)), Address(str(file), 0, 0)):
        with pytest.raises(BadImageError, match=r"^empty file$"):
            reader.read(address)
    file.write_bytes(b"before" + PNG + b"after")
    content = reader.read(Address(str(file), 6, len(PNG)))
    assert np.array_equal(reader.decode(content), RGB)
    with pytest.raises(BadImageError, match="truncated: shorter than when it was listed"):
        reader.read(Address(str(file), 6, len(PNG) + 100))
    with pytest.raises(MissingInputError, match="cannot be read"):
        reader.read(Address(str(tmp_path)))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(decode.storage, "read_bytes", fail)
    with pytest.raises(UnavailableError, match=r"a\.png: cannot be read \(Input/output error\); see to the disk"):
        reader.read(Address(str(file)))


def test_readers_are_small_and_their_processes_import_no_torch():
    reader = FileReader(256, "adm", True)
    assert pickle.loads(pickle.dumps(reader)) == reader
    assert len(pickle.dumps(reader)) < 200
    code = "import sys, data_tools.images, data_tools.decode, data_tools.cifar10, data_tools.digits as d\n"
    code += "print([name for name in ('torch', 'scipy', 'sklearn') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_pillows_limits_are_those_that_are_documented():
    assert decode.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20
