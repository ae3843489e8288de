# SPDX-License-Identifier: Apache-2.0
"""Is this machine ready: `facts` reads it, `judge` says what works and what is missing, `text`
prints that.
"""
