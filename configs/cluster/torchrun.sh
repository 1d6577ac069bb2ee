#!/bin/bash
# A training run on several nodes without Slurm. Copy it, change what is marked, and start it on each node with the same
# RDZV_ADDRESS.
NUM_NODES=${NUM_NODES:-2}                        # CHANGE
DEVICES=${DEVICES:-4}                            # CHANGE: on each node
RDZV_ADDRESS=${RDZV_ADDRESS:-node1:29500}        # CHANGE: a node and a free port that all nodes reach
ROOT=${ROOT:-runs/torchrun}                      # CHANGE for each training run: a folder that all nodes see

# When a process fails, torchrun starts all of them again, up to --max-restarts times, and --resume if-any continues from
# the newest checkpoint. A lost node joins again when this script is started there within 10 minutes. When the node of
# RDZV_ADDRESS is lost, the others end with exit code 1: start the script again on all nodes, with the same ROOT.

# without this, restarted processes read each other's old addresses: github.com/pytorch/pytorch/issues/135712
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="$NUM_NODES" --nproc-per-node="$DEVICES" --max-restarts=5 \
    --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ADDRESS" --rdzv-id=lit_cifar \
    -m lit_cifar.fit --config resnet18 --num_nodes "$NUM_NODES" --devices "$DEVICES" \
    --trainer.default_root_dir "$ROOT" --resume if-any "$@"
