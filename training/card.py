"""The model card of a published folder: what the model is, how to use it, what was measured, how it was trained.

Every number was measured by the run or is told by its files; what is not known has no line.
"""

import contextlib
import json
import math
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from training.launch import RunError
from training.pictures import loss_curve
from training.wording import in_bytes, in_time

TAG = "mae-accelerate"  # by which a card is known as ours
CLASSES, MASKS = "image-classification", "image-segmentation"  # the Hub's tasks
STARTS = ("init_from", "path_to_pretrained_mae_weights", "path_to_backbone_checkpoint")  # flags: the weights before
METRICS = {  # of metrics.json -> the Hub's type, words
    "top1": ("accuracy", "top-1 accuracy (%)"),
    "top5": ("top_5_accuracy", "top-5 accuracy (%)"),
    "mean_iou": ("mean_iou", "mean IoU (%)"),
    "mean_accuracy": ("mean_accuracy", "mean accuracy of the classes (%)"),
    "overall_accuracy": ("overall_accuracy", "accuracy of the pixels (%)"),
    "val_loss": ("loss", "validation loss"),
    "masked_psnr": ("psnr", "PSNR of the removed patches (dB)"),
    "masked_psnr_visible_mean": ("psnr", "PSNR of the mean colour of the visible patches in their place (dB)"),
    "masked_ssim": ("ssim", "SSIM of the removed patches"),
    "prediction_psnr": ("psnr", "PSNR of the whole prediction (dB)"),
    "prediction_ssim": ("ssim", "SSIM of the whole prediction"),
    "pasted_psnr": ("psnr", "PSNR with the visible patches pasted (dB)"),
    "pasted_ssim": ("ssim", "SSIM with the visible patches pasted"),
    "knn_top1": ("accuracy", "top-1 accuracy of nearest neighbours by the encoder's features (%)"),
    "linear_top1": ("accuracy", "top-1 accuracy of a linear fit to the encoder's features (%)"),
}
PICTURES = {  # script -> where its pictures are, the name of the newest beside the card, what it shows
    "pretrain_mae.py": (
        "reconstructions",
        "reconstructions.png",
        "original, what the encoder sees, prediction (which means nothing where it could see), prediction with the "
        "visible patches",
    ),
    "finetune_classifier.py": ("predictions", "confusion.png", "which class is taken for which"),
    "finetune_segmentation.py": ("predictions", "predictions.png", "image, annotation, prediction"),
}


class Run(NamedTuple):
    """What a run folder tells of itself; what it does not is None or empty."""

    folder: Path
    script: str  # "pretrain_mae.py", ...
    flags: dict
    command: str | None  # what was typed, from the script on
    environment: dict  # versions, machine, git_revision, processes
    data: dict  # "images", "held_out": numbers; "bytes": about
    log: list[dict]
    metrics: dict | None  # of a finished run

    @property
    def start(self) -> str | None:
        """The weights that the run started from."""
        return next((self.flags[name] for name in STARTS if self.flags.get(name)), None)

    @property
    def total_steps(self) -> int | None:
        """How long the run is meant to be, in optimizer steps."""
        if self.flags.get("max_steps"):
            return self.flags["max_steps"]
        known = [line for line in self.log if line.get("epoch")]
        if not self.flags.get("epochs") or not known:
            return None
        return round(self.flags["epochs"] * known[-1]["step"] / known[-1]["epoch"])

    def measured(self, step: int | None) -> dict:
        """What was measured after that very step, by the names of metrics.json."""
        lines = [*(line for line in self.log if "loss" not in line), self.metrics or {}]
        return {name: value for line in lines if line.get("step") == step for name, value in line.items()}

    def seconds(self, step: int | None) -> float | None:
        """Time that the run took until `step`, where its end or the checkpoint of that step tells."""
        if self.metrics is not None and self.metrics.get("step") == step:
            return self.metrics.get("seconds")
        with contextlib.suppress(OSError, ValueError, TypeError):
            return json.loads((self.folder / f"checkpoints/step_{step:08d}/state.json").read_text()).get("seconds")


def read_run(folder: str | Path) -> Run | None:
    """The run that a folder holds, or None where it has no args.json. Raises RunError where its files are damaged."""
    folder, metrics, log = Path(folder), None, []
    path = folder / "args.json"
    try:
        if not path.is_file():
            return None
        told = json.loads(path.read_text())
        flags = dict(told.pop("flags"))
        command, data = told.pop("command", None), told.pop("data", {})
        if (path := folder / "metrics.json").is_file():
            metrics = dict(json.loads(path.read_text()))
        if (path := folder / "log.jsonl").is_file():
            for text in path.read_text().splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a line that a kill cut short
                    line = dict(json.loads(text))
                    log += [line] if _is_number(line.get("step")) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} cannot be read; expected the file that a run writes; give another run") from None
    script = "pretrain_mae.py" if "mask_ratio" in flags else "finetune_classifier.py"
    script = "finetune_segmentation.py" if "crop_size" in flags else script
    return Run(folder, script, flags, command, told, data, log, metrics)


class Facts(NamedTuple):
    """What is known of the model in a folder."""

    task: str  # the Hub's: "image-feature-extraction", "image-classification" or "image-segmentation"
    summary: str  # its sizes in a line
    autoencoder: bool  # there is pretraining/
    img_size: tuple[int, int]  # pixels
    channels: int
    mean: list[float]  # by which images in [0, 1] are normalised
    std: list[float]
    value_range: tuple[float, float] | None  # the pixels that become 0 and 1; None: 0 and 255
    classes: list[str]
    differences: dict[str, float]  # "timm" -> how far it is from our own module on random images
    notes: list[str]  # what a library does not allow, a sentence each
    origin: str  # where weights that are of no run come from
    step: int | None  # of the run
    finished: bool

    @property
    def is_square(self) -> bool:
        return self.img_size[0] == self.img_size[1]


def is_card(path: str | Path) -> bool:
    """Whether a file is a model card that `write_card` wrote."""
    try:
        text = Path(path).read_text()
    except (OSError, ValueError):
        return False
    return text.startswith("---\n") and f"\n- {TAG}\n" in text.partition("\n---\n")[0]


def write_card(
    folder: Path,
    facts: Facts,
    run: Run | None,
    *,
    place: str | Path,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """Writes README.md for the weights in `folder`, and the pictures that it shows.

    `place` is where the folder will lie, which the examples name, or `repo_id` and its `revision` where they are given.
    `license` and `datasets` are the Hub's names. The pictures are the curve of the loss, and the run's newest at or
    before the step of the weights.
    """
    found = run.measured(facts.step) if run else {}
    measured = {name: found[name] for name in METRICS if _is_number(found.get(name))}
    title = repo_id.partition("/")[2] if repo_id else (run.folder if run else Path(place)).resolve().name
    metadata = _metadata(facts, run, measured, title=title, license=license, datasets=datasets)
    parts = [f"---\n{metadata}\n---", f"# {title}", _introduction(facts, run)]
    parts += _picture(folder, facts, run) if run else []
    parts += ["## Use", *_uses(facts, str(place), repo_id, revision)]
    if measured:
        parts += ["## Results", *_results(facts, run, measured)]
    if run:
        parts += ["## Training", *_training(folder, facts, run)]
    if facts.differences:
        module = "that was trained" if run else "as it was read"
        told = f"How far what the libraries compute is from the module {module}, on random images:"
        rows = [(name, f"{value:.1g}") for name, value in facts.differences.items()]
        parts += ["## Checks", told, _table(("library", "largest difference"), rows)]
    if facts.notes:
        parts += ["## Limits", "\n".join(f"- {note}" for note in facts.notes)]
    text = "\n\n".join(parts) + "\n"
    (folder / "README.md").write_bytes(text.encode(errors="backslashreplace"))  # names of files may be no text


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [header, *cells]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _metadata(facts: Facts, run: Run | None, measured: dict, *, title, license, datasets) -> str:
    """The YAML that the Hub reads."""
    data = str(run.flags.get("path_to_data")) if run else ""
    built_in = data.startswith("builtin:")
    dataset = {
        "dataset_type": datasets[0] if datasets else data if built_in else "imagefolder",
        "dataset_name": datasets[0] if datasets else data if built_in else Path(data).name or "images",
    }
    results = []
    for name, value in measured.items():
        kind, words = METRICS[name]
        metric = dict(metric_type=kind, metric_name=words, metric_value=round(value, 4))
        results.append(EvalResult(task_type=facts.task, **dataset, **metric))
    start = str(run.start) if run else facts.origin.partition(" ")[0]
    pretrained = facts.autoencoder or bool(run and run.start)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=facts.task,
        license=license or "unknown",
        datasets=list(datasets) or None,
        base_model=start.removeprefix("hf:").partition("@")[0] if start.startswith("hf:") else None,
        tags=[TAG, *(["masked-autoencoder"] if pretrained else []), "vit", *(["timm"] if facts.task != MASKS else [])],
        model_name=title if results else None,
        eval_results=results or None,
    ).to_yaml()


def _introduction(facts: Facts, run: Run | None) -> str:
    """What the model is, and how far its run had come."""
    noun = {CLASSES: "An image classifier", MASKS: "A segmenter, which labels every pixel"}.get(facts.task)
    if run is None:
        noun = noun or ("A masked autoencoder" if facts.autoencoder else "A Vision Transformer")
        lines = [f"{noun}; the weights were converted from {facts.origin}."]
    elif run.script == "pretrain_mae.py":
        paper = "[He et al. 2021](https://arxiv.org/abs/2111.06377)"
        lines = [
            f"A Vision Transformer pre-trained without labels, as a masked autoencoder ({paper}): "
            f"{run.flags['mask_ratio']:.0%} of the patches of each image were removed and predicted from the rest."
        ]
    else:
        how, blocks = "fine-tuned" if run.start else "trained from scratch", run.flags.get("trainable_blocks")
        if run.flags.get("linear_probe"):
            how = "a linear head was trained on a frozen encoder"
        elif blocks is not None:
            last = "the MLP of the last block" if blocks == 0.5 else f"the last {blocks:g} blocks"
            how = f"its head and {last} were trained"
        lines = [f"{noun}: {how}."]
    if run and run.start:
        lines.append(f"The run started from the weights `{run.start}`.")
    lines.append(f"{facts.summary}.")
    if facts.autoencoder:
        lines.append("This is the encoder; the whole autoencoder is in `pretraining/`.")
    if run and facts.step is not None:
        words = "The weights are" if facts.finished else "**The run is not finished:** the weights are"
        total = f" of {run.total_steps:,}" if run.total_steps else ""
        lines.append(f"{words} those after step {facts.step:,}{total}.")
    return "\n".join(lines)


def _picture(folder: Path, facts: Facts, run: Run) -> list[str]:
    """Copies the newest picture at or before the step of the weights into `folder`, and shows it."""
    source, name, shown = PICTURES[run.script]
    paths = sorted((run.folder / source).glob("step_*.png"))
    paths = [path for path in paths if facts.step is None or path.stem <= f"step_{facts.step:08d}"]
    if not paths:
        return []
    shutil.copyfile(paths[-1], folder / name)
    caption = f"After step {int(paths[-1].stem.removeprefix('step_')):,}: {shown}"
    return [f"![{caption}]({name})", f"*{caption}.*"]


def _uses(facts: Facts, place: str, repo_id: str | None, revision: str | None) -> list[str]:
    """How each library takes the folder: code that runs as it stands, on photo.jpg where the model takes colour."""
    at = f"@{revision}" if repo_id and revision else ""
    path, project = (
        json.dumps(repo_id or place, ensure_ascii=False),
        shlex.quote(f"hf:{repo_id}{at}" if repo_id else place),
    )
    path += f", revision={json.dumps(revision, ensure_ascii=False)}" if at else ""
    # transformers' pipelines and processors make 8-bit colour of every image
    colour = facts.channels == 3 and facts.value_range is None
    predict = f"python predict.py {project} photo.jpg"

    def transformers(name: str, *then: str, subfolder: str = "") -> str:
        load = f"model = {name}.from_pretrained({path}{subfolder})"
        processor = [
            f"processor = AutoImageProcessor.from_pretrained({path})",
            'images = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]',
        ]
        imports = f"from transformers import {'AutoImageProcessor, ' if colour else ''}{name}"
        return python(["import torch", *photo, imports], load, processor, then)

    def timm(*then: str) -> str:
        name = json.dumps(f"hf-hub:{repo_id}{at}" if repo_id else f"local-dir:{place}", ensure_ascii=False)
        load = f"model = timm.create_model({name}, pretrained=True).eval()"
        transform = [
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            'images = transform(Image.open("photo.jpg").convert("RGB"))[None]',
        ]
        return python(["import timm", "import torch", *photo], load, transform, then)

    def python(imports: list[str], load: str, prepare: list[str], then: Sequence[str]) -> str:
        height, width = facts.img_size
        made = ": (pixels - {0}) / ({1} - {0})".format(*facts.value_range) if facts.value_range else ""
        own = [
            f"images = torch.rand(1, {facts.channels}, {height}, {width})  # yours, in [0, 1]{made}",
            f"mean, std = torch.tensor({facts.mean})[:, None, None], torch.tensor({facts.std})[:, None, None]",
            "images = (images - mean) / std",
        ]
        return _code("python", *imports, "", load, *(prepare if colour else own), "with torch.inference_mode():", *then)

    def pipeline() -> str:
        load = f'pipe = pipeline("{facts.task}", model={path})'
        return _code("python", "from transformers import pipeline", "", load, 'print(pipe("photo.jpg"))')

    def here(*commands: str) -> list[str]:
        told = "With the project that made it, Masked Autoencoders on Hugging Face Accelerate:"
        return [told, _code("bash", *commands)]

    photo = ["from PIL import Image"] if colour else []
    if facts.task == MASKS:
        then = "    labels = model(images).logits.argmax(dim=1)  # (1, H, W)"
        theirs = pipeline() if colour else transformers("UperNetForSemanticSegmentation", then)
        told = f"With transformers, which resizes the whole image to {facts.img_size[0]} x {facts.img_size[1]} pixels:"
        return [told, theirs, *here(predict)]
    if facts.task == CLASSES:
        then = ["    best = model(images).logits.argmax(dim=1).item()", "print(model.config.id2label[best])"]
        theirs = pipeline() if colour else transformers("AutoModelForImageClassification", *then)
        then = ["    best = model(images).argmax(dim=1).item()", 'print(model.pretrained_cfg["label_names"][best])']
        return ["With transformers:", theirs, "With timm:", timm(*then), *here(predict)]
    then = "    tokens = model(images).last_hidden_state  # (1, 1 + patches, width), the class token first"
    parts = ["With transformers:", transformers("AutoModel", then)]
    parts += ["With timm:", timm("    tokens = model.forward_features(images)  # the same")]
    if facts.autoencoder and facts.is_square:
        then = "    output = model(images)  # output.logits: predicted patches; output.mask: 1 = removed"
        autoencoder = transformers("ViTMAEForPreTraining", then, subfolder=', subfolder="pretraining"')
        parts += ["The whole autoencoder:", autoencoder]
    commands = [predict] if facts.autoencoder else []
    images = f" --input_channels {facts.channels}" if facts.channels != 3 else ""
    images += " --value_range {} {}".format(*facts.value_range) if facts.value_range else ""
    commands += [
        f"{predict} --features features.npy",
        f"python finetune_classifier.py --path_to_data IMAGES --path_to_pretrained_mae_weights {project}{images}",
        f"python finetune_segmentation.py --path_to_data DATA --path_to_backbone_checkpoint {project}{images}",
    ]
    return [*parts, *here(*commands)]


def _results(facts: Facts, run: Run, measured: dict) -> list[str]:
    """What was measured at the step of the weights, and how."""
    flags, held_out = run.flags, run.data.get("held_out")
    images = "images" if held_out is None else f"{held_out:,} held-out images"
    if held_out == 0:
        images = "some of the training images, as none are held out"
    if run.script == "pretrain_mae.py":
        how = f"under a fixed mask each ({flags['mask_strategy']}, {flags['mask_ratio']:g} of the patches removed)"
        if flags["norm_pix_loss"]:
            how += (
                ". The target is normalised per patch: for PSNR, SSIM and pictures the true mean and deviation of each "
                "patch are put back, which is part of the answer"
            )
    elif run.script == "finetune_classifier.py":
        how = "each once, resized and cropped in the middle"
    else:
        way = "in sliding windows" if flags.get("evaluate") == "slide" else "as a whole"
        scales = " ".join(f"{scale:g}" for scale in flags.get("evaluate_scales") or [1.0])
        how = f"each once, {way}, at the annotation's own size and without void; scales: {scales}"
        how += ", and mirrored" if flags.get("evaluate_flip") else ""
    rows = [(METRICS[name][1], f"{value:.4g}") for name, value in measured.items()]
    parts = [f"Measured after step {facts.step:,} on {images}, {how}.", _table(("metric", "value"), rows)]
    found, columns = run.measured(facts.step), {"IoU (%)": "per_class_iou", "accuracy (%)": "per_class_accuracy"}
    columns = {words: found[name] for words, name in columns.items() if found.get(name)}
    if columns:
        rows = [
            (name, *(f"{values[name]:.1f}" if _is_number(values.get(name)) else "none" for values in columns.values()))
            for name in next(iter(columns.values()))
        ]
        parts.append(_details("By class", _table(("class", *columns), rows)))
    return parts


def _quoted(text: str) -> str:
    return "`" + str(text).replace("`", "'") + "`"


def _hardware(told: dict) -> str:
    """What a start of a run was on, in words."""
    machine, processes = told.get("machine", {}), told.get("processes")
    hardware = [f"{count} x {name}" for name, count in Counter(machine.get("gpus")).items()]
    hardware = hardware or ([f"no GPU, {machine['cores']} CPU cores"] if machine.get("cores") else [])
    return ", ".join(hardware + ([f"processes: {processes}"] if processes else []))


def _training(folder: Path, facts: Facts, run: Run) -> list[str]:
    """The command, on what and for how long it ran; draws the curve of the loss into `folder`."""
    flags, told, data, rows = run.flags, run.environment, run.data, {}
    processes = told.get("processes")
    if flags.get("path_to_data"):
        sizes = [f"{data['images']:,} images"] if data.get("images") else []
        sizes += [f"about {in_bytes(data['bytes'])}"] if data.get("bytes") else []
        sizes += [f"{data['held_out']:,} held out"] if data.get("held_out") else []
        rows["data"] = f"{_quoted(flags['path_to_data'])}{': ' if sizes else ''}{', '.join(sizes)}"
    if facts.step is not None:
        epochs = [line["epoch"] for line in run.log if line["step"] == facts.step and _is_number(line.get("epoch"))]
        rows["optimizer steps"] = f"{facts.step:,}" + (f" ({epochs[-1]:.4g} epochs)" if epochs else "")
    if flags.get("global_batch_size"):
        rows["images per step"] = f"{flags['global_batch_size']:,}"
    rows["hardware"] = _hardware(told)
    for start in told.get("resumed", []):
        if facts.step is None or start["step"] < facts.step:
            rows[f"resumed after step {start['step']:,}"] = f"{_quoted(start['command'])}, {_hardware(start)}"
    if seconds := run.seconds(facts.step):
        metrics = run.metrics or {}
        rate = metrics.get("images_per_second") if metrics.get("step") == facts.step else None
        rows["time"] = in_time(seconds) + (f", {rate:.4g} images/s with validation and saving" if rate else "")
    versions = [f"{name} {version}" for name, version in told.get("versions", {}).items()]
    versions += [f"revision {told['git_revision']}"] if told.get("git_revision") else []
    rows["versions"] = ", ".join(versions)
    parts = [_table(("of the run", ""), [row for row in rows.items() if row[1]])]
    if run.command:
        launcher = "python" if processes in (None, 1) else f"accelerate launch --num_processes {processes}"
        parts.insert(0, _code("bash", f"{launcher} {run.command}"))
    losses, validation = (
        [(line["step"], line[name]) for line in run.log if _is_number(line.get(name))] for name in ("loss", "val_loss")
    )
    if losses:
        loss_curve(folder / "loss.png", losses, validation=validation)
        parts.append("![Loss by optimizer step](loss.png)")
    given = {name: value for name, value in flags.items() if value is not None}
    shown = [(name, " ".join(map(str, v)) if isinstance(v, list) else v) for name, v in given.items()]
    return [*parts, _details("All flags", _table(("flag", "value"), shown))]
