#!/usr/bin/env bash
# Evaluates an encoder as the field does: k-NN, linear probe, attentive probe, fine-tuning. Killed, it continues.
#
#   bash recipes/evaluate.sh ENCODER DATA [FLAGS of finetune_classifier.py]
#
# ENCODER is a run, a folder or file of weights, or hf:OWNER/NAME; DATA holds train/CLASS/* and val/CLASS/*. Writes
# work_dir/evaluate/table.md and table.json. Without FLAGS the recipes are the published ones for ImageNet.
set -euo pipefail
encoder=$1 data=$2 folder=work_dir/evaluate
shift 2
mkdir -p "$folder"
for part in train val; do
    [ -f "$folder/$part.npy" ] || python predict.py "$encoder" "$data/$part" --features "$folder/$part.npy"
done
shared=(--path_to_data "$data" --path_to_pretrained_mae_weights "$encoder" --working_directory "$folder")
shared+=(--resume_from_checkpoint auto)
for probe in linear attentive; do
    accelerate launch finetune_classifier.py "${shared[@]}" --experiment_name "$probe" "--${probe}_probe" "$@"
done
accelerate launch finetune_classifier.py "${shared[@]}" --experiment_name fine-tuning "$@"
python - "$folder" <<'TABLE'
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from training.neighbours import score_features

folder, parts = Path(sys.argv[1]), []
for part in ("train", "val"):
    names = json.loads((folder / f"{part}.json").read_text())
    parts.append((np.load(folder / f"{part}.npy"), [Path(name).parent.name for name in names]))
classes = sorted({*parts[0][1]})
parts = [(torch.from_numpy(x), torch.tensor([classes.index(name) for name in names])) for x, names in parts]
scores, _ = score_features(*parts, num_classes=len(classes), crew=SimpleNamespace(gather=lambda values: values))
ours = {"k-NN": scores["knn_top1"]}
for run in ("linear", "attentive", "fine-tuning"):
    ours[run] = json.loads((folder / run / "metrics.json").read_text())["top1"]
published = {"k-NN": None, "linear": 67.8, "attentive": 75.5, "fine-tuning": 83.6}
rows = {"this encoder": ours, "MAE ViT-B on ImageNet, published": published}
lines = ["| top-1 (%) | " + " | ".join(ours) + " |", "|---" * 5 + "|"]
for name, row in rows.items():
    lines.append(f"| {name} | " + " | ".join("" if value is None else f"{value:.1f}" for value in row.values()) + " |")
(folder / "table.md").write_text("\n".join(lines) + "\n")
(folder / "table.json").write_text(json.dumps(rows | {"rankme": scores["rankme"]}, indent=1) + "\n")
print("\n".join(lines))
TABLE
