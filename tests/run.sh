#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint, types and tests, on any machine. Arguments go to pytest; -n 0 runs the tests in one process.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh" requirements.txt requirements-tensorflow.txt requirements-rtx.txt requirements-triton.txt requirements-ray.txt requirements-video.txt requirements-dev.txt
# Type stubs of TensorRT 10. They require `tensorrt` itself, which does not install everywhere and is not needed to read them.
python -c 'import importlib.metadata as m; m.version("tensorrt-stubs")' 2>/dev/null ||
  pip install --quiet --disable-pip-version-check --no-deps 'tensorrt-stubs>=10.13,<11'

# The report of compare.py is looked at in a browser, the DeepStream parser is compiled; without them those tests are skipped and say so.
command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null || install_package chromium-headless-shell || true
# strace traces a run for network calls, see tests/test_sessions.py.
command -v strace >/dev/null || install_package strace || true
command -v g++ >/dev/null && command -v make >/dev/null || install_package build-essential || true

ruff format --check .
ruff check .
python scripts/tensorrt_typings.py build/typings
mypy
# A file of tests is one worker's; each worker needs about 2 GB.
python -m pytest -n "$(nproc | awk '{print $1 < 4 ? $1 : 4}')" --dist loadfile "$@"
