"""Export a run as a folder that transformers, timm and this project load, with a model card, and upload it to the Hub.

    python push_to_hub.py work_dir/quickstart_pretrain

writes work_dir/quickstart_pretrain/hub/: weights, configurations, README.md (the model card) and pictures. The folder
replaces an earlier one only if transformers and timm load it and compute the same outputs as the run's own model.

    python push_to_hub.py work_dir/finetune_classifier --checkpoint best --repo_id OWNER/NAME --private

also uploads it, using the account you are logged in to (`hf auth login` or HF_TOKEN). After an interruption, repeat the
command. Weights of other projects (a .pth of the official MAE, files and folders of timm or transformers,
hf:OWNER/NAME) are converted in the same way:

    python push_to_hub.py mae_pretrain_vit_base.pth --output mae_base

    python push_to_hub.py work_dir/quickstart_pretrain --space OWNER/NAME

writes work_dir/quickstart_pretrain/space/ instead, a Hugging Face Space with the page of demo.py, and uploads it.
"""

import argparse
from functools import partial
from pathlib import Path

from modeling.classifier import Classifier
from modeling.detector import Detector
from modeling.export import (
    export_autoencoder,
    export_classifier,
    export_detector,
    export_encoder,
    export_segmenter,
    libraries_of,
    vit_mae_misfit,
)
from modeling.files import Stored, WeightsError
from modeling.hub import is_on_hub
from modeling.mae import MaskedAutoencoder
from modeling.parity import differences
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from training import arguments, launch, space
from training.arguments import integer, number
from training.card import ModelSummary, is_card, read_record, write_card
from training.files import alone_at, replace_folder
from training.launch import RunError, fail
from training.progress import best_of
from training.run_folder import RunFolder, read_state
from training.upload import check_repo_id, upload
from training.wording import count_targets, in_one_line, several

MAX_DIFFERENCE = 1e-4  # between the outputs of a library and of this project's module
REMEDY = "nothing was written; install the versions of transformers and timm in requirements.txt"
TASKS = {  # pipeline tags of the Hub
    Classifier: "image-classification",
    Segmenter: "image-segmentation",
    Detector: "object-detection",
}


def parse_args(argv=None):
    """Return the flags and a list of errors in them."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag("path", metavar="RUN_FOLDER", help="run, or weights: a file, a folder, hf:OWNER/NAME[@revision]")
    flag("--checkpoint", default="last", help="last, best (fine-tuning only) or a checkpoint's name (default last)")
    flag("--output", help="folder to write (default RUN_FOLDER/hub, or RUN_FOLDER/space)")
    flag = parser.add_argument_group("upload").add_argument
    flag("--repo_id", metavar="OWNER/NAME", help="repository on the Hub, created if missing (left out: no upload)")
    flag("--space", metavar="OWNER/NAME", help="write and upload a Space, the page of demo.py, not a model (left out)")
    flag("--private", action=argparse.BooleanOptionalAction, default=False, help="make a new repository private (off)")
    flag("--revision", help="branch to upload to, created if missing (default main)")
    flag = parser.add_argument_group("model card").add_argument
    flag("--license", default="unknown", help="license as the Hub spells it, such as apache-2.0 (default unknown)")
    flag("--datasets", nargs="+", default=[], metavar="NAME", help="names on the Hub of the training data")
    flag = parser.add_argument_group("weights of other projects").add_argument
    flag("--encoder_num_heads", type=integer(1), help="attention heads (default those of the known size)")
    flag("--decoder_num_heads", type=integer(1), help="attention heads (default 16)")
    flag("--mean", type=number(), nargs="+", help="channel means of images in [0, 1] (default ImageNet's)")
    flag("--std", type=number(1e-6), nargs="+", help="channel standard deviations (default ImageNet's)")
    flag("--target", choices=("normalized", "pixels"), help="what an autoencoder predicts (default normalized)")
    pixels = dict(dest="target", action="store_const")
    flag("--norm_pix_loss", const="normalized", help="the same as --target normalized", **pixels)
    flag("--no-norm_pix_loss", const="pixels", help="the same as --target pixels", **pixels)
    args, errors = parser.read(argv)
    places = [name for name in ("repo_id", "space") if getattr(args, name) is not None]
    if not places:
        given = [name for name in ("private", "revision") if getattr(args, name)]
        errors += [f"--{name} needs an upload; add --repo_id OWNER/NAME" for name in given]
    if len(places) > 1:
        errors.append("--repo_id and --space are two uploads; give one of them, and the other in a second call")
    errors += [f"--{name} {error}" for name in places for error in check_repo_id(getattr(args, name))]
    return args, errors


def select_weights(path, checkpoint):
    """Return the weights that --checkpoint names at `path`, their run and their step (None, None without a run).

    Raises RunError if the run has no such weights.
    """
    record = None if is_on_hub(path) else read_record(path)
    if record is None:
        if checkpoint != "last":
            raise RunError(f"--checkpoint {checkpoint} needs a run, but {path} has no args.json; leave it out")
        return path, None, None
    if record.flags.get("eval_only"):
        raise RunError(f"{path} is an --eval_only run without weights of its own; give the run that it evaluated")
    if checkpoint == "best":
        of_classifier = {"labels": "mean_ap", "numbers": "mean_r2"}.get(record.flags.get("target"), "top1")
        of_head = {"crop_size": "mean_iou", "window_size": "box_ap"}  # keyed by a flag that only this head's script has
        metric = next((metric for flag, metric in of_head.items() if flag in record.flags), of_classifier)
        _, step = best_of(record.folder, metric)
        if step is None or not (record.folder / "best" / "config.json").is_file():
            raise RunError(f"--checkpoint best: {path} has no best/; expected a validated fine-tuning run; give last")
        return record.folder / "best", record, step
    if checkpoint == "last" and record.metrics is not None:
        return record.folder, record, record.metrics["step"]
    checkpoints = {folder.name: folder for folder in RunFolder(record.folder).whole_checkpoints()}
    name = max(checkpoints, default="") if checkpoint == "last" else checkpoint
    if name not in checkpoints:
        names = ", ".join(checkpoints) or "none yet"
        raise RunError(f"--checkpoint {checkpoint}: {path} has no such checkpoint; give last, best or one of: {names}")
    return checkpoints[name], record, read_state(checkpoints[name])["step"]


def resolve_output(output, path, record, *, name):
    """Return the folder to write, by default `name` in the run. Raises RunError for a missing path or foreign files."""
    if not is_on_hub(path) and not Path(path).exists():
        raise RunError(f"{path}: no such file or folder; expected a run or weights (on the Hub: hf:OWNER/NAME)")
    if output is None and record is None:
        raise RunError(f"--output is missing, and {path} is not a run folder; give a folder to write")
    output = Path(output) if output else record.folder / name
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if taken and not is_card(output / "README.md"):
        raise RunError(f"--output {output} exists and was not written by push_to_hub.py; give an empty or a new folder")
    return output


def describe_model(trained):
    """Describe the architecture in one line."""
    encoder, model = trained.encoder, trained.model
    words = f"ViT {encoder.embed_dim} wide, {encoder.depth} deep, {encoder.num_heads} heads"
    words += f", {encoder.patch_size}-pixel patches"
    words += f", {encoder.num_cls_tokens} class tokens" if encoder.num_cls_tokens > 1 else ""
    if isinstance(model, MaskedAutoencoder):
        words += f", {model.decoder.title} {model.decoder.embed_dim} wide, {model.decoder.depth} deep"
        words += f", predicting {model.target.title}"
    elif isinstance(model, Classifier):
        words += f", head for {count_targets(model.num_classes, model.problem)} on {model.pooled}"
    elif isinstance(model, Detector):
        words += f", {model.head} for {several(model.num_classes, 'class')}, windows of {model.window}"
    elif isinstance(model, Segmenter):
        words += f", {model.decode_head.title} for {model.num_classes} classes"
    images = "images of {} x {} pixels".format(*encoder.img_size)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{words}, for {images} with {several(encoder.in_channels, 'channel')}: {millions:.3g} M parameters"


def export_model(trained, folder):
    """Write the weights and configurations that the libraries read."""
    model, statistics = trained.model, dict(mean=trained.mean, std=trained.std, value_range=trained.value_range)
    if isinstance(model, Segmenter):
        evaluation = dict(resize=trained.resize, masks=trained.masks)
        export_segmenter(model, folder, classes=trained.classes, **evaluation, **statistics)
    elif isinstance(model, Detector):
        export_detector(model, folder, classes=trained.classes, class_ids=trained.class_ids, **statistics)
    elif isinstance(model, Classifier):
        export_classifier(model, folder, classes=trained.classes, crop_ratio=trained.crop_ratio, **statistics)
    else:
        export_encoder(trained.encoder, folder, **statistics)
        if isinstance(model, MaskedAutoencoder):
            export_autoencoder(model, folder / "pretraining", **statistics)


def compare_libraries(trained, folder):
    """Print how much the libraries' outputs differ from the model's, and return notes on libraries that are left out.

    Raises RunError if a library does not load the folder or its outputs differ.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        distances, notes = differences(folder, trained.model)
    except Exception as error:  # the libraries raise many types
        raise RunError(f"the libraries cannot load the exported folder ({in_one_line(error)}); {REMEDY}") from error
    for library, distance in distances.items():
        if not distance <= MAX_DIFFERENCE:
            raise RunError(f"{library} differs by {distance:.2g}, expected at most {MAX_DIFFERENCE:g}; {REMEDY}")
    print(f"differences from this model: {', '.join(f'{name} {value:.1g}' for name, value in distances.items())}")
    return notes


def write_folder(folder, *, trained, record, step, origin, **card):
    """Write and check the exported model, and write its card; `card` goes to `write_card`."""
    export_model(trained, folder)
    notes = compare_libraries(trained, folder)
    has_decoder = isinstance(trained.model, MaskedAutoencoder)
    summary = ModelSummary(
        task=TASKS.get(type(trained.model), "image-feature-extraction"),
        description=describe_model(trained),
        target=trained.model.problem if isinstance(trained.model, Classifier) else None,
        has_decoder=has_decoder,
        is_vit_mae=has_decoder and not vit_mae_misfit(trained.model),
        reconstructs=has_decoder and trained.model.target.invertible,
        libraries=libraries_of(trained.model),
        has_encoder=(folder / "encoder").is_dir() and bool(libraries_of(trained.encoder)),
        num_cls_tokens=trained.encoder.num_cls_tokens,
        img_size=trained.encoder.img_size,
        channels=trained.encoder.in_channels,
        mean=trained.mean,
        std=trained.std,
        value_range=trained.value_range,
        notes=[*notes, *(f"Assumed: {assumption}." for assumption in trained.assumed)],
        origin=origin,
        step=step,
    )
    write_card(folder, summary, record, **card)


def write_demo(folder, *, trained, origin, repo_id, license, datasets):
    """Write a Space that shows the page of demo.py."""
    if isinstance(trained.model, MaskedAutoencoder):  # one folder: it includes the encoder
        statistics = dict(mean=trained.mean, std=trained.std, value_range=trained.value_range)
        export_autoencoder(trained.model, folder / space.MODEL, **statistics)
    else:
        export_model(trained, folder / space.MODEL)
    words = dict(title=repo_id.partition("/")[2], description=f"{describe_model(trained)}.", origin=origin)
    space.write_space(folder, license=license, datasets=datasets, **words)


def main(argv=None):
    """Run the script; see the module's docstring."""
    # Flags and weights
    args, errors = parse_args(argv)
    try:
        weights, record, step = select_weights(args.path, args.checkpoint)
        output = resolve_output(args.output, args.path, record, name="space" if args.space else "hub")
        names = ("decoder_num_heads", "mean", "std", "target")
        stored = Stored(num_heads=args.encoder_num_heads, **{name: getattr(args, name) for name in names})
        trained = None if errors else open_trained(weights, given=stored)
        for name in ("mean", "std") if trained else ():
            values, channels = getattr(args, name), trained.encoder.in_channels
            if values is not None and len(values) != channels:
                errors.append(f"--{name} has {len(values)} values for {channels} channels; give one per channel")
    except (RunError, WeightsError) as error:
        errors.append(str(error))
    except FileNotFoundError as error:
        errors.append(f"{error.filename or error} does not exist; if the run is training, repeat the same command")
    if errors:
        fail(errors)
    print(f"{trained.path}: {describe_model(trained)}" + ("" if record else f"; read as {trained.layout}"))
    if record and record.metrics is None:
        print(f"the run is not finished: these are the weights after step {step}, and the card says so")
    for assumption in trained.assumed:
        print(f"assumed, as the weights do not say: {assumption}")

    # Folder and upload
    with alone_at(output):
        origin = f"{args.path} ({trained.layout})"
        card = dict(origin=origin, license=args.license, datasets=args.datasets)
        if args.space:
            write = partial(write_demo, repo_id=args.space, **card)
        else:
            card |= dict(repo_id=args.repo_id, revision=args.revision)
            write = partial(write_folder, record=record, step=step, location=output, **card)
        replace_folder(output, partial(write, trained=trained))
        print(f"written: {output}", flush=True)
        if args.repo_id or args.space:
            message = f"Weights of step {step}" if step is not None else "Weights"
            options = dict(private=args.private, revision=args.revision, message=message)
            options["repo_type"] = "space" if args.space else "model"
            print(f"uploaded: {upload(output, args.space or args.repo_id, **options)}")


if __name__ == "__main__":
    launch.run_script(main, remedy="repeat the same command")
