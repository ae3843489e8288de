# SPDX-License-Identifier: Apache-2.0
"""Rewrites of ONNX graphs."""
