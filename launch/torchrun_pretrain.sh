#!/bin/bash
# Trains under torchrun on one node or many. Edit the two lines, then start it on every node, in the same folder of a file
# system that all nodes see; arguments are added to `run`:  launch/torchrun_pretrain.sh --set seed=2
# nodes=2:4 begins with two to four, and goes on with those that are left when one is lost (global_batch_size stays).
nodes=1 gpus=gpu head=localhost:29400 # how many nodes, ranks on each (gpu: one a GPU), one node's name and a free port
run=(--config configs/model/tinyllama_1_1b.yaml --mixture runs/mine/mixture.yaml)

# This node's address on the way to `head`, and whether it is `head`: torchrun guesses both from the host's name, which on
# many machines leads to 127.0.0.1. With several networks a node, export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME too.
where=$(python -c 'import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # a way is looked up, nothing is sent
    way.connect((sys.argv[1], 9))
    print(way.getsockname()[0], int(way.getsockname()[0] == way.getpeername()[0]))' "${head%:*}") || exit 2
read -r address is_head <<<"$where"

# A rank that dies ends all ranks; they start again from the newest complete checkpoint, --max-restarts times. When `head`
# itself is lost, start this again. SIGTERM to this script: all ranks finish their step, save and end.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds to save in: after torchrun's own 30 it kills, and large models take longer
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else ranks that start again may read where the dead ones were to be found
exec torchrun --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts=3 --local-addr="$address" --rdzv-id=pretrain \
    --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-conf="is_host=$is_head" launch/pretrain.py "${run[@]}" "$@"
