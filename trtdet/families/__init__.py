# SPDX-License-Identifier: Apache-2.0
"""The detector families that create_onnx.py knows. To add one: docs/adding_a_family.md."""

from trtdet.families import automl, deformable_detr, detr, retinanet, tfod, yolo
from trtdet.family import Family

FAMILIES: list[Family] = [automl, tfod, retinanet, yolo, detr, deformable_detr]
