# SPDX-License-Identifier: Apache-2.0
# Sourced by examples/run.sh and tests/run.sh: makes .venv in the repository, once, with the requirement files named as arguments.
# PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 1; }

# A package of Debian or Ubuntu, installed without a question.
install_package() {
  local sudo
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  echo "installing $1" >&2
  { $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$1"; } >&2
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python not found; install Python 3.10 to 3.13, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$python" --version) is too old; Python 3.10 to 3.13 is needed (set PYTHON)"
"$python" -c 'import sys; sys.exit(sys.version_info >= (3, 14))' || fail "$("$python" --version) is newer than what TensorFlow is packaged for; set PYTHON to 3.10 to 3.13"

if ! "$python" -c 'import ensurepip' 2>/dev/null; then # Debian and Ubuntu package it apart
  package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  install_package "$package" || fail "could not install $package; please install it, then run this again"
fi
[ -x .venv/bin/pip ] || "$python" -m venv .venv

stamp=$(cat "$@" | sha256sum | cut -d' ' -f1)
if [ ! -e ".venv/.installed-$stamp" ]; then
  echo "installing $* into .venv" >&2
  .venv/bin/pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@")
  touch ".venv/.installed-$stamp"
fi
# ONNX Runtime sends telemetry by default; a value that is set stays.
export ORT_DISABLE_TELEMETRY="${ORT_DISABLE_TELEMETRY-1}"
export PATH="$PWD/.venv/bin:$PATH"
