#!/usr/bin/env bash
# Measures lit_cifar on one GPU beside its peers, in one command and a given time, and ends in a table: see gpu.py.
#
#   benchmarks/gpu.sh DATA_DIR [--peers FOLDER] [--seconds 520] [--output FOLDER] [--only PART ...]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
own=$here/../.venv/bin/python
[ -x "$own" ] || own=python3
exec "${PYTHON:-$own}" "$here/gpu.py" "$@"
