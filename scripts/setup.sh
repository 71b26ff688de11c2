#!/usr/bin/env bash
# Makes .venv beside this script's parent with everything in it. Quick when it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/.installed 2>/dev/null)" = "$stamp" ]; then exit 0; fi

python=$(./scripts/find_python.sh)
echo "Setting up .venv with $($python --version), once; this takes a few minutes…" >&2
if ! "$python" -m venv .venv; then
  echo "Error: $python can't make virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2
  exit 2
fi
# torch first and by its exact version, so that nothing else decides which build comes
.venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)" "$(grep '^numpy==.*>=' constraints.txt)" \
  "$(grep '^numpy==.*<' constraints.txt)" 'setuptools>=77' wheel
.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
echo "$stamp" > .venv/.installed
