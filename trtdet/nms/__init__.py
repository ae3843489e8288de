# SPDX-License-Identifier: Apache-2.0
"""The end of every model: what selects the detections, as nodes of a graph, and as NumPy
references.
"""
