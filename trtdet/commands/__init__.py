# SPDX-License-Identifier: Apache-2.0
"""The command lines: one module per stage, with its options, its checks of usage, and a recipe
of calls.
"""
