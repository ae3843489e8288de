# SPDX-License-Identifier: Apache-2.0
"""All that is known of TensorRT at build time."""
