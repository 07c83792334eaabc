#!/usr/bin/env bash
# Fails when the committed bundle differs from what the sources build to.
set -euo pipefail
cd "$(dirname "$0")"
fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
node build.mjs --outdir="$fresh"
if ! cmp "$fresh/explorer.js" ../dendrite_lab/static/explorer.js; then
  echo "dendrite_lab/static/explorer.js is stale: run 'npm run build' in widgets/" >&2
  exit 1
fi
echo "explorer.js is fresh"
