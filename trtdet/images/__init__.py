# SPDX-License-Identifier: Apache-2.0
"""Image files become batches. No CUDA here."""
