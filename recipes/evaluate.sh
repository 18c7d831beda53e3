#!/usr/bin/env bash
# Evaluates an encoder as the field does: linear probe, attentive probe, fine-tuning and k-NN. Killed, it continues.
#
#   bash recipes/evaluate.sh ENCODER DATA OUTPUT [FLAGS of finetune_classifier.py]
#
# ENCODER is a run, a folder or file of weights, or hf:OWNER/NAME; DATA holds train/CLASS/* and val/CLASS/*. The three
# trainings take the defaults of finetune_classifier.py and FLAGS. Writes OUTPUT/table.md and OUTPUT/table.json, which
# compare the encoder with the published results of MAE's ViT-B on ImageNet.
set -euo pipefail
encoder=${1:?give ENCODER DATA OUTPUT} data=${2:?give ENCODER DATA OUTPUT} output=${3:?give ENCODER DATA OUTPUT}
shift 3
shared=(--path_to_data "$data" --path_to_pretrained_mae_weights "$encoder" --working_directory "$output")
shared+=(--resume_from_checkpoint auto)
for probe in linear attentive; do
    accelerate launch finetune_classifier.py "${shared[@]}" --experiment_name "$probe" "--${probe}_probe" "$@"
done
accelerate launch finetune_classifier.py "${shared[@]}" --experiment_name fine-tuning "$@"
for part in train val; do
    features=$output/$part.npy
    [ -f "$features" ] && continue
    rm -f "$output/$part.json" "$output/.$part.npy"  # of a call that was killed
    python predict.py "$encoder" "$data/$part" --features "$features" || [ -f "$features" ]  # but for damaged images
done
python - "$data" "$output" <<'TABLE'
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from training.neighbours import score_features

data, output = map(Path, sys.argv[1:])
parts = []
for part in ("train", "val"):
    names = json.loads((output / f"{part}.json").read_text())
    classes = [Path(name).relative_to(data / part).parts[0] for name in names]
    parts.append((torch.from_numpy(np.load(output / f"{part}.npy")), classes))
numbers = {name: number for number, name in enumerate(sorted({*parts[0][1]}))}
parts = [(features, torch.tensor([numbers[name] for name in classes])) for features, classes in parts]
scores, _ = score_features(*parts, num_classes=len(numbers), crew=SimpleNamespace(gather=list))
ours = {"k-NN": scores["knn_top1"]}
for run in ("linear", "attentive", "fine-tuning"):
    ours[run] = json.loads((output / run / "metrics.json").read_text())["top1"]
published = {"k-NN": None, "linear": 67.8, "attentive": 75.5, "fine-tuning": 83.66}
rows = {"this encoder": ours, "MAE ViT-B on ImageNet, published": published}
lines = ["| top-1 (%) | " + " | ".join(ours) + " |", "|---" * 5 + "|"]
for name, row in rows.items():
    lines.append(f"| {name} | " + " | ".join("" if value is None else f"{value:.1f}" for value in row.values()) + " |")
text = "\n".join([*lines, "", f"RankMe of its features: {scores['rankme']:.1f} of {parts[0][0].shape[1]}"])
(output / "table.md").write_text(text + "\n")
(output / "table.json").write_text(json.dumps(rows | {"rankme": scores["rankme"]}, indent=1) + "\n")
print(text)
TABLE
