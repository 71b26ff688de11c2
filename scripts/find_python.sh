#!/usr/bin/env bash
# Prints the name of a Python that environments can be made with: 3.10 or newer, those that the suite is run with first.
set -euo pipefail
for name in python3.11 python3.12 python3.13 python3.10 python3 python; do
  if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "$name"
    exit 0
  fi
done
echo "Error: Python 3.10 or newer is needed: install it first" >&2
exit 2
