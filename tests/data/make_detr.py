# SPDX-License-Identifier: Apache-2.0
"""Make detr_tiny and deformable_detr_tiny: ONNX text, weights, and what transformers detects in
three pictures.

Run once, with Python 3.11, torch 2.13.0 (CPU) and transformers 5.23.0:

    python tests/data/make_detr.py

The weights are random but alive: batch normalisation has the statistics of its own input, and heads
spread boxes and scores. They are numbers that float16 holds, so the files are small and the model
is exactly theirs.
"""

import gzip
import re
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
)

HERE = Path(__file__).parent
PHOTOGRAPH = HERE.parents[1] / "trtdet" / "data" / "astronaut.jpg"
HEIGHT, WIDTH = 64, 96
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
EXTENTS_WH = [(96, 40), (50, 64), (96, 64)]  # of the pictures in the letterboxed input
SOURCE_WH = [(192, 80), (100, 128), (480, 320)]
COMMON = {
    "use_timm_backbone": False, "encoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_labels": 4, "attn_implementation": "eager",
}  # fmt: skip


class Network(nn.Module):
    """The two outputs alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask=None):
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return outputs.logits, outputs.pred_boxes


def network(deformable, normalised):
    torch.manual_seed(0)
    stages = ["stage2", "stage3"] if deformable else ["stage3"]
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 12],
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=stages,
    )
    if deformable:
        config = DeformableDetrConfig(
            backbone_config=backbone, d_model=32, decoder_layers=2, num_queries=12, num_feature_levels=2, encoder_n_points=2,
            decoder_n_points=2, with_box_refine=True, disable_custom_kernels=True, **COMMON,
        )  # fmt: skip
        model = DeformableDetrForObjectDetection(config)
    else:
        model = DetrForObjectDetection(
            DetrConfig(
                backbone_config=backbone, d_model=16, decoder_layers=1, num_queries=10, **COMMON
            )
        )
    return bring_to_life(model.eval(), normalised, deformable)


def bring_to_life(model, normalised, deformable):
    random = torch.Generator().manual_seed(1)

    def draw(tensor, scale=1.0, mean=0.0):
        return mean + scale * torch.randn(tensor.shape, generator=random)

    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.data, module.bias.data = (
                draw(module.weight, 0.2, 1),
                draw(module.bias, 0.1),
            )
        elif isinstance(module, nn.Embedding):
            module.weight.data = draw(module.weight)
        elif isinstance(module, nn.Linear):
            scale = 0.9 * module.weight.shape[1] ** -0.5
            if not deformable and name.endswith(("q_proj", "k_proj")):
                scale *= 2.2
            if name.startswith(("class_", "model.decoder.class_embed")):
                scale *= 2.5
            module.weight.data = draw(module.weight, scale)
            module.bias.data = draw(
                module.bias, 0.5 if "sampling" in name or "class" in name else 0.1
            )

    def settle(module, inputs):
        (x,) = inputs
        module.running_mean.data = x.mean((0, 2, 3))
        module.running_var.data = x.var((0, 2, 3)) + 1e-3

    norms = [m for m in model.modules() if type(m).__name__.endswith("FrozenBatchNorm2d")]
    hooks = [module.register_forward_pre_hook(settle) for module in norms]
    with torch.no_grad():
        model(pixel_values=normalised)
    for hook in hooks:
        hook.remove()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()
    return model


def export(model, path, *, newer):
    masks = torch.ones(2, HEIGHT, WIDTH, dtype=torch.int64)
    masks[:, :, WIDTH // 2 :] = 0
    names, outputs = ["pixel_values", "pixel_mask"], ["logits", "pred_boxes"]
    if newer:
        batch = torch.export.Dim("batch", min=1, max=64)
        free = {"dynamic_shapes": {name: {0: batch} for name in names}, "external_data": False}
    else:
        free = {"dynamic_axes": {name: {0: "batch"} for name in names + outputs}}
    torch.onnx.export(
        Network(model).eval(), (torch.randn(2, 3, HEIGHT, WIDTH), masks), str(path), input_names=names, output_names=outputs,
        dynamo=newer, opset_version=18 if newer else 16, **free,
    )  # fmt: skip


def as_text(model):
    """(text in which larger weights are inputs, those weights)"""
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = {k: v for k, v in weights.items() if v.dtype == np.float32 and v.size > 16}
    small = [t for t in model.graph.initializer if t.name not in weights]
    for field in ("initializer", "value_info", "metadata_props"):
        model.graph.ClearField(field)
    model.graph.initializer.extend(small)
    for item in [*model.graph.node, *model.graph.input, *model.graph.output]:
        item.ClearField("metadata_props")
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(k, 1, v.shape) for k, v in weights.items()
    )
    # The printer writes 0.0 as 0, which the parser of onnx 1.18 takes for an integer.
    text = re.sub(r"(: float = -?\d+)([,>])", r"\1.0\2", onnx.printer.to_text(model))
    return text, weights


def main():
    with Image.open(PHOTOGRAPH) as photograph:
        photo = np.asarray(photograph.convert("RGB").resize((WIDTH, HEIGHT)), np.uint8)
    images = np.stack([photo, 255 - photo[:, ::-1], photo[::-1]])
    full = torch.tensor(((images - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2).copy())
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.int64)
    for mask, (w, h) in zip(masks, EXTENTS_WH, strict=True):
        mask[:h, :w] = 1
    sizes = [(h, w) for w, h in SOURCE_WH]
    for name, processor in (
        ("detr_tiny", DetrImageProcessor()),
        ("deformable_detr_tiny", DeformableDetrImageProcessor()),
    ):
        deformable = name.startswith("deformable")
        model = network(deformable, full)
        path = HERE / f"{name}.onnx"
        export(model, path, newer=not deformable)
        text, weights = as_text(onnx.load(path))
        path.unlink()
        if deformable:
            (HERE / f"{name}.onnx.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        else:
            (HERE / f"{name}.onnx.txt").write_text(text)
        values = {"images": images, "extents_wh": EXTENTS_WH, "source_wh": SOURCE_WH}
        with torch.no_grad():
            results = {
                "letterbox": model(pixel_values=full * masks[:, None], pixel_mask=masks),
                "stretch": model(pixel_values=full),
            }
        for mode, outputs in results.items():
            found = processor.post_process_object_detection(
                outputs, threshold=0.0, target_sizes=sizes
            )
            for part in ("boxes", "scores", "labels"):
                values[f"{mode}_{part}"] = np.stack([one[part].numpy() for one in found])
        halves = {
            f"weight/{k}": v.astype(np.float16) if (v == v.astype(np.float16)).all() else v
            for k, v in weights.items()
        }
        np.savez_compressed(HERE / f"{name}.npz", **values, **halves)


if __name__ == "__main__":
    main()
