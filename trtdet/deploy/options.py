# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a deployment. Standard library only: the command lines read it."""

#: Batches of an ONNX file without bounds.
DEFAULT_MAX_BATCH = 8
