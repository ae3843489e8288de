# SPDX-License-Identifier: Apache-2.0
"""Two forms of a detector, compared."""
