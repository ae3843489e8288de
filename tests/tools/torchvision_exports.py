# SPDX-License-Identifier: Apache-2.0
"""Exports of torchvision's detectors with the whole model inside and random weights, and the
detections that torchvision itself finds with them.

It runs in an environment with torch, torchvision and LibreYOLO:

    python tests/tools/torchvision_exports.py OUT --photos DIR [--seed 1] [--form any_size]
        MODEL [MODEL ...]

writes OUT/MODEL/model.onnx and reference.json: for each photograph the detections of `forward`, in
its pixels. The forms are any_size, of an input [3, H, W]; batched, of [1, 3, H, W]; and fixed, of
[1, 3, 256, 320], for which photographs are stretched.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from libreyolo_exports import HIDDEN, export_each, fill, photographs_of, spread_outputs, thaw
from PIL import Image
from torch import nn
from torchvision.models import detection

#: Model -> what it is made with.
MODELS: dict[str, dict[str, Any]] = {
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
    "retinanet_resnet50_fpn": {"min_size": 256, "max_size": 400},
    "retinanet_resnet50_fpn_v2": {"min_size": 256, "max_size": 400},
    "fcos_resnet50_fpn": {"min_size": 256, "max_size": 400},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {},
    "fasterrcnn_resnet50_fpn": {"min_size": 256, "max_size": 400},
    "fasterrcnn_resnet50_fpn_v2": {"min_size": 256, "max_size": 400},
    "maskrcnn_resnet50_fpn": {"min_size": 256, "max_size": 400},
    "keypointrcnn_resnet50_fpn": {"min_size": 256, "max_size": 400},
}
FIXED, CLASSES = (256, 320), 91


def pixels(photo: Path, form: str) -> torch.Tensor:
    image = np.array(Image.open(photo).convert("RGB"))
    if form == "fixed":
        image = cv2.resize(image, FIXED[::-1], interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def shake(net: nn.Module, images: list[torch.Tensor], seed: int) -> None:
    """Random weights that behave: see libreyolo_exports.py."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                fan = module.weight[0].numel()
                is_plain = name.startswith("backbone.features") or HIDDEN.search(name)
                gain = 1.2 if module.bias is None or is_plain else 0.03
                gain = 0.3 if ".fpn." in name else gain
                fill(module.weight, (gain / fan) ** 0.5, False)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        frozen = [m for m in net.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
        hooks = [m.register_forward_pre_hook(thaw) for m in frozen]
        net.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        net(images)
        for handle in hooks:
            handle.remove()
        net.eval()
        for name, module in net.named_modules():  # most of SSD's boxes are of no object
            if not isinstance(module, nn.Conv2d) or "classification_head.module_list" not in name:
                continue
            if module.bias is not None and module.out_channels % CLASSES == 0:
                module.bias[::CLASSES] += 4
                module.weight.mul_(30)
        with spread_outputs(net):
            net([images[0]])


def export(name: str, form: str, out: Path, photos: list[Path], seed: int) -> None:
    made_with = {"weights": None, "weights_backbone": None, "num_classes": CLASSES} | MODELS[name]
    if name.startswith("keypoint"):
        made_with["num_classes"] = 2
    net = getattr(detection, name)(**made_with)
    images = [pixels(photo, form) for photo in photos]
    shake(net, images, seed)
    folder = out / f"{name}_{form}"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        found = [net([image])[0] for image in images]
    names = [key for key in found[0] if key != "keypoints_scores"]
    free = {axis: "size" for axis in range(4)}
    args: Any = ([images[1]],) if form == "any_size" else (images[1][None],)
    axes: dict[str, Any] = {key: {0: "n"} for key in names}
    if form == "any_size":
        axes["image"] = {1: "height", 2: "width"}
    if form == "batched":
        axes["image"] = {k: v for k, v in free.items() if k > 1}
        axes["image"] = {2: "height", 3: "width"}
    torch.onnx.export(
        net, args, str(folder / "model.onnx"), opset_version=17, dynamo=False,
        input_names=["image"], output_names=names, dynamic_axes=axes,
    )  # fmt: skip
    rows = []
    for photo, result in zip(photos, found, strict=True):
        width, height = Image.open(photo).size
        scale = np.array([width / FIXED[1], height / FIXED[0]] * 2) if form == "fixed" else 1.0
        best = result["scores"].argsort(descending=True)[:100]
        rows.append({
            "file": photo.name, "width": width, "height": height,
            "scores": result["scores"][best].numpy().round(6).tolist(),
            "classes": result["labels"][best].tolist(),
            "boxes": (result["boxes"][best].numpy() * scale).round(2).tolist(),
        })  # fmt: skip
    note = f"torchvision {name}, {form}, random weights {seed}"
    with open(folder / "reference.json", "w") as file:
        json.dump({"note": note, "images": rows}, file)
    print("OK", name, form, [len(r["scores"]) for r in rows], rows[0]["scores"][:3], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("wanted", nargs="+", choices=[*MODELS], metavar="MODEL")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=["any_size", "batched", "fixed"], default="any_size")
    args = parser.parse_args()
    photos = photographs_of(args.photos)
    return export_each(
        args.wanted, lambda name: export(name, args.form, args.out, photos, args.seed)
    )


if __name__ == "__main__":
    raise SystemExit(main())
