"""Fine-tunes a pre-trained encoder to classify images; also linear probes, partial fine-tuning, and from scratch.

    accelerate launch finetune_classifier.py @recipes/quickstart/finetune_classifier.args

prints its plan, then a bar with the loss and, once an epoch, the accuracy; writes work_dir/EXPERIMENT_NAME/ with
log.jsonl, checkpoints/, predictions/ (the confusion matrix, up to 50 classes), best/ and, at the end, metrics.json and
model/: folders which transformers and timm load. Kill it at any moment: the same command with
--resume_from_checkpoint auto continues it exactly.

What trains is decided by three flags: --path_to_pretrained_mae_weights (left out: everything, from scratch),
--linear_probe (the head alone) and --trainable_blocks. The defaults follow from it: the paper's recipe for ViT-B, but
that gradients are clipped and weights are not averaged. recipes/paper/ has those of ViT-L and ViT-H.
"""

import argparse
import contextlib
import copy
import math
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, broadcast_object_list

from data.batches import ClassificationBatch, ClassificationDataset, Normalization, make_loader, own_batches
from data.decode import PixelFormat
from data.index import DataError
from data.sampling import StepSampler, model_seed, seed_everything
from data.sources import describe_data, find_statistics, open_sources
from data.transforms import empty_images, rand_augment
from modeling.classifier import Classifier
from modeling.export import export_classifier
from modeling.files import WeightsError
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import classifier_kind, open_weights, start_from
from training import arguments, launch
from training.arguments import integer, number, one_of
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
from training.optimizer import adamw, lars, parameter_groups, set_learning_rate
from training.pictures import MOST_CLASSES, confusion_matrix
from training.plan import describe_run, needed_memory, plan_run, rehearse
from training.processes import Crew, start_accelerator
from training.progress import DamagedImages, Progress, best_of, truncate_log
from training.publish import Publisher, check_hub, check_token
from training.schedule import is_due, learning_rate_at
from training.sharding import prepare, resolve_sharding
from training.trackers import finish_trackers, start_trackers
from training.wording import in_bytes, several

# The defaults, for ViT-B (He et al. 2021, tables 9, 10 and 11), by what trains; partial fine-tuning has those of all.
RECIPES = {
    "fine-tuning": dict(
        **dict(epochs=100, warmup_epochs=5, base_learning_rate=5e-4, min_learning_rate=1e-6, layer_decay=0.65),
        **dict(optimizer="adamw", betas=[0.9, 0.999], weight_decay=0.05, pooling="mean", drop_path=0.1),
        **dict(random_aug_magnitude=9, random_erase=0.25, mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
    ),
    "linear probe": dict(
        **dict(epochs=90, warmup_epochs=10, base_learning_rate=0.1, min_learning_rate=0.0, layer_decay=1.0),
        **dict(optimizer="lars", betas=[0.9, 0.999], weight_decay=0.0, pooling="cls", drop_path=0.0),
        **dict(random_aug_magnitude=0, random_erase=0.0, mixup_alpha=0.0, cutmix_alpha=0.0, label_smoothing=0.0),
    ),
    "from scratch": dict(
        **dict(epochs=300, warmup_epochs=20, base_learning_rate=1e-4, min_learning_rate=0.0, layer_decay=1.0),
        **dict(optimizer="adamw", betas=[0.9, 0.95], weight_decay=0.3, pooling="mean", drop_path=0.1),
        **dict(random_aug_magnitude=9, random_erase=0.0, mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
    ),
}
WEIGHTS = "--path_to_pretrained_mae_weights"
LABELS = "a column `label` (.cls in shards)"


def parse_args(argv=None):
    """The flags, resolved as far as they can be without processes, weights and data, and what is wrong with them."""
    usual = RECIPES["fine-tuning"]
    parser = arguments.Parser(__doc__)
    arguments.add_run_flags(parser, name="finetune_classifier")
    arguments.add_length_flags(parser, epochs=usual["epochs"], warmup=usual["warmup_epochs"])
    arguments.add_batch_flags(parser)
    sizes = dict(base_learning_rate=usual["base_learning_rate"], weight_decay=usual["weight_decay"])
    arguments.add_optimizer_flags(parser, **sizes)
    flag = parser.add_argument_group("optimizer of a classifier").add_argument
    flag("--optimizer", type=one_of("adamw", "lars"), help="adamw or lars")
    flag("--betas", type=number(0, 0.99999), nargs=2, metavar=("B1", "B2"), help="of AdamW")
    flag("--layer_decay", type=number(0.01, 1), help="rate of a block / that of the block above")
    flag("--ema_decay", type=number(0, 0.9999999), default=0.0, help="average the weights; 0 = do not (default 0)")
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, interval=1)
    arguments.add_hub_flags(parser)
    arguments.add_image_flags(parser)
    arguments.add_crop_flags(parser, crop_scale=(0.08, 1.0))
    arguments.add_encoder_flags(parser, sizes=SIZES)

    flag = parser.add_argument_group("what trains").add_argument
    pair = partial(flag, action=argparse.BooleanOptionalAction, default=False)
    flag(
        WEIGHTS,
        metavar="PATH",
        help="a run of pretrain_mae.py, its encoder/, a .pth of the official MAE, or a folder or file of timm or "
        "transformers; its sizes, --img_size, --mean and --std become the defaults (left out: train from scratch)",
    )
    pair("--linear_probe", help="train the head alone, behind a BatchNorm, on frozen features")
    flag("--trainable_blocks", type=number(), metavar="N", help="train the last N blocks, norm and head; 0.5: one MLP")
    pair("--adapt_channels", help="sum or repeat the channels of the weights to fit --input_channels (off)")
    flag("--num_classes", type=integer(2), help="default: as many as the data have")
    flag("--pooling", type=one_of("mean", "cls"), help="what the head sees: mean of the patches, or cls token")
    pair("--eval_only", help=f"only measure the classifier that {WEIGHTS} leads to; training's flags are not used")

    flag = parser.add_argument_group("augmentation").add_argument
    flag("--random_aug_magnitude", type=integer(0, 10), help="of RandAugment; 0 = none")
    flag("--random_erase", type=number(0, 1), help="probability of erasing a part of an image")
    flag("--mixup_alpha", type=number(), help="of mixup's Beta distribution; 0 = none")
    flag("--cutmix_alpha", type=number(), help="of cutmix's; 0 = none")
    flag("--mixup_probability", type=number(0, 1), default=1.0, help="that a micro-batch is mixed (default 1)")
    flag("--mixup_switch", type=number(0, 1), default=0.5, help="that it is by cutmix, where both are on (default 0.5)")
    flag("--label_smoothing", type=number(0, 0.99), help="share of a label that goes to all classes")

    flag = parser.add_argument_group("validation").add_argument
    flag("--validate_every", type=integer(0), default=1, help="epochs between validations, 0 = at the end only")
    parser.set_defaults(**dict.fromkeys(usual))
    parser.tell_defaults(RECIPES)
    args, errors = parser.read(argv)

    for name, value in RECIPES[kind_of_run(args)].items():
        if getattr(args, name) is None and name != "warmup_epochs":  # which plan_run shortens where it is left out
            if name == "min_learning_rate" and args.learning_rate is not None:
                value = min(value, args.learning_rate)
            setattr(args, name, value)
    hub = dict(repository=args.hub_model_id, every=args.hub_every, private=args.hub_private)
    return args, errors + check_flags(args) + check_hub(args.push_to_hub, **hub)


def kind_of_run(args):
    """The entry of RECIPES that the flags ask for."""
    if args.linear_probe:
        return "linear probe"
    return "fine-tuning" if args.path_to_pretrained_mae_weights else "from scratch"


def check_flags(args):
    """What contradicts itself in the flags of a classifier, a line each."""
    errors = []
    recipe = RECIPES[kind_of_run(args)]
    if args.optimizer != recipe["optimizer"] and args.learning_rate is None:
        errors.append(
            f"--optimizer {args.optimizer} has no usual learning rate for this; give --learning_rate, or leave it at "
            f"{recipe['optimizer']}"
        )
    if args.linear_probe:
        contrary = {"mixup_alpha": 0, "cutmix_alpha": 0, "drop_path": 0, "layer_decay": 1, "trainable_blocks": None}
        given = [f"--{name} {getattr(args, name):g}" for name in contrary if getattr(args, name) != contrary[name]]
        if given:
            errors.append(
                f"--linear_probe trains a linear layer on frozen features, to which {', '.join(given)} does not apply; "
                "leave that out"
            )
    if args.path_to_pretrained_mae_weights == "":
        errors.append(f"{WEIGHTS} is empty; give a path, or leave the flag out to train from scratch")
    if not args.path_to_pretrained_mae_weights:
        for name in ("linear_probe", "trainable_blocks", "adapt_channels", "eval_only"):
            if getattr(args, name) not in (None, False):
                errors.append(f"--{name} needs trained weights; give {WEIGHTS}")
    if args.trainable_blocks is not None and args.trainable_blocks % 1 and args.trainable_blocks != 0.5:
        errors.append(f"--trainable_blocks {args.trainable_blocks:g} is not 0.5 nor whole; give one of these")
    if args.eval_only:
        for name, without, why in (
            ("resume_from_checkpoint", None, f"give the checkpoint's folder as {WEIGHTS}, and an --experiment_name"),
            ("linear_probe", False, "the weights tell what they are"),
            ("dry_run", False, "nothing trains"),
            ("push_to_hub", False, "nothing trains"),
        ):
            if getattr(args, name) != without:
                errors.append(f"--{name} does not go with --eval_only: {why}; leave it out")
    return errors


def check_micro_batch(args, size):
    """What a micro-batch of `size` images is too small or odd for, a line each."""
    errors = []
    if (args.mixup_alpha or args.cutmix_alpha) and size % 2:
        errors.append(
            f"--mixup_alpha and --cutmix_alpha mix pairs of images, and the micro-batch of {size} is odd; give an even "
            "one, or 0 for both"
        )
    if args.linear_probe and size < 2:
        errors.append(
            f"--linear_probe has a BatchNorm, for which a micro-batch of {size} image is too small; give at least 2"
        )
    return errors


def resolve_model(args, weights):
    """Resolves the flags of images and encoder, from `weights` where they were left out; what is wrong with them."""
    size, (statistics, errors) = SIZES[args.model or "base"], find_statistics(args.path_to_data)
    if weights:
        path, stored, kind = weights.path, weights.stored, classifier_kind(weights.state)
        if args.model is None:
            size = dict(weights.sizes)
            if size["num_heads"] is None and args.encoder_num_heads is None:
                errors.append(f"{WEIGHTS} {path} does not tell its number of heads; give --encoder_num_heads")
                size["num_heads"] = 1
        if args.img_size is None and weights.grid:
            patch_size = args.patch_size or weights.sizes["patch_size"]
            args.img_size = [side * patch_size for side in weights.grid]
        if args.eval_only:
            if kind is None:
                errors.append(f"--eval_only {path} holds no classifier's head; give a model/, best/ or checkpoint")
            elif stored.pooling not in (None, kind[1]):
                errors.append(
                    f"--eval_only {path} has {stored.pooling} pooling without a norm behind it, which is not known "
                    "here; give a classifier with fc_norm, or one on the cls token"
                )
            else:
                errors += check_num_classes(args.num_classes, kind[0], "the classifier")
                args.num_classes, args.pooling, args.linear_probe = kind
    statistics = None if args.eval_only else statistics  # a model is measured as it was trained
    errors += arguments.check_images(args, statistics, weights, adapt=args.adapt_channels) + arguments.check_crops(args)
    errors += arguments.check_encoder(args, size)
    if args.random_aug_magnitude and (args.value_range or args.input_channels not in (1, 3)):
        if args.random_aug_magnitude != RECIPES[kind_of_run(args)]["random_aug_magnitude"]:
            errors.append(
                f"--random_aug_magnitude {args.random_aug_magnitude} is for 8-bit images in colour or grey; give 0"
            )
        args.random_aug_magnitude = 0
    if args.trainable_blocks is not None and args.trainable_blocks > args.encoder_depth:
        errors.append(
            f"--trainable_blocks {args.trainable_blocks:g} is more than the encoder has; expected at most "
            f"{args.encoder_depth}"
        )
        args.trainable_blocks = None  # so that the rest is checked
    return errors


def check_num_classes(given, there, where):
    """What is wrong with --num_classes, in a list."""
    if given in (None, there):
        return []
    return [f"--num_classes {given} does not fit {where}, which has {there}; leave it out, or give {there}"]


def check_classes(path_to_data, train_source, validation_source):
    """What keeps the data from being classified, a line each."""
    if validation_source is None:
        return [
            f"--path_to_data {path_to_data} holds no images back to measure by; put some into val/ beside train/, or "
            "give --path_to_validation_data"
        ]
    for source, part in ((train_source, "train"), (validation_source, "val")):
        if not source.classes:
            return [
                f"--path_to_data {path_to_data} has images without a class; expected {part}/CLASS/IMAGE, or {LABELS}"
            ]
    if len(train_source.classes) < 2:
        return [
            f"--path_to_data {path_to_data} has one class, {train_source.classes[0]}; expected at least two folders"
        ]
    errors = []
    for one, other, part, there in (
        (train_source, validation_source, "train", "val"),
        (validation_source, train_source, "val", "train"),
    ):
        lacking = sorted({*one.classes} - {*other.classes})
        if lacking:
            errors.append(
                f"--path_to_data {path_to_data} has classes in {part} that {there} lacks ({some_of(lacking)}); give "
                "both the same classes"
            )
    return errors


def some_of(names):
    """A list of names that may be long, in words."""
    return f"{', '.join(names[:3])}, and {len(names) - 3} more" if len(names) > 4 else ", ".join(names)


def match_classes(path_to_data, source, names, num_classes):
    """The numbers that a trained classifier's labels `names` (None where it has none) give to the classes of `source`,
    and what is wrong with them."""
    found = source.classes
    if not found:
        return [], [f"--path_to_data {path_to_data} has images without a class; expected val/CLASS/IMAGE, or {LABELS}"]
    if names is None:
        if len(found) == num_classes:
            return list(range(num_classes)), []
        return [], [
            f"--path_to_data {path_to_data} has {len(found)} classes, the classifier {num_classes} without names; give "
            "data with those classes"
        ]
    strange = sorted({*found} - {*names})
    if strange:
        return [], [
            f"--path_to_data {path_to_data} has classes that the classifier does not know ({some_of(strange)}); it "
            f"knows {some_of(names)}; name the class folders so"
        ]
    return [names.index(name) for name in found], []


def open_data(args, pixels, names):
    """The training and validation images, the classes' names, the numbers that these give to the classes of the
    validation images, and what is wrong with all that. Resolves --num_classes.

    `names` are those of the classifier that is only evaluated, on validation images or all that there are.
    """
    try:
        if not args.path_to_data:
            return None, None, [], [], []  # which is an error already
        places = dict(validation=args.path_to_validation_data, cache=args.cache_dir)
        train_source, validation_source = open_sources(args.path_to_data, pixels, **places)
    except DataError as error:
        return None, None, [], [], str(error).splitlines()
    if args.eval_only:
        source = validation_source or train_source
        if not args.num_classes:
            return source, source, [], [], []  # the weights are wrong already
        numbers, errors = match_classes(args.path_to_data, source, names, args.num_classes)
        return source, source, names or source.classes, numbers, errors
    classes = train_source.classes
    errors = check_classes(args.path_to_data, train_source, validation_source)
    errors = errors or check_num_classes(args.num_classes, len(classes), f"--path_to_data {args.path_to_data}")
    args.num_classes = len(classes)
    numbers = [] if errors else [classes.index(name) for name in validation_source.classes]
    return train_source, validation_source, classes, numbers, errors


def build_model(args):
    """The classifier that the flags describe, with what trains marked."""
    encoder = VisionTransformer(
        img_size=tuple(args.img_size),
        patch_size=args.patch_size,
        in_channels=args.input_channels,
        embed_dim=args.encoder_embed_dim,
        depth=args.encoder_depth,
        num_heads=args.encoder_num_heads,
        mlp_ratio=args.encoder_mlp_ratio,
        drop_path=args.drop_path,
        custom_weight_init=args.custom_weight_init,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    options = dict(pooling=args.pooling, linear_probe=args.linear_probe, custom_weight_init=args.custom_weight_init)
    model = Classifier(encoder, args.num_classes, **options)
    if args.trainable_blocks is not None:
        model.train_last_blocks(args.trainable_blocks)
    return model


def describe_plan(args, model, batch, length, accelerator, memory, train_source, validation_source):
    """The resolved plan, printed before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = "AdamW" if args.optimizer == "adamw" else "LARS"
    kind = kind_of_run(args)
    if args.trainable_blocks is not None:
        kind = f"the last {args.trainable_blocks:g} blocks, norm and head"
    average = f", weights averaged by {args.ema_decay:g}" if args.ema_decay else ""
    return "\n".join(
        [
            f"data       {args.path_to_data}: {len(train_source)} images of {args.num_classes} classes (about "
            f"{in_bytes(train_source.size_in_bytes())}), {len(validation_source)} held out",
            f"model      {args.encoder_embed_dim} x {args.encoder_depth} encoder, head on the "
            f"{'mean of the patches' if args.pooling == 'mean' else 'cls token'}: {parameters / 1e6:.3g} M parameters "
            f"({trained / 1e6:.3g} M train), {model.training_flops() / 1e9:.3g} GFLOP per image and step",
            f"recipe     {kind}: {optimizer}, weight decay {args.weight_decay:g}, layer decay {args.layer_decay:g}, "
            f"drop path {args.drop_path:g}{average}",
            f"images     {args.img_size[0]} x {args.img_size[1]}, {several(args.input_channels, 'channel')}, "
            f"{math.prod(model.encoder.grid)} patches of {args.patch_size}; RandAugment {args.random_aug_magnitude}, "
            f"erasing {args.random_erase:g}, mixup {args.mixup_alpha:g}, cutmix {args.cutmix_alpha:g}, smoothing "
            f"{args.label_smoothing:g}",
            *describe_run(args, batch, length, accelerator, memory, optimizer=optimizer),
        ]
    )


def average_of(model, decay):
    """The exponential moving average of a model's weights, with its latest statistics, to be updated every step."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, exclude_buffers=True)


def make_optimizer(args, model):
    """AdamW or LARS over what trains."""
    decay = dict(bias_weight_decay=args.bias_weight_decay, norm_weight_decay=args.norm_weight_decay)
    groups = parameter_groups(model, args.weight_decay, layer_decay=args.layer_decay, **decay)
    return adamw(groups, betas=tuple(args.betas)) if args.optimizer == "adamw" else lars(groups)


def make_mixing(args, device):
    """What is done to a normalised micro-batch on its device: erasing (images -> images), and mixing (images, labels ->
    images, soft labels), which is None where nothing is mixed."""
    from timm.data.mixup import Mixup
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(args.random_erase, mode="pixel", device=device) if args.random_erase else lambda x: x
    if not (args.mixup_alpha or args.cutmix_alpha):
        return erase, None
    return erase, Mixup(
        mixup_alpha=args.mixup_alpha,
        cutmix_alpha=args.cutmix_alpha,
        prob=args.mixup_probability,
        switch_prob=args.mixup_switch,
        label_smoothing=args.label_smoothing,
        num_classes=args.num_classes,
    )


def optimizer_step(
    model, optimizer, batches, normalize, seeds, *, erase, mix, label_smoothing, accelerator, waiting, max_grad_norm
):
    """One optimizer step over as many micro-batches as there are `seeds`: its loss and gradient norm, which stay on the
    device, and (index, reason) of damaged images."""
    loss, damaged = 0.0, []
    for seed in seeds:
        with waiting():
            batch = next(batches)
        with accelerator.accumulate(model):
            seed_everything(seed)
            images = erase(normalize(batch.images.to(accelerator.device, non_blocking=True)))
            labels = batch.labels.to(accelerator.device, non_blocking=True)
            if mix:
                images, labels = mix(images, labels)
            with accelerator.autocast():
                logits = model(images)
            micro_loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.0 if mix else label_smoothing)
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
    images = empty_images(plan.micro, pixels.channels, args.img_size, pixels.dtype).zero_()
    batches = repeat(ClassificationBatch(images, torch.zeros(plan.micro, dtype=torch.int64), [], []))
    erase, mix = make_mixing(args, accelerator.device)
    options = dict(erase=erase, mix=mix, label_smoothing=args.label_smoothing, max_grad_norm=args.max_grad_norm)
    options |= dict(accelerator=accelerator, waiting=contextlib.nullcontext)
    optimizer_step(model, optimizer, batches, normalize, [0] * plan.accumulation, **options)


def find_micro_batch(args, model, plan, memory, normalize, *, pixels, accelerator, **options):
    """`plan` in the largest micro-batches that fit into memory; `options` are those of `fit_micro_batch`."""

    def try_step(size):
        copied, one = copy.deepcopy(model), plan._replace(per_process=size, micro=size)
        optimizer = make_optimizer(args, copied)
        empty_step(args, copied, optimizer, one, normalize, pixels=pixels, accelerator=accelerator)

    options |= dict(allowed=lambda size: not check_micro_batch(args, size), accelerator=accelerator)
    plan = fit_micro_batch(plan, memory, try_step, **options)
    args.micro_batch_size, args.gradient_accumulation_steps = plan.micro, plan.accumulation
    return plan


@torch.no_grad()
def evaluate(model, dataset, classes, normalize, *, read, accelerator, crew, note_damage):
    """The scores over all images of `dataset`, each once, damaged ones left out: those of metrics.json, and how often
    each class (row) was taken for which (column).

    Returns None where the run is asked to stop meanwhile; resumed, it validates this step again. Raises RunError where
    no image can be read.
    """
    training = model.training
    model.eval()
    for buffer in model.buffers():  # BatchNorm's statistics are those of the main process, as in a checkpoint
        broadcast(buffer)
    rows, damage = [], []
    for batch in read(dataset, range(len(dataset))):
        with accelerator.autocast():
            logits = model.forward(normalize(batch.images.to(accelerator.device))).float()  # not compiled: sizes vary
        losses = F.cross_entropy(logits, batch.labels.to(logits.device), reduction="none")
        ranking = logits.topk(min(5, len(classes))).indices
        damaged = {index for index, _ in batch.damaged}
        healthy = [row for row, index in enumerate(batch.indices) if index not in damaged]
        rows += [
            (batch.indices[row], label, ranked, loss)
            for row, label, ranked, loss in zip(
                healthy,
                batch.labels[healthy].tolist(),
                ranking[healthy].tolist(),
                losses[healthy].tolist(),
                strict=True,
            )
        ]
        damage += [(dataset.source.name(index), reason) for index, reason in batch.damaged]
    model.train(training)
    if crew.wanted():
        return None
    note_damage(damage)
    rows, results = sorted(crew.gather(rows)), []
    if not rows:
        raise RunError(f"none of the {len(dataset)} held-out images can be read; damaged.jsonl says why: repair them")
    if accelerator.is_main_process:
        from training.scores import ClassificationScores  # importing evaluate takes seconds

        _, labels, rankings, losses = zip(*rows, strict=True)
        scores = ClassificationScores()
        scores.add_batch(predictions=rankings, references=labels, losses=losses)
        confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(confusion, (labels, [ranking[0] for ranking in rankings]), 1)
        results = [(scores.compute(classes=classes), confusion)]
    return crew.gather(results)[0]


def advise(top1, confusion, args):
    """What to check first where the first accuracy, in percent, is what guessing gives, or less; otherwise None."""
    counts = confusion.sum(axis=1)
    chance = counts.max() / counts.sum()
    if top1 > 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / counts.sum())):
        return None
    checks = ["that a class holds the same things in train/ and val/", "that the warmup of the learning rate is over"]
    if args.path_to_pretrained_mae_weights:
        mean, std = (" ".join(f"{x:g}" for x in values) for values in (args.mean, args.std))
        checks.insert(0, f"that the line of {WEIGHTS} above tells of many loaded parameters")
        checks.append(f"that --mean {mean} --std {std} are those of the pre-training")
    if args.ema_decay:
        checks.append(f"that the average of --ema_decay {args.ema_decay:g} has left the initial weights")
    told = f"top-1 {top1:.2f} % is no better than always naming the commonest class ({100 * chance:.2f} %)"
    return f"{told}; check first {'; '.join(checks)}"


def record(values, confusion, classes, step, *, progress, folder, advice=None):
    """Logs the scores after `step` steps, and draws the confusion matrix where it can be read."""
    epoch = step / progress.steps_per_epoch
    progress.say(
        f"epoch {epoch:.4g}: top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} %, validation loss "
        f"{values['val_loss']:.4f}"
    )
    if advice:
        progress.say(advice)
    if len(classes) <= MOST_CLASSES and progress.accelerator.is_main_process:
        path = folder / "predictions" / f"step_{step:08d}.png"
        title = f"step {step}, epoch {epoch:.4g}: top-1 {values['top1']:.2f} %"
        confusion_matrix(path, confusion, classes, title=title)
        progress.picture(path, "confusion", step)
    # Last: what the log has is not measured again by a resumed run
    progress.write({"step": step, "epoch": epoch, **values, **({"advice": advice} if advice else {})})


def finish(folder, values, *, step, epoch, seconds, num_images):
    """Writes metrics.json and says where everything is."""
    rate = round(num_images / seconds, 2)
    run = {"step": step, "epoch": epoch, "seconds": round(seconds, 1), "images_per_second": rate}
    write_json(folder / "metrics.json", {**run, **values})
    print(f"finished: top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} %; {folder / 'metrics.json'}")


def only_evaluate(measure, model, classes, progress, *, folder, num_images):
    """Measures a classifier that is trained: its scores are the whole run."""
    found = measure(model)
    progress.close()
    if found is None:
        progress.say("stopped by a signal; nothing was measured")
        return
    values, confusion = found
    record(values, confusion, classes, 0, progress=progress, folder=folder)
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
    errors += found if checkpoint else found + check_place(WEIGHTS, args.path_to_pretrained_mae_weights, folder.path)
    errors += check_token() if args.push_to_hub else []
    start_step = saved.get("step", 0)

    # Weights, and the sizes that they tell
    weights = None
    try:
        if checkpoint or args.path_to_pretrained_mae_weights:
            weights = open_weights(checkpoint or args.path_to_pretrained_mae_weights)
    except WeightsError as error:
        errors.append(f"{WEIGHTS} {error}")
    errors += resolve_model(args, weights)

    # Data, and the plan that follows from its size
    pixels = PixelFormat(args.input_channels, args.value_range, args.nodata, args.max_pixels)
    train_source, validation_source, classes, numbers, found = open_data(
        args, pixels, weights.stored.classes if weights else None
    )
    errors += found
    fingerprints = [source.fingerprint() if source else None for source in (train_source, validation_source)]
    batch_plan, length, found = plan_run(
        args,
        num_samples=len(train_source) if train_source else None,
        num_processes=accelerator.num_processes,
        held=saved.get("global_batch_size"),
        default_warmup_epochs=RECIPES[kind_of_run(args)]["warmup_epochs"],
    )
    errors += [] if args.eval_only else found + check_micro_batch(args, batch_plan.micro)
    if checkpoint:
        errors += compare_with_run(checkpoint, vars(args), fingerprints[0], defaults=vars(parse_args([])[0]))

    # Model
    torch.manual_seed(args.seed)
    try:
        args.num_classes = args.num_classes or 2  # of data or weights that could not be read
        model = build_model(args)
        if weights and not checkpoint and not (args.eval_only and classifier_kind(weights.state) is None):
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
    ema = average_of(model, args.ema_decay) if args.ema_decay else None
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)
    normalize = Normalization(args.mean, args.std, device)
    img_size = tuple(args.img_size)
    statistics = dict(mean=args.mean, std=args.std, value_range=args.value_range)
    crop_ratio = 0.875 if max(img_size) <= 224 else 1.0
    export = partial(export_classifier, classes=classes, crop_ratio=crop_ratio, **statistics)

    # Optimizer
    steps = dict(total_steps=length.total_steps, warmup_steps=length.warmup_steps)
    lr_at = partial(learning_rate_at, peak=args.learning_rate, minimum=args.min_learning_rate, **steps)
    optimizer = make_optimizer(args, model)
    if not args.eval_only:
        half, options = args.mixed_precision != "no", dict(optimizer=args.optimizer, averaged=bool(args.ema_decay))
        activations = model.activation_bytes(half_precision=half)
        memory = needed_memory(model, activations, accelerator, **options)
        if args.micro_batch_size == "auto":
            options = dict(held=saved.get("micro_batch_size"), pixels=pixels, accelerator=accelerator, crew=crew)
            batch_plan = find_micro_batch(args, model, batch_plan, memory, normalize, **options)
        accelerator.gradient_accumulation_steps = batch_plan.accumulation
        sources = train_source, validation_source
        accelerator.print(describe_plan(args, model, batch_plan, length, accelerator, memory, *sources))

    # Prepare
    model, optimizer, plain_model = prepare(accelerator, model, optimizer)
    for source in {train_source, validation_source}:
        source.prepare(processes=args.num_workers or 1, progress=accelerator.is_main_process)

    # Resume
    logged = [({}, (-1.0, None))]
    if accelerator.is_main_process and not args.dry_run:
        if not args.eval_only:
            folder.clear_beyond(start_step)
        told = {"flags": vars(args), "classes": classes, "data": describe_data(train_source, validation_source)}
        note_start(folder.path, told, start_step, accelerator.num_processes, fresh=checkpoint is None)
        logged = [(truncate_log(folder.path, start_step), best_of(folder.path, "top1"))]
    measured, best = broadcast_object_list(logged)[0]  # after `start_step` and until then, before the run stopped
    if checkpoint:
        if accelerator.num_processes > 2:  # which sum gradients up in another order before DDP has made a step
            empty_step(args, model, optimizer, batch_plan, normalize, pixels=pixels, accelerator=accelerator)
        load_training(checkpoint, accelerator, model, optimizer, ema=ema.module if ema else None)
        accelerator.print(f"resuming from {checkpoint}, after step {start_step}")
    if not args.dry_run:
        names = dict(project=args.experiment_name, run_name=args.wandb_run_name)
        start_trackers(accelerator, folder.path, args.report_to, **names, flags=vars(args), start_step=start_step)
    accelerator.wait_for_everyone()

    # Loop
    shared = dict(img_size=img_size, pixels=pixels, seed=args.seed)
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

    labels = np.array(numbers)[validation_source.labels]
    validation_data = ClassificationDataset(validation_source, labels, train=False, crop_ratio=crop_ratio, **shared)
    options = dict(batch_size=min(batch_plan.micro, 256), num_workers=args.num_workers, stop=crew.wanted)
    read = partial(own_batches, **options, **processes)
    options = dict(normalize=normalize, read=read, accelerator=accelerator, crew=crew, note_damage=note_damage)
    measure = partial(evaluate, dataset=validation_data, classes=classes, **options)
    if args.eval_only:
        options = dict(folder=folder.path, num_images=len(validation_source))
        only_evaluate(measure, plain_model(), classes, progress, **options)
        finish_trackers(accelerator)
        accelerator.end_training()
        return
    augment = rand_augment(args.random_aug_magnitude, img_size, args.mean) if args.random_aug_magnitude else None
    crops = dict(crop_scale=tuple(args.crop_scale), augment=augment, fast=args.fast_decoding)
    train_data = ClassificationDataset(train_source, train_source.labels, train=True, **crops, **shared)
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
    erase, mix = make_mixing(args, device)
    options = dict(erase=erase, mix=mix, label_smoothing=args.label_smoothing, max_grad_norm=args.max_grad_norm)
    options |= dict(accelerator=accelerator, waiting=progress.waiting)

    def train(step):
        first = sampler.first_position
        positions = range(first, first + batch_plan.per_process, batch_plan.micro)
        seeds = [model_seed(args.seed, step, position) for position in positions]
        result = optimizer_step(model, optimizer, batches, normalize, seeds, **options)
        if ema:
            ema.update(plain_model())
        return result

    model.train()
    if args.dry_run:
        read_ahead = math.ceil(2 * args.num_workers / batch_plan.accumulation)
        rehearse(train, crew, progress, read_ahead=read_ahead, left_out="validation and saving")
        accelerator.end_training()
        return
    new_damage = []

    def validate(step):
        """The metrics that are due after `step` steps, or None where the run is asked to stop meanwhile."""
        nonlocal best
        last = step == length.total_steps
        if step == start_step and "top1" in measured:
            return measured
        if not last and not is_due(step, args.validate_every * length.steps_per_epoch):
            return {}
        with progress.paused():
            shown = ema.module if ema else plain_model()
            found = measure(shown)
            if found is None:
                return None
            values, confusion = found
            advice = advise(values["top1"], confusion, args) if best[1] is None else None
            if values["top1"] > best[0]:
                best = values["top1"], step
                if accelerator.is_main_process:
                    replace_folder(folder.path / "best", partial(export, shown))
            record(values, confusion, classes, step, progress=progress, folder=folder.path, advice=advice)
        return values

    def save(step):
        with progress.paused(), crew.saving():
            note_damage(new_damage)
            new_damage.clear()
            progress.check_finite()
            state = dict(step=step, epoch=step / length.steps_per_epoch, global_batch_size=batch_plan.global_size)
            state |= dict(data=fingerprints[0], seconds=progress.seconds, micro_batch_size=batch_plan.micro)
            options = dict(keep=args.keep_checkpoints, ema=ema.module if ema else None)
            save_training(folder, accelerator, crew, model, optimizer, state, **options)

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
    shown = ema.module if ema else plain_model()
    if accelerator.is_main_process:
        replace_folder(folder.path / "model", partial(export, shown))
        values = {**metrics, "best_top1": best[0], "best_step": best[1]}
        done = dict(step=step, epoch=step / length.steps_per_epoch, num_images=step * batch_plan.global_size)
        finish(folder.path, values, seconds=progress.seconds, **done)
    finish_trackers(accelerator)
    accelerator.end_training()
    publisher.finish(stop=lambda: bool(crew.signal_name))  # last of all: no other process waits for it


if __name__ == "__main__":
    launch.run_script(main)
