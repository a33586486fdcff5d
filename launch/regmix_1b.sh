#!/bin/bash
# RegMix's 1B experiment: four mixtures, five seeds each, 20 runs of 26.2B tokens. Edit the two lines, then start it from the
# repository's folder. What is finished is skipped, what was cut goes on: start it again. Arguments go to every run:
#   launch/regmix_1b.sh --gpus 8 --dry-run        launch/regmix_1b.sh --set batch.micro_batch_size=8
# `launch` may be launch/torchrun_pretrain.sh (many nodes), or sbatch launch/slurm_pretrain.sbatch (all runs are queued at once).
shards=${shards:-shards} out=${out:-runs/regmix_1b}
launch=${launch:-torchrun --nproc-per-node gpu launch/pretrain.py}

case " $* " in *" --dry-run "*) launch="python launch/pretrain.py" ;; esac
for seed in 1 2 3 4 5; do
    for mixture in human doremi pile_cc_only regmix; do
        name=$mixture-$seed
        [ ! -e "$out/$name/result.json" ] || continue
        $launch --config configs/model/tinyllama_1_1b.yaml --mixture "configs/mixture/$mixture.yaml" --name "$name" \
            --set "data.data_dir=$shards" "out_dir=$out/$name" "seed=$seed" "$@" || exit
    done
done
