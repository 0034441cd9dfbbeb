#!/usr/bin/env bash
# Installs a wheel and its dependencies as a user would, and runs the first snippet of README.md where
# no compiler is found. Prints what took how long.
#
# usage: try_wheel.sh WHEEL PYTHON [REQUIREMENT...]     such as torch==2.8.0
#   TRY_ENV=folder   an environment that has the dependencies, instead of a new one
set -euo pipefail
wheel=$(realpath "$1")
python=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
start=$SECONDS
if [ -n "${TRY_ENV:-}" ]; then
  python=$TRY_ENV/bin/python
  "$python" -m pip install --quiet --no-deps --no-index --target "$work/site" "$wheel"
  export PYTHONPATH=$work/site
else
  "$python" -m venv "$work/env"
  python=$work/env/bin/python
  "$python" -m pip install --quiet "$wheel" "$@"
fi
echo "installed in $((SECONDS - start)) s"
cd "$work"
start=$SECONDS
env PATH=/nonexistent CXX= CC= "$(command -v "$python")" "$root/packaging/first_snippet.py" "$root/README.md"
echo "ran in $((SECONDS - start)) s"
