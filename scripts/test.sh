#!/usr/bin/env bash
# Sets up and runs the whole suite; arguments go to pytest. SWARM_SKIP_PETALS=1 leaves out the tests against Petals,
# SWARM_SKIP_BROWSER=1 those of the gateway's pages, which need chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
if [ -z "${SWARM_SKIP_PETALS:-}" ]; then ./scripts/petals/setup.sh; fi
./scripts/setup_browser.sh
./scripts/check.sh
exec .venv/bin/python -m pytest "$@"
