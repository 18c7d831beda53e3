"""Write the model card of an exported folder: what the model is, how to use it, its scores, how it was trained.

The text is the template `card.md.jinja`; this file collects its values from the files of a run.
"""

import contextlib
import json
import math
import shlex
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from training.files import read_lines
from training.launch import RunError
from training.pictures import loss_curve
from training.wording import TRUE_STATISTICS, in_time

TAG = "mae-accelerate"  # marks a card as written by this project
INITIAL_WEIGHTS = ("init_from", "path_to_pretrained_mae_weights", "path_to_backbone_checkpoint")  # flags
METRICS = {  # key of metrics.json -> the Hub's type, label
    "top1": ("accuracy", "top-1 accuracy (%)"),
    "top5": ("top_5_accuracy", "top-5 accuracy (%)"),
    "mean_ap": ("mean_average_precision", "mean average precision of the labels (%)"),
    "mean_auroc": ("roc_auc", "mean AUROC of the labels (%)"),
    "mean_f1": ("f1", "mean F1 of the labels at a probability of 0.5 (%)"),
    "mean_r2": ("r_squared", "mean coefficient of determination (R2)"),
    "mean_iou": ("mean_iou", "mean IoU (%)"),
    "mean_accuracy": ("mean_accuracy", "mean class accuracy (%)"),
    "overall_accuracy": ("overall_accuracy", "pixel accuracy (%)"),
    "box_ap": ("box_ap", "COCO's average precision of boxes (%)"),
    "box_ap50": ("box_ap50", "average precision of boxes at an overlap of 0.5 (%)"),
    "mask_ap": ("mask_ap", "COCO's average precision of masks (%)"),
    "mask_ap50": ("mask_ap50", "average precision of masks at an overlap of 0.5 (%)"),
    "val_loss": ("loss", "validation loss"),
    "masked_psnr": ("psnr", "PSNR of the masked patches (dB)"),
    "masked_psnr_visible_mean": ("psnr", "PSNR of the masked patches filled with the mean visible colour (dB)"),
    "masked_ssim": ("ssim", "SSIM of the masked patches"),
    "prediction_psnr": ("psnr", "PSNR of the whole prediction (dB)"),
    "prediction_ssim": ("ssim", "SSIM of the whole prediction"),
    "pasted_psnr": ("psnr", "PSNR with the visible patches pasted (dB)"),
    "pasted_ssim": ("ssim", "SSIM with the visible patches pasted"),
    "rankme": ("rankme", "RankMe of the encoder's features"),
    "knn_top1": ("accuracy", "k-NN top-1 accuracy on the encoder's features (%)"),
    "linear_top1": ("accuracy", "top-1 accuracy of a linear fit to the encoder's features (%)"),
}
PICTURES = {  # task -> folder of a run's pictures, file beside the card
    "image-feature-extraction": ("reconstructions", "reconstructions.png"),
    "image-classification": ("predictions", "confusion.png"),
    "image-segmentation": ("predictions", "predictions.png"),
    "object-detection": ("predictions", "predictions.png"),
}


class RunRecord(NamedTuple):
    """The files of a run folder."""

    folder: Path
    args: dict  # args.json: flags, command, data, machine, ...
    flags: dict  # the resolved flags, from args.json
    log: list[dict]  # log.jsonl
    metrics: dict | None  # metrics.json of a finished run

    @property
    def initial_weights(self) -> str | None:
        """The weights that the run started from; None if it trained from scratch."""
        return next((self.flags[name] for name in INITIAL_WEIGHTS if self.flags.get(name)), None)

    def metrics_at(self, step: int) -> dict:
        """Return the metrics measured after a step, with the keys of metrics.json."""
        lines = [*(line for line in self.log if "loss" not in line), self.metrics or {}]
        return {name: value for line in lines if line.get("step") == step for name, value in line.items()}


def read_record(folder: str | Path) -> RunRecord | None:
    """Read the files of a run folder; None if it has no args.json. Raises RunError for damaged files."""
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        return None
    args = _read(folder / "args.json", "flags", "command", "data", "machine", "processes", "versions")
    metrics = _read(folder / "metrics.json", "step") if (folder / "metrics.json").is_file() else None
    return RunRecord(folder, args, args["flags"], read_lines(folder / "log.jsonl"), metrics)


def find_record(path: str | Path) -> RunRecord | None:
    """Return the record of the run that the weights at `path` belong to, None if none can be read."""
    folder = Path(path).resolve()
    folder = folder.parent if folder.is_file() else folder
    folders = [folder]
    if folder.name in ("best", "encoder", "hub"):
        folders.append(folder.parent)
    if folder.parent.name == "checkpoints":
        folders.append(folder.parent.parent)
    for each in folders:
        with contextlib.suppress(RunError):  # args.json of another program
            if record := read_record(each):
                return record
    return None


def _read(path: Path, *names: str) -> dict:
    """Return the object in a JSON file. Raises RunError if the file is damaged or lacks one of the `names`."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content.get("flags", {}), dict):
            raise TypeError("flags are no object")
        return content | {name: content[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is damaged; expected the file that a run writes; give another run") from None


class ModelSummary(NamedTuple):
    """The model in an exported folder."""

    task: str  # on the Hub: "image-feature-extraction", "image-classification", ...
    description: str  # its sizes, in one line
    target: str | None  # of a classifier: "classes", "labels" or "numbers"
    has_decoder: bool  # the folder has pretraining/
    is_vit_mae: bool  # transformers' ViTMAE loads it
    reconstructs: bool  # its predictions can be turned into pixels
    libraries: Sequence[str]  # those that load the whole folder: transformers, timm
    has_encoder: bool  # the folder has encoder/, which transformers loads
    num_cls_tokens: int
    img_size: tuple[int, int]  # height and width in pixels
    channels: int
    mean: list[float]  # normalization of images in [0, 1]
    std: list[float]
    value_range: tuple[float, float] | None  # the pixel values that become 0 and 1; None: 0 and 255
    notes: list[str]  # limits and assumptions, one sentence each
    origin: str  # the source of weights that belong to no run
    step: int | None  # of the run; None without one


def is_card(path: Path) -> bool:
    """Return True if a file is a model card that `write_card` wrote."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return text.startswith("---\n") and f"\n- {TAG}\n" in text.partition("\n---\n")[0]


def write_card(
    folder: Path,
    model: ModelSummary,
    record: RunRecord | None,
    *,
    location: Path,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str = "unknown",
    datasets: Sequence[str] = (),
) -> None:
    """Write README.md for the weights in `folder`, and its pictures: the loss curve, and the run's newest picture.

    The examples load the model from `location`, where the folder will be, or from `revision` of `repo_id` on the Hub.
    `record` is None for weights of no run. `license` and `datasets`, the training data, are names on the Hub.
    """
    metrics = record.metrics_at(model.step) if record else {}
    labels = _label_metrics(record.flags if record else {})
    known = {name: metrics[name] for name in labels if metrics.get(name) is not None}
    scores = {name: value for name, value in known.items() if math.isfinite(value)}
    title = Path(repo_id or (record.folder if record else location).resolve()).name
    at, address = f"@{revision}" if revision else "", repo_id or str(location)
    quoted = partial(json.dumps, ensure_ascii=False)
    if record:
        loss_curve(folder / "loss.png", record.log)
    card = ModelCard.from_template(
        _metadata(model, record, scores, labels=labels, title=title, license=license, datasets=datasets),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        title=title,
        model=model,
        record=record,
        hub_name=quoted(address) + (f", revision={quoted(revision)}" if at else ""),
        timm_name=quoted(f"hf-hub:{repo_id}{at}" if repo_id else f"local-dir:{location}"),
        weights=shlex.quote(f"hf:{repo_id}{at}" if repo_id else address),
        picture=_copy_picture(folder, model, record) if record else None,
        metrics=metrics,
        scores={labels[name][1]: value for name, value in scores.items()},
        in_time=in_time,
    )
    (folder / "README.md").write_bytes(str(card).encode(errors="backslashreplace"))  # file names may be invalid Unicode


def _label_metrics(flags: dict) -> dict[str, tuple[str, str]]:
    """Return METRICS for a run with these flags; PSNR from normalized patches has its own label and no baseline."""
    if flags.get("target") != "normalized" and not flags.get("norm_pix_loss"):
        return METRICS
    labels = METRICS | {"masked_psnr": ("psnr", f"PSNR of the masked patches {TRUE_STATISTICS} (dB)")}
    return {name: label for name, label in labels.items() if name != "masked_psnr_visible_mean"}


def _metadata(model: ModelSummary, record: RunRecord | None, scores: dict, *, labels, title, license, datasets):
    """Return the card's front matter."""
    results = [
        EvalResult(
            task_type=model.task,
            dataset_type=datasets[0] if datasets else "imagefolder",
            dataset_name=datasets[0] if datasets else Path(record.flags["path_to_data"]).name or "images",
            metric_type=labels[key][0],
            metric_name=labels[key][1],
            metric_value=round(value, 4),
        )
        for key, value in scores.items()
    ]
    base = str(record.initial_weights) if record else model.origin.partition(" ")[0]
    pretrained = model.has_decoder or (record and record.initial_weights)
    tags = [TAG, "masked-autoencoder" * bool(pretrained), "vit", "timm" * ("timm" in model.libraries)]
    return ModelCardData(
        library_name="transformers" if "transformers" in model.libraries else None,
        pipeline_tag=model.task,
        license=license,
        datasets=list(datasets) or None,
        base_model=base.removeprefix("hf:").partition("@")[0] if base.startswith("hf:") else None,
        tags=list(filter(None, tags)),
        model_name=title if results else None,
        eval_results=results or None,
    )


def _copy_picture(folder: Path, model: ModelSummary, record: RunRecord) -> dict[str, str | int] | None:
    """Copy the newest picture of the run up to the model's step into `folder`; return its file name and step."""
    source, file = PICTURES[model.task]
    paths = (record.folder / source).glob("step_*.png")
    newest = max((path for path in paths if path.stem <= f"step_{model.step:08d}"), default=None)
    if newest is None:
        return None
    shutil.copyfile(newest, folder / file)
    return {"file": file, "step": int(newest.stem.removeprefix("step_"))}
