#!/usr/bin/env bash
# Runs the quickstart on the built-in synthetic scenes: pre-trains, fine-tunes, probes, trains from scratch and segments,
# and prints the metrics. If it was interrupted, it continues.
#
#   bash recipes/quickstart/all.sh
set -euo pipefail
resume=(--resume_from_checkpoint auto)
accelerate launch pretrain_mae.py @recipes/quickstart/pretrain.args "${resume[@]}" "$@"
for recipe in finetune_classifier linear_probe from_scratch; do
    accelerate launch finetune_classifier.py "@recipes/quickstart/$recipe.args" "${resume[@]}" "$@"
done
accelerate launch finetune_segmentation.py @recipes/quickstart/finetune_segmentation.args "${resume[@]}" "$@"
python - <<'TABLE'
import json

print("| trained | top-1 (%) | validation loss | training time (s) |\n|---|---|---|---|")
for run, what in {
    "finetune_classifier": "the pre-trained encoder and the head",
    "linear_probe": "a linear head on the frozen encoder",
    "from_scratch": "everything, from scratch",
}.items():
    with open(f"work_dir/quickstart_{run}/metrics.json") as file:
        metrics = json.load(file)
    print(f"| {what} | {metrics['top1']:.1f} | {metrics['val_loss']:.3f} | {metrics['seconds']:.0f} |")
with open("work_dir/quickstart_finetune_segmentation/metrics.json") as file:
    metrics = json.load(file)
print(f"\nsegmentation: mean IoU {metrics['mean_iou']:.1f} %, {metrics['overall_accuracy']:.1f} % of the pixels right")
TABLE
