"""Image files of every kind: decoded to the pixels that a viewer shows, or refused by row and file name."""

import re
import struct
import zlib

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image

from smoot_hf import InputPipeline
from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import BACKGROUND, DecodedImages, Decoding, decode_images, on_background, pixels_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written beside the user's own data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def noise(height=6, width=8, seed=0):
    """Grey noise; every third column is black, as RGB values are below full transparency."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    values[:, ::3] = 0
    return values


def see_through(mode, values, alpha):
    """An image of grey `values` with the given alpha, in every way that Pillow stores one."""
    grey, opacity = Image.fromarray(values), Image.fromarray(alpha)
    if mode in ("RGBA", "LA"):
        return Image.merge(mode, [*[grey] * (len(mode) - 1), opacity])
    if mode in ("RGBa", "La"):
        return see_through(mode.upper(), values, alpha).convert(mode)
    if mode == "PA":
        palette = grey.convert("P")
        palette.putpalette([level for level in range(256) for _ in range(3)])
        palette.putalpha(opacity)
        return palette
    raise AssertionError(mode)


@pytest.mark.parametrize("convert_rgb", [False, True])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_shows_the_background(mode, convert_rgb):
    """Fault: pictures that differ in alpha alone decode to one black image, whose deviation is 0 in every channel."""
    values, half = noise(), np.full((6, 8), 128, dtype=np.uint8)
    for alpha in (half * 0, half, half * 0 + 255, np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)):
        expected = values * (alpha / 255) + 255 * (1 - alpha / 255)
        image = see_through(mode, values, alpha)
        assert image.mode == mode
        got = pixels_of(image, Decoding(convert_rgb))
        assert got.shape == (3, 6, 8)
        # Premultiplied values are stored in 8 bits as well, so that they are rounded twice.
        assert np.abs(got - expected).max() <= (1 if mode.isupper() else 2)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_colour_that_stands_for_nothing_shows_the_background(mode):
    """Fault: the colour that a PNG or GIF declares transparent is decoded as that colour."""
    image = Image.fromarray(noise()).convert(mode)
    opaque = np.asarray(image.convert("RGB"))
    key = image.getpixel((0, 0))
    image.info["transparency"] = key if mode != "1" else int(bool(key))
    is_key = np.all(opaque == opaque[0, 0], axis=-1)
    assert 0 < is_key.sum() < is_key.size
    got = pixels_of(image, Decoding(convert_rgb=True)).transpose(1, 2, 0)
    np.testing.assert_array_equal(got, np.where(is_key[..., None], 255, opaque))


def test_opaque_images_are_what_they_were():
    """Fault: values changed by an alpha channel that hides nothing, which most screenshots have."""
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    assert on_background(image) is image
    image.putalpha(255)
    np.testing.assert_array_equal(pixels_of(image, Decoding()), values.transpose(2, 0, 1))
    assert BACKGROUND == "white"


def test_pictures_that_differ_in_alpha_alone_can_be_trained_on():
    """Fault: "std must be positive in every channel", of icons drawn in black on nothing."""
    shapes = [see_through("RGBA", np.zeros((6, 8), dtype=np.uint8), noise(seed=seed)) for seed in range(4)]
    features = Features({"image": datasets.Image(), "labels": ClassLabel(names=["a", "b"])})
    split = Dataset.from_dict({"image": shapes, "labels": [0, 1, 0, 1]}, features=features)
    decoded = DecodedImages(decode_images(DatasetDict(train=split))["train"])
    mean, std = decoded.channel_statistics()
    InputPipeline(mean=mean, std=std)
    assert len({decoded[i]["pixel_values"].numpy().tobytes() for i in range(4)}) == 4


def png_of_16_bits(values):
    """A PNG of 16-bit RGB, which Pillow reads and does not write; values (H, W, 3)."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


COLOURS = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def good_file(kind, path):
    """Write an image file; its pixels as RGB (H, W, 3), by other means than Pillow's `convert` where there are any."""
    image = Image.fromarray(COLOURS)
    if kind == "palette.png":
        image.quantize(200).save(path)
        levels = image.quantize(200)
        return np.array(levels.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(levels)]
    if kind == "cmyk.tif":
        inks = [Image.fromarray(255 - COLOURS[..., i]) for i in range(3)]
        Image.merge("CMYK", [*inks, Image.new("L", image.size)]).save(path)
        return COLOURS
    if kind == "deep.png":
        path.write_bytes(png_of_16_bits(COLOURS.astype(np.uint16) * 256 + 99))
        return COLOURS
    exif = Image.Exif()
    exif[0x0112] = {"upside down.png": 3, "on its left.png": 8, "on its right.png": 6}[kind]
    turns = {3: 2, 8: 1, 6: 3}[exif[0x0112]]
    image.save(path, exif=exif)
    return np.rot90(COLOURS, turns)


@pytest.mark.parametrize(
    "kind", ["palette.png", "cmyk.tif", "deep.png", "upside down.png", "on its left.png", "on its right.png"]
)
def test_image_files_decode_to_what_a_viewer_shows(kind, tmp_path):
    """Fault: palette numbers taken for grey, inverted ink, 16 bits cut to white, photographs on their side."""
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(5):
            expected = good_file(kind, tmp_path / "set" / name / f"{i} {kind}")
    decoded = DecodedImages(decode_images(load_image_dataset(str(tmp_path / "set")))["train"])
    np.testing.assert_array_equal(decoded[3]["pixel_values"].numpy(), expected.transpose(2, 0, 1))


def animated(kind, path):
    """Write three frames of different colours; the first as RGB (H, W, 3)."""
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    exact = {"lossless": True} if kind.endswith("webp") else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **exact)
    with Image.open(path) as image:
        assert image.n_frames == 3
    return np.asarray(frames[0])


@pytest.mark.parametrize("kind", ["moving.gif", "moving.webp", "moving.png", "pages.tif"])
def test_of_animations_and_pages_the_first_picture_is_taken(kind, tmp_path):
    """Fault: the last frame, all frames in one array, or an error about files that every viewer shows."""
    expected = animated(kind, tmp_path / kind)
    with Image.open(tmp_path / kind) as image:
        np.testing.assert_array_equal(pixels_of(image, Decoding(convert_rgb=True)), expected.transpose(2, 0, 1))


def bad_file(kind, path):
    if kind == "truncated.jpg":
        Image.fromarray(COLOURS).resize((64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:-400])
    elif kind == "text.png":
        path.write_text("no image")
    elif kind == "empty.jpg":
        path.write_bytes(b"")
    else:
        deep = {"grey of 16 bits.png": np.uint16, "whole numbers.tif": np.int32, "floats.tif": np.float32}[kind]
        Image.fromarray(np.full((6, 8), 40_000, dtype=deep)).save(path)


BAD = {
    "truncated.jpg": "truncated",
    "text.png": "cannot identify",
    "empty.jpg": "cannot identify",
    "grey of 16 bits.png": "'I;16' has more than 8 bits",
    "whole numbers.tif": "'I' has more than 8 bits",
    "floats.tif": "'F' has more than 8 bits",
}


def write_good_folder(folder):
    """Two splits of two classes of two images."""
    for split in ("train", "test"):
        for i in range(4):
            path = folder / split / ("ant" if i < 2 else "bee") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(COLOURS).save(path)
    return folder


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("row", [0, 3])
def test_files_that_cannot_be_decoded_are_named(kind, row, tmp_path):
    """Fault: an error without row and file among ten thousand, or 16 bits cut to white everywhere."""
    place = "train/ant" if row == 0 else "train/bee"
    bad = write_good_folder(tmp_path / "set") / place / f"{row}.png"
    bad.unlink()
    bad_file(kind, bad.with_name(f"{row} {kind}"))
    splits = load_image_dataset(str(tmp_path / "set"))
    named = rf"^the image in row {row} of split 'train' \({place}/{row} {kind}\) cannot be decoded \(.*{BAD[kind]}.*it$"
    with pytest.raises(ValueError, match=named):
        decode_images(splits)


def test_all_files_that_cannot_be_decoded_are_found_at_once(tmp_path):
    """Fault: one attempt for each bad file of a folder; or a message of ten thousand lines."""
    folder = write_good_folder(tmp_path / "set")
    places = ["train/bee", "train/bee", "test/ant", "test/bee", "test/bee", "test/bee"]
    for place, kind in zip(places, BAD, strict=True):
        bad_file(kind, folder / place / kind)
    with pytest.raises(ValueError, match=r"^6 images cannot be used, mend or remove them: ") as error:
        decode_images(load_image_dataset(str(folder)))
    named = re.findall(r"split '(\w+)' \(([^)]+)\) cannot be decoded", str(error.value))
    # In the order of the rows, train before test.
    assert named == [
        ("train", "train/bee/text.png"),
        ("train", "train/bee/truncated.jpg"),
        ("test", "test/ant/empty.jpg"),
        ("test", "test/bee/floats.tif"),
        ("test", "test/bee/grey of 16 bits.png"),
    ]
    assert str(error.value).endswith("; and 1 more")


def test_bad_bytes_in_parquet_are_all_found(tmp_path):
    """Fault: images without a file of their own are left out of the count."""
    images = [{"bytes": b"?", "path": "a.png"}, {"bytes": b"", "path": None}, None]
    features = Features({"image": datasets.Image(), "labels": ClassLabel(names=["a", "b"])})
    split = Dataset.from_dict({"image": images, "labels": [0, 1, 1]}, features=features)
    with pytest.raises(ValueError, match=r"^3 images .*row 0 of split 'train' \(a.png\) .*row 1 .*; row 2 .*\(null\)$"):
        decode_images(DatasetDict(train=split))


def test_the_size_on_disk_is_said_before_it_is_written(tmp_path, capsys):
    """Fault: a disk that fills up without a word; or the same words where the cache is only read."""
    splits = load_image_dataset(str(write_good_folder(tmp_path / "set")))
    decode_images(splits, image_size=512)
    assert "Decoding 4 train images of 512x512, 3.0 MiB on disk" in capsys.readouterr().err
    decode_images(splits, image_size=512)
    assert "Decoding" not in capsys.readouterr().err


def mixed(sizes):
    values = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    features = Features({"image": datasets.Image(), "labels": ClassLabel(names=["a", "b"])})
    images = [Image.fromarray(one) for one in values]
    split = Dataset.from_dict({"image": images, "labels": [i % 2 for i in range(len(sizes))]}, features=features)
    return values, DatasetDict(train=split)


def test_the_middle_of_an_image_becomes_the_square():
    """Fault: a squeezed picture, or the crop at the top left; nothing is resampled where the shorter side fits."""
    values, splits = mixed([(6, 12), (10, 6), (6, 6)])
    decoded = DecodedImages(decode_images(splits, image_size=6)["train"])
    middles = [values[0][:, 3:9], values[1][2:8], values[2]]
    for row, expected in enumerate(middles):
        np.testing.assert_array_equal(decoded[row]["pixel_values"].numpy(), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (48, 48), (12, 20)])
def test_the_square_is_what_resizing_and_cropping_of_image_processors_gives(size):
    """Fault: resizing without antialiasing. One grey value apart: the crop comes before the resizing here."""
    _, splits = mixed([size])
    decoded = DecodedImages(decode_images(splits, image_size=24)["train"])
    made = InputPipeline(mean=(0.0,) * 3, std=(1 / 255,) * 3, size=24, crop_size=(24, 24), resized_by="pillow")
    stored = DecodedImages(decode_images(splits)["train"]).__getitems__([0])["pixel_values"]
    difference = made.prepare_evaluation(stored)[0] - decoded[0]["pixel_values"]
    assert difference.abs().max() <= 1.001


def test_mixed_sizes_are_refused_with_the_flag_that_mends_it():
    """Fault: most folders of photographs end in an error that names no way on."""
    _, splits = mixed([(6, 8), (6, 8), (7, 8)])
    with pytest.raises(ValueError, match=r"first is \(3, 6, 8\).* row 2 of split 'train' is \(3, 7, 8\).*--image_size"):
        decode_images(splits)
    assert decode_images(splits, image_size=4)["train"].num_rows == 3
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        decode_images(splits, image_size=0)


def test_images_decoded_in_another_way_are_not_read_from_the_cache(tmp_path):
    """Fault: yesterday's size, or yesterday's background, out of the cache of decoded images."""
    (tmp_path / "set").mkdir()
    mixed([(6, 8)] * 10)[1]["train"].to_parquet(tmp_path / "set" / "train.parquet")
    splits = load_image_dataset(str(tmp_path / "set"))
    found = {size: decode_images(splits, image_size=size)["train"] for size in (None, 4, 5)}
    assert [DecodedImages(one).image_shape for one in found.values()] == [(3, 6, 8), (3, 4, 4), (3, 5, 5)]
