#!/bin/bash
# DoReMi's 120M pipeline on the Pile: a reference, a proxy under Group DRO against it, and a model on the weights that the proxy
# found. Three runs of 104.9B tokens. Edit the two lines, then start it from the repository's folder; what is finished is
# skipped, what was cut goes on. Arguments go to every run. For another round: reference=FOLDER/mixture.yaml out=NEW.
shards=${shards:-shards} out=${out:-runs/doremi_120M} reference=${reference:-configs/mixture/pile_baseline_120M.yaml}
launch=${launch:-torchrun --nproc-per-node gpu launch/pretrain.py}

case " $* " in *" --dry-run "*) launch="python launch/pretrain.py" dry=yes ;; esac
train() { # NAME MIXTURE SEED KEY=VALUE ARGUMENTS
    [ -e "$out/$1/result.json" ] || $launch --config configs/model/doremi_120M.yaml --mixture "$2" --name "$1" \
        --set "data.data_dir=$shards" "out_dir=$out/$1" "seed=$3" "$4" "${@:5}" || [ -n "$dry" ] || exit
}
train reference "$reference" 1111 reweighting=null "$@"
# a seed of its own, or excess loss would be measured where the reference had just been
train proxy configs/mixture/pile_uniform.yaml 1112 "reweighting.reference=$out/reference" "$@"
[ -z "$dry" ] || exit 0
python - "$out" "$shards" <<'END' || exit
import json, sys
from megatron_lite.data.mixture import Mixture

out, shards = sys.argv[1:]
with open(f"{out}/proxy/result.json") as file:
    found = json.load(file)["domain_weights"]
Mixture.load("configs/mixture/pile_uniform.yaml", shards).with_weights(found).save(f"{out}/mixture.yaml")
END
train main "$out/mixture.yaml" 1113 reweighting=null "$@"
