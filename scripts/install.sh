#!/usr/bin/env bash
# Makes a virtual environment from locked requirements: install.sh FOLDER REQUIREMENTS...
# Torch comes apart from them: the CPU build unless TORCH names a backend uv knows (cu130, rocm7.0, auto).
set -euo pipefail
venv=$1
shift
torch=${TORCH:-cpu}
version=$(sed -n 's/^torch==//p' requirements/torch.txt)

"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
echo "$venv: tools"
"${pip[@]}" install --requirement requirements/tools.txt
echo "$venv: torch $version ($torch)"
if [ "$torch" != cpu ] || ! "${pip[@]}" install "torch==$version+cpu" 2>/dev/null; then
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend "$torch" "torch==$version"
fi
for file in "$@"; do
    echo "$venv: $file"
    "${pip[@]}" install --no-deps --requirement "$file"
done
"${pip[@]}" install --no-deps --no-build-isolation --editable . 2> "$venv/editable.log" || { cat "$venv/editable.log" >&2; exit 1; }
touch "$venv/.installed"
