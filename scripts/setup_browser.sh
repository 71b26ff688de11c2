#!/usr/bin/env bash
# Installs Debian's chromium for the tests of the gateway's pages, if it is missing. SWARM_SKIP_BROWSER=1 leaves it out.
set -euo pipefail
if [ -n "${SWARM_SKIP_BROWSER:-}" ] || command -v chromium >/dev/null; then exit 0; fi
sudo=""
if [ "$(id -u)" != 0 ]; then sudo="sudo"; fi
if ! command -v apt-get >/dev/null || { [ -n "$sudo" ] && ! command -v sudo >/dev/null; }; then
  echo "Error: the tests of the pages need chromium: install it, or leave them out with SWARM_SKIP_BROWSER=1" >&2
  exit 2
fi
echo "Installing chromium for the tests of the pages, once…" >&2
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
