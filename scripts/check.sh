#!/usr/bin/env bash
# The linter and the type checker.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The three rooms stand side by side here and inside one another when imported; mypy wants to see the latter.
rm -rf build/types
mkdir -p build/types/swarm
for entry in swarm/*; do ln -s "$PWD/$entry" "build/types/swarm/$(basename "$entry")"; done
ln -s "$PWD/node" build/types/swarm/node
ln -s "$PWD/client" build/types/swarm/client
MYPYPATH=build/types .venv/bin/mypy --explicit-package-bases build/types/swarm
