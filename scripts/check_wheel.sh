#!/usr/bin/env bash
# Build the wheel, see that it ships smi_fed alone, and import it where nothing of this project is.
set -euo pipefail
python=$PWD/.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m build --wheel --outdir "$scratch" . >"$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
wheel=$(echo "$scratch"/*.whl)
foreign=$("$python" -m zipfile --list "$wheel" | awk 'NR > 1 {print $1}' | grep -vE '^(smi_fed/|smi_fed-[^/]*\.dist-info/)' || true)
[ -z "$foreign" ] || { echo "the wheel ships more than smi_fed: $foreign"; exit 1; }

# A clean environment that borrows only the dependencies, by path; the project's editable install stays out.
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir "$scratch/deps" "$scratch/empty"
for entry in "$site"/*; do
  case "$(basename "$entry")" in *smi_fed* | __editable__*) ;; *) ln -s "$entry" "$scratch/deps/" ;; esac
done
cd "$scratch/empty"
PYTHONPATH="$scratch/deps" "$scratch/venv/bin/python" - <<'PY'
import smi_fed, smi_fed.distillation, smi_fed.inversion, smi_fed.models, smi_fed.strategies
assert "venv" in smi_fed.__file__, smi_fed.__file__
spec = smi_fed.models.ModelSpec("vit_tiny_patch16_224", 10, 32, {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2})
print("wheel imports:", smi_fed.__version__, type(smi_fed.models.build_model(spec).backbone).__name__)
PY
