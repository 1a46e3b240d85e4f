#!/usr/bin/env bash
# mypy over the package as it is installed: kernels/ appears as kbit.kernels, which a checkout does not show.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
view=$(mktemp -d)
trap 'rm -rf "$view"' EXIT
mkdir "$view/kbit"
ln -s "$root"/kbit/* "$view/kbit/"
ln -sfn "$root/kernels" "$view/kbit/kernels"  # also where a checkout has a link of that name
cd "$view"
# The view has another name every time, so a cache kept between runs would only confuse.
mypy --config-file "$root/pyproject.toml" --cache-dir "$view/.cache" kbit
