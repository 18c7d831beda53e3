"""Fine-tune a pre-trained encoder to classify images; also probes, partial fine-tuning, and from scratch.

    accelerate launch finetune_classifier.py @recipes/quickstart/finetune_classifier.args

prints the plan, then a bar with the loss and, once an epoch, the accuracy, and writes work_dir/EXPERIMENT_NAME/:
log.jsonl, checkpoints/, predictions/ (the confusion matrix, up to 50 classes), best/ and, at the end, metrics.json and
model/: folders which transformers and timm load. Kill it at any moment: the same command with
--resume_from_checkpoint auto continues it exactly.

Without --path_to_pretrained_mae_weights, everything is trained from scratch; with it, everything is fine-tuned, unless
--linear_probe, --attentive_probe or --trainable_blocks limits it. --target learns labels or numbers instead of classes.
Defaults: the published recipe named in the plan, with gradient clipping (except for probes), without weight averaging.
"""

import math
from functools import partial
from itertools import repeat
from operator import itemgetter

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import nn

from data.augment import RandAugment
from data.batches import ClassificationBatch, ClassificationDataset, Normalization, own_batches, training_batches
from data.columns import TargetSource, check_held_out, read_targets, targets_of
from data.decode import PixelFormat
from data.features import encode_dataset
from data.index import DataError
from data.sampling import StepSampler, seed_everything
from data.sources import check_num_classes, describe_data, match_classes, open_sources
from data.statistics import read_statistics
from data.transforms import CentreCrop, RandomCrop, build_mixing, empty_images, evaluation_crop_ratio
from modeling.classifier import Classifier
from modeling.export import export_classifier
from modeling.files import Stored, WeightsError
from modeling.trained import open_trained
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import open_weights, start_from
from training import arguments, classification
from training.arguments import integer
from training.checkpoint import check_outside
from training.files import replace_folder
from training.launch import InputError, RunError, put_back, run_script
from training.memory import check_memory
from training.objectives import build_objective
from training.optimizer import (
    DECAY_FLAGS,
    adamw,
    build_average,
    clip_gradients,
    lars,
    parameter_groups,
    set_learning_rate,
)
from training.recipes import LARGER, RECIPES, choose_kind, choose_recipe, describe_recipe
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
from training.wording import count_targets, several

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
    classification.add_optimizer_flags(parser)
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, interval=1)
    arguments.add_hub_flags(parser)
    arguments.add_image_flags(parser)
    arguments.add_crop_flags(parser, crop_scale=(0.08, 1.0))
    arguments.add_encoder_flags(parser, sizes=SIZES)

    classification.add_target_flags(parser)
    classification.add_augmentation_flags(parser)
    flag = parser.add_argument_group("validation").add_argument
    flag("--validate_every", type=integer(0), default=1, help="epochs between validations (0: at the end only)")
    parser.set_defaults(**dict.fromkeys(usual))
    parser.describe_defaults({**RECIPES, **LARGER})
    args, errors = parser.read(argv)
    errors += arguments.check_run(args) + arguments.check_crops(args) + arguments.check_finetuning(args, WEIGHTS)
    return args, errors + classification.check_classifier(args)


def build_model(encoder, num_classes, *, drop_path, custom_weight_init, **head):
    """Build the classifier from the arguments of VisionTransformer and Classifier."""
    encoder = VisionTransformer(**encoder).initialize(custom_weight_init).add_extras(drop_path=drop_path)
    return Classifier(encoder, num_classes, custom_weight_init=custom_weight_init, **head)


def build_optimizer(model, name, betas, **decay):
    """Build AdamW or LARS over the parameters that train; `decay` are options of `parameter_groups`."""
    groups = parameter_groups(model, **decay)
    return {"adamw": partial(adamw, betas=tuple(betas)), "lars": lars}[name](groups)


def optimizer_step(accelerator, model, optimizer, batches, normalize, *, mixing, loss_of, max_grad_norm):
    """Take one optimizer step, accumulating gradients over the micro-batches.

    Args:
        batches: an iterator over (seed of the model's randomness, ClassificationBatch).
        mixing: random erasing, and mixup and CutMix or None; see `build_mixing`.
        loss_of: outputs (B, num_classes), labels -> loss ().
        max_grad_norm: the norm that gradients are clipped to; 0 for none.

    Returns:
        Loss () and gradient norm (), both left on the device, and [(index, reason)] of damaged images.
    """
    loss, damaged, (erase, mix) = 0.0, [], mixing
    for _ in range(accelerator.gradient_accumulation_steps):
        seed, batch = next(batches)
        with accelerator.accumulate(model):
            seed_everything(seed)
            images = erase(normalize(batch.images.to(accelerator.device, non_blocking=True)))  # (B, C, H, W)
            labels = batch.labels.to(accelerator.device, non_blocking=True)  # (B,) or (B, num_classes)
            if mix:
                images, labels = mix(images, labels)  # labels (B, num_classes)
            with accelerator.autocast():
                logits = model(images)  # (B, num_classes)
            micro_loss = loss_of(logits.float(), labels)
            accelerator.backward(micro_loss)
            loss += micro_loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, model, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        damaged += batch.damaged
    return loss, grad_norm, damaged


def empty_step(accelerator, model, optimizer, size, *, normalize, pixels, **options):
    """Take one optimizer step on black images, to measure memory or to warm up DDP before a checkpoint is loaded."""
    plain = accelerator.unwrap_model(model)
    images = empty_images(size, pixels.channels, plain.encoder.img_size, pixels.dtype).zero_()
    labels = torch.zeros(size).long() if plain.problem == "classes" else torch.zeros(size, plain.num_classes)
    batch = ClassificationBatch(images, labels, [], [])
    optimizer_step(accelerator, model, optimizer, repeat((0, batch)), normalize, **options)


@torch.no_grad()
def evaluate(run, model, dataset, objective, normalize, *, read, export=None):
    """Score a model on all images of the dataset, each once, and log the scores; damaged images are left out.

    Args:
        read: read(dataset, indices) yields the batches of this process.
        export: writes the model into a folder, which becomes best/ if the model is the best so far.
    """
    training = model.training
    model.eval()
    for buffer in model.buffers():  # BatchNorm's statistics are those of the main process, as in a checkpoint
        broadcast(buffer)
    rows, damaged = [], []
    present = torch.from_numpy(np.unique(dataset.labels)).to(run.device)  # for --target classes: those in the data
    for batch in read(dataset, range(len(dataset))):
        with run.accelerator.autocast():  # the forward method is not compiled, as sizes vary
            outputs = model.forward(normalize(batch.images.to(run.device, non_blocking=True))).float()
        answers = objective.to_rows(outputs, batch.labels.to(run.device, non_blocking=True), present)
        rows += [row for row in zip(batch.indices, answers, strict=True) if row[0] not in dict(batch.damaged)]
        damaged += [(dataset.source.name(index), reason) for index, reason in batch.damaged]
    model.train(training)
    run.note_damage(damaged)
    rows, scores = [row for _, row in sorted(run.crew.gather(rows), key=itemgetter(0))], []
    if not rows:
        raise RunError(f"none of the {len(dataset)} validation images can be read; see damaged.jsonl, and repair them")
    if run.is_main_process:
        scores = [objective.score(rows)]
        path = run.folder / "predictions" / f"step_{run.step:08d}.png"
        title = f"step {run.step}, epoch {run.epoch:.4g}: {objective.describe(scores[0])}"
        if objective.draw(path, rows, title=title):
            run.progress.picture(path, "confusion", run.step)
    (scores,) = run.crew.gather(scores)
    if export and run.is_best(objective.best, scores):
        replace_folder(run.folder / "best", partial(export, model))
    run.record(scores, f"epoch {run.epoch:.4g}: {objective.describe(scores)}, validation loss {scores['val_loss']:.4f}")


@torch.no_grad()
def encode_once(run, normalize, datasets, *, read):
    """Encode all images once; return data sets of the features that a probe's head reads (--cache_features)."""
    model = run.plain_model().eval()

    def encode(images):
        with run.accelerator.autocast():
            return model.encode_for_head(normalize(images.to(run.device, non_blocking=True)))

    shape = encode(datasets[0].__getitems__([(0, 0)]).images).shape[1:]
    check_memory("--cache_features", 4 * math.prod(shape) * sum(map(len, datasets)))
    options = dict(read=partial(read, watch=partial(run.watch, title="features")), gather=run.crew.gather)
    options["share"] = slice(run.process_index, None, run.num_processes)
    with run.paused():
        return [encode_dataset(dataset, encode, shape, **options) for dataset in datasets]


def describe_model(model, recipe, augmentation):
    """Return the plan's lines about model, recipe and images; `recipe` and `augmentation` are texts."""
    encoder, (height, width) = model.encoder, model.encoder.img_size
    count = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    return [
        f"model      {encoder.embed_dim} x {len(encoder.blocks)} encoder, head on {model.pooled}: "
        f"{count:.3g} M parameters ({trained:.3g} M train), "
        f"{model.training_flops() / 1e9:.3g} GFLOP per image and step",
        f"recipe     {recipe}",
        f"images     {height} x {width}, {several(encoder.in_channels, 'channel')}, {math.prod(encoder.grid)} patches "
        f"of {encoder.patch_size}; {augmentation}",
    ]


def evaluate_trained(run):
    """Measure a trained classifier on the validation images, or on all images if there are none (--eval_only)."""
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
        if flags.num_classes not in (None, model.num_classes):
            raise InputError(f"--num_classes {flags.num_classes} does not fit the classifier of {model.num_classes}")
        if flags.target not in ("classes", model.problem):
            raise InputError(f"--target {flags.target}: {trained.path} predicts {model.problem}; leave the flag out")
        names = trained.classes
        if model.problem == "classes":
            names = match_classes(flags.path_to_data, source, trained.class_names, model.num_classes)
        else:
            source = TargetSource.read(model.problem, flags.path_to_data, source, flags.label_columns, names)
            check_held_out(flags.path_to_data, source)
        objective = build_objective(model.problem, names, scale=model.scale, regression_loss=flags.regression_loss)
    run.gate()
    sizes = dict(encoder_flags(vars(encoder)), img_size=list(encoder.img_size), num_classes=model.num_classes)
    content = {"classes": objective.names, "data": describe_data(source, source)}
    run.start_evaluation({**images._asdict(), **sizes, "target": model.problem}, source, content)
    if source.notes:
        run.say("\n".join(source.notes))
    crop = CentreCrop(encoder.img_size, evaluation_crop_ratio(encoder.img_size))
    dataset = ClassificationDataset(source, targets_of(source, names, model.scale), pixels=pixels, crop=crop, seed=0)
    read = partial(own_batches, batch_size=min(run.batch.micro, 256), **run.reading)
    evaluate(run, model.to(run.device), dataset, objective, Normalization(*images[3:], run.device), read=read)
    run.end(f"{objective.describe(run.metrics)}; {run.folder / 'metrics.json'}")


@put_back()
def main(argv=None):
    """Run the script; see the module's docstring."""
    given, errors = parse_args(argv)
    run = Run(given, errors)  # processes, signals, the locked folder, the checkpoint to resume; bad flags end here
    if given.eval_only:
        return evaluate_trained(run)

    # Weights, data, plan and model: run.gate() prints all errors; a block that depends on a failed one is skipped
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
        recipe_name, recipe = choose_recipe(kind, encoder, learning_rate=given.learning_rate, target=given.target)
        args = run.fill_in(recipe)
        head = dict(pooling=args.pooling, probe=any(probes.values()), problem=args.target)
        if args.attentive_probe:
            head["num_queries"] = resolve_queries(args.num_queries, encoder["embed_dim"])
        check_blocks(args.trainable_blocks, encoder["depth"])
    with run.refusing(InputError):
        magnitude = resolve_augmentation(args.random_aug_magnitude, recipe["random_aug_magnitude"], images)
    with run.refusing(DataError):
        places = dict(validation=given.path_to_validation_data, cache=given.cache_dir, data_format=given.data_format)
        places["drop_unlabelled"] = given.drop_unlabelled
        train_source, validation_source = sources = open_sources(given.path_to_data, pixels, **places)
        train_source, validation_source = read_targets(given.target, given.path_to_data, given.label_columns, *sources)
        classes = train_source.classes
        losses = {name: vars(args)[name] for name in ("label_smoothing", "positive_weights", "regression_loss")}
        objective = build_objective(args.target, classes, labels=train_source.labels, device=run.device, **losses)
        check_num_classes(given.path_to_data, train_source, given.num_classes)
    with run.refusing(InputError):
        is_mixed = bool(args.mixup_alpha or args.cutmix_alpha)
        check_batch = partial(check_classifier_batch, mixing=is_mixed, probe=head["probe"])
        run.plan_steps(len(train_source), check_batch, recipe_epochs=(recipe["warmup_epochs"], recipe["epochs"]))
    with run.refusing(WeightsError, flag=WEIGHTS):
        torch.manual_seed(args.seed)
        encoder["in_channels"], img_size = pixels.channels, encoder["img_size"]
        options = dict(drop_path=args.drop_path, custom_weight_init=args.custom_weight_init)
        model = build_model(encoder, len(classes), **head, **options)
        model.encoder.gradient_checkpointing = run.gradient_checkpointing
        model.set_scale(objective.scale)
        if weights:
            channels = dict(adapt_channels=args.adapt_channels, mean=images.mean, std=images.std)
            run.accelerator.print(f"{WEIGHTS} {weights.path}: {start_from(weights, model.encoder, **channels)}")
    run.gate()
    sizes = dict(encoder_flags(encoder), num_classes=len(classes), num_queries=head.get("num_queries"))
    resolved = dict(images._asdict(), **sizes, img_size=list(img_size), random_aug_magnitude=magnitude)
    run.compare(resolved, train_source, validation_source, defaults=vars(parse_args([])[0]))
    if args.trainable_blocks is not None:
        model.train_last_blocks(args.trainable_blocks)
    model.to(run.device)
    ema = build_average(model, args.ema_decay) if args.ema_decay else None
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)

    # Optimizer
    normalize = Normalization(images.mean, images.std, run.device)
    soft = dict(num_classes=len(classes), label_smoothing=args.label_smoothing, multi_label=args.target == "labels")
    mixes = dict(mixup_alpha=args.mixup_alpha, cutmix_alpha=args.cutmix_alpha, switch_prob=args.mixup_switch)
    mixing = build_mixing(args.random_erase, device=run.device, prob=args.mixup_probability, **mixes, **soft)
    optimizer = build_optimizer(model, args.optimizer, args.betas, **{name: vars(args)[name] for name in DECAY_FLAGS})
    fixed = dict(mixing=mixing, loss_of=objective.loss, max_grad_norm=args.max_grad_norm)
    empty = partial(empty_step, run.accelerator, normalize=normalize, pixels=pixels, **fixed)
    if args.micro_batch_size == "auto":
        run.fit_micro_batch(empty, model, optimizer)
    summary, augmentation = describe_recipe(recipe_name, vars(args) | dict(random_aug_magnitude=magnitude))
    run.print_plan(
        describe_model(model, summary, augmentation), images, targets=count_targets(len(classes), args.target)
    )
    model, optimizer = run.prepare(model, optimizer, average=ema and ema.module)
    run.prepare_sources()
    if run.needs_warm_up:
        empty(model, optimizer, run.batch.micro)
    run.resume({"classes": classes, "data": describe_data(train_source, validation_source)})

    # Batches
    augment = RandAugment(magnitude, images.mean) if magnitude else None
    crop = CentreCrop(img_size, evaluation_crop_ratio(img_size))
    random_crop = RandomCrop(img_size, tuple(args.crop_scale), args.fast_decoding, args.crop_style)
    samples = dict(crop=crop if args.cache_features else random_crop, augment=augment, pixels=pixels, seed=args.seed)
    labels = [targets_of(source, classes, objective.scale) for source in (train_source, validation_source)]
    train_data = ClassificationDataset(train_source, labels[0], **samples)
    validation_data = ClassificationDataset(validation_source, labels[1], **samples | dict(crop=crop, augment=None))
    read = partial(own_batches, batch_size=min(run.batch.micro, 256), **run.reading)
    if args.cache_features:
        train_data, validation_data = encode_once(run, normalize, (train_data, validation_data), read=read)
        normalize = nn.Identity()
    sampler = StepSampler(len(train_source), **run.sampling)
    batches = run.timed(training_batches(train_data, sampler, **run.loading))
    normalization = dict(mean=images.mean, std=images.std, value_range=images.value_range)
    export = partial(export_classifier, classes=classes, crop_ratio=crop.ratio, **normalization)

    # Loop
    lr_at, steps_per_epoch = partial(learning_rate_at, **run.plan.schedule), run.plan.length.steps_per_epoch
    model.train()
    for step in run.steps:  # completed optimizer steps
        if run.is_due(step, args.validate_every * steps_per_epoch, objective.best):
            trained = ema.module if ema else run.plain_model()
            with run.paused():
                evaluate(run, trained, validation_data, objective, normalize, read=read, export=export)
        if step == run.plan.length.total_steps:
            break
        set_learning_rate(optimizer, lr_at(step))
        loss, grad_norm, damaged = optimizer_step(run.accelerator, model, optimizer, batches, normalize, **fixed)
        if ema:
            ema.update(run.plain_model())
        run.completed(step + 1, loss, grad_norm, damaged)  # logs, saves, raises Stopped if the run is asked to stop

    # Finish
    trained = ema.module if ema else run.plain_model()
    if run.is_main_process:
        replace_folder(run.folder / "model", partial(export, trained))
    run.end(f"{objective.describe(run.metrics)}; {run.folder / 'metrics.json'}", best=objective.best)


if __name__ == "__main__":
    run_script(main)
