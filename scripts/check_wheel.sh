#!/usr/bin/env bash
# Build the wheel, see that it ships smi_fed alone, install it where nothing of this project is, and use it there.
set -euo pipefail
root=$PWD python=$PWD/.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m build --wheel --outdir "$scratch" . >"$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
wheel=$(echo "$scratch"/*.whl)
foreign=$("$python" -m zipfile --list "$wheel" | awk 'NR > 1 {print $1}' | grep -vE '^(smi_fed/|smi_fed-[^/]*\.dist-info/)' || true)
[ -z "$foreign" ] || { echo "the wheel ships more than smi_fed: $foreign"; exit 1; }

"$python" -m uv venv --quiet --python "$python" "$scratch/venv"
"$python" -m uv pip install --quiet --python "$scratch/venv/bin/python" --constraint "$root/constraints.txt" "$wheel"
mkdir "$scratch/empty"
cd "$scratch/empty"
"$scratch/venv/bin/python" - <<'PY'
import smi_fed, smi_fed.distillation, smi_fed.inversion, smi_fed.models, smi_fed.strategies
assert "venv" in smi_fed.__file__, smi_fed.__file__
spec = smi_fed.models.ModelSpec("vit_tiny_patch16_224", 10, 32, {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2})
print("wheel imports:", smi_fed.__version__, type(smi_fed.models.build_model(spec).backbone).__name__)
PY
"$scratch/venv/bin/smi-fed" demo --clients 2 --output demo experiment=smoke >demo.log 2>&1 || { cat demo.log; exit 1; }
"$scratch/venv/bin/smi-fed" evaluate demo/student.safetensors --json
"$scratch/venv/bin/smi-fed" federate mine >/dev/null
"$scratch/venv/bin/flwr" build --app mine >build.log 2>&1 || { cat build.log; exit 1; }
