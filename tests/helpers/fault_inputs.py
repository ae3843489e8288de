# SPDX-License-Identifier: Apache-2.0
"""More sound files to damage at random: videos, pictures of every form, weights in a file of their
own, a journal. They take longer to read than those of `fault_desk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fault_desk import inside
from PIL import Image

from trtdet.commands import tune_precision

TUNE = "tune_precision --model net.onnx --calib_cache net.cache --input photos --annotations objects.json --output tuned.json --views 1 --noise_images 1 --threads 1"  # fmt: skip
#: Container -> encoder and pixel format.
VIDEOS = {"mp4": ("mpeg4", "yuv420p"), "mkv": ("ffv1", "bgr0"), "ts": ("mpeg2video", "yuv420p"), "avi": ("mjpeg", "yuvj420p"), "webm": ("libvpx", "yuv420p")}  # fmt: skip
#: Name -> how Pillow's mode and options make it.
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "grey.jpg": ("L", {}), "colour.jpg": ("RGB", {}), "progressive.jpg": ("RGB", {"progressive": True}), "cmyk.jpg": ("CMYK", {}),
    "plain.tif": ("RGB", {}), "lzw.tif": ("RGB", {"compression": "tiff_lzw"}), "deflate.tif": ("RGBA", {"compression": "tiff_adobe_deflate"}),
    "jpeg.tif": ("RGB", {"compression": "jpeg"}), "fax.tif": ("1", {"compression": "group4"}), "sixteen.tif": ("I;16", {}), "cmyk.tif": ("CMYK", {}),
    "lossy.webp": ("RGB", {}), "lossless.webp": ("RGBA", {"lossless": True}), "sixteen.png": ("I;16", {}), "alpha.png": ("RGBA", {}),
    "palette.png": ("P", {}), "bits.png": ("1", {}), "plain.bmp": ("RGB", {}), "palette.bmp": ("P", {}),
}  # fmt: skip


def add(folder: Path) -> None:
    """Write them into a folder that `fault_desk.make` has made."""
    for name in PICTURES:
        make_picture(folder / name.replace(".", "_") / name)
    for suffix in VIDEOS if find_spec("av") else ():
        make_video(folder / f"clip.{suffix}")
    split_weights(folder / "net.onnx", folder / "split.onnx")
    make_journal(folder)
    (folder / "long.pbtxt").write_text(LABEL_MAP)


def make_journal(folder: Path) -> None:
    """What `TUNE` leaves, but for its result."""
    with inside(folder), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert tune_precision.main(TUNE.split()[1:]) == 0
    (folder / "tuned.json").unlink()


def make_picture(path: Path) -> None:
    mode, options = PICTURES[path.name]
    rows = np.add.outer(np.arange(32) * 5, np.arange(48) * 2).astype(np.uint8)
    rows[:8] = rows[-8:] = rows[:, :8] = rows[:, -8:] = 0  # the corners: class 0 of the detector
    if mode == "I;16":
        picture = Image.fromarray(rows.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(np.stack([rows, rows, rows // 2], 2)).convert(mode)
    if path.suffix == ".jpg":
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "held upright"
        options = {**options, "exif": exif}
    path.parent.mkdir(parents=True)
    picture.save(path, **options)


def make_video(path: Path, frames: int = 6) -> None:
    import av

    encoder, pixels = VIDEOS[path.suffix[1:]]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for number in range(frames):
            picture = np.full((48, 64, 3), (40 * number, 2, 0), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def split_weights(source: Path, target: Path, changes: Sequence[float] = ()) -> None:
    """A model with its weights in a file of their own.

    Args:
        changes: put in place of the first of them.
    """
    model = onnx.load(source)
    target.with_name(f"{target.name}.data").unlink(missing_ok=True)  # it would be appended to
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=0)  # fmt: skip
    if changes:
        data = target.with_name(f"{target.name}.data")
        values = np.frombuffer(data.read_bytes(), np.float32).copy()
        values[: len(changes)] = changes
        data.write_bytes(values.tobytes())


#: As the label maps of the TensorFlow Object Detection API are, with all that they may have.
LABEL_MAP = """# of TFOD
item: {
  name: "/m/01g317"  # an id
  id: 1
  display_name: "apple \\"red\\" \\101"
}
item <
  id: 2;
  name: 'pear', display_name: "pe" "ar"
  keypoints { id: 1 label: "stalk" }
>
item { id: 3 name: "plum" lvis { frequency: RARE } }
"""
