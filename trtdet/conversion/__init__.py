# SPDX-License-Identifier: Apache-2.0
"""Stage 1: a trained model becomes an ONNX file that ends in NMS, and is compared with its
source.
"""
