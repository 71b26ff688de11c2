#!/usr/bin/env bash
# Makes .venv-petals: Petals 2.2, unmodified, to test and to measure against. Quick when it is there already.
set -euo pipefail
cd "$(dirname "$0")/../.."

stamp=$(cat scripts/petals/requirements.txt scripts/petals/sitecustomize.py scripts/petals/setup.sh | cksum)
if [ -x .venv-petals/bin/python ] && [ "$(cat .venv-petals/.installed 2>/dev/null)" = "$stamp" ]; then exit 0; fi

python=python3.11  # some of its old packages have no builds for newer ones
if ! "$python" -c '' 2>/dev/null; then
  echo "Error: Petals, which tests/petals and scripts/bench_petals.py need, runs on Python 3.11 only: install python3.11 with" \
    "its venv module beside the Python in use, or set SWARM_SKIP_PETALS=1 to leave these tests out" >&2
  exit 2
fi

echo "Setting up .venv-petals with $("$python" --version), once; this takes a few minutes…" >&2
if [ ! -x .venv-petals/bin/python ] && ! "$python" -m venv .venv-petals; then
  rm -rf .venv-petals
  echo "Error: $python can't make virtual environments: on Debian and Ubuntu, apt install python3.11-venv" >&2
  exit 2
fi
install() { .venv-petals/bin/pip install --quiet --disable-pip-version-check "$@"; }
# torch first and by its exact version, so that nothing else decides which build comes
install $(grep -E '^(torch|numpy|setuptools|wheel)==' scripts/petals/requirements.txt)
install --no-build-isolation --requirement scripts/petals/requirements.txt
install --no-deps petals==2.2.0.post1
cp scripts/petals/sitecustomize.py "$(.venv-petals/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
PETALS_IGNORE_DEPENDENCY_VERSION=1 HF_HUB_OFFLINE=1 .venv-petals/bin/python -W ignore -c 'import petals' 2>/dev/null ||
  { echo "Error: Petals does not import in .venv-petals: remove the folder and try again" >&2; exit 1; }
echo "$stamp" > .venv-petals/.installed
