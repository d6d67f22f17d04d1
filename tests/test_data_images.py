"""Folders of images: sizes, modes, classes; written back as pictures."""

import numpy as np
import pytest
import torch

from likely.contract import Binary, Integers
from likely.data import DataError, Schema, infer_schema

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def pixels(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def test_grey_and_colour_png_files_come_back_to_the_pixel(tmp_path):
    for name, shape, channels in (("grey", (6, 5), 1), ("rgb", (6, 5, 3), 3)):
        arrays = [pixels(*shape) for _ in range(4)]
        for i, array in enumerate(arrays):
            save(tmp_path / name / f"{i}.png", array)
        schema = infer_schema(tmp_path / name)
        assert schema.space == Integers((channels, 6, 5), 256)
        data = schema.read(tmp_path / name)
        assert np.array_equal(schema.to_user(data.x), np.stack(arrays))
        schema.write(data.x, tmp_path / f"{name}-out")
        assert torch.equal(schema.read(tmp_path / f"{name}-out").x, data.x)
        assert Schema.from_toml(schema.to_toml()) == schema
        assert torch.equal(schema.read(np.stack(arrays)).x, data.x), "an array may be held against the schema"
        with pytest.raises(DataError, match="expected a new or empty folder"):
            schema.write(data.x, tmp_path / f"{name}-out")


def test_sub_folders_are_classes(tmp_path):
    for label in ("cat", "dog"):
        for i in range(3):
            save(tmp_path / label / f"{i}.png", pixels(4, 4))
    schema = infer_schema(tmp_path, given="label")
    data = schema.read(tmp_path)
    assert data.condition[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert schema.form.given[0].categories == ("cat", "dog")
    schema.write(data.x, tmp_path / "out", data.condition)
    again = infer_schema(tmp_path / "out", given="label").read(tmp_path / "out")
    assert torch.equal(again.x, data.x) and torch.equal(again.condition, data.condition)
    save(tmp_path / "stray.png", pixels(4, 4))
    with pytest.raises(DataError, match=r"needs one sub-folder a class; .*stray\.png lies in none"):
        infer_schema(tmp_path, given="label")


def test_sizes_that_differ_are_listed_and_may_be_made_one(tmp_path):
    save(tmp_path / "a.png", pixels(6, 8))
    save(tmp_path / "b.png", pixels(6, 8))
    save(tmp_path / "c.png", pixels(9, 3))
    with pytest.raises(DataError, match=r"got 6×8 \(2 files, e\.g\. a\.png\), 9×3 \(1 files, e\.g\. c\.png\); pass"):
        infer_schema(tmp_path)
    schema = infer_schema(tmp_path, size=4)
    assert schema.space == Integers((1, 4, 4), 256) and "resized and cropped" in schema.describe()
    assert schema.read(tmp_path).x.shape == (3, 1, 4, 4)
    assert infer_schema(tmp_path, size=(3, 5)).space.shape == (1, 3, 5)
    save(tmp_path / "new" / "d.png", pixels(40, 20))
    assert schema.read(tmp_path / "new").x.shape == (1, 1, 4, 4), "new images are brought to the size of the schema"
    with pytest.raises(DataError, match="size: expected one whole number or two"):
        infer_schema(tmp_path, size="big")


def test_the_crop_is_central_and_keeps_constant_areas(tmp_path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", wide)
    assert (infer_schema(tmp_path, size=4).read(tmp_path).x == 200).all()


def test_modes(tmp_path):
    save(tmp_path / "a.png", pixels(4, 4))
    save(tmp_path / "b.png", pixels(4, 4, 3))
    with pytest.raises(DataError, match="got 1 grey and 1 in colour; pass channels='grey' or channels='rgb'"):
        infer_schema(tmp_path)
    assert infer_schema(tmp_path, channels="rgb").space.shape == (3, 4, 4)
    grey = infer_schema(tmp_path, channels="grey")
    assert grey.space.shape == (1, 4, 4)
    assert np.array_equal(grey.read(tmp_path).x[0, 0].numpy(), np.asarray(Image.open(tmp_path / "a.png")))
    save(tmp_path / "c.png", np.concatenate([pixels(4, 4, 3), np.full((4, 4, 1), 255, np.uint8)], -1))
    with pytest.raises(DataError, match=r"c\.png: expected a grey or RGB image, got mode RGBA; pass channels="):
        infer_schema(tmp_path)
    with pytest.raises(DataError, match="channels: expected 'grey' or 'rgb', got 'colour'"):
        infer_schema(tmp_path, channels="colour")


def test_one_bit_and_sixteen_bit_images(tmp_path):
    bits = RNG.random((4, 4)) > 0.5
    for name in ("a", "b"):
        Image.fromarray(bits).save(tmp_path / f"{name}.png")
    schema = infer_schema(tmp_path)
    assert schema.space == Binary((1, 4, 4))
    assert np.array_equal(schema.read(tmp_path).x[0, 0].numpy(), bits)
    deep = RNG.integers(0, 65536, (2, 4, 4)).astype(np.uint16)
    for i in range(2):
        save(tmp_path / "deep" / f"{i}.png", deep[i])
    schema = infer_schema(tmp_path / "deep")
    assert schema.space == Integers((1, 4, 4), 65536)
    assert np.array_equal(schema.read(tmp_path / "deep").x[:, 0].numpy(), deep)


def test_lossy_and_webp_files(tmp_path):
    array = pixels(8, 8, 3)
    for suffix, options in (("jpg", {}), ("webp", {"lossless": True})):
        for i in range(2):
            save(tmp_path / suffix / f"{i}.{suffix}", array, **options)
        assert infer_schema(tmp_path / suffix).read(tmp_path / suffix).x.shape == (2, 3, 8, 8)
    assert np.array_equal(infer_schema(tmp_path / "webp").read(tmp_path / "webp").x[0].permute(1, 2, 0).numpy(), array)


def test_a_sheet_of_samples(tmp_path):
    array = pixels(7, 4, 4)
    schema = infer_schema(array)
    schema.write(schema.read(array).x, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        found = np.asarray(sheet)
    assert np.array_equal(found[:56:14, :56:14], array[0]), "4×4 pixels are enlarged 14 times"
    with pytest.raises(DataError, match=r"expected a name that ends in \.npy or \.npz, \.png"):
        schema.write(schema.read(array).x, tmp_path / "sheet.bmp")


def test_folders_without_whole_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected images .* found none"):
        infer_schema(tmp_path / "empty")
    save(tmp_path / "cut" / "a.png", pixels(30, 30))
    data = (tmp_path / "cut" / "a.png").read_bytes()
    (tmp_path / "cut" / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.png: not a whole image .*; mend or remove it"):
        infer_schema(tmp_path / "cut")
