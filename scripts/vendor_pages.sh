#!/usr/bin/env bash
# Brings the libraries of the gateway's pages from npm, by exact version, with their licenses. What it makes is committed:
# nobody needs npm to run the pages. Run it again after changing a version here.
set -euo pipefail
cd "$(dirname "$0")/.."

marked=18.2.1 dompurify=3.4.18 highlight=11.12.0 axe=4.14.1
languages="bash c cpp css diff go java javascript json markdown python rust sql typescript xml yaml"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
npm install --prefix "$work" --no-save --ignore-scripts --no-audit --no-fund --silent \
  "marked@$marked" "dompurify@$dompurify" "@highlightjs/cdn-assets@$highlight" "axe-core@$axe"
from=$work/node_modules pages=client/gateway/pages/vendor tests=tests/pages/vendor

rm -rf "$pages" "$tests"
mkdir -p "$pages/languages" "$tests"
take() { # file, name, license, version: the code with a line that says where it is from (and no link to a source map)
  { echo "/*! $4, https://www.npmjs.com/package/${4% *}; license: LICENSE-${2%%.*} */"; grep -v '^//# sourceMappingURL' "$1"; } > "$pages/$2"
  cp "$3" "$pages/LICENSE-${2%%.*}"
}
take "$from/marked/lib/marked.esm.js" marked.js "$from/marked/LICENSE" "marked $marked"
take "$from/dompurify/dist/purify.es.mjs" purify.js "$from/dompurify/LICENSE" "dompurify $dompurify"
take "$from/@highlightjs/cdn-assets/es/core.min.js" highlight.js "$from/@highlightjs/cdn-assets/LICENSE" "@highlightjs/cdn-assets $highlight"
for language in $languages; do
  cp "$from/@highlightjs/cdn-assets/es/languages/$language.min.js" "$pages/languages/$language.js"
done
cp "$from/axe-core/axe.min.js" "$tests/axe.min.js"
cp "$from/axe-core/LICENSE" "$tests/LICENSE-axe"
du -sh "$pages" "$tests"
