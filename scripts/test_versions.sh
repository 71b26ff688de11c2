#!/usr/bin/env bash
# Runs what rests on other libraries with the oldest and with the newest versions that pyproject.toml allows, each in an
# environment of its own (.venv-oldest, .venv-newest), not with the pinned ones. Arguments: which of the two; default both.
# Where pip's torch is a CUDA build, each takes some 6 GB. SWARM_SKIP_VERSIONS=1 leaves it all out.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${SWARM_SKIP_VERSIONS:-}" ]; then exit 0; fi

tests="tests/swarm/compat tests/swarm/wire tests/swarm/commands tests/families tests/client tests/node/engine tests/node/rpc/test_handler.py tests/swarm/model/test_skeleton.py
  tests/swarm/weights/hub/test_hub.py tests/gateway/test_api.py tests/gateway/test_refusals.py tests/swarm_e2e/test_families.py"

install() { # environment, options for pip and what to install
  local name=$1
  shift
  ".venv-$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

make() { # environment, options for pip
  local name=$1
  shift
  if [ ! -x ".venv-$name/bin/python" ]; then "$(./scripts/find_python.sh)" -m venv ".venv-$name"; fi
  echo "Installing the $name versions into .venv-$name; this takes some minutes…" >&2
  install "$name" "$@" torch # by itself, so that nothing else decides which build comes
  install "$name" "$@" --editable '.[gateway,gguf,quantization]' pytest hypothesis peft compressed-tensors openai jsonschema
  ".venv-$name/bin/python" -m pip list --disable-pip-version-check |
    grep -iE '^(torch|transformers|hivemind|huggingface.hub|tokenizers|safetensors|numpy|pydantic|starlette|typer|peft) ' >&2
}

try() { # environment
  echo "== the tests with the $1 versions" >&2
  # the bounds of the peak of memory are those of the pinned versions, and the words for a misspelt option are click's
  ".venv-$1/bin/python" -m pytest -p no:cacheprovider $tests --deselect \
    tests/node/engine/blocks/quantization/test_quantization.py::test_the_peak_of_loading_is_one_block_above_what_is_loaded \
    --deselect 'tests/swarm/commands/test_builder.py::test_what_cannot_be[argv2-No such option: --prot]'
  ".venv-$1/bin/python" scripts/try_install.py ".venv-$1/bin" # serve, generate and gateway, as commands
}

for name in ${@:-oldest newest}; do
  case $name in
    oldest)
      # what tests need is of a pinned version; what the package needs, as old as it may be
      constraints=$(mktemp)
      "$(./scripts/find_python.sh)" scripts/oldest_versions.py > "$constraints"
      grep -E '^(pytest|hypothesis)==' constraints.txt >> "$constraints"
      make oldest --constraint "$constraints"
      rm "$constraints"
      ;;
    newest) make newest --upgrade --upgrade-strategy eager ;;
    *)
      echo "Error: oldest or newest, not $name" >&2
      exit 2
      ;;
  esac
  try "$name"
done
