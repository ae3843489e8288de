# SPDX-License-Identifier: Apache-2.0
"""Narrow types and quantization, put into a model in memory."""
