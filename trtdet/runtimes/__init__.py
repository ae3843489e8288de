# SPDX-License-Identifier: Apache-2.0
"""What turns a batch of images into the four outputs."""
