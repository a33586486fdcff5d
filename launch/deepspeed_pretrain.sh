#!/bin/bash
# Trains under DeepSpeed on the nodes of a hostfile, a line a node: `node1 slots=8`. Edit the two lines, then start it on one
# node, in a folder that all nodes see; needs pdsh there, and ssh without a password. Arguments are added to `run`.
hostfile=hostfile port=29500
run=(--config configs/model/tinyllama_1_1b.yaml --mixture runs/mine/mixture.yaml)

# To stop it, on any node: pkill -USR1 -f -- '-u launch/pretrain.py'. All ranks finish their step, save and end with 75.
# (SIGTERM to the launcher leaves 30 s to save in, too little for a large model.) DeepSpeed restarts nothing, so this does:
# what was killed goes on from the newest complete checkpoint; 2 and 5 are errors that would come again.
for try in 1 2 3 4; do
    deepspeed --hostfile "$hostfile" --master_port "$port" launch/pretrain.py "${run[@]}" "$@"
    code=$?
    case $code in 0 | 2 | 5 | 75) break ;; esac
    echo "launch/pretrain.py ended with $code (start $try of 4)" >&2
done
exit $code
