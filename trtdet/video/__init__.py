# SPDX-License-Identifier: Apache-2.0
"""Video files, cameras and streams: `source` decodes, `batches` feeds a model, `sink` writes,
`run` puts them together.
"""
