"""Host preprocessing: exact sizes and pixels, every kind of file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlclip_jax.data.transforms import ImageError, Preprocess, decode
from mlclip_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess.npz"
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """A smooth colourful picture."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("name", ["land", "port", "small"])
@pytest.mark.parametrize(
    ("key", "preprocess", "pixels"),
    [
        ("clip_eval", Preprocess(32), CLIP_PIXELS),
        ("mkt_eval", Preprocess(32, "resize256"), IMAGENET_PIXELS),
        ("lmpt_test", Preprocess(32, "squash", "bilinear"), IMAGENET_PIXELS),
    ],
)
def test_equals_torchvision(name, key, preprocess, pixels):
    golden = np.load(GOLDEN)
    expected = golden[f"out/{key}_{name}"].transpose(1, 2, 0)
    mean, std = np.asarray(pixels)
    result = preprocess(golden[f"in/{name}_uint8"])
    assert (result.dtype, result.shape) == (np.uint8, (32, 32, 3))
    np.testing.assert_array_equal(result, np.rint((expected * std + mean) * 255))
    assert np.abs((result / 255 - mean) / std - expected).max() <= 1e-6


def test_sizes_are_rounded_as_torchvision_does():
    assert Preprocess(224).resized(640, 480) == (298, 224)
    assert Preprocess(224).resized(480, 641) == (224, 299)
    assert Preprocess(224).resized(333, 500) == (224, 336)
    assert Preprocess(224, "resize256").resized(500, 500) == (256, 256)
    assert Preprocess(336, "resize256").resized(640, 480) == (512, 384)
    assert Preprocess(448, "squash").resized(640, 480) == (448, 448)


def test_crop_offsets_round_halves_to_even():
    # A ramp along x: the first pixel tells where the crop began.
    for width, offset in ((33, 0), (35, 2), (37, 2), (39, 4)):
        ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (32, width, 3))
        assert Preprocess(32)(np.ascontiguousarray(ramp))[0, 0, 0] == offset


def test_kinds_of_files_become_rgb(tmp_path):
    rgb = photo(40, 30)
    pixels = np.asarray(rgb)
    exact = {
        "png": encoded(rgb, "PNG"),
        "bmp": encoded(rgb, "BMP"),
        "alpha": encoded(rgb.convert("RGBA"), "PNG"),
    }
    for name, content in exact.items():
        np.testing.assert_array_equal(np.asarray(decode(content)), pixels, err_msg=name)
    path = tmp_path / "a.png"
    path.write_bytes(exact["png"])
    np.testing.assert_array_equal(np.asarray(decode(path)), pixels)
    np.testing.assert_array_equal(np.asarray(decode(str(path))), pixels)
    np.testing.assert_array_equal(np.asarray(decode(rgb)), pixels)

    close = {
        "palette": encoded(rgb.quantize(256), "PNG"),
        "palette with transparency": encoded(rgb.quantize(255), "PNG", transparency=b"\0" * 255),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "jpeg": encoded(rgb, "JPEG", quality=95),
        "webp": encoded(rgb, "WEBP", quality=95),
    }
    for name, content in close.items():
        result = np.asarray(decode(content)).astype(int)
        assert result.shape == pixels.shape
        assert np.abs(result - pixels).mean() < 8, name


def test_grey_values():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.repeat(grey[..., None], 3, -1)
    kinds = {
        "8 bit": encoded(Image.fromarray(grey), "PNG"),
        "16 bit": encoded(Image.fromarray(grey.astype(np.uint16) << 8), "PNG"),
        "with alpha": encoded(Image.fromarray(grey).convert("LA"), "PNG"),
        "pixels": grey,
        "one channel": grey[..., None],
    }
    for name, source in kinds.items():
        np.testing.assert_array_equal(np.asarray(decode(source)), colours, err_msg=name)
    bits = encoded(Image.fromarray(grey > 127), "PNG")
    np.testing.assert_array_equal(np.asarray(decode(bits)), (colours > 127) * np.uint8(255))


def test_colours_of_16_bits_keep_their_upper_8():
    # Pillow writes no such file: header, filter byte 0 before each row, checksums.
    deep = np.random.default_rng(0).integers(0, 65536, (3, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 5, 3, 16, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body
        png += struct.pack(">I", zlib.crc32(kind + body))
    np.testing.assert_array_equal(np.asarray(decode(png)), deep >> 8)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_picture(form):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    first, *others = [Image.new("RGB", (20, 16), colour) for colour in colours]
    content = encoded(first, form, save_all=True, append_images=others, lossless=True)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    assert np.abs(np.asarray(decode(content)).astype(int) - colours[0]).max() <= 2


def test_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode(encoded(photo(40, 30), "JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize("mode", ["clip", "squash", "resize256"])
def test_fast_decode_is_close(mode):
    content = encoded(photo(1000, 760), "JPEG", quality=90)
    exact = Preprocess(64, mode)(content).astype(int)
    fast = Preprocess(64, mode, fast_decode=True)(content).astype(int)
    assert fast.shape == exact.shape
    assert 0 < np.abs(fast - exact).mean() < 3
    png = encoded(photo(100, 76), "PNG")
    np.testing.assert_array_equal(
        Preprocess(64, mode, fast_decode=True)(png), Preprocess(64, mode)(png)
    )


def test_fast_decode_never_scales_below_the_target(monkeypatch):
    from PIL import JpegImagePlugin

    drafts = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(self, mode, size):
        result = draft(self, mode, size)
        drafts.append((size, self.size))
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    for width, height in ((1000, 760), (300, 1200), (255, 254), (100, 90)):
        Preprocess(64, fast_decode=True)(encoded(photo(width, height), "JPEG"))
    assert [actual for _, actual in drafts] == [(125, 95), (75, 300), (128, 127), (100, 90)]
    for asked, actual in drafts:
        assert actual[0] >= asked[0]
        assert actual[1] >= asked[1]


@pytest.mark.parametrize("box", [(0, 0, 640, 480), (100, 37, 612, 421), (30.5, 8.25, 94, 71.75)])
def test_a_part_is_its_pixels_resized(box):
    image = photo(640, 480)
    content = encoded(image, "JPEG", quality=95)
    part = Preprocess(64).part(content, lambda w, h: box)
    expected = decode(content).resize((64, 64), Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(np.asarray(part), np.asarray(expected))
    fast = Preprocess(64, fast_decode=True).part(content, lambda w, h: box)
    difference = np.abs(np.asarray(fast).astype(int) - np.asarray(part)).mean()
    assert difference < 2, "the part has moved"


def test_fast_decode_never_scales_a_part_below_the_target(monkeypatch):
    from PIL import JpegImagePlugin

    sizes, draft = [], JpegImagePlugin.JpegImageFile.draft

    def spy(self, mode, size):
        result = draft(self, mode, size)
        sizes.append(self.size)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    content = encoded(photo(800, 600), "JPEG")
    for side in (600, 512, 511, 256, 255, 128, 127, 9):
        Preprocess(64, fast_decode=True).part(content, lambda w, h, s=side: (0, 0, s, s))
    assert [width for width, _ in sizes] == [100, 100, 200, 200, 400, 400, 800, 800]


def test_a_callers_image_is_never_scaled():
    with Image.open(io.BytesIO(encoded(photo(640, 480), "JPEG"))) as image:
        Preprocess(64, fast_decode=True)(image)
        assert image.size == (640, 480)


def test_what_cannot_be_read_is_named(tmp_path):
    content = encoded(photo(200, 150), "JPEG")
    cases = {
        "half.jpg": content[: len(content) // 2],
        "half.png": encoded(photo(200, 150), "PNG")[:800],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
    }
    for name, damaged in cases.items():
        path = tmp_path / name
        path.write_bytes(damaged)
        with pytest.raises(ImageError) as caught:
            Preprocess(32)(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: cannot be read as an image (")
        assert "\n" not in message
        assert " at 0x" not in message
        with pytest.raises(UserError, match="from the record 7"):
            Preprocess(32)(damaged, name=f"{name} from the record 7")
    with pytest.raises(ImageError, match="no such image file"):
        decode(tmp_path / "absent.jpg")
    with pytest.raises(UserError, match="no such image file"):
        decode(tmp_path)


def test_pixels_of_the_wrong_kind():
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(UserError, match="uint8"):
            decode(wrong)
    floating = Image.fromarray(np.zeros((4, 4), np.float32))
    with pytest.raises(UserError, match="floating-point"):
        decode(encoded(floating, "TIFF"))


def test_needles_are_refused_rather_than_blown_up():
    needle = np.zeros((1, 3000, 3), np.uint8)
    with pytest.raises(UserError, match="3000 x 1 pixels are too long and thin"):
        Preprocess(224)(needle)
    assert Preprocess(224, "squash")(needle).shape == (224, 224, 3)


def test_options_are_checked():
    for options in ({"mode": "crop"}, {"interpolation": "nearest"}, {"size": 0}):
        with pytest.raises(UserError):
            Preprocess(**{"size": 32, **options})


@pytest.mark.parity
def test_equals_the_processor_of_transformers():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(do_normalize=False, do_rescale=False)
    # Its crop rounds down where torchvision's (and ours) rounds; these leave even margins.
    for width, height in ((500, 375), (333, 500), (640, 480)):
        image = photo(width, height)
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(Preprocess(224)(image), expected)
