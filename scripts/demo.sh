#!/usr/bin/env bash
# A private swarm of three nodes on this machine, and a text generated through them. --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
exec .venv/bin/python scripts/demo.py "$@"
