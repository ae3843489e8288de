# SPDX-License-Identifier: Apache-2.0
"""A model over image files: detect, evaluate, tune, measure."""
