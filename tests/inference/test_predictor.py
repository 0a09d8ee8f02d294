"""A trained run names new images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import Checkpointer, Predictor, UsageError, create_model
from flax_resnetv2.cli import predict as predict_command
from flax_resnetv2.data.decoding import center_crop
from flax_resnetv2.run import loop
from flax_resnetv2.run.run_directory import load_config
from flax_resnetv2.training.augment import AugmentConfig
from tests.support import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run with moving averages, trained for one epoch."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        tiny.patch_dataset(patch, tiny.dataset())
        config = tiny.replace(
            tiny.config(epochs=1, ema_decay=0.5), architecture=tiny.SMALL, log_every=100
        )
        loop.fit(config, directory, devices=jax.devices()[:1])
    return directory


def test_probabilities_are_those_of_the_averaged_net(run):
    images = tiny.dataset().splits["test"].image[:5]
    config = load_config(run)
    model = create_model(config.architecture)
    predictor = Predictor.find(run)
    probabilities = predictor(images)
    assert probabilities.shape == (5, 4)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    pixels = (images / 255 - np.array(config.augment.mean)) / np.array(
        config.augment.std
    )
    with Checkpointer(run / "checkpoints") as checkpoints:
        saved = checkpoints._manager.restore(checkpoints.latest())["state"]
    logits = model.apply(saved["ema"], jnp.asarray(pixels, jnp.float32), train=False)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-3)


def test_labels_that_exclude_no_other_have_a_probability_each(run):
    images = tiny.dataset().splits["test"].image[:5]
    config = load_config(run)
    one = Predictor.find(run)
    several = Predictor(
        create_model(config.architecture),
        one.variables,
        config.augment,
        "abcd",
        tiny.SHAPE,
        multi_label=True,
    )
    odds = several(images) / (1 - several(images))
    # Sigmoid and softmax of the same logits: the odds are as the probabilities.
    shares = odds / odds.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, one(images), rtol=1e-3)


def test_the_command_names_files_of_any_size(run, tmp_path, capsys):
    path = tmp_path / "a.png"
    Image.new("L", (31, 17), 200).save(path)
    assert predict_command.main([str(run), str(path), "--top", "2"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{path}: ")
    assert line.count("%") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such", "a.png"], "/no/such is not a run directory"),
        (["RUN", "/no/such.png"], "/no/such.png cannot be read (No such file or di"),
        (["RUN", "EMPTY"], "holds no image (.bmp .gif"),
        (["RUN", "NOT"], "is not an image"),
        (["RUN"], "no image given"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(run, tmp_path, capsys, words, message):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    names = {"RUN": str(run), "NOT": str(tmp_path / "text")}
    names["EMPTY"] = str(tmp_path / "empty")
    assert predict_command.main([names.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_images_of_another_shape_are_refused(run):
    predictor = Predictor.find(run)
    with pytest.raises(UsageError, match=r"uint8 \['N', 8, 8, 3\]; got float32"):
        predictor(np.zeros((1, 9, 8, 3), np.float32))


# Image files, read for a net of 4x4 pixels


@pytest.fixture(params=[3, 1], ids=["color", "gray"])
def reader(request):
    shape = (4, 4, request.param)
    return Predictor(None, {}, AugmentConfig(), ("a",), shape)


def saved(path, image, kind="PNG", **options):
    image.save(path, kind, **options)
    return path


ORANGE = (255, 128, 0)
GREY_OF_ORANGE = 151
"""0.299 R + 0.587 G + 0.114 B, the weights of ITU-R 601-2."""


@pytest.mark.parametrize(
    ("mode", "color", "kind", "expected"),
    [
        ("RGB", ORANGE, "PNG", ORANGE),
        ("RGBA", (*ORANGE, 0), "PNG", ORANGE),
        ("RGBA", (*ORANGE, 255), "WEBP", ORANGE),
        ("P", ORANGE, "PNG", ORANGE),
        ("P", ORANGE, "GIF", ORANGE),
        ("CMYK", (0, 127, 255, 0), "TIFF", ORANGE),
        ("CMYK", (0, 127, 255, 0), "JPEG", ORANGE),
        ("L", 100, "PNG", (100,) * 3),
        ("LA", (100, 7), "PNG", (100,) * 3),
        ("1", 1, "PNG", (255,) * 3),
        ("I;16", 100 * 256 + 7, "PNG", (100,) * 3),
        ("I;16", 100 * 256 + 7, "TIFF", (100,) * 3),
    ],
)
def test_every_kind_of_pixel_is_read_right(
    reader, tmp_path, mode, color, kind, expected
):
    path = saved(tmp_path / "a", Image.new(mode, (9, 7), color), kind)
    pixels = reader.load(path)
    assert (pixels.shape, pixels.dtype) == (reader.image_shape, np.uint8)
    if reader.image_shape[-1] == 1:
        expected = GREY_OF_ORANGE if expected == ORANGE else expected[0]
    # JPEG and WEBP lose a little.
    assert np.abs(pixels.astype(int) - expected).max() <= 6


def test_a_transparent_palette_is_read_without_a_warning(reader, tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    path = saved(tmp_path / "a", image, transparency=b"\0\x80")
    expected = ORANGE if reader.image_shape[-1] == 3 else GREY_OF_ORANGE
    assert (reader.load(path) == expected).all()


def test_of_an_animation_the_first_frame_is_read(reader, tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    path = saved(
        tmp_path / "a", frames[0], "GIF", save_all=True, append_images=frames[1:]
    )
    assert (reader.load(path) == 50).all()


def test_an_image_is_turned_as_the_camera_says(reader, tmp_path):
    image = Image.new("L", (4, 4))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored on the left is above
    path = saved(tmp_path / "a", image, exif=exif)
    assert np.argwhere(reader.load(path)[..., 0] == 255).tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("1", (10_000, 9_000), r"too large \(.*90000000 pixels.*limit of 89478485"),
        ("1", (20_000, 9_000), r"too large \(.*180000000 pixels.*limit of 178956970"),
        ("L", (65_536, 1), "is 65536x1 pixels; the limit of a side is 65535; scale"),
        ("L", (1, 1_000_000), "is 1x1000000 pixels; the limit of a side is 65535"),
        ("I", (4, 4), "has pixels of mode I, whose range is not known"),
        ("F", (4, 4), "has pixels of mode F, whose range is not known"),
    ],
)
def test_images_of_the_wrong_size_or_kind_are_one_line(
    reader, tmp_path, mode, size, message
):
    kind = "TIFF" if mode in "IF" else "PNG"
    path = saved(tmp_path / "a", Image.new(mode, size), kind)
    with pytest.raises(UsageError, match=message) as caught:
        reader.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_the_longest_side_is_read(reader, tmp_path):
    path = saved(tmp_path / "a", Image.new("L", (65_535, 1), 100))
    assert (reader.load(path) == 100).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_an_image_that_was_cut_off_is_one_line(reader, tmp_path, kind):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
    path = saved(tmp_path / "a", noise, kind)
    content = path.read_bytes()
    for length in range(0, len(content) * 3 // 4, len(content) // 30):
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"is not an image|cannot be read \(."):
            reader.load(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_no_flipped_bit_of_an_image_is_a_traceback(reader, tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("GIF", "BMP") else {"exif": exif}
    path = saved(tmp_path / "a", Image.new("RGB", (8, 8), ORANGE), kind, **options)
    content = path.read_bytes()
    for place in range(min(len(content), 400)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert reader.load(path).shape == reader.image_shape
        except UsageError as error:
            assert "\n" not in str(error)


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    for name in ("config.json", "dataset.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        Predictor.find(tmp_path)


def test_an_image_is_cut_as_in_evaluation(run, tmp_path):
    """A streamed run with ``test_crop`` sees the middle of an image, and so do we."""
    config = load_config(run)
    image = Image.effect_noise((64, 48), 100).convert("RGB")
    image.save(tmp_path / "noise.png")
    predictor = Predictor(
        create_model(config.architecture),
        {},
        tiny.replace(config.augment, test_crop=0.5),
        "abcd",
        tiny.SHAPE,
        square=True,
    )
    expected = np.asarray(center_crop(8, 0.5)(image))
    np.testing.assert_array_equal(predictor.load(tmp_path / "noise.png"), expected)
    assert (np.asarray(center_crop(8)(image)) != expected).any()
