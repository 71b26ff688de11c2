#!/usr/bin/env bash
# Sets up and runs the whole suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
./scripts/check.sh
exec .venv/bin/python -m pytest "$@"
