# SPDX-License-Identifier: Apache-2.0
"""Exports of LibreYOLO's detectors with random weights, and the detections that LibreYOLO itself
finds with them.

It runs in an environment of its own, which has torch and LibreYOLO:

    python tests/tools/libreyolo_exports.py OUT --photos DIR [--seed 1] [--small] CLASS:SIZE:PIXELS
    ...

writes OUT/CLASS_SIZE/model.onnx and reference.json: for each photograph the best detections of
`predict`, in its pixels.

Random weights are made to behave: batch normalisation has the statistics of the photographs, and
the layers that give scores and boxes have outputs of a chosen mean and spread. So scores are
neither equal nor 0 or 1, and boxes are no larger than the picture.

With --small most weights are 0 and the others one of two values, and the file is written as
model.onnx.xz: those of tests/data/libreyolo.
"""

import argparse
import json
import lzma
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libreyolo
import numpy as np
import torch
from libreyolo.models.centernet.nn import set_portable_dcn
from PIL import Image
from torch import nn

#: Layers that give class scores, and those that give boxes, of the families that have both as
#: convolutions.
SCORES = re.compile(
    r"(bbox_ctrness|pred_cls|gfl_cls|rtm_cls|cls_pred|cls_preds|obj_preds|cv3|^hm\.2)(\.\d+)*$"
)
BOXES = re.compile(
    r"(bbox_reg|pred_reg|gfl_reg|rtm_reg|reg_pred|reg_preds|cv2|box_net\.predict\.conv_pw|^reg\.2)(\.\d+)*$"
)
#: CenterNet's width and height, in cells of the heatmap: their mean and largest value.
SIDES, SIDE_SPREAD = re.compile(r"^wh\.2$"), (9.0, 30.0)
#: Layers of a head before its last one, with a bias and no batch normalisation behind them.
HIDDEN = re.compile(r"(_head\.conv\.\d+(\.0)?|rpn\.head\.conv\.\d+\.0|box_head\.(fc)?\d)$")
#: Layers that give scores alone, of several boxes.
SCORES_ALONE = re.compile(r"(class_net\.predict\.conv_pw|cls_logits|cls_score)$")
#: Layers that score what a second stage looks at.
PROPOSALS = re.compile(r"rpn\.head\.cls_logits$")
#: Mean and largest value of their outputs; of scores the largest differs from class to class by
#: about 1.
SCORE_SPREAD, BOX_SPREAD = (-6.0, 0.0), (0.8, 2.0)
#: How much less each further bin gets, where the sides of a box are means over bins.
FALL = 0.5
NUM_CLASSES = 80
#: With --small: the share of weights that are not 0, in layers with more than `FEW` of them for
#: each output.
SHARE, FEW = 0.06, 100
#: By how much a layer may be multiplied.
MOST_GAIN = 50.0
#: What is asked of `predict`.
CONFIDENCE, OVERLAP, MOST = 0.001, 0.6, 100


def fill(weight: torch.Tensor, spread: float, small: bool) -> None:
    """Random numbers of that standard deviation; `small`: 0, or one of two values."""
    weight.normal_(0, spread)
    if small:
        share = SHARE if weight[0].numel() > FEW else 0.5
        used = torch.rand_like(weight) < share
        weight.copy_(weight.sign() * used * (spread / share**0.5))


def shake(detector: Any, pixels: int, photos: list[Path], seed: int, small: bool) -> None:
    """Give a network random weights that behave."""
    net: nn.Module = detector.model
    torch.manual_seed(seed)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            fan = weight[0].numel()
            bins = weight.numel() == fan and torch.equal(weight.flatten().round(), weight.flatten())
            with torch.no_grad():
                if fan > 1 and not bins:
                    gain = 1.2 if module.bias is None or HIDDEN.search(name) else 0.03
                    if ".fpn." in name and hasattr(net, "roi_heads"):  # two stages behind it
                        gain = 0.3
                    fill(weight, (gain / fan) ** 0.5, small)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
    images = [detector._preprocess(str(p), input_size=pixels)[0] for p in photos]
    if len({image.shape for image in images}) == 1:
        images = [torch.cat(images)]
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    frozen = [m for m in net.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    hooks = [m.register_forward_pre_hook(thaw) for m in frozen]
    net.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for batch in images:
            net(batch)
        for handle in hooks:
            handle.remove()
        net.eval()
        with spread_outputs(net):
            net(images[0])


def thaw(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    """A hook before a batch normalisation that never learns: it has the statistics of its input,
    of the last photographs where they come one by one.
    """
    norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)).clamp(min=1e-3))
    norm.weight.fill_(1)
    norm.bias.zero_()


def settle(module: nn.Conv2d | nn.Linear, out: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """Change a layer so that each of its outputs has the mean and the largest value wanted;
    returns the outputs.
    """
    assert module.bias is not None
    places = (0, *range(2, out.ndim))
    mean = out.mean(dim=places)
    factor = (to[:, 1] - to[:, 0]) / (out.amax(dim=places) - mean).clamp(min=1e-6)
    factor = factor.clamp(max=MOST_GAIN)  # an output that hardly varies would be rounding alone
    module.bias.copy_((module.bias - mean) * factor + to[:, 0])
    module.weight.mul_(factor.reshape(-1, *[1] * (module.weight.ndim - 1)))
    sides = (-1, *[1] * (out.ndim - 2))
    return (out - mean.reshape(sides)) * factor.reshape(sides) + to[:, 0].reshape(sides)


def settle_once(to: torch.Tensor) -> Any:
    """A forward hook: `settle` at the first of several levels that share a layer."""
    calls: list[nn.Module] = []

    def hook(module: nn.Conv2d | nn.Linear, _: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(module)
        return settle(module, out, to) if len(calls) == 1 else out

    return hook


@contextmanager
def spread_outputs(net: nn.Module) -> Iterator[None]:
    """While it is open, the layers of `SCORES` and `BOXES` are settled as they run."""
    handles = []
    for name, module in net.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or module.bias is None:
            continue
        n = len(module.bias)
        sides = SIDES.search(name) is not None
        to = torch.tensor(SIDE_SPREAD if sides else BOX_SPREAD).repeat(n, 1)
        if PROPOSALS.search(name):
            to[:] = torch.tensor((-1.0, 3.0))
        elif SCORES_ALONE.search(name):
            to[:] = torch.tensor(SCORE_SPREAD)
            to[:, 1] += torch.randn(n)
        elif SCORES.search(name) and n >= NUM_CLASSES:
            to[:NUM_CLASSES] = torch.tensor(SCORE_SPREAD)
            to[:NUM_CLASSES, 1] += torch.randn(NUM_CLASSES)
        elif SCORES.search(name) and n == 1:
            to[:] = torch.tensor((-1.0, 3.0))
        elif not (sides or BOXES.search(name)):
            continue
        values = n - NUM_CLASSES if n > NUM_CLASSES and SCORES.search(name) else n
        bins = values // 4 if BOXES.search(name) or values < n else 0
        if bins:
            to[n - values :] -= FALL * torch.arange(bins).repeat(4)[:, None]
        handles.append(module.register_forward_hook(settle_once(to)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def export(
    cls: str, size: str, pixels: int, out: Path, photos: list[Path], seed: int, small: bool
) -> None:
    weights = {} if cls == "LibreRFDETR" else None  # whose None asks the net for some
    detector = getattr(libreyolo, cls)(weights, size=size)
    if cls == "LibreCenterNet":  # as it is exported, without torchvision's compiled operators
        set_portable_dcn(detector.model, True)
    shake(detector, pixels, photos, seed, small)
    folder = out / f"{cls}_{size}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    failures = []
    for options in ({"dynamic": True}, {"dynamic": False}, {}):
        try:
            written = detector.export(
                "onnx", output_path=str(path), imgsz=pixels, simplify=False, **options
            )
            break
        except Exception as error:
            failures.append(f"{options}: {error}")
    else:
        raise RuntimeError("; ".join(failures)[:600])
    if str(written) != str(path):
        os.replace(written, path)
    backend = libreyolo.LibreYOLO(str(path))
    images = [found(backend, photo) for photo in photos]
    note = f"LibreYOLO {libreyolo.__version__} {cls} {size}, {pixels} pixels, random weights {seed}"
    with open(folder / "reference.json", "w") as file:
        json.dump({"note": note, "confidence": CONFIDENCE, "iou": OVERLAP, "images": images}, file)
    if small:
        (folder / "model.onnx.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
        path.unlink()
    print("OK", cls, size, options, [len(i["scores"]) for i in images], images[0]["scores"][:3])


def found(backend: Any, photo: Path) -> dict[str, Any]:
    """The detections of one photograph, in its pixels."""
    result = backend.predict(str(photo), conf=CONFIDENCE, iou=OVERLAP, max_det=MOST)
    boxes = (result[0] if isinstance(result, list) else result).boxes
    width, height = Image.open(photo).size
    return {
        "file": photo.name,
        "width": width,
        "height": height,
        "scores": np.asarray(boxes.conf).round(6).tolist(),
        "classes": np.asarray(boxes.cls).astype(int).tolist(),
        "boxes": np.asarray(boxes.xyxy).round(2).tolist(),
    }


def photographs_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png"))[:4]


def export_each(wanted: Sequence[str], export_one: Callable[[str], None]) -> int:
    """The exit status: 1 where one of them failed, which is printed."""
    failed = 0
    for text in wanted:
        try:
            export_one(text)
        except Exception as error:
            failed += 1
            print("FAILED", text, type(error).__name__, str(error)[:600], flush=True)
            traceback.print_exc(limit=-3)
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("wanted", nargs="+", metavar="CLASS:SIZE:PIXELS")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    photos = photographs_of(args.photos)

    def one(text: str) -> None:
        cls, size, pixels = text.split(":")
        export(cls, size, int(pixels), args.out, photos, args.seed, args.small)

    return export_each(args.wanted, one)


if __name__ == "__main__":
    raise SystemExit(main())
