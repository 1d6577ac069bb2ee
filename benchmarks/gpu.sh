#!/usr/bin/env bash
# Compares lit_cifar's speedruns with their peers on one GPU, in one hour on one machine, and prints what each reports.
#
#   benchmarks/gpu.sh DATA_DIR PEERS [RUNS]
#
# PEERS is a folder with copies of the peers' scripts (benchmarks/README.md says where to get them):
# airbench94_muon.py, airbench96_faster.py, cifar10_speedrun.py. RUNS is how many runs of each, 20 by default.
set -euo pipefail

data=$(realpath "$1")
peers=$(realpath "$2")
runs=${3:-20}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$here/.."

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

# the peers read the data as torch files in a folder of this name
PYTHONPATH="$here" "$python" - "$data" "$work/cifar10" <<'PYTHON'
import sys
from pathlib import Path

from run_airbench import write_data

write_data(Path(sys.argv[1]), Path(sys.argv[2]))
PYTHON

peer() {
    echo "== $1, $runs runs"
    sed "s/range(200)/range($runs)/" "$peers/$1" > "$work/$1"
    echo 'print("peak GPU memory, MB", torch.cuda.max_memory_allocated() / 1e6)' >> "$work/$1"
    (cd "$work" && "$python" "$1" | tail -n 30)
}

ours() {
    echo "== $1, $runs runs"
    "$python" -m lit_cifar.bench "configs/$1.yaml" --runs "$runs" --warm true --data_dir "$data" \
        --accelerator gpu --precision bf16-mixed --compile true
}

peer cifar10_speedrun.py
ours speedrun94
peer airbench94_muon.py
peer airbench96_faster.py
ours speedrun96

echo "== input pipeline against a step of speedrun94"
"$python" -m lit_cifar.bench configs/speedrun94.yaml --stage loader --data_dir "$data" --accelerator gpu
"$python" -m lit_cifar.bench configs/speedrun94.yaml --stage step --data_dir "$data" --accelerator gpu \
    --precision bf16-mixed --compile true

echo "== nothing waits for the GPU between logging steps"
"$python" -m pytest -m gpu tests/test_gpu.py
