# SPDX-License-Identifier: Apache-2.0
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trtdet.results import coco, naming
from trtdet.results.naming import (
    check_apart,
    encode_png,
    output_names,
    write_picture,
)

ROOT = Path("in")


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),  # as the old sample
        (["a.jpg", "a.png", "b.png"], ["a.jpg", "a.png", "b"]),  # a shared stem
        (["a.jpg", "A.png"], ["a.jpg", "A.png"]),  # one file where case does not count
        (["x/a.jpg", "y/a.png", "a.jpg"], ["x/a", "y/a", "a"]),  # folders are mirrored
        (["a.jpg", "a.jpg.bmp", "a.png"], ["a.jpg", "a.jpg.bmp", "a.png"]),  # a stem that meets a full name
        (["a.b.jpg", "a.c.jpg"], ["a.b", "a.c"]),  # only the last suffix goes
    ],
)  # fmt: skip
def test_output_names(files: list[str], names: list[str]) -> None:
    assert output_names([ROOT / file for file in files], ROOT) == names


def test_a_single_image_is_its_own_root() -> None:
    assert output_names([ROOT / "sub" / "a.jpg"], ROOT / "sub" / "a.jpg") == ["a"]


def test_names_never_collide_and_never_lose_an_image() -> None:
    stems = ["a", "a.jpg", "a.png", "a.jpg.jpg", "b"]
    paths = [ROOT / f"{stem}{suffix}" for stem in stems for suffix in (".jpg", ".png", ".bmp")]
    for count in range(1, len(paths) + 1):
        names = output_names(paths[:count], ROOT)
        assert len({name.casefold() for name in names}) == count


def test_an_image_outside_the_root_is_an_error() -> None:
    with pytest.raises(ValueError, match="elsewhere"):
        output_names([Path("elsewhere/a.jpg")], ROOT)


def test_inputs_are_not_overwritten(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    image = photos / "sub" / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    names = {image: "sub/a"}
    check_apart(tmp_path / "out", names, photos, recursive=True)
    check_apart(photos / "out", {image: "a"}, [photos / "sub"])
    for output, sources, recursive in (
        (photos, photos, True),
        (photos / "out", photos, True),  # a later run looks into it
        (photos / "x" / "..", photos, True),
        (photos, [photos / "sub"], False),  # photos/sub/a.png is beside the image
    ):
        with pytest.raises(ValueError, match=rf"^--output: .* is also a folder that images are read from.*such as --output {re.escape(str(tmp_path))}"):  # fmt: skip
            check_apart(output, names, sources, recursive=recursive)
    with pytest.raises(ValueError, match=r"such as --output .*sub_out$"):
        check_apart(photos / "sub", {image: "a"}, [image])


def test_write_picture_keeps_every_pixel(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    write_picture(tmp_path / "new" / "a.png", image)
    with Image.open(tmp_path / "new" / "a.png") as written:
        np.testing.assert_array_equal(np.asarray(written), image)


def test_names_leave_room_for_a_suffix_whatever_the_alphabet() -> None:
    """251 bytes before the suffix, and the suffix kept as two images share a stem: 255 bytes
    must hold what is added.
    """
    stem = "\N{GRINNING FACE}" * 62
    paths = [Path("photos", f"{stem}{end}") for end in ("a.jpg", "a.png", "b.png")]
    names = output_names(paths, Path("photos"))
    assert len(set(names)) == 3
    for name in names:
        assert len(f"{name}.tsv".encode()) <= 255
        assert name.startswith("\N{GRINNING FACE}" * 50)


SHAPES = [(1, 1, 3), (1, 7, 3), (9, 1, 3), (48, 64, 3), (333, 500, 3)]


@pytest.mark.parametrize("by", ["fpng", "OpenCV"])
@pytest.mark.parametrize("shape", SHAPES)
def test_png_keeps_every_pixel(
    shape: tuple[int, ...], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By OpenCV where fpng is not installed."""
    if by == "fpng":
        pytest.importorskip("fpng")
    else:
        monkeypatch.setattr(naming, "_maybe_fpng", lambda: None)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    fixed = noise // 64
    fixed.setflags(write=False)
    for image in (noise, np.full(shape, 7, np.uint8), noise[:, ::-1], fixed):
        with Image.open(io.BytesIO(encode_png(image))) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(picture), image)


def test_pictures_are_written_as_their_suffix_says(tmp_path: Path) -> None:
    image = np.full((40, 60, 3), (200, 100, 50), np.uint8)
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG")):
        path = tmp_path / f"a.{suffix}"
        write_picture(path, image)
        with Image.open(path) as picture:
            assert picture.format == kind
            assert np.abs(np.asarray(picture).astype(int) - image).max() <= 2


def test_ids_of_odd_names_can_be_read_again(tmp_path: Path) -> None:
    """An escape in a file name is text in detections.json, and readable as such."""
    paths = [tmp_path / "a\x1b[2J.png", tmp_path / "b.png"]
    ids = coco.name_images(paths, tmp_path)
    assert list(ids.values()) == ["a\\x1b[2J.png", "b.png"]
    images = [{"id": n, "file_name": name} for n, name in enumerate(ids.values(), 1)]
    categories = [{"id": 1, "name": "one"}]
    content = {"images": images, "annotations": [], "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    rows = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5} for i in ids.values()]  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(rows))
    annotations = coco.read_annotations(tmp_path / "truth.json")
    found = coco.read_results(tmp_path / "found.json", annotations)
    assert [entry["image_id"] for entry in found] == [1, 2]


@pytest.mark.parametrize("name", ["a.jpg", "d/a.jpg", "d.x/a", "d.x/.hid", ".hid.jpg", "a.b.c", "a", "a..jpg"])  # fmt: skip
def test_a_suffix_is_what_pathlib_takes_for_one(name: str) -> None:
    assert naming._without_suffix(name) == str(Path(name).with_suffix(""))


def test_dots_alone_are_no_name() -> None:
    names = naming.output_names([Path("in/..jpg"), Path("in/d/...png")], Path("in"))
    assert names == ["..jpg", "d/...png"]
