#!/usr/bin/env bash
# Runs what rests on other libraries with the oldest and with the newest versions that pyproject.toml allows, each in an
# environment of its own (.venv-oldest, .venv-newest), not with the pinned ones. Arguments: which of the two; default both.
# Where pip's torch is a CUDA build, each takes some 6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

pip_of() { echo ".venv-$1/bin/python -m pip --quiet --disable-pip-version-check"; }

make() { # environment, options for pip
  local name=$1
  shift
  if [ ! -x ".venv-$name/bin/python" ]; then "$(./scripts/find_python.sh)" -m venv ".venv-$name"; fi
  echo "Installing the $name versions into .venv-$name; this takes some minutes…" >&2
  # torch by itself first: what it brings is most of the work
  $(pip_of "$name") install "$@" torch
  $(pip_of "$name") install "$@" --editable '.[gateway,gguf,quantization]' pytest hypothesis peft compressed-tensors openai
  ".venv-$name/bin/python" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -iE '^(torch|transformers|hivemind|huggingface.hub|tokenizers|numpy|pydantic|starlette|typer|peft) ' >&2
}

run() { # environment
  echo "== tests with the $1 versions" >&2
  ".venv-$1/bin/python" -m pytest -p no:cacheprovider tests/compat tests/families tests/client tests/node/engine \
    tests/swarm/test_skeleton.py tests/swarm_e2e/test_families.py tests/gateway/test_api.py
}

for which in "${@:-oldest newest}"; do
  for name in $which; do
    case $name in
      oldest)
        python3 scripts/oldest_versions.py > .venv-oldest.txt
        # what tests need is pinned; what the package needs is as old as it may be
        grep -E '^(pytest|hypothesis)==' constraints.txt >> .venv-oldest.txt
        make oldest --constraint .venv-oldest.txt
        ;;
      newest) make newest --upgrade --upgrade-strategy eager ;;
      *) echo "Error: oldest or newest, not $name" >&2; exit 2 ;;
    esac
    run "$name"
  done
done
