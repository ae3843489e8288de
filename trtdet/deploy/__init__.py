# SPDX-License-Identifier: Apache-2.0
"""On to servers: Triton repositories, DeepStream configurations, trtexec command lines, all from
what a model says about itself.
"""
