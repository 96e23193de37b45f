#!/usr/bin/env bash
# Build the environment: setup.sh DIRECTORY. Safe to run again; the marker is written last.
set -euo pipefail
venv=$1
wanted='3.11, 3.12 or 3.13'

usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

python=""
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
  if command -v "$candidate" >/dev/null && usable "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "smi-fed needs Python $wanted; found: $("${PYTHON:-python3}" --version 2>&1 || echo none). Set PYTHON=/path/to/python." >&2
  exit 1
fi

if ! usable "$venv/bin/python"; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
# uv resolves and links this many packages in seconds; the version is free, flwr brings its own. It leaves bytecode out
# unless it is told, and where Python may not write any, each process would compile torch and timm again.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$venv/bin/python" -m uv pip install --python "$venv/bin/python" --constraint constraints.txt \
  --compile-bytecode --editable '.[dev]'
touch "$venv/.ready"
echo "ready: $venv ($("$venv/bin/python" --version))"
