"""Turns a run into a folder that transformers, timm and this project load, with a model card; and puts it on the Hub.

    python push_to_hub.py work_dir/quickstart_pretrain

writes work_dir/quickstart_pretrain/hub/: weights, configurations, README.md (the model card), pictures. Before that the
folder is loaded with transformers and timm, and refused where they do not compute what the run's own model does.

    python push_to_hub.py work_dir/finetune_classifier --checkpoint best --repo_id OWNER/NAME --private

uploads it too, as whom `hf auth login` or HF_TOKEN says. An interrupted upload is continued by the same command. Other
weights (a .pth of the official MAE, files and folders of timm or transformers, hf:OWNER/NAME) are converted alike:

    python push_to_hub.py mae_pretrain_vit_base.pth --output mae_base
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

from modeling.classifier import Classifier
from modeling.export import export_autoencoder, export_classifier, export_encoder, export_segmenter
from modeling.files import Stored, WeightsError
from modeling.hub import is_on_hub
from modeling.mae import MaskedAutoencoder
from modeling.parity import differences
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from training import arguments, launch
from training.arguments import integer, number
from training.card import Facts, Run, is_card, read_run, write_card
from training.checkpoint import RunFolder, alone_at, read_state, replace_folder
from training.launch import RunError, fail
from training.publish import check_repo_id, upload
from training.wording import several

LIMIT = 1e-4  # of the difference between libraries
TASKS = {Classifier: "image-classification", Segmenter: "image-segmentation"}  # the Hub's names
POOLINGS = {"mean": "mean of the patch tokens", "cls": "cls token"}
HEADS = {"upernet": "an UperNet", "linear": "a linear head for segmentation"}


def parse_args(argv=None):
    """The flags, and what is wrong with them."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag(
        "path",
        nargs="?",
        metavar="RUN_FOLDER",
        help="a run, or any weights: a file, a folder, hf:OWNER/NAME[@revision]",
    )
    flag(
        "--checkpoint", default="last", help="last, best (of a fine-tuning) or the name of a checkpoint (default last)"
    )
    flag("--output", help="folder to write (default RUN_FOLDER/hub)")
    flag = parser.add_argument_group("upload").add_argument
    flag(
        "--repo_id",
        metavar="OWNER/NAME",
        help="repository on the Hub, made where it does not exist (left out: no upload)",
    )
    pair = partial(flag, action=argparse.BooleanOptionalAction, default=False)
    pair("--private", help="make a new repository private (off)")
    flag("--revision", help="branch to upload to, made where it does not exist (default main)")
    pair("--create_pr", help="open a pull request instead (off)")
    flag = parser.add_argument_group("model card").add_argument
    flag("--license", help="as the Hub spells it, such as apache-2.0 (default unknown)")
    flag(
        "--datasets", nargs="+", default=[], metavar="NAME", help="names on the Hub of the data that it was trained on"
    )
    flag = parser.add_argument_group("what files of other projects do not tell").add_argument
    flag("--encoder_num_heads", type=integer(1), help="attention heads (default those of the known size)")
    flag("--decoder_num_heads", type=integer(1), help="attention heads (default 16)")
    flag("--mean", type=number(), nargs="+", help="channel means of images in [0, 1] (default ImageNet's)")
    flag("--std", type=number(1e-6), nargs="+", help="channel deviations of images in [0, 1] (default ImageNet's)")
    flag(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        help="the autoencoder predicts pixels normalised per patch (default) or plain ones",
    )
    args, errors = parser.read(argv)
    if args.path is None:
        errors.append("RUN_FOLDER is missing; give a run, a folder or file of weights, or hf:OWNER/NAME")
    if args.repo_id is not None:
        errors += [f"--repo_id {error}" for error in check_repo_id(args.repo_id)]
        if args.create_pr and args.revision not in (None, "main"):
            errors.append(f"--create_pr asks for a change of main, --revision for {args.revision}; leave one out")
    else:
        given = [name for name in ("private", "revision", "create_pr") if getattr(args, name)]
        errors += [f"--{name} is of an upload; give --repo_id OWNER/NAME with it" for name in given]
    return args, errors


class Chosen(NamedTuple):
    """What is to be published."""

    weights: str | Path  # what `open_trained` takes
    run: Run | None = None  # None for weights that are of no run
    step: int | None = None  # of the run
    finished: bool = True


def choose(path, checkpoint):
    """What `checkpoint` names: last, best, or one in checkpoints/ of the run that lies at `path`. Raises RunError."""
    run = None if is_on_hub(path) else read_run(Path(path))
    if run is None:
        if checkpoint != "last":
            raise RunError(f"--checkpoint {checkpoint} is of a run, and {path} is none (no args.json); leave it out")
        return Chosen(path)
    whole = {place.name: place for place in RunFolder(Path(path)).whole_checkpoints()}
    if run.flags.get("eval_only"):
        raise RunError(f"{path} is a run of --eval_only, which trains nothing; give the one that it measured")
    if checkpoint == "best":
        metric = "mean_iou" if "crop_size" in run.flags else "top1"
        scores = [(line[metric], -line["step"]) for line in run.log if metric in line]
        if not scores or not (run.folder / "best" / "config.json").is_file():
            raise RunError(
                f"--checkpoint best: {path} has no best/; expected a fine-tuning that was validated; give last"
            )
        return Chosen(run.folder / "best", run, -max(scores)[1], run.metrics is not None)  # the first of equals
    if checkpoint != "last":
        if checkpoint not in whole:
            known = ", ".join(whole) or "none"
            raise RunError(
                f"--checkpoint {checkpoint} is no whole checkpoint of {path}; expected last, best or: {known}"
            )
        return Chosen(whole[checkpoint], run, read_state(whole[checkpoint])["step"], run.metrics is not None)
    if run.metrics is not None:
        return Chosen(run.folder, run, run.metrics.get("step"))
    if not whole:
        raise RunError(f"{path} has no whole checkpoint yet; wait for the first one, or give another run")
    newest = list(whole.values())[-1]
    return Chosen(newest, run, read_state(newest)["step"], False)


def check_output(output, path, run):
    """The folder to write; raises RunError where that cannot be."""
    if not is_on_hub(path) and not Path(path).exists():
        raise RunError(f"{path}: no such file or folder; expected a run or weights (of the Hub: hf:OWNER/NAME)")
    if output is None and run is None:
        raise RunError(
            f"--output is missing: {path} is no run that could hold it; give a folder to write, or of a run's part the "
            "run itself with --checkpoint"
        )
    output = Path(output) if output else run.folder / "hub"
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if taken and not is_card(output / "README.md"):
        raise RunError(f"--output {output} exists and is no folder of this script; give an empty or a new one")
    return output


def describe(trained):
    """The model in words, a line."""
    encoder, model = trained.encoder, trained.model
    kind = f"ViT of {encoder.embed_dim} x {encoder.depth}, {encoder.num_heads} heads, patches of {encoder.patch_size}"
    if isinstance(model, MaskedAutoencoder):
        kind += f", with a decoder of {model.decoder_embed.out_features} x {len(model.decoder_blocks)}"
    elif isinstance(model, Classifier):
        kind += f", with a classifier of {model.num_classes} classes on the {POOLINGS[model.pooling]}"
    elif isinstance(model, Segmenter):
        kind += f", with {HEADS[model.head]} of {model.num_classes} classes"
    height, width = encoder.img_size
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    images = f"images of {height} x {width} pixels and {several(encoder.in_channels, 'channel')}"
    return f"{kind}, for {images}: {millions:.3g} M parameters"


def export(trained, folder):
    """Writes the module as the libraries read it."""
    model, statistics = trained.model, dict(mean=trained.mean, std=trained.std, value_range=trained.value_range)
    if isinstance(model, Segmenter):
        export_segmenter(model, folder, classes=trained.classes, resize=trained.resize, **statistics)
    elif isinstance(model, Classifier):
        export_classifier(model, folder, classes=trained.classes, crop_ratio=trained.crop_ratio, **statistics)
    else:
        export_encoder(trained.encoder, folder, **statistics)
        if isinstance(model, MaskedAutoencoder):
            export_autoencoder(model, folder / "pretraining", **statistics)


def check(trained, folder):
    """What the libraries make of the folder, as `differences` tells; raises RunError where they disagree."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        found, notes = differences(folder, trained.model)
    except Exception as error:  # whatever a library raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"the folder cannot be loaded as others will load it ({reason}); nothing was written; look at the versions "
            "of transformers and timm: requirements.txt has those that work"
        ) from error
    for library, distance in found.items():
        if not distance <= LIMIT:
            raise RunError(
                f"{library} computes something else from the folder: a difference of {distance:.2g}, expected at most "
                f"{LIMIT:g}; nothing was written; look at its version, requirements.txt has those that work"
            )
    return found, notes


def main(argv=None):
    """Runs the script; see the module's docstring."""
    # What is to be published
    args, errors = parse_args(argv)
    if args.path is None:
        fail(errors)
    try:
        chosen = choose(args.path, args.checkpoint)
        output = check_output(args.output, args.path, chosen.run)
        names = ("decoder_num_heads", "mean", "std", "norm_pix_loss")
        told = Stored(num_heads=args.encoder_num_heads, **{name: getattr(args, name) for name in names})
        trained = None if errors else open_trained(chosen.weights, told=told)
        for name in ("mean", "std") if trained else ():
            numbers, channels = getattr(args, name), trained.encoder.in_channels
            if numbers is not None and len(numbers) != channels:
                errors.append(f"--{name} has {len(numbers)} values for {channels} channels; give one a channel")
    except (RunError, WeightsError) as error:
        errors.append(str(error))
    except FileNotFoundError as error:  # a checkpoint that a run beside has just removed
        errors.append(f"{error.filename} is gone, as the run goes on; repeat the same command")
    if errors:
        fail(errors)
    model, run = trained.model, chosen.run
    print(f"{trained.path}: {describe(trained)}" + (f"; read as {trained.layout}" if run is None else ""))
    if not chosen.finished:
        print(f"the run is not finished: this is what it had learned after step {chosen.step}, and the card says so")
    for words in trained.assumed:
        print(f"nobody told, so it was assumed: {words}")

    # The folder
    facts = dict(
        task=TASKS.get(type(model), "image-feature-extraction"),
        summary=describe(trained),
        autoencoder=isinstance(model, MaskedAutoencoder),
        img_size=trained.encoder.img_size,
        channels=trained.encoder.in_channels,
        mean=trained.mean,
        std=trained.std,
        value_range=trained.value_range,
        classes=trained.classes,
        origin=f"{args.path} ({trained.layout})",
        step=chosen.step,
        finished=chosen.finished,
    )
    found = {}

    def write(folder):
        try:
            export(trained, folder)
        except ValueError as error:
            raise RunError(f"{trained.path} is no model that transformers has: {error}") from error
        distances, notes = check(trained, folder)
        found.update(distances)
        facts.update(differences=distances, notes=[*notes, *(f"Assumed: {words}." for words in trained.assumed)])
        options = dict(place=output, repo_id=args.repo_id, revision=args.revision)
        options |= dict(license=args.license, datasets=args.datasets)
        write_card(folder, Facts(**facts), run, **options)

    with alone_at(output):
        replace_folder(output, write)
        told = ", ".join(f"{library} {distance:.1g}" for library, distance in found.items())
        model = "the run's own model" if run else "the model as it was read"
        print(f"written: {output} (differences from {model}: {told})", flush=True)
        if args.license is None:
            print("its card says that the license is unknown; give --license to say which")

        # The upload
        if args.repo_id:
            message = f"Weights of step {chosen.step}" if chosen.step is not None else "Weights"
            options = dict(private=args.private, revision=args.revision, create_pr=args.create_pr, message=message)
            print(f"uploaded: {upload(output, args.repo_id, **options)}")


if __name__ == "__main__":
    launch.run_script(main, remedy="repeat the same command")
