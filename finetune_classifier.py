"""Fine-tune a pre-trained encoder to classify images; also linear probes, partial fine-tuning, and from scratch.

    accelerate launch finetune_classifier.py @recipes/quickstart/finetune_classifier.args

prints the plan, then a bar with the loss and, once an epoch, the accuracy, and writes work_dir/EXPERIMENT_NAME/:
log.jsonl, checkpoints/, predictions/ (the confusion matrix, up to 50 classes), best/ and, at the end, metrics.json and
model/: folders which transformers and timm load. Kill it at any moment: the same command with
--resume_from_checkpoint auto continues it exactly.

Without --path_to_pretrained_mae_weights, everything trains from scratch. With them everything is fine-tuned, or only
what --linear_probe, --attentive_probe or --trainable_blocks say. The defaults follow from this and from the encoder's
size: the published recipe for ViT-B, ViT-L or ViT-H, except that weights are not averaged and gradients of other than
probes are clipped. The plan names the recipe.
"""

import math
from functools import partial
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast

from data.augment import RandAugment
from data.batches import ClassificationBatch, ClassificationDataset, Normalization, own_batches, training_batches
from data.decode import PixelFormat
from data.index import DataError
from data.sampling import StepSampler, seed_everything
from data.sources import check_classes, check_num_classes, describe_data, labels_in, match_classes, open_sources
from data.statistics import read_statistics
from data.transforms import CentreCrop, RandomCrop, build_mixing, empty_images, evaluation_crop_ratio
from modeling.classifier import Classifier
from modeling.export import export_classifier
from modeling.files import Stored, WeightsError
from modeling.trained import open_trained
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import open_weights, start_from
from training import arguments
from training.arguments import Pair, integer, number
from training.checkpoint import check_outside
from training.files import replace_folder
from training.launch import InputError, RunError, put_back, run_script
from training.optimizer import (
    DECAY_FLAGS,
    adamw,
    build_average,
    clip_gradients,
    lars,
    parameter_groups,
    set_learning_rate,
)
from training.pictures import confusion_matrix
from training.recipes import LARGER, RECIPES, choose_kind, choose_recipe
from training.resolve import (
    ImageFormat,
    check_blocks,
    check_classifier_batch,
    check_trained,
    encoder_flags,
    resolve_augmentation,
    resolve_encoder,
    resolve_images,
    resolve_inputs,
    resolve_queries,
)
from training.run import Run
from training.schedule import learning_rate_at
from training.scores import score_classification
from training.wording import several

WEIGHTS = "--path_to_pretrained_mae_weights"


def parse_args(argv=None):
    """Return the flags, and error messages for those that contradict each other."""
    usual = RECIPES["fine-tuning"]
    parser = arguments.Parser(__doc__)
    arguments.add_run_flags(parser, name="finetune_classifier")
    arguments.add_source_flags(parser, has_labels=True)
    arguments.add_length_flags(parser, epochs=usual["epochs"], warmup=usual["warmup_epochs"])
    arguments.add_batch_flags(parser)
    arguments.add_optimizer_flags(parser, base_learning_rate=5e-4, weight_decay=0.05)  # see RECIPES
    arguments.add_finetuning_flags(parser, weights=WEIGHTS, betas=None, layer_decay=None)
    flag = parser.add_argument_group("optimizer of a classifier").add_argument
    flag("--optimizer", choices=("adamw", "lars"), help="AdamW or LARS")
    flag("--ema_decay", type=number(0, 0.9999999), default=0.0, help="decay of averaged weights (0: off, default 0)")
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, interval=1)
    arguments.add_hub_flags(parser)
    arguments.add_image_flags(parser)
    arguments.add_crop_flags(parser, crop_scale=(0.08, 1.0))
    arguments.add_encoder_flags(parser, sizes=SIZES)

    flag = parser.add_argument_group("what trains (default: everything)").add_argument
    flag("--linear_probe", action=Pair, default=False, help="the head alone, on frozen features")
    flag("--attentive_probe", action=Pair, default=False, help="attentive pooling and the head, on frozen features")
    flag("--trainable_blocks", type=number(), metavar="N", help="the last N blocks (0.5: one MLP) and the head")
    flag = parser.add_argument_group("head").add_argument
    flag("--num_queries", type=integer(1), metavar="Q", help="queries of attentive pooling (default at most 32)")
    flag("--num_classes", type=integer(2), help="number of classes (default: that of the data)")
    flag("--pooling", choices=("mean", "cls"), help="input of the head: mean of the patch tokens, or cls token")
    arguments.add_augmentation_flags(parser)
    flag = parser.add_argument_group("validation").add_argument
    flag("--validate_every", type=integer(0), default=1, help="epochs between validations (0: at the end only)")
    parser.set_defaults(**dict.fromkeys(usual))
    parser.describe_defaults({**RECIPES, **LARGER})
    args, errors = parser.read(argv)
    errors += arguments.check_run(args) + arguments.check_crops(args) + arguments.check_finetuning(args, WEIGHTS)
    probes = dict(linear_probe=args.linear_probe, attentive_probe=args.attentive_probe)
    kind = choose_kind(args.path_to_pretrained_mae_weights, **probes)
    return args, errors + arguments.check_classifier(args, usual_optimizer=RECIPES[kind]["optimizer"])


def build_model(encoder, num_classes, *, drop_path, custom_weight_init, **head):
    """Build the classifier from the arguments of VisionTransformer and Classifier."""
    encoder = VisionTransformer(**encoder, custom_weight_init=custom_weight_init).add_extras(drop_path=drop_path)
    return Classifier(encoder, num_classes, custom_weight_init=custom_weight_init, **head)


def build_optimizer(model, name, betas, **decay):
    """Build AdamW or LARS over the parameters that train; `decay` are options of `parameter_groups`."""
    groups = parameter_groups(model, **decay)
    return {"adamw": partial(adamw, betas=tuple(betas)), "lars": lars}[name](groups)


def optimizer_step(accelerator, model, optimizer, batches, normalize, *, mixing, label_smoothing, max_grad_norm):
    """Take one optimizer step, accumulating gradients over the micro-batches.

    Args:
        batches: an iterator over (seed of the model's randomness, ClassificationBatch).
        max_grad_norm: the norm that gradients are clipped to; 0 for none.

    Returns:
        Loss () and gradient norm (), both left on the device, and [(index, reason)] of damaged images.
    """
    loss, damaged, (erase, mix) = 0.0, [], mixing  # mix: None without mixup and CutMix, see build_mixing
    for _ in range(accelerator.gradient_accumulation_steps):
        seed, batch = next(batches)
        with accelerator.accumulate(model):
            seed_everything(seed)
            images = erase(normalize(batch.images.to(accelerator.device, non_blocking=True)))  # (B, C, H, W)
            labels = batch.labels.to(accelerator.device, non_blocking=True)  # (B,)
            if mix:
                images, labels = mix(images, labels)  # labels (B, num_classes)
            with accelerator.autocast():
                logits = model(images)  # (B, num_classes)
            micro_loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.0 if mix else label_smoothing)
            accelerator.backward(micro_loss)
            loss += micro_loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, model, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        damaged += batch.damaged
    return loss, grad_norm, damaged


def empty_step(accelerator, model, optimizer, size, *, normalize, mixing, pixels):
    """Take one optimizer step on black images: to measure memory, or to warm up DDP before a checkpoint is loaded."""
    img_size = accelerator.unwrap_model(model).encoder.img_size
    images = empty_images(size, pixels.channels, img_size, pixels.dtype).zero_()
    batch = ClassificationBatch(images, torch.zeros(size, dtype=torch.int64), [], [])
    options = dict(mixing=mixing, label_smoothing=0.0, max_grad_norm=1.0)
    optimizer_step(accelerator, model, optimizer, repeat((0, batch)), normalize, **options)


@torch.no_grad()
def evaluate(run, model, dataset, classes, normalize, *, read, export=None):
    """Score a model on all images of the dataset, each once, and log the scores; damaged images are left out.

    Args:
        read: returns the batches of a dataset's indices.
        export: writes the model into a folder, which becomes best/ if the model is the best so far.
    """
    training = model.training
    model.eval()
    for buffer in model.buffers():  # BatchNorm's statistics are those of the main process, as in a checkpoint
        broadcast(buffer)
    rows, damaged, present = [], [], torch.from_numpy(np.unique(dataset.labels)).to(run.device)
    for batch in read(dataset, range(len(dataset))):
        with run.accelerator.autocast():  # the forward method is not compiled, as sizes vary
            logits = model.forward(normalize(batch.images.to(run.device, non_blocking=True))).float()
        labels = batch.labels.to(run.device, non_blocking=True)
        losses = F.cross_entropy(logits, labels, reduction="none").tolist()
        rankings = logits.topk(min(5, len(classes))).indices.tolist()
        best_present = present[logits[:, present].argmax(dim=1)].tolist()
        scored = zip(batch.indices, batch.labels.tolist(), rankings, best_present, losses, strict=True)
        rows += [row for row in scored if row[0] not in dict(batch.damaged)]
        damaged += [(dataset.source.name(index), reason) for index, reason in batch.damaged]
    model.train(training)
    run.note_damage(damaged)
    rows, scores = sorted(run.crew.gather(rows)), []
    if not rows:
        raise RunError(f"none of the {len(dataset)} held-out images can be read; damaged.jsonl says why: repair them")
    if run.is_main_process:
        scores = [score_classification(rows, classes)]
        path = run.folder / "predictions" / f"step_{run.step:08d}.png"
        title = f"step {run.step}, epoch {run.epoch:.4g}: top-1 {scores[0]['top1']:.2f} %"
        labels, predictions = [row[1] for row in rows], [row[2][0] for row in rows]
        if confusion_matrix(path, labels, predictions, classes, title=title):  # not for too many classes to read
            run.progress.picture(path, "confusion", run.step)
    (scores,) = run.crew.gather(scores)
    if export and run.is_best("top1", scores):
        replace_folder(run.folder / "best", partial(export, model))
    run.record(scores, f"epoch {run.epoch:.4g}: {describe_scores(scores)}, validation loss {scores['val_loss']:.4f}")


def describe_scores(scores):
    """Return the accuracies in words."""
    subset = f" ({scores['subset_top1']:.2f} % among the classes of the data)" if "subset_top1" in scores else ""
    return f"top-1 {scores['top1']:.2f} %{subset}, top-5 {scores['top5']:.2f} %"


def describe_model(model, recipe, augmentation):
    """Return the plan's lines about model, recipe and images; the latter two are in words."""
    encoder, (height, width) = model.encoder, model.encoder.img_size
    count = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    head = {"cls": "cls token", "mean": "mean of the patches", "attentive": "attentive pooling"}[model.pooling]
    return [
        f"model      {encoder.embed_dim} x {len(encoder.blocks)} encoder, head on the {head}: {count:.3g} M parameters "
        f"({trained:.3g} M train), {model.training_flops() / 1e9:.3g} GFLOP per image and step",
        f"recipe     {recipe}",
        f"images     {height} x {width}, {several(encoder.in_channels, 'channel')}, {math.prod(encoder.grid)} patches "
        f"of {encoder.patch_size}; {augmentation}",
    ]


def evaluate_trained(run):
    """Measure a trained classifier on the held-out images, or on all images if none are held out (--eval_only)."""
    flags, path = run.given, run.given.path_to_pretrained_mae_weights
    with run.refusing(WeightsError, InputError, flag=WEIGHTS):
        check_outside(path, run.folder)
        given = Stored(num_heads=flags.encoder_num_heads)
        channels = flags.input_channels if flags.adapt_channels else None
        trained = open_trained(path, whole=False, given=given, img_size=flags.img_size, in_channels=channels)
        if not isinstance(trained.model, Classifier):
            raise InputError(f"{trained.path} holds no classifier; give a model/, best/ or checkpoint")
    run.gate()
    model, encoder = trained.model, trained.encoder
    with run.refusing(InputError, DataError):
        check_trained(vars(flags), SIZES, encoder)
        known = ImageFormat(encoder.in_channels, trained.value_range, None, trained.mean, trained.std)
        images = resolve_images(ImageFormat.from_dict(vars(flags)), known=None, trained=known)
        pixels = PixelFormat(images.input_channels, images.value_range, images.nodata, flags.max_pixels)
        places = dict(validation=flags.path_to_validation_data, cache=flags.cache_dir, data_format=flags.data_format)
        places["drop_unlabelled"] = flags.drop_unlabelled
        train_source, validation_source = open_sources(flags.path_to_data, pixels, **places)
        source = validation_source or train_source
        classes = match_classes(flags.path_to_data, source, trained.class_names, model.num_classes)
        if flags.num_classes not in (None, model.num_classes):
            raise InputError(f"--num_classes {flags.num_classes} does not fit the classifier of {model.num_classes}")
    run.gate()
    sizes = dict(encoder_flags(vars(encoder)), img_size=list(encoder.img_size), num_classes=len(classes))
    content = {"classes": classes, "data": describe_data(source, source)}
    run.start_evaluation({**images._asdict(), **sizes}, source, content)
    if source.notes:
        run.say("\n".join(source.notes))
    crop = CentreCrop(encoder.img_size, evaluation_crop_ratio(encoder.img_size))
    dataset = ClassificationDataset(source, labels_in(source, classes), pixels=pixels, crop=crop, seed=0)
    read = partial(own_batches, batch_size=min(run.batch.micro, 256), **run.reading)
    evaluate(run, model.to(run.device), dataset, classes, Normalization(*images[3:], run.device), read=read)
    run.end(f"{describe_scores(run.metrics)}; {run.folder / 'metrics.json'}")


@put_back()
def main(argv=None):
    """Run the script; see the module's docstring."""
    given, errors = parse_args(argv)
    run = Run(given, errors)  # processes, signals, the locked folder, the checkpoint to resume; bad flags end here
    if given.eval_only:
        return evaluate_trained(run)

    # Weights, data, plan and model: run.gate() prints all errors; a block that needs what failed is skipped
    with run.refusing(InputError, WeightsError, flag=WEIGHTS):
        path = None if run.checkpoint else given.path_to_pretrained_mae_weights
        check_outside(path, run.folder)
        weights = open_weights(path) if path else None
    with run.refusing(InputError, DataError):
        statistics = read_statistics(given.path_to_data)
        images = resolve_inputs(vars(given), previous=run.previous, statistics=statistics, weights=weights)
        pixels = PixelFormat(images.input_channels, images.value_range, images.nodata, given.max_pixels)
    with run.refusing(InputError):
        encoder = resolve_encoder(vars(given), SIZES, previous=run.previous, weights=weights)
        probes = dict(linear_probe=given.linear_probe, attentive_probe=given.attentive_probe)
        kind = choose_kind(given.path_to_pretrained_mae_weights, **probes)
        recipe_name, recipe = choose_recipe(kind, encoder, learning_rate=given.learning_rate)
        args = run.fill_in(recipe)
        head = dict(pooling=args.pooling, probe=any(probes.values()))
        if args.attentive_probe:
            head["num_queries"] = resolve_queries(args.num_queries, encoder["embed_dim"])
        check_blocks(args.trainable_blocks, encoder["depth"])
    with run.refusing(InputError):
        magnitude = resolve_augmentation(args.random_aug_magnitude, recipe["random_aug_magnitude"], images)
    with run.refusing(DataError):
        places = dict(validation=given.path_to_validation_data, cache=given.cache_dir, data_format=given.data_format)
        places["drop_unlabelled"] = given.drop_unlabelled
        train_source, validation_source = open_sources(given.path_to_data, pixels, **places)
        check_classes(given.path_to_data, train_source, validation_source)
        classes = train_source.classes
        check_num_classes(given.path_to_data, train_source, given.num_classes)
    with run.refusing(InputError):
        is_mixed = bool(args.mixup_alpha or args.cutmix_alpha)
        check_batch = partial(check_classifier_batch, mixing=is_mixed, probe=head["probe"])
        run.plan_steps(len(train_source), check_batch, recipe_epochs=(recipe["warmup_epochs"], recipe["epochs"]))
    with run.refusing(WeightsError, flag=WEIGHTS):
        torch.manual_seed(args.seed)
        encoder["in_channels"] = pixels.channels
        options = dict(drop_path=args.drop_path, custom_weight_init=args.custom_weight_init)
        model = build_model(encoder, len(classes), **head, **options)
        model.encoder.gradient_checkpointing = run.gradient_checkpointing
        if weights:
            channels = dict(adapt_channels=args.adapt_channels, mean=images.mean, std=images.std)
            run.accelerator.print(f"{WEIGHTS} {weights.path}: {start_from(weights, model.encoder, **channels)}")
    run.gate()
    sizes = dict(encoder_flags(encoder), random_aug_magnitude=magnitude, num_classes=len(classes))
    sizes["num_queries"] = head.get("num_queries")
    resolved = dict(images._asdict(), **sizes, img_size=list(encoder["img_size"]))
    run.compare(resolved, train_source, validation_source, defaults=vars(parse_args([])[0]))
    if args.trainable_blocks is not None:
        model.train_last_blocks(args.trainable_blocks)
    model.to(run.device)
    ema = build_average(model, args.ema_decay) if args.ema_decay else None
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)

    # Optimizer
    normalize = Normalization(images.mean, images.std, run.device)
    alphas = dict(mixup_alpha=args.mixup_alpha, cutmix_alpha=args.cutmix_alpha)
    chances = dict(prob=args.mixup_probability, switch_prob=args.mixup_switch, label_smoothing=args.label_smoothing)
    mixing = build_mixing(args.random_erase, device=run.device, num_classes=len(classes), **alphas, **chances)
    optimizer = build_optimizer(model, args.optimizer, args.betas, **{name: vars(args)[name] for name in DECAY_FLAGS})
    empty = partial(empty_step, run.accelerator, normalize=normalize, mixing=mixing, pixels=pixels)
    if args.micro_batch_size == "auto":
        run.fit_micro_batch(empty, model, optimizer)
    if args.trainable_blocks is not None:
        recipe_name += f" of the last {args.trainable_blocks:g} blocks, norm and head"
    summary = f"{recipe_name}: {args.optimizer}, weight decay {args.weight_decay:g}, layer decay {args.layer_decay:g}, "
    summary += f"drop path {args.drop_path:g}" + (f", weights averaged by {args.ema_decay:g}" if args.ema_decay else "")
    augmentation = f"RandAugment {magnitude}, erasing {args.random_erase:g}, mixup {args.mixup_alpha:g}, CutMix "
    augmentation += f"{args.cutmix_alpha:g}, smoothing {args.label_smoothing:g}"
    run.print_plan(describe_model(model, summary, augmentation), images, classes=len(classes))
    model, optimizer = run.prepare(model, optimizer, average=ema and ema.module)
    run.prepare_sources()
    if run.needs_warm_up:
        empty(model, optimizer, run.batch.micro)
    run.resume({"classes": classes, "data": describe_data(train_source, validation_source)})

    # Batches
    img_size = encoder["img_size"]
    augment = RandAugment(magnitude, images.mean) if magnitude else None
    samples = dict(pixels=pixels, seed=args.seed)
    train_crop = RandomCrop(img_size, tuple(args.crop_scale), args.fast_decoding, args.crop_style)
    train_data = ClassificationDataset(train_source, train_source.labels, crop=train_crop, augment=augment, **samples)
    sampler = StepSampler(len(train_source), **run.sampling)
    batches = run.timed(training_batches(train_data, sampler, **run.loading))
    crop, labels = CentreCrop(img_size, evaluation_crop_ratio(img_size)), labels_in(validation_source, classes)
    validation_data = ClassificationDataset(validation_source, labels, crop=crop, **samples)
    read = partial(own_batches, batch_size=min(run.batch.micro, 256), **run.reading)
    normalization = dict(mean=images.mean, std=images.std, value_range=images.value_range)
    export = partial(export_classifier, classes=classes, crop_ratio=crop.ratio, **normalization)

    # Loop
    lr_at, steps_per_epoch = partial(learning_rate_at, **run.plan.schedule), run.plan.length.steps_per_epoch
    options = dict(mixing=mixing, label_smoothing=args.label_smoothing, max_grad_norm=args.max_grad_norm)
    model.train()
    for step in run.steps:  # completed optimizer steps
        if run.is_due(step, args.validate_every * steps_per_epoch, "top1"):
            trained = ema.module if ema else run.plain_model()
            with run.paused():
                evaluate(run, trained, validation_data, classes, normalize, read=read, export=export)
        if step == run.plan.length.total_steps:
            break
        set_learning_rate(optimizer, lr_at(step))
        loss, grad_norm, damaged = optimizer_step(run.accelerator, model, optimizer, batches, normalize, **options)
        if ema:
            ema.update(run.plain_model())
        run.completed(step + 1, loss, grad_norm, damaged)  # logs, saves, raises Stopped if the run is asked to stop

    # Finish
    trained = ema.module if ema else run.plain_model()
    if run.is_main_process:
        replace_folder(run.folder / "model", partial(export, trained))
    run.end(f"{describe_scores(run.metrics)}; {run.folder / 'metrics.json'}", best="top1")


if __name__ == "__main__":
    run_script(main)
