"""Fine-tunes a pre-trained encoder to label every pixel: UperNet on ADE20K, or on any folder laid out like it.

    accelerate launch finetune_segmentation.py @recipes/quickstart/finetune_segmentation.args

prints its plan, then a bar with the loss and, every so many steps, the mean IoU; writes work_dir/EXPERIMENT_NAME/ with
log.jsonl, checkpoints/, predictions/ (image, annotation, prediction), best/ and, at the end, metrics.json and model/:
folders which transformers loads as UperNetForSemanticSegmentation. Kill it at any moment: the same command with
--resume_from_checkpoint auto continues it exactly.

    accelerate launch finetune_segmentation.py --path_to_data ADEChallengeData2016 \\
        --path_to_backbone_checkpoint work_dir/pretrain_mae

is the published recipe (mmsegmentation's mae-base_upernet): 512 x 512 crops, batches of 16, 160,000 steps; only that
gradients are clipped. Without a checkpoint, everything is trained from scratch.
"""

import argparse
import contextlib
import copy
import math
from functools import partial
from itertools import groupby, repeat
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

from data.batches import Normalization, make_loader, own_batches
from data.decode import PixelFormat
from data.index import DataError
from data.sampling import StepSampler, model_seed, seed_everything
from data.segmentation import (
    EvaluationPairs,
    SegmentationBatch,
    SegmentationDataset,
    check_masks,
    open_pairs,
    palette,
    view_sizes,
)
from data.sources import describe_data, find_statistics
from data.transforms import empty_images
from modeling.export import export_segmenter
from modeling.files import WeightsError
from modeling.sliding_window import predict
from modeling.upernet import HEADS, Segmenter, default_layers, segmentation_loss
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import open_weights, segmenter_kind, start_from
from training import arguments, launch
from training.arguments import Unreadable, integer, number, one_of
from training.checkpoint import (
    RunFolder,
    check_place,
    claim_run_folder,
    compare_with_run,
    load_training,
    note_start,
    replace_folder,
    save_training,
    write_json,
)
from training.launch import RunError, fail
from training.memory import fit_micro_batch
from training.metrics import segmentation_areas
from training.optimizer import adamw, parameter_groups, set_learning_rate
from training.pictures import displayable, segmentation_grid
from training.plan import describe_run, needed_memory, plan_run, rehearse
from training.processes import Crew, start_accelerator
from training.progress import DamagedImages, Progress, best_of, truncate_log
from training.publish import Publisher, check_hub, check_token
from training.schedule import is_due, learning_rate_at
from training.sharding import prepare, resolve_sharding
from training.trackers import finish_trackers, start_trackers
from training.wording import in_bytes, several

STEPS, WARMUP_STEPS, BATCH_SIZE, CROP_SIZE = 160_000, 1_500, 16, 512
SAVE_STEPS = 1_000
WEIGHTS = "--path_to_backbone_checkpoint"
BALANCED = "balanced"


def parse_args(argv=None):
    """The flags, resolved as far as they can be without processes, weights and data, and what is wrong with them."""
    parser = arguments.Parser(__doc__)
    data = f"folder laid out like ADE20K's; or, with masks, a {arguments.SOURCES}"
    arguments.add_run_flags(parser, name="finetune_segmentation", data=data)
    flag = parser.add_argument_group("classes").add_argument
    names = "their names, a line each, or ade20k (default classes.txt in the data)"
    flag("--path_to_classes", metavar="FILE", help=names)
    arguments.add_length_flags(parser, epochs=None, steps=STEPS, warmup=f"{WARMUP_STEPS} steps")
    arguments.add_batch_flags(parser, global_default=BATCH_SIZE)
    arguments.add_optimizer_flags(parser, learning_rate=1e-4, weight_decay=0.05)
    flag = parser.add_argument_group("optimizer of a segmenter").add_argument
    flag("--betas", type=number(0, 0.99999), nargs=2, metavar=("B1", "B2"), default=[0.9, 0.999], help="of AdamW")
    decay = "rate of a block / that of the block above (default 0.65)"
    flag("--layer_decay", type=number(0.01, 1), default=0.65, help=decay)
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, steps=SAVE_STEPS)
    arguments.add_hub_flags(parser)
    arguments.add_image_flags(parser)
    flag = parser.add_argument_group("crops").add_argument
    size = f"side of the square crops, and of the window of evaluation (default {CROP_SIZE})"
    flag("--crop_size", type=integer(1), help=size)
    flag(
        "--resize",
        type=integer(1),
        nargs=2,
        metavar=("LONG", "SHORT"),
        help="images are resized to fit these sides, in training times 0.5 to 2 (default 4 x the crop, the crop)",
    )
    arguments.add_encoder_flags(parser, sizes=SIZES, drop_path=0.1)

    flag = parser.add_argument_group("segmenter").add_argument
    pair = partial(flag, action=argparse.BooleanOptionalAction)
    flag(
        WEIGHTS,
        metavar="PATH",
        help="a run of pretrain_mae.py, its encoder/, a .pth of the official MAE, or a folder or file of timm or "
        "transformers; its sizes, --mean and --std become the defaults (left out: train from scratch)",
    )
    pair("--adapt_channels", default=False, help="sum or repeat channels of the weights to fit --input_channels (off)")
    pair("--relative_position_bias", default=True, help="add a learned bias, from zero, to each block's attention (on)")
    flag("--layer_scale", type=number(), default=1.0, help="initial weight of the blocks' branches; 0 = none (1)")
    flag("--head", type=one_of(*HEADS), default="upernet", help="upernet, or linear on the last block")
    flag("--head_width", type=integer(1), help="channels of UperNet's layers (default 512)")
    flag(
        "--layers",
        type=integer(0),
        nargs="+",
        metavar="I",
        help="blocks, from 0, whose outputs the head sees (default of UperNet: after 1/3, 1/2, 2/3 and all of them)",
    )
    flag("--auxiliary_weight", type=number(), help="of UperNet's auxiliary head in the loss; 0 = none (default 0.4)")
    flag(
        "--class_weights",
        type=_class_weight,
        nargs="+",
        metavar="W",
        help=f"of the classes in the loss, one number each; or {BALANCED}, which favours the rare ones (default equal)",
    )

    flag = parser.add_argument_group("evaluation").add_argument
    pair = partial(flag, action=argparse.BooleanOptionalAction)
    flag(
        "--evaluate",
        type=one_of("slide", "whole"),
        default="slide",
        help="slide windows of the crop's size over the resized image; or squeeze the whole image into one crop, as "
        "the folders in transformers do (default slide)",
    )
    flag("--evaluate_scales", type=number(0.1, 8), nargs="+", default=[1.0], help="average over sizes (default 1)")
    pair("--evaluate_flip", default=False, help="average over the image and its mirror image (off)")
    flag("--evaluate_every", type=integer(0), default=16_000, help="steps, 0 = at the end only (default 16000)")
    flag("--num_preview_images", type=integer(0), default=8, help="rows of the pictures (default 8)")
    pair("--eval_only", default=False, help=f"only measure the model that {WEIGHTS} leads to, as it is; nothing trains")
    args, errors = parser.read(argv)

    if args.epochs is None and args.max_steps is None:
        args.max_steps = STEPS
    if args.save_checkpoint_interval is None and args.save_checkpoint_steps is None:
        args.save_checkpoint_steps = SAVE_STEPS
    hub = dict(repository=args.hub_model_id, every=args.hub_every, private=args.hub_private)
    return args, errors + check_flags(args) + check_hub(args.push_to_hub, **hub)


def _class_weight(text):
    """A flag's type: a number, or the word that stands for weights found in the data."""
    value = text if text == BALANCED else number()(text)
    return Unreadable(text, f"numbers of at least 0, or {BALANCED}") if isinstance(value, Unreadable) else value


def check_flags(args):
    """What contradicts itself in the flags, a line each."""
    errors = []
    if args.path_to_backbone_checkpoint == "":
        errors.append(f"{WEIGHTS} is empty; give a path, or leave the flag out to train from scratch")
    if not args.path_to_backbone_checkpoint:
        wanting = [name for name in ("adapt_channels", "eval_only") if getattr(args, name)]
        errors += [f"--{name} needs trained weights; give {WEIGHTS}" for name in wanting]
    if args.resize and args.resize[0] < args.resize[1]:
        errors.append(f"--resize {args.resize[0]} {args.resize[1]} has its longer side last; give LONG SHORT")
    if args.class_weights and BALANCED in args.class_weights and len(args.class_weights) > 1:
        errors.append(f"--class_weights mixes {BALANCED} and numbers; give one or the other")
    elif args.class_weights and not any(args.class_weights):
        errors.append("--class_weights are all 0, so that there is nothing to learn; give at least one above 0")
    if args.eval_only:
        for name, why in (
            ("resume_from_checkpoint", f"give the checkpoint's folder as {WEIGHTS}, and an --experiment_name"),
            ("dry_run", "nothing trains"),
            ("push_to_hub", "nothing trains"),
        ):
            if getattr(args, name):
                errors.append(f"--{name} does not go with --eval_only: {why}; leave it out")
    return errors


def resolve_model(args, weights, *, whole):
    """Resolves the flags of images, encoder and head, from `weights` where they were left out; what is wrong with them.

    `whole` says that the weights are those of a segmenter, which is to be resumed or measured.
    """
    size, (statistics, errors) = SIZES[args.model or "base"], find_statistics(args.path_to_data)
    kind = segmenter_kind(weights.state) if weights else None
    if weights and args.model is None:
        size = dict(weights.sizes)
        if size["num_heads"] is None and args.encoder_num_heads is None:
            errors.append(f"{WEIGHTS} {weights.path} does not tell its number of heads; give --encoder_num_heads")
            size["num_heads"] = 1
    if args.eval_only and weights and kind is None:
        errors.append(f"--eval_only {weights.path} holds no segmenter; give a model/, best/ or checkpoint")
    if whole and kind:
        if weights.grid and args.crop_size is None:
            args.crop_size = weights.grid[0] * (args.patch_size or size["patch_size"])
        if args.eval_only:
            args.head, args.head_width, args.auxiliary_weight = kind.head, kind.head_width or None, None
            if kind.head == "upernet":
                args.auxiliary_weight = float(kind.auxiliary)
            args.relative_position_bias, args.layer_scale = kind.relative_position_bias, float(kind.layer_scale)
            args.layers = weights.stored.layers or args.layers
    args.crop_size = args.crop_size or CROP_SIZE
    args.resize = args.resize or [4 * args.crop_size, args.crop_size]
    statistics = None if args.eval_only else statistics  # a model is measured as it was trained
    errors += arguments.check_images(args, statistics, weights, adapt=args.adapt_channels)
    errors += arguments.check_encoder(args, size)
    return errors + check_head(args)


def check_head(args):
    """Gives the flags of the head that were left out their defaults; what is wrong with them."""
    depth, upernet = args.encoder_depth, args.head == "upernet"
    count = 4 if upernet else 1
    given = [name for name in ("head_width", "auxiliary_weight") if getattr(args, name) is not None]
    if not upernet and given:
        flags = " ".join(f"--{name} {getattr(args, name):g}" for name in given)
        args.head_width = args.auxiliary_weight = None
        return [f"{flags} is of UperNet and does not go with --head linear; leave it out"]
    if upernet:
        args.head_width = args.head_width or 512
        args.auxiliary_weight = 0.4 if args.auxiliary_weight is None else args.auxiliary_weight
    try:
        args.layers = args.layers or (default_layers(depth) if upernet else [depth - 1])
    except ValueError:
        args.layers = [depth - 1]
        return [f"--head upernet needs an encoder of at least 4 blocks, not {depth}; give --head linear"]
    shown = "--layers " + " ".join(map(str, args.layers))
    errors = []
    if upernet and args.crop_size < 2 * args.patch_size:
        errors.append(
            f"--crop_size {args.crop_size} holds one patch of {args.patch_size} a side; UperNet needs at least two"
        )
    if max(args.layers) >= depth:
        errors.append(f"{shown} is beyond the encoder's {depth} blocks; expected 0 to {depth - 1}")
    if len(args.layers) != count or args.layers != sorted(set(args.layers)):
        errors.append(f"{shown} does not fit --head {args.head}; expected {count} rising, different numbers")
    return errors


def check_micro_batch(args, size, *, synchronised):
    """What a micro-batch of `size` images is too small for, in a list."""
    if args.head == "upernet" and size == 1 and not synchronised:
        return ["UperNet has BatchNorms that see one value an image; give micro-batches of at least 2 images"]
    return []


def open_data(args, pixels, weights):
    """The training and validation pairs, which are the same where nothing trains, the classes' names, and what is wrong
    with all that."""
    try:
        if not args.path_to_data:
            return None, None, [], []  # which is an error already
        places = dict(validation=args.path_to_validation_data, classes_file=args.path_to_classes, cache=args.cache_dir)
        train, validation = open_pairs(args.path_to_data, pixels, **places)
    except DataError as error:
        return None, None, [], str(error).splitlines()
    classes, errors = train.classes, []
    if args.class_weights and BALANCED not in args.class_weights and len(args.class_weights) != len(classes):
        errors.append(
            f"--class_weights has {len(args.class_weights)} numbers for {len(classes)} classes; give one each, in the "
            "order of classes.txt"
        )
    kind = segmenter_kind(weights.state) if weights and args.eval_only else None
    if kind:
        known = weights.stored.classes
        if kind.num_classes != len(classes):
            errors.append(
                f"--path_to_data {args.path_to_data} has {len(classes)} classes, the segmenter {kind.num_classes}; "
                "give data with those classes"
            )
        elif known and known != classes:
            i = next(i for i, name in enumerate(classes) if name != known[i])
            errors.append(
                f"--path_to_data {args.path_to_data} calls class {i + 1} {classes[i]!r}, the segmenter {known[i]!r}; "
                "give data with the segmenter's classes, in its order"
            )
    return (validation if args.eval_only else train), validation, classes, errors


def check_annotations(train, validation, pixels, accelerator, crew, processes):
    """How many pixels of the training masks have which class, (num_classes,), or None where nothing trains; and what is
    wrong with any mask. Each process reads its share."""
    counts, errors = {}, []
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    sources = {"training": train, "validation": validation}
    if train is validation:
        del sources["training"]
    for name, source in sources.items():
        bar = f"reading {name} masks" if accelerator.is_main_process else None
        options = dict(pixels=pixels, processes=processes, progress=bar)
        found = crew.gather([check_masks(source, range(len(source))[own], **options)])
        counts[name] = sum(areas for areas, _ in found)
        errors += [error for _, lines in found for error in lines]
        if not errors and not counts[name].any():
            errors.append(f"no pixel of the {name} masks has a class (they are all 0, which is void); give others")
    classes, counts = np.array(train.classes), counts.get("training")
    absent = [] if counts is None else classes[counts == 0].tolist()
    if absent and not errors:
        some = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        accelerator.print(f"no training mask has a pixel of {len(absent)} of the {len(classes)} classes: {some}")
    return counts, errors


def class_weights(given, pixels):
    """The weights (N,) of the classes in the loss, None where all are equal. Balanced ones are the median of the
    classes' numbers of pixels divided by the class's own (as Eigen & Fergus 2015, section 4.3.2), 10 at most, and 1 for
    a class without any."""
    if not given:
        return None
    if BALANCED not in given:
        return torch.tensor(given)
    pixels = torch.as_tensor(pixels, dtype=torch.float64)
    balanced = (pixels[pixels > 0].median() / pixels).clamp(max=10)
    return torch.where(pixels > 0, balanced, 1.0).float()


def build_model(args, num_classes):
    """The segmenter that the flags describe."""
    encoder = VisionTransformer(
        img_size=args.crop_size,
        patch_size=args.patch_size,
        in_channels=args.input_channels,
        embed_dim=args.encoder_embed_dim,
        depth=args.encoder_depth,
        num_heads=args.encoder_num_heads,
        mlp_ratio=args.encoder_mlp_ratio,
        drop_path=args.drop_path,
        custom_weight_init=args.custom_weight_init,
        gradient_checkpointing=args.gradient_checkpointing,
        relative_position_bias=args.relative_position_bias,
        layer_scale=args.layer_scale or None,
    )
    options = dict(head=args.head, layers=args.layers, auxiliary=bool(args.auxiliary_weight))
    options |= dict(head_width=args.head_width or 512, custom_weight_init=args.custom_weight_init)
    return Segmenter(encoder, num_classes, **options)


def describe_plan(args, model, batch, length, accelerator, memory, flops, train_source, validation_source, num_classes):
    """The resolved plan, printed before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    upernet = args.head == "upernet"
    head = f"UperNet of width {args.head_width}" if upernet else "linear head"
    extras = ["relative position bias"] * args.relative_position_bias
    extras += [f"LayerScale {args.layer_scale:g}"] * bool(args.layer_scale)
    auxiliary = f", auxiliary loss {args.auxiliary_weight:g}" if model.auxiliary else ""
    return "\n".join(
        [
            f"data       {args.path_to_data}: {len(train_source)} images of {num_classes} classes (about "
            f"{in_bytes(train_source.size_in_bytes())}), {len(validation_source)} held out",
            f"model      {args.encoder_embed_dim} x {args.encoder_depth} encoder"
            f"{' with ' if extras else ''}{' and '.join(extras)}, {head} after block{'s' if upernet else ''} "
            f"{', '.join(map(str, args.layers))}: {parameters / 1e6:.3g} M parameters, {flops / 1e9:.3g} GFLOP per "
            "image and step",
            f"recipe     AdamW, weight decay {args.weight_decay:g}, layer decay {args.layer_decay:g}, drop path "
            f"{args.drop_path:g}{auxiliary}",
            f"images     crops of {args.crop_size} x {args.crop_size}, {several(args.input_channels, 'channel')}, "
            f"{math.prod(model.encoder.grid)} patches of {args.patch_size}; resized to fit {args.resize[0]} x "
            f"{args.resize[1]}, times 0.5 to 2",
            *describe_run(args, batch, length, accelerator, memory, decay="linear"),
        ]
    )


def optimizer_step(
    model, optimizer, batches, normalize, seeds, *, weights, auxiliary_weight, accelerator, waiting, max_grad_norm
):
    """One optimizer step over as many micro-batches as there are `seeds`: its loss and gradient norm, which stay on the
    device, and (index, reason) of damaged images. `weights` (num_classes,) are those of the classes, or None."""
    loss, damaged = 0.0, []
    for seed in seeds:
        with waiting():
            batch = next(batches)
        with accelerator.accumulate(model):
            seed_everything(seed)
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))
            masks = batch.masks.to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                output = model(images)
            logits, auxiliary = output if isinstance(output, tuple) else (output, None)
            micro_loss = segmentation_loss(logits, masks, class_weights=weights)
            if auxiliary is not None:
                micro_loss += auxiliary_weight * segmentation_loss(auxiliary, masks, class_weights=weights)
            accelerator.backward(micro_loss)
            loss += micro_loss.detach() / len(seeds)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        damaged += batch.damaged
    return loss, grad_norm, damaged


def empty_step(args, model, optimizer, plan, normalize, *, pixels, accelerator):
    """One optimizer step on images without content, of as many and as large micro-batches as those of the run."""
    images = empty_images(plan.micro, pixels.channels, (args.crop_size, args.crop_size), pixels.dtype).zero_()
    masks = torch.zeros(plan.micro, args.crop_size, args.crop_size, dtype=torch.uint8)
    options = dict(weights=None, auxiliary_weight=args.auxiliary_weight, max_grad_norm=args.max_grad_norm)
    options |= dict(accelerator=accelerator, waiting=contextlib.nullcontext)
    batches = repeat(SegmentationBatch(images, masks, [], []))
    optimizer_step(model, optimizer, batches, normalize, [0] * plan.accumulation, **options)


def find_micro_batch(args, model, plan, memory, normalize, *, pixels, accelerator, **options):
    """`plan` in the largest micro-batches that fit into memory; `options` are those of `fit_micro_batch`."""

    def try_step(size):
        copied, one = copy.deepcopy(model), plan._replace(per_process=size, micro=size)
        optimizer = adamw(parameter_groups(copied, args.weight_decay), betas=tuple(args.betas))
        empty_step(args, copied, optimizer, one, normalize, pixels=pixels, accelerator=accelerator)

    synchronised = accelerator.num_processes > 1 and accelerator.device.type == "cuda"
    allowed = partial(check_micro_batch, args, synchronised=synchronised)
    options |= dict(allowed=lambda size: not allowed(size), accelerator=accelerator)
    plan = fit_micro_batch(plan, memory, try_step, **options)
    args.micro_batch_size, args.gradient_accumulation_steps = plan.micro, plan.accumulation
    return plan


@torch.no_grad()
def evaluate(model, dataset, classes, normalize, *, predict, read, accelerator, crew, note_damage, num_previews):
    """The scores over all images of `dataset`, each once and at its annotation's own size, damaged ones left out: those
    of metrics.json; and (image, annotation, prediction) of `num_previews` of them.

    `predict(forward, views, size)` -> classes (B, *size). Returns None where the run is asked to stop meanwhile;
    resumed, it evaluates this step again. Raises RunError where nothing can be scored.
    """
    training = model.training
    model.eval()
    for buffer in model.buffers():  # BatchNorm's statistics are those of the main process, as in a checkpoint
        broadcast(buffer)
    rows, previews, damage = [], [], []
    shown = {int(i) for i in np.linspace(0, len(dataset) - 1, min(num_previews, len(dataset)))}
    for batch in read(dataset, range(len(dataset))):
        damage += [(dataset.source.name(pair.index), pair.damaged) for pair in batch if pair.damaged]
        healthy = [pair for pair in batch if not pair.damaged]
        for size, group in groupby(healthy, key=lambda pair: tuple(pair.mask.shape)):
            pairs = list(group)
            batches = zip(*(pair.views for pair in pairs), strict=True)
            views = [normalize(torch.stack(images).to(accelerator.device)) for images in batches]
            with accelerator.autocast():
                predictions = predict(model.forward, views, size)  # not compiled: sizes vary
            for pair, prediction in zip(pairs, predictions, strict=True):
                areas = segmentation_areas(prediction, pair.mask.to(prediction.device), len(classes))
                rows.append((pair.index, areas.tolist()))
                if pair.index in shown:
                    picture = displayable(pair.image).numpy()
                    previews.append((pair.index, picture, pair.mask.numpy(), prediction.cpu().numpy()))
    model.train(training)
    if crew.wanted():
        return None
    note_damage(damage)
    rows, previews, results = sorted(crew.gather(rows)), sorted(crew.gather(previews), key=lambda row: row[0]), []
    if not rows:
        raise RunError(f"none of the {len(dataset)} held-out images can be read; damaged.jsonl says why: repair them")
    if not any(sum(labelled) for _, (_, _, labelled) in rows):
        raise RunError("no pixel of the held-out annotations has a class; give annotations that are not all void")
    if accelerator.is_main_process:
        from training.scores import SegmentationScores  # importing evaluate takes seconds

        intersections, predicted, labelled = zip(*(areas for _, areas in rows), strict=True)
        scores = SegmentationScores()
        scores.add_batch(intersections=intersections, prediction_areas=predicted, label_areas=labelled)
        results = [(scores.compute(classes=classes), [row[1:] for row in previews])]
    return crew.gather(results)[0]


def record(values, previews, classes, step, *, progress, folder):
    """Logs the scores after `step` steps, and draws the pictures."""
    epoch = step / progress.steps_per_epoch
    line = (
        f"step {step}: mean IoU {values['mean_iou']:.2f} %, mean accuracy {values['mean_accuracy']:.2f} %, pixel "
        f"accuracy {values['overall_accuracy']:.2f} %"
    )
    progress.say(line)
    if previews and progress.accelerator.is_main_process:
        path = folder / "predictions" / f"step_{step:08d}.png"
        segmentation_grid(path, previews, classes, palette(len(classes)), title=line)
        progress.picture(path, "predictions", step)
    # Last: what the log has is not measured again by a resumed run
    progress.write({"step": step, "epoch": epoch, **values})


def finish(folder, values, *, step, epoch, seconds, num_images):
    """Writes metrics.json and says where everything is."""
    rate = round(num_images / seconds, 2)
    run = {"step": step, "epoch": epoch, "seconds": round(seconds, 1), "images_per_second": rate}
    write_json(folder / "metrics.json", {**run, **values})
    print(f"finished: mean IoU {values['mean_iou']:.2f} %; {folder / 'metrics.json'}")


def only_evaluate(measure, model, classes, progress, *, folder, num_images):
    """Measures a segmenter that is trained: its scores are the whole run."""
    found = measure(model)
    progress.close()
    if found is None:
        progress.say("stopped by a signal; nothing was measured")
        return
    values, previews = found
    record(values, previews, classes, 0, progress=progress, folder=folder)
    if progress.accelerator.is_main_process:
        finish(folder, values, step=0, epoch=0.0, seconds=progress.seconds, num_images=num_images)


def main(argv=None):
    """Runs the script; see the module's docstring."""
    # Accelerator, seed and run folder
    args, errors = parse_args(argv)
    accelerator, found = start_accelerator(args.mixed_precision, tf32=args.tf32, compiled=args.compile)
    errors += found + resolve_sharding(args, accelerator)
    args.mixed_precision, device = accelerator.mixed_precision, accelerator.device
    crew = Crew(args.time_limit)
    folder = RunFolder(Path(args.working_directory) / args.experiment_name)
    checkpoint, saved, found = claim_run_folder(folder, args.resume_from_checkpoint, write=not args.dry_run)
    if args.eval_only:  # which cannot be resumed
        found = [error.replace("continue it with --resume_from_checkpoint latest or give", "give") for error in found]
    errors += found if checkpoint else found + check_place(WEIGHTS, args.path_to_backbone_checkpoint, folder.path)
    errors += check_token() if args.push_to_hub else []
    start_step = saved.get("step", 0)

    # Weights, and the sizes that they tell
    weights = None
    try:
        if checkpoint or args.path_to_backbone_checkpoint:
            weights = open_weights(checkpoint or args.path_to_backbone_checkpoint)
    except WeightsError as error:
        errors.append(f"{WEIGHTS} {error}")
    errors += resolve_model(args, weights, whole=bool(checkpoint) or args.eval_only)

    # Data, and the plan that follows from its size
    pixels = PixelFormat(args.input_channels, args.value_range, args.nodata, args.max_pixels)
    train_source, validation_source, classes, found = open_data(args, pixels, weights)
    errors += found
    fingerprints = [source.fingerprint() if source else None for source in (train_source, validation_source)]
    batch_plan, length, found = plan_run(
        args,
        num_samples=len(train_source) if train_source else None,
        num_processes=accelerator.num_processes,
        held=saved.get("global_batch_size"),
        default_batch_size=BATCH_SIZE,
        default_warmup_steps=WARMUP_STEPS,
    )
    synchronised = accelerator.num_processes > 1 and device.type == "cuda"
    found += check_micro_batch(args, batch_plan.micro, synchronised=synchronised)
    errors += [] if args.eval_only else found
    if checkpoint:
        errors += compare_with_run(checkpoint, vars(args), fingerprints[0], defaults=vars(parse_args([])[0]))

    # Model
    torch.manual_seed(args.seed)
    try:
        model = build_model(args, len(classes) or 2)
        if weights and not checkpoint and not (args.eval_only and errors):
            options = dict(adapt_channels=args.adapt_channels, mean=args.mean, std=args.std)
            report = start_from(weights, model if args.eval_only else model.encoder, **options)
            accelerator.print(f"{WEIGHTS} {weights.path}: {report}")
    except WeightsError as error:
        errors.append(f"{WEIGHTS} {weights.path}: {error}")
    except ValueError:  # impossible sizes
        if not errors:
            raise
    errors = crew.gather(errors) or crew.differences(vars(args), fingerprints)
    if errors:
        fail(errors, show=accelerator.is_main_process)
    del weights
    model.to(device)
    normalize = Normalization(args.mean, args.std, device)
    statistics = dict(mean=args.mean, std=args.std, value_range=args.value_range)
    export = partial(export_segmenter, classes=classes, resize=args.resize, **statistics)

    # Optimizer
    steps = dict(total_steps=length.total_steps, warmup_steps=length.warmup_steps, linear=True)
    lr_at = partial(learning_rate_at, peak=args.learning_rate, minimum=args.min_learning_rate, **steps)
    decay = dict(bias_weight_decay=args.bias_weight_decay, norm_weight_decay=args.norm_weight_decay)
    groups = parameter_groups(model, args.weight_decay, layer_decay=args.layer_decay, **decay)
    optimizer = adamw(groups, betas=tuple(args.betas))
    if not args.eval_only:
        half = args.mixed_precision != "no"
        flops, activations = model.training_cost(half_precision=half)
        memory = needed_memory(model, activations, accelerator)
        if args.micro_batch_size == "auto":
            options = dict(held=saved.get("micro_batch_size"), pixels=pixels, accelerator=accelerator, crew=crew)
            batch_plan = find_micro_batch(args, model, batch_plan, memory, normalize, **options)
        accelerator.gradient_accumulation_steps = batch_plan.accumulation
        sources = train_source, validation_source, len(classes)
        accelerator.print(describe_plan(args, model, batch_plan, length, accelerator, memory, flops, *sources))

    # Prepare
    workers = args.num_workers or 1
    for source in {train_source, validation_source}:
        source.prepare(processes=workers, progress=accelerator.is_main_process)
    class_pixels, errors = check_annotations(train_source, validation_source, pixels, accelerator, crew, workers)
    if errors:
        fail(errors, show=accelerator.is_main_process)
    loss_weights = None if args.eval_only else class_weights(args.class_weights, class_pixels)
    loss_weights = None if loss_weights is None else loss_weights.to(device)
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model, optimizer, plain_model = prepare(accelerator, model, optimizer)

    # Resume
    logged = [({}, (-1.0, None))]
    if accelerator.is_main_process and not args.dry_run:
        if not args.eval_only:
            folder.clear_beyond(start_step)
        told = {"flags": vars(args), "classes": classes, "data": describe_data(train_source, validation_source)}
        note_start(folder.path, told, start_step, accelerator.num_processes, fresh=checkpoint is None)
        logged = [(truncate_log(folder.path, start_step), best_of(folder.path, "mean_iou"))]
    measured, best = broadcast_object_list(logged)[0]  # after `start_step` and until then, before the run stopped
    if checkpoint:
        if accelerator.num_processes > 2:  # which sum gradients up in another order before DDP has made a step
            empty_step(args, model, optimizer, batch_plan, normalize, pixels=pixels, accelerator=accelerator)
        load_training(checkpoint, accelerator, model, optimizer)
        accelerator.print(f"resuming from {checkpoint}, after step {start_step}")
    if not args.dry_run:
        names = dict(project=args.experiment_name, run_name=args.wandb_run_name)
        start_trackers(accelerator, folder.path, args.report_to, **names, flags=vars(args), start_step=start_step)
    accelerator.wait_for_everyone()

    # Loop
    processes = dict(process_index=accelerator.process_index, num_processes=accelerator.num_processes)
    options = dict(total_steps=length.total_steps, steps_per_epoch=length.steps_per_epoch, log_every=args.log_every)
    options |= dict(global_batch_size=batch_plan.global_size, start_step=start_step, seconds=saved.get("seconds", 0.0))
    progress = Progress(accelerator, folder.path, **options)
    num_images = len(train_source) + len(validation_source)
    damaged_images = DamagedImages(
        folder.path, num_images, is_main_process=accelerator.is_main_process, replace=args.on_damaged == "replace"
    )

    def note_damage(found):
        damaged_images.add(crew.gather(found))

    sizes = dict(resize=tuple(args.resize), crop_size=args.crop_size)
    options = dict(mode=args.evaluate, scales=args.evaluate_scales, patch_size=args.patch_size)
    sizes_of = partial(view_sizes, **options, **sizes)
    validation_data = EvaluationPairs(validation_source, pixels=pixels, sizes=sizes_of)
    window = dict(window=args.crop_size if args.evaluate == "slide" else None, stride=max(1, 2 * args.crop_size // 3))
    options = dict(batch_size=min(batch_plan.micro, 8), num_workers=args.num_workers, stop=crew.wanted)
    read = partial(own_batches, **options, **processes)
    options = dict(normalize=normalize, predict=partial(predict, flip=args.evaluate_flip, **window), read=read)
    options |= dict(accelerator=accelerator, crew=crew, note_damage=note_damage, num_previews=args.num_preview_images)
    measure = partial(evaluate, dataset=validation_data, classes=classes, **options)
    if args.eval_only:
        options = dict(folder=folder.path, num_images=len(validation_source))
        only_evaluate(measure, plain_model(), classes, progress, **options)
        finish_trackers(accelerator)
        accelerator.end_training()
        return
    fill = [value if args.value_range else round(255 * value) for value in args.mean]
    train_data = SegmentationDataset(train_source, pixels=pixels, seed=args.seed, fill=fill, **sizes)
    sampler = StepSampler(
        len(train_source),
        global_batch_size=batch_plan.global_size,
        micro_batch_size=batch_plan.micro,
        total_steps=2**40 if args.dry_run else length.total_steps,
        start_step=start_step,
        seed=args.seed,
        **processes,
    )
    batches = iter(make_loader(train_data, sampler, num_workers=args.num_workers, pin_memory=args.pin_memory))
    save_every = args.save_checkpoint_steps or math.ceil(args.save_checkpoint_interval * length.steps_per_epoch)
    repository = args.hub_model_id if accelerator.is_main_process else None
    push_every = args.hub_every * length.steps_per_epoch
    publisher = Publisher(folder.path, repository, every=push_every, private=args.hub_private)
    options = dict(weights=loss_weights, auxiliary_weight=args.auxiliary_weight, max_grad_norm=args.max_grad_norm)
    options |= dict(accelerator=accelerator, waiting=progress.waiting)

    def train(step):
        first = sampler.first_position
        positions = range(first, first + batch_plan.per_process, batch_plan.micro)
        seeds = [model_seed(args.seed, step, position) for position in positions]
        return optimizer_step(model, optimizer, batches, normalize, seeds, **options)

    model.train()
    if args.dry_run:
        read_ahead = math.ceil(2 * args.num_workers / batch_plan.accumulation)
        rehearse(train, crew, progress, read_ahead=read_ahead, left_out="evaluation and saving")
        accelerator.end_training()
        return
    new_damage = []

    def validate(step):
        """The metrics that are due after `step` steps, or None where the run is asked to stop meanwhile."""
        nonlocal best
        if step == start_step and "mean_iou" in measured:
            return measured
        if step < length.total_steps and not is_due(step, args.evaluate_every):
            return {}
        with progress.paused():
            found = measure(shown := plain_model())
            if found is None:
                return None
            values, previews = found
            if values["mean_iou"] > best[0]:
                best = values["mean_iou"], step
                if accelerator.is_main_process:
                    replace_folder(folder.path / "best", partial(export, shown))
            record(values, previews, classes, step, progress=progress, folder=folder.path)
        return values

    def save(step):
        with progress.paused(), crew.saving():
            note_damage(new_damage)
            new_damage.clear()
            progress.check_finite()
            state = dict(step=step, epoch=step / length.steps_per_epoch, global_batch_size=batch_plan.global_size)
            state |= dict(data=fingerprints[0], seconds=progress.seconds, micro_batch_size=batch_plan.micro)
            save_training(folder, accelerator, crew, model, optimizer, state, keep=args.keep_checkpoints)

    crew.begin()
    for step in range(start_step, length.total_steps + 1):  # optimizer steps that are completed
        metrics = validate(step)
        if metrics is None:
            save(step)
        if metrics is None or step == length.total_steps:
            break
        publisher.after(step)
        learning_rate = lr_at(step)
        set_learning_rate(optimizer, learning_rate)
        loss, grad_norm, damaged = train(step)
        new_damage += [(train_source.name(index), reason) for index, reason in damaged]
        logged = progress.step(step + 1, loss, grad_norm, learning_rate)
        stopping = crew.wanted(after_step=True)
        saving = stopping or step + 1 == length.total_steps or is_due(step + 1, save_every, publisher.every)
        if logged or (args.on_damaged == "error" and crew.any(bool(new_damage))):
            note_damage(new_damage)
            new_damage.clear()
        if saving:
            save(step + 1)
        if stopping:
            metrics, step = None, step + 1
            break

    # Finish
    if metrics is None:
        progress.say(crew.farewell(step, start_step=start_step))
        finish_trackers(accelerator)
        accelerator.end_training()
        return
    progress.close()
    shown = plain_model()
    if accelerator.is_main_process:
        replace_folder(folder.path / "model", partial(export, shown))
        values = {**metrics, "best_mean_iou": best[0], "best_step": best[1]}
        done = dict(step=step, epoch=step / length.steps_per_epoch, num_images=step * batch_plan.global_size)
        finish(folder.path, values, seconds=progress.seconds, **done)
    finish_trackers(accelerator)
    accelerator.end_training()
    publisher.finish(stop=lambda: bool(crew.signal_name))  # last of all: no other process waits for it


if __name__ == "__main__":
    launch.run_script(main)
