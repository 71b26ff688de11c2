#!/usr/bin/env bash
# Sets up and runs the whole suite, two files at a time (nodes wait for each other much of the time); arguments go to
# pytest, -n 0 runs one file after another. SWARM_SKIP_PETALS=1 leaves out the tests against Petals,
# SWARM_SKIP_BROWSER=1 those of the gateway's pages, which need chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
if [ -z "${SWARM_SKIP_PETALS:-}" ]; then ./scripts/petals/setup.sh; fi
./scripts/setup_browser.sh
./scripts/check.sh
# in the order of the files, or those with few tests, which take long, would be last, and one would run alone
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
