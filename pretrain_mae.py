"""Pre-train a masked autoencoder (He et al. 2021).

    accelerate launch pretrain_mae.py @recipes/quickstart/pretrain.args

prints the plan, then a bar with the loss, and writes work_dir/EXPERIMENT_NAME/: log.jsonl, checkpoints/,
reconstructions/ (look at them), and at the end metrics.json and encoder/, which transformers, timm and the fine-tuning
scripts load. Kill it at any moment: the same command with --resume_from_checkpoint auto continues it exactly.
"""

import math
from collections import Counter
from functools import partial
from itertools import repeat

import torch

from data.batches import (
    FIXED_EPOCH,
    Normalization,
    PretrainingBatch,
    PretrainingDataset,
    own_batches,
    training_batches,
)
from data.decode import VALIDITY, PixelFormat, preview_channels
from data.index import DataError
from data.masking import MASK_STRATEGIES
from data.sampling import StepSampler, spread
from data.sources import check_labels, describe_data, keep_labelled, labels_in, open_sources
from data.statistics import read_statistics
from data.transforms import CROP_RATIO, CentreCrop, RandomCrop, empty_images
from modeling.decoder import DECODERS
from modeling.export import export_autoencoder, export_encoder, loading_commands
from modeling.files import WeightsError
from modeling.mae import MaskedAutoencoder
from modeling.targets import TARGETS
from modeling.teacher import open_teacher
from modeling.vit import SIZES, VisionTransformer, patchify
from modeling.weights import open_weights, start_from
from training import arguments, pretraining
from training.arguments import integer, number
from training.checkpoint import check_outside
from training.files import replace_folder
from training.launch import InputError, check, put_back, run_script
from training.metrics import sum_reconstruction_metrics
from training.neighbours import own_features, score_features
from training.optimizer import adamw, check_muon, clip_gradients, muon, parameter_groups, set_learning_rate
from training.pictures import reconstruction_grid
from training.pretraining import DECODER_FLAGS
from training.resolve import (
    ENCODER_FLAGS,
    ImageFormat,
    check_preview,
    check_width,
    encoder_flags,
    encoder_sizes,
    resolve_images,
)
from training.run import Run
from training.schedule import learning_rate_at
from training.wording import TRUE_STATISTICS

WARMUP_EPOCHS, EPOCHS = 40, 800
MODEL_FLAGS = ("drop_path", "custom_weight_init", "mask_ratio", "predict_ratio", "target")


def parse_args(argv=None):
    """Return the flags, and error messages for those that contradict each other."""
    parser = arguments.Parser(__doc__)
    arguments.add_run_flags(parser, name="pretrain_mae")
    arguments.add_source_flags(parser)
    arguments.add_length_flags(parser, epochs=EPOCHS, warmup=WARMUP_EPOCHS)
    arguments.add_batch_flags(parser)
    arguments.add_optimizer_flags(parser, base_learning_rate=1.5e-4, weight_decay=0.05)
    flag = parser.add_argument_group("optimizer of pre-training").add_argument
    flag("--optimizer", choices=("adamw", "muon"), default="adamw", help="AdamW, or Muon for blocks (default adamw)")
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, interval=10)
    arguments.add_hub_flags(parser)
    arguments.add_image_flags(parser)
    arguments.add_crop_flags(parser, crop_scale=(0.2, 1.0))
    arguments.add_encoder_flags(parser, sizes=SIZES)

    pretraining.add_mask_flags(parser, strategies=MASK_STRATEGIES, validities=VALIDITY)
    pretraining.add_decoder_flags(parser, decoders=DECODERS, targets=TARGETS)

    flag = parser.add_argument_group("validation").add_argument
    flag("--validate_every", type=integer(0), default=10, help="epochs between validations (0: at the end only)")
    flag("--knn_every", type=number(), default=0, help="epochs between RankMe and k-NN, or 0.5 (0: none, default 0)")
    flag("--knn_images", type=integer(1), metavar="N", help="training and validation images for these (default all)")
    flag("--num_preview_images", type=integer(0), default=8, help="rows of the pictures (default 8)")
    arguments.add_preview_flag(flag)
    args, errors = parser.read(argv)
    args.model = args.model or "base"
    return args, errors + check_flags(args)


def check_flags(args):
    """Return error messages for the flags of this script, and fill in the encoder sizes that --model implies."""
    errors = arguments.check_run(args) + arguments.check_crops(args) + check_preview(args.preview_channels)
    errors += pretraining.check_decoder(args, DECODERS[args.decoder]) + pretraining.check_target(args)
    vars(args).update(encoder_flags(encoder_sizes(vars(args), SIZES[args.model])))
    errors += check_width("encoder", args.encoder_embed_dim, args.encoder_num_heads)
    return errors + check_muon(args.optimizer) + pretraining.check_sizes(args)


def build_model(
    encoder, decoder, *, kind="self", target="normalized", width=None, drop_path, custom_weight_init, **options
):
    """Build the autoencoder from arguments of encoder and decoder; `width` is the target's, `options` the model's."""
    encoder = VisionTransformer(**encoder).initialize(custom_weight_init).add_extras(drop_path=drop_path)
    target = TARGETS[target](encoder, width)
    decoder = DECODERS[kind](encoder, **decoder, num_outputs=target.width, custom_weight_init=custom_weight_init)
    return MaskedAutoencoder(encoder, decoder, target, **options)


def build_dataset(source, crop, *, model, seed=0, **options):
    """Build the dataset of crops and masks for the model; the default seed is that of validation."""
    grid = tuple(side // model.encoder.patch_size for side in crop.size)
    num_kept, _ = model.count(math.prod(grid))
    return PretrainingDataset(source, crop=crop, grid=grid, num_kept=num_kept, seed=seed, **options)


def build_optimizer(model, name, weight_decay, **decay):
    """Build AdamW as in the paper (table 8), or Muon; `decay` says whether biases and norms have weight decay."""
    groups, betas = parameter_groups(model, weight_decay, **decay), (0.9, 0.95)
    return muon(groups, model, betas=betas) if name == "muon" else adamw(groups, betas=betas)


def to_device(batch, device):
    """Return images (B, C, H, W), noise (B, L) and valid pixels (B, 1, H, W), or None, of a PretrainingBatch."""
    return [part if part is None else part.to(device, non_blocking=True) for part in batch[:3]]


def optimizer_step(accelerator, model, optimizer, batches, normalize, *, max_grad_norm, teacher=None):
    """Take one optimizer step, accumulating gradients over the micro-batches.

    Args:
        batches: an iterator over (seed of the model's randomness, PretrainingBatch).
        max_grad_norm: the norm that gradients are clipped to; 0 for none.
        teacher: computes the features to predict, see `modeling.teacher`; None for other targets.

    Returns:
        Loss () and gradient norm (), both left on the device, and [(index, reason)] of damaged images.
    """
    loss, damaged = 0.0, []
    for _ in range(accelerator.gradient_accumulation_steps):
        seed, batch = next(batches)
        with accelerator.accumulate(model):
            torch.manual_seed(seed)
            images, noise, valid = to_device(batch, accelerator.device)
            grid = teacher and accelerator.unwrap_model(model).encoder.grid_of(images)
            with accelerator.autocast():
                options = dict(features=teacher(images, grid) if teacher else None, valid=valid, loss_only=True)
                micro_loss = model(images, noise, normalize=normalize.patches, **options)
            accelerator.backward(micro_loss)
            loss += micro_loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, model, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        damaged += batch.damaged
    return loss, grad_norm, damaged


def empty_step(accelerator, model, optimizer, size, *, normalize, pixels, teacher=None):
    """Take one optimizer step on black images, to measure memory or to warm up DDP before a checkpoint is loaded."""
    encoder = accelerator.unwrap_model(model).encoder
    images = empty_images(size, pixels.channels, encoder.img_size, pixels.dtype).zero_()
    valid = torch.ones(size, 1, *encoder.img_size, dtype=torch.bool) if pixels.validity else None
    batch = PretrainingBatch(images, torch.zeros(size, math.prod(encoder.grid)), valid, [])
    optimizer_step(accelerator, model, optimizer, repeat((0, batch)), normalize, max_grad_norm=1.0, teacher=teacher)


@torch.no_grad()
def reconstruct(accelerator, model, batch, normalize, teacher=None):
    """Return the loss () of a batch and, for an invertible target, images, predictions, pixel masks and valid pixels.

    Images and predictions are (B, C, H, W) on the scale of [0, 1], masks and valid pixels (B, 1, H, W) or None.
    """
    images, noise, valid = to_device(batch, accelerator.device)
    with accelerator.autocast():
        features, images = teacher(images) if teacher else None, normalize(images)
        loss, prediction, mask = model.forward(images, noise, features=features, valid=valid)  # uncompiled: sizes vary
    if not model.target.invertible:
        return (loss,)
    prediction = normalize.undo(model.reconstruct(images, prediction, valid))
    return loss, normalize.undo(images), prediction, model.pixel_mask(mask), valid


def evaluate(run, model, dataset, indices, normalize, *, teacher, read, preview):
    """Log the loss on masked patches and, for an invertible target, PSNR and SSIM; each image has a fixed mask.

    Args:
        read: yields batches, see `own_batches`; the next readable image replaces a damaged one.
        preview: (number of images in the picture, channels to show).
    """
    model.eval()
    sums, total, damaged = Counter(), Counter(), []
    for batch in read(dataset, indices):
        loss, *pictures = reconstruct(run.accelerator, model, batch, normalize, teacher)
        sums.update({"images": len(batch.images), "val_loss": loss.item() * len(batch.images)})
        sums.update(sum_reconstruction_metrics(*pictures) if pictures else {})
        damaged += [(dataset.source.name(index), reason) for index, reason in batch.damaged]
    run.note_damage(damaged)
    for part in run.crew.gather([sums]):
        total.update(part)
    num_images, num_scored = total.pop("images"), total.pop("count", 0)
    metrics = {name: total[name] / (num_images if name == "val_loss" else num_scored) for name in sorted(total)}

    count, channels = preview
    if count and model.target.invertible and run.is_main_process:
        rows = [(FIXED_EPOCH, indices[i]) for i in spread(count, len(indices))]
        _, *pictures = reconstruct(run.accelerator, model, dataset.__getitems__(rows), normalize)
        path = run.folder / "reconstructions" / f"step_{run.step:08d}.png"
        reconstruction_grid(
            path,
            *pictures[:3],
            title=f"step {run.step}, epoch {run.epoch:.4g}",
            uses_true_patch_statistics=model.target.uses_true_patch_statistics,
            channels=channels,
        )
        run.progress.picture(path, "reconstructions", run.step)
    text = f"epoch {run.epoch:.4g}: validation loss {metrics['val_loss']:.4f}"
    if "masked_psnr" in metrics:
        baseline = f"(visible mean: {metrics['masked_psnr_visible_mean']:.2f} dB)"
        baseline = TRUE_STATISTICS if model.target.uses_true_patch_statistics else baseline
        text += f", masked patches {metrics['masked_psnr']:.2f} dB {baseline}"
    run.record(metrics, text)
    model.train()


@torch.no_grad()
def features_of(accelerator, model, images, normalize):
    """Return the mean-pooled patch tokens of the unmasked encoder: (B, C, H, W) -> (B, D)."""
    with accelerator.autocast():
        tokens = model.encoder.forward_features(normalize(images.to(accelerator.device, non_blocking=True)))
    return model.encoder.split(tokens)[1].float().mean(dim=1)


def measure_features(run, model, datasets, normalize, *, read, most):
    """Log RankMe of the encoder's features and, with labels, the accuracies of k-NN and of a linear classifier.

    Args:
        datasets: the training and the validation dataset; without labels, only the training dataset.
        most: maximum number of images of each, evenly spread; None for all.
    """
    model.eval()
    embed = partial(features_of, run.accelerator, model, normalize=normalize)
    options = dict(width=model.encoder.embed_dim, read=read, most=most)
    classes = datasets[0].source.classes if len(datasets) > 1 else []
    labels = [labels_in(dataset.source, classes) if classes else None for dataset in datasets]
    features = [own_features(run, embed, *pair, **options) for pair in zip(datasets, labels, strict=True)]
    model.train()
    metrics, text = score_features(*features, num_classes=len(classes), crew=run.crew)
    run.record(metrics, f"epoch {run.epoch:.4g}: {text}")


def export(model, folder, **statistics):
    """Write the encoder into a folder, and the whole autoencoder into its subfolder pretraining/."""
    export_encoder(model.encoder, folder, **statistics)
    export_autoencoder(model, folder / "pretraining", **statistics)


def fit_components(model, dataset, normalize, *, device, read):
    """Compute the principal components to predict from 500 images, equally on all processes; once per run."""
    if model.target.components.any():  # loaded from the checkpoint or --init_from
        return
    # Batches do not depend on the micro-batch: the order of sums determines directions without variance
    batches = read(dataset, spread(500, len(dataset)), batch_size=50, process_index=0, num_processes=1, watch=iter)
    side = model.encoder.patch_size
    model.target.fit(normalize.patches(patchify(batch.images.to(device), side)) for batch in batches)


@put_back()
def main(argv=None):
    """Run the script; see the module's docstring."""
    args, errors = parse_args(argv)
    run = Run(args, errors)  # processes, signals, the locked folder, the checkpoint to resume; bad flags end here

    # Data, plan, model and weights: run.gate() prints all errors; a block that depends on a failed one is skipped
    with run.refusing(InputError, DataError):
        known = ImageFormat.from_dict(run.previous) or ImageFormat.from_dict(read_statistics(args.path_to_data))
        images = resolve_images(ImageFormat.from_dict(vars(args)), known=known)
        validity = pretraining.resolve_validity(args.validity, args.target, images.nodata, run.previous)
        pixels = PixelFormat(images.input_channels, images.value_range, images.nodata, args.max_pixels, validity)
    with run.refusing(InputError):
        shown_channels = args.preview_channels or preview_channels(pixels)
        check(check_preview(shown_channels, pixels.channels))
        check(pretraining.check_components(args.num_components, args.patch_size**2 * pixels.channels))
        num_components = args.num_components
    with run.refusing(DataError):
        places = dict(validation=args.path_to_validation_data, cache=args.cache_dir, data_format=args.data_format)
        train_source, validation_source = open_sources(args.path_to_data, pixels, **places)
        has_labels = bool(validation_source and (train_source.classes or train_source.label_errors))
        if args.knn_every and has_labels:
            check_labels(args.path_to_data, train_source, validation_source)
    with run.refusing(InputError):
        views, check_batch = args.repeated_augmentation, partial(pretraining.check_views, args.repeated_augmentation)
        run.plan_steps(len(train_source) * views, check_batch, recipe_epochs=(WARMUP_EPOCHS, EPOCHS))
        stages = pretraining.plan_stages(args.img_size_schedule, args.img_size, run.plan.length.total_steps)
    with run.refusing(WeightsError, flag="--teacher"):
        shape = dict(grid=[side // args.patch_size for side in args.img_size], in_channels=pixels.channels)
        teacher = args.teacher and open_teacher(args.teacher, value_range=pixels.value_range, **shape).to(run.device)
        if teacher:
            run.accelerator.print(f"--teacher {args.teacher}: {teacher.description}")
    with run.refusing(InputError, WeightsError, flag="--init_from"):
        torch.manual_seed(args.seed)
        encoder_args = {name: getattr(args, flag) for name, flag in ENCODER_FLAGS.items()}
        encoder_args |= dict(img_size=tuple(args.img_size), in_channels=pixels.channels)
        decoder_args = {name: getattr(args, flag) for name, flag in DECODER_FLAGS.items()}
        if args.decoder == "cross":
            decoder_args["inputs"] = args.decoder_inputs
        options = {name: getattr(args, name) for name in MODEL_FLAGS}
        width = teacher.width if teacher else num_components
        model = build_model(encoder_args, decoder_args, kind=args.decoder, width=width, **options)
        model.encoder.gradient_checkpointing = run.gradient_checkpointing
        if args.init_from and not run.checkpoint:
            check_outside(args.init_from, run.folder)
            weights = open_weights(args.init_from, whole=True)
            channels = dict(adapt_channels=args.adapt_channels, mean=images.mean, std=images.std)
            report = start_from(weights, model, **channels)
            run.accelerator.print(f"--init_from {weights.path}: {report}")
    run.gate()
    resolved = dict(images._asdict(), preview_channels=shown_channels, validity=validity)
    resolved["teacher"] = teacher and f"sha256 {teacher.fingerprint()}"
    run.compare(resolved, train_source, validation_source, defaults=vars(parse_args([])[0]))
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)
    normalize = Normalization(images.mean, images.std, run.device)
    step_options = dict(normalize=normalize, teacher=teacher, pixels=pixels)

    # Optimizer
    decay = dict(bias_weight_decay=args.bias_weight_decay, norm_weight_decay=args.norm_weight_decay)
    optimizer = build_optimizer(model, args.optimizer, args.weight_decay, **decay)
    if args.micro_batch_size == "auto":
        try_step = partial(empty_step, run.accelerator, **step_options)
        run.fit_micro_batch(try_step, model, optimizer)
    masks = dict(mask_strategy=args.mask_strategy, mask_block=args.mask_block)
    run.print_plan(pretraining.describe_model(model, stages, validity=validity, **masks), images, views=views)
    new_data = partial(build_dataset, model=model, pixels=pixels, **masks)
    model, optimizer = run.prepare(model, optimizer)
    run.prepare_sources()
    if run.needs_warm_up:
        empty_step(run.accelerator, model, optimizer, run.batch.micro, **step_options)
    run.resume({"data": describe_data(train_source, validation_source)})

    # Batches
    size = tuple(args.img_size)
    crops = [RandomCrop(stage.size, tuple(args.crop_scale), args.fast_decoding) for stage in stages]
    train_data = {crop.size: new_data(train_source, crop, seed=args.seed) for crop in crops}

    def load(stage):
        sampler = StepSampler(len(train_source), views=views, **run.sampling | dict(steps=stage.steps))
        check_room = dict(largest=train_data[size], check=stage.steps.start <= run.start_step)  # once, at the start
        return training_batches(train_data[stage.size], sampler, **check_room, **run.loading)

    batches = run.timed(pretraining.staged_batches(stages, load, run.start_step, run.rehearsal))
    read = partial(own_batches, batch_size=min(run.batch.micro, 256), **run.reading)
    validation_data = new_data(validation_source or train_source, CentreCrop(size))
    indices = range(len(validation_source)) if validation_source else spread(1000, len(train_source))
    evaluation = dict(teacher=teacher, read=read, preview=(args.num_preview_images, shown_channels))
    if args.target == "pca":
        fit_components(run.accelerator.unwrap_model(model), train_data[size], normalize, device=run.device, read=read)

    # Loop
    lr_at, steps_per_epoch = partial(learning_rate_at, **run.plan.schedule), run.plan.length.steps_per_epoch
    model.train()
    for step in run.steps:  # completed optimizer steps
        if run.is_due(step, args.validate_every * steps_per_epoch, "val_loss"):
            with run.paused():
                evaluate(run, run.plain_model(), validation_data, indices, normalize, **evaluation)
        if args.knn_every and run.is_due(step, max(1, round(args.knn_every * steps_per_epoch)), "rankme"):
            with run.paused():
                sources = map(keep_labelled, run.sources) if has_labels else run.sources[:1]
                data = [new_data(source, CentreCrop(size, CROP_RATIO)) for source in sources]  # as encoder/ crops
                measure_features(run, run.plain_model(), data, normalize, read=read, most=args.knn_images)
        if step == run.plan.length.total_steps:
            break
        set_learning_rate(optimizer, lr_at(step))
        loss, grad_norm, damaged = optimizer_step(
            run.accelerator, model, optimizer, batches, normalize, max_grad_norm=args.max_grad_norm, teacher=teacher
        )
        run.completed(step + 1, loss, grad_norm, damaged)  # logs, saves, raises Stopped if the run is asked to stop

    # Finish
    trained, folder = run.plain_model(), run.folder / "encoder"
    if run.is_main_process:
        statistics = dict(mean=images.mean, std=images.std, value_range=images.value_range)
        replace_folder(folder, partial(export, trained, **statistics))
    pictures = f", pictures in {run.folder / 'reconstructions'}" if trained.target.invertible else ""
    results = f"{run.folder / 'metrics.json'}{pictures}.{loading_commands(trained.encoder, folder)}"
    run.end(results, uses_true_patch_statistics=trained.target.uses_true_patch_statistics)


if __name__ == "__main__":
    run_script(main)
