#!/bin/bash
# A training on several nodes without Slurm: start it on each node, with the same RDZV_ADDRESS everywhere.
# Copy it, change what is marked.
NUM_NODES=${NUM_NODES:-2}                        # CHANGE
DEVICES=${DEVICES:-4}                            # CHANGE: on each node
RDZV_ADDRESS=${RDZV_ADDRESS:-node1:29500}        # CHANGE: a node and a free port that all nodes reach
ROOT=${ROOT:-runs/torchrun}                      # CHANGE for each training: a folder that all nodes see

# When a process fails, torchrun starts all of them again, up to --max-restarts times; --resume if-any goes on where the
# newest checkpoint was written. When a node is lost, end this script on the others and start it again on each. Exit code
# 75 is 'stopped by a signal, resumable'.
exec torchrun --nnodes="$NUM_NODES" --nproc-per-node="$DEVICES" --max-restarts=5 \
    --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ADDRESS" --rdzv-id=lit_cifar \
    -m lit_cifar.fit --config configs/resnet18.yaml --num_nodes "$NUM_NODES" --devices "$DEVICES" \
    --trainer.default_root_dir "$ROOT" --resume if-any "$@"
