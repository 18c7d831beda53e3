"""Pre-trains a masked autoencoder (He et al. 2021).

    accelerate launch pretrain_mae.py @recipes/quickstart/pretrain.args

prints its plan, then a bar with the loss; writes work_dir/EXPERIMENT_NAME/ with log.jsonl, checkpoints/,
reconstructions/ (look at them), and at the end metrics.json and encoder/, which transformers, timm and the fine-tuning
scripts load. Kill it at any moment: the same command with --resume_from_checkpoint auto continues it exactly.
"""

import argparse
import contextlib
import copy
import math
from collections import Counter
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from data.batches import FIXED_EPOCH, Normalization, PretrainingBatch, PretrainingDataset, make_loader, own_batches
from data.decode import PixelFormat, preview_channels
from data.index import DataError
from data.masking import MASK_STRATEGIES
from data.sampling import StepSampler, model_seed
from data.sources import describe_data, find_statistics, open_sources
from data.transforms import empty_images
from modeling.export import export_autoencoder, export_encoder
from modeling.files import WeightsError, find_weights, read_state_dict, read_stored
from modeling.mae import MaskedAutoencoder
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import load_weights
from training import arguments, launch
from training.arguments import integer, number, one_of
from training.checkpoint import (
    RunFolder,
    claim_run_folder,
    compare_with_run,
    load_training,
    note_start,
    save_training,
    write_json,
)
from training.launch import fail
from training.memory import fit_micro_batch
from training.metrics import knn_vote, linear_sums, linear_vote, nearest, reconstruction_metrics
from training.optimizer import adamw, parameter_groups, set_learning_rate
from training.pictures import reconstruction_grid
from training.plan import describe_run, needed_memory, plan_run, rehearse
from training.processes import Crew, start_accelerator
from training.progress import DamagedImages, Progress, truncate_log
from training.publish import Publisher, check_hub, check_token
from training.schedule import is_due, learning_rate_at
from training.sharding import prepare, resolve_sharding
from training.trackers import finish_trackers, start_trackers
from training.wording import in_bytes, several

DEFAULT_WARMUP_EPOCHS = 40
EVALUATION_CROP_RATIO = 0.875  # that of encoder/preprocessor_config.json


def parse_args(argv=None):
    """The flags, resolved as far as they can be without processes and data, and what is wrong with them."""
    parser = arguments.Parser(__doc__)
    arguments.add_run_flags(parser, name="pretrain_mae")
    arguments.add_length_flags(parser, epochs=800, warmup=DEFAULT_WARMUP_EPOCHS)
    arguments.add_batch_flags(parser)
    arguments.add_optimizer_flags(parser, base_learning_rate=1.5e-4, weight_decay=0.05)
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, interval=10)
    arguments.add_hub_flags(parser)

    arguments.add_image_flags(parser)
    arguments.add_crop_flags(parser, crop_scale=(0.2, 1.0))
    arguments.add_encoder_flags(parser, sizes=SIZES)

    flag = parser.add_argument_group("views and masks").add_argument
    flag(
        "--repeated_augmentation",
        type=integer(1),
        default=1,
        metavar="K",
        help="crops and masks of each image that is read, in one micro-batch; they count as images (default 1)",
    )
    flag("--mask_ratio", type=number(0, 1), default=0.75, help="share of patches that is removed (default 0.75)")
    flag("--mask_strategy", type=one_of(*MASK_STRATEGIES), default="random", help="random, block or grid")

    flag = parser.add_argument_group("decoder and target").add_argument
    flag("--decoder_embed_dim", type=integer(1), default=512, help="width (default 512)")
    flag("--decoder_depth", type=integer(1), default=8, help="number of blocks (default 8)")
    flag("--decoder_num_heads", type=integer(1), default=16, help="default 16")
    flag("--decoder_mlp_ratio", type=number(0.1), default=4.0, help="default 4")
    flag(
        "--init_from", metavar="PATH", help="start from a checkpoint of this project, the official MAE or transformers"
    )
    pair = partial(flag, action=argparse.BooleanOptionalAction, default=True)
    pair("--norm_pix_loss", help="predict pixels normalised per patch (default) or plain ones")
    pair(
        "--adapt_channels",
        default=False,
        help="sum or repeat the channels of --init_from to fit --input_channels (off)",
    )

    flag = parser.add_argument_group("validation").add_argument
    flag("--validate_every", type=integer(0), default=10, help="epochs between validations, 0 = at the end only")
    flag("--knn_every", type=integer(0), default=0, help="epochs between classifications by k-NN, 0 = none (default)")
    flag("--num_preview_images", type=integer(0), default=8, help="rows of the pictures (default 8)")
    arguments.add_preview_flag(flag)
    args, errors = parser.read(argv)

    args.model = args.model or "base"
    hub = dict(repository=args.hub_model_id, every=args.hub_every, private=args.hub_private)
    return args, errors + check_flags(args) + check_hub(args.push_to_hub, **hub)


def check_flags(args):
    """What is wrong with the flags of images, masks and model, a line each."""
    statistics, errors = find_statistics(args.path_to_data)
    errors += arguments.check_images(args, statistics) + arguments.check_crops(args)
    pixels = PixelFormat(args.input_channels, args.value_range)
    args.preview_channels = args.preview_channels or preview_channels(pixels)
    errors += arguments.check_preview(args.preview_channels, args.input_channels)
    if args.adapt_channels and not args.init_from:
        errors.append(
            "--adapt_channels converts the weights of --init_from, which is missing; give it or leave this out"
        )
    errors += arguments.check_encoder(args, SIZES[args.model])
    height, width = args.img_size
    if not height % args.patch_size and not width % args.patch_size:
        num_patches = (height // args.patch_size) * (width // args.patch_size)
        kept = int(num_patches * (1 - args.mask_ratio))
        if not 0 < kept < num_patches:
            errors.append(
                f"--mask_ratio {args.mask_ratio:g} keeps {kept} of {num_patches} patches; "
                "take a ratio that keeps and removes at least one"
            )
    return errors + arguments.check_width("decoder", args.decoder_embed_dim, args.decoder_num_heads)


def build_model(args):
    """The masked autoencoder that the flags describe."""
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
    return MaskedAutoencoder(
        encoder,
        decoder_embed_dim=args.decoder_embed_dim,
        decoder_depth=args.decoder_depth,
        decoder_num_heads=args.decoder_num_heads,
        decoder_mlp_ratio=args.decoder_mlp_ratio,
        mask_ratio=args.mask_ratio,
        norm_pix_loss=args.norm_pix_loss,
        custom_weight_init=args.custom_weight_init,
    )


def open_data(args, pixels):
    """The training and validation images, the latter None where there are none, and what is wrong with them."""
    try:
        if not args.path_to_data:
            return None, None, []  # which is an error already
        places = dict(validation=args.path_to_validation_data, cache=args.cache_dir)
        train_source, validation_source = open_sources(args.path_to_data, pixels, **places)
    except DataError as error:
        return None, None, str(error).splitlines()
    errors = check_labels(args.path_to_data, train_source, validation_source) if args.knn_every else []
    return train_source, validation_source, errors


def check_labels(path_to_data, train_source, validation_source):
    """What keeps held-out images from being classified by their neighbours, a line each."""
    if validation_source is None:
        return [f"--knn_every needs held-out images, and {path_to_data} holds none back; leave the flag out"]
    if not train_source.classes or not validation_source.classes:
        return [
            f"--knn_every needs labels, and {path_to_data} has images without a class; expected train/CLASS/IMAGE and "
            "val/CLASS/IMAGE, or a column `label`; leave the flag out"
        ]
    strange = sorted({*validation_source.classes} - {*train_source.classes})
    if strange:
        return [
            f"--knn_every needs the classes of val/ in train/, and {path_to_data} lacks {len(strange)} of them there "
            f"({', '.join(strange[:3])}{', ...' if strange[3:] else ''}); leave the flag out"
        ]
    return []


def with_labels(train_source, validation_source, **options):
    """The bank of a classification by neighbours, and its queries: (dataset, indices, labels in train's numbers)."""
    options.update(seed=0, train=False, crop_ratio=EVALUATION_CROP_RATIO)
    numbers = np.array([train_source.classes.index(name) for name in validation_source.classes])
    labels = (train_source.labels, numbers[validation_source.labels])
    return [
        (PretrainingDataset(source, **options), np.arange(len(source)), own_labels)
        for source, own_labels in zip((train_source, validation_source), labels, strict=True)
    ]


def start_from(path, model, *, adapt_channels, mean, std):
    """Loads the weights that `path` leads to, and says what became of them. Raises WeightsError."""
    path = find_weights(path, whole=True)
    stored = read_stored(path)
    options = dict(stored=stored, adapt_channels=adapt_channels, new_decoder=True)
    report = f"{path}: {load_weights(model, read_state_dict(path), **options)}"
    if stored.mean in (None, mean) and stored.std in (None, std):
        return report
    theirs, ours = (f"mean {numbers[0]} and std {numbers[1]}" for numbers in ((stored.mean, stored.std), (mean, std)))
    return f"{report}; they were trained with {theirs}, this run has {ours}; give --mean and --std to choose"


def describe_plan(args, model, batch, length, accelerator, memory, train_source, validation_source):
    """The resolved plan, printed before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    encoder_parameters = sum(p.numel() for p in model.encoder.parameters())
    grid = model.encoder.grid
    target = "pixels normalised per patch" if args.norm_pix_loss else "plain pixels"
    held_out = (
        f"{len(validation_source)} held out" if validation_source else "none held out: validated on some of these"
    )
    views = f", {args.repeated_augmentation} views of each" if args.repeated_augmentation > 1 else ""
    return "\n".join(
        [
            f"data       {args.path_to_data}: {len(train_source)} images (about "
            f"{in_bytes(train_source.size_in_bytes())}){views}, {held_out}",
            f"model      {args.encoder_embed_dim} x {args.encoder_depth} encoder, {args.decoder_embed_dim} x "
            f"{args.decoder_depth} decoder: {parameters / 1e6:.3g} M parameters ({encoder_parameters / 1e6:.3g} M "
            f"encoder), {model.training_flops() / 1e9:.3g} GFLOP per image and step",
            f"images     {args.img_size[0]} x {args.img_size[1]}, {several(args.input_channels, 'channel')}, "
            f"{grid[0] * grid[1]} patches of {args.patch_size}, {model.num_kept} kept ({args.mask_strategy}); "
            f"target: {target}",
            *describe_run(args, batch, length, accelerator, memory),
        ]
    )


def optimizer_step(model, optimizer, batches, normalize, seeds, *, accelerator, waiting, max_grad_norm):
    """One optimizer step over as many micro-batches as there are `seeds`: its loss and gradient norm, which stay on the
    device, and (index, reason) of damaged images."""
    loss, damaged = 0.0, []
    for seed in seeds:
        with waiting():
            batch = next(batches)
        with accelerator.accumulate(model):
            torch.manual_seed(seed)
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))
            with accelerator.autocast():
                noise = batch.noise.to(accelerator.device, non_blocking=True)
                micro_loss = model(images, noise, removed_only=True).loss
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
    noise = torch.zeros(plan.micro, math.prod(side // args.patch_size for side in args.img_size))
    options = dict(accelerator=accelerator, waiting=contextlib.nullcontext, max_grad_norm=args.max_grad_norm)
    batches = repeat(PretrainingBatch(images, noise, []))
    optimizer_step(model, optimizer, batches, normalize, [0] * plan.accumulation, **options)


def find_micro_batch(args, model, plan, memory, normalize, *, pixels, accelerator, **options):
    """`plan` in the largest micro-batches that fit into memory; `options` are those of `fit_micro_batch`."""

    def try_step(size):
        copied = copy.deepcopy(model)
        optimizer = adamw(parameter_groups(copied, args.weight_decay), betas=(0.9, 0.95))
        one = plan._replace(per_process=size, micro=size)
        empty_step(args, copied, optimizer, one, normalize, pixels=pixels, accelerator=accelerator)

    options |= dict(allowed=lambda size: size % args.repeated_augmentation == 0, accelerator=accelerator)
    plan = fit_micro_batch(plan, memory, try_step, **options)
    args.micro_batch_size, args.gradient_accumulation_steps = plan.micro, plan.accumulation
    return plan


@torch.no_grad()
def evaluate(model, dataset, indices, normalize, step, *, read, accelerator, crew, progress, previews, folder, damage):
    """Logs and returns means over the images `indices`, each once under its fixed mask: the masked loss, PSNR and SSIM,
    named as in metrics.json. Draws a picture of some into `folder`, (number of them, channels) being `previews`;
    appends to `damage`.

    Returns None where the run is asked to stop meanwhile; resumed, it validates this step again.
    """
    with progress.paused():
        model.eval()
        sums, total = Counter(), Counter()
        for batch in read(dataset, indices):
            loss, images, prediction, mask = reconstruct(model, batch, normalize, accelerator)
            sums.update({"count": len(images), "val_loss": loss.item() * len(images)})
            for name, value in reconstruction_metrics(images, prediction, mask).items():
                sums[name] += value.cpu().double().sum().item()
            damage += [(dataset.source.name(index), reason) for index, reason in batch.damaged]
        if crew.wanted():
            model.train()
            return None
        for part in crew.gather([sums]):
            total.update(part)
        values = {name: total[name] / total["count"] for name in sorted(total) if name != "count"}

        epoch = step / progress.steps_per_epoch
        num_previews, channels = previews
        if num_previews and accelerator.is_main_process:
            chosen = [(FIXED_EPOCH, indices[i]) for i in spread(num_previews, len(indices))]
            shown = dataset.__getitems__(chosen)
            _, images, prediction, mask = reconstruct(model, shown, normalize, accelerator)
            path = folder / f"step_{step:08d}.png"
            reconstruction_grid(
                path,
                images,
                prediction,
                mask,
                title=f"step {step}, epoch {epoch:.4g}",
                uses_true_patch_statistics=model.norm_pix_loss,
                channels=channels,
            )
            progress.picture(path, "reconstructions", step)
        # Last: what the log has is not measured again by a resumed run
        progress.write({"step": step, "epoch": epoch, **values})
        progress.say(
            f"epoch {epoch:.4g}: validation loss {values['val_loss']:.4f}, removed patches "
            f"{values['masked_psnr']:.2f} dB (visible mean: {values['masked_psnr_visible_mean']:.2f} dB)"
        )
        model.train()
    return values


@torch.no_grad()
def features_of(model, dataset, indices, labels, normalize, *, read, accelerator):
    """This process's share of the images `indices`, damaged ones left out: the mean of their patch tokens under the
    unmasked encoder (n, D), and their labels (n,)."""
    own = indices[accelerator.process_index :: accelerator.num_processes]
    features = torch.empty(len(own), model.encoder.embed_dim, device=accelerator.device)
    done, damaged = 0, set()
    for batch in read(dataset, indices):
        with accelerator.autocast():
            tokens = model.encoder.forward_features(normalize(batch.images.to(accelerator.device)))
        features[done : done + len(tokens)] = tokens[:, 1:].float().mean(dim=1)
        done += len(tokens)
        damaged.update(index for index, _ in batch.damaged)
    labels = torch.from_numpy(labels[own]).to(accelerator.device)
    if damaged:
        healthy = torch.tensor([i for i, index in enumerate(own) if index not in damaged], dtype=torch.long)
        features, labels = features[healthy], labels[healthy]
    return features, labels


def classify(model, bank, queries, normalize, step, *, read, accelerator, crew, progress):
    """Logs and returns how many of `queries` are classified rightly by the encoder's features, in percent: by their
    nearest neighbours in `bank`, and by the linear classifier that fits `bank` best in least squares.

    Both are (dataset, indices, labels). Every process searches its own share of the bank. Returns None where the run
    is asked to stop meanwhile.
    """
    with progress.paused():
        model.eval()
        num_classes = len(bank[0].source.classes)
        bank, bank_labels = features_of(model, *bank, normalize, read=read, accelerator=accelerator)
        queries, labels = features_of(model, *queries, normalize, read=read, accelerator=accelerator)
        model.train()
        if crew.wanted():
            return None
        queries, labels = torch.cat(crew.gather([queries.cpu()])), torch.cat(crew.gather([labels.cpu()]))
        sums = sum(crew.gather([linear_sums(bank, bank_labels, num_classes).cpu()]))
        counts = sum(crew.gather([torch.bincount(bank_labels, minlength=num_classes).cpu()]))
        k = min(200, int(counts[counts > 0].min()))
        similarity, classes = nearest(bank, bank_labels, queries.to(bank.device), k)  # in this process's share
        similarity, classes = (torch.cat(crew.gather([part.cpu()]), dim=1) for part in (similarity, classes))
        similarity, order = similarity.topk(k)
        by_neighbours = knn_vote(similarity, classes.gather(1, order), num_classes)
        by_line = linear_vote(sums, queries)
        values = {
            "knn_top1": 100 * (by_neighbours == labels).double().mean().item(),
            "linear_top1": 100 * (by_line == labels).double().mean().item(),
        }
        epoch = step / progress.steps_per_epoch
        progress.write({"step": step, "epoch": epoch, **values})
        progress.say(
            f"epoch {epoch:.4g}: {values['knn_top1']:.2f} % right by {k} nearest neighbours, "
            f"{values['linear_top1']:.2f} % by a linear classifier"
        )
    return values


def reconstruct(model, batch, normalize, accelerator):
    """A batch's loss, its images and predictions (B, C, H, W) in [0, 1], and masks (B, 1, H, W)."""
    images, noise = normalize(batch.images.to(accelerator.device)), batch.noise.to(accelerator.device)
    with accelerator.autocast():
        loss, prediction, mask = model.forward(images, noise)  # not compiled: sizes vary
    prediction = normalize.undo(model.reconstruct(images, prediction))
    return loss, normalize.undo(images), prediction, model.pixel_mask(mask)


def spread(count, total):
    """At most `count` indices, evenly spread over `total`."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def finish(folder, model, metrics, **statistics):
    """Writes the run's results: encoder/, the whole autoencoder below it, and metrics.json. `statistics` are those that
    `export_encoder` takes."""
    encoder = folder / "encoder"
    export_encoder(model.encoder, encoder, **statistics)
    export_autoencoder(model, encoder / "pretraining", **statistics)
    write_json(folder / "metrics.json", {**metrics, "uses_true_patch_statistics": model.norm_pix_loss})
    print(
        f"finished: {folder / 'metrics.json'}, pictures in {folder / 'reconstructions'}. Use the encoder:\n"
        f"  python -c \"import timm; timm.create_model('local-dir:{encoder}', pretrained=True)\"\n"
        f"  python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{encoder}')\""
    )


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
    errors += found
    errors += check_token() if args.push_to_hub else []
    start_step = saved.get("step", 0)

    # Data, and the plan that follows from its size
    pixels = PixelFormat(args.input_channels, args.value_range, args.nodata, args.max_pixels)
    train_source, validation_source, found = open_data(args, pixels)
    errors += found
    fingerprints = [source.fingerprint() if source else None for source in (train_source, validation_source)]
    batch_plan, length, found = plan_run(
        args,
        num_samples=len(train_source) * args.repeated_augmentation if train_source else None,
        num_processes=accelerator.num_processes,
        held=saved.get("global_batch_size"),
        default_warmup_epochs=DEFAULT_WARMUP_EPOCHS,
    )
    errors += found
    if batch_plan.micro % args.repeated_augmentation:
        errors.append(
            f"--repeated_augmentation {args.repeated_augmentation} does not divide the micro-batch of "
            f"{batch_plan.micro} images; give a batch and micro-batch that are multiples of it"
        )
    if checkpoint:
        errors += compare_with_run(checkpoint, vars(args), fingerprints[0], defaults=vars(parse_args([])[0]))

    # Model
    torch.manual_seed(args.seed)
    try:
        model = build_model(args)
        if args.init_from and not checkpoint:
            options = dict(adapt_channels=args.adapt_channels, mean=args.mean, std=args.std)
            accelerator.print(f"--init_from {start_from(args.init_from, model, **options)}")
    except WeightsError as error:
        errors.append(f"--init_from {error}")
    except ValueError:  # impossible sizes
        if not errors:
            raise
    errors = crew.gather(errors) or crew.differences(vars(args), fingerprints)
    if errors:
        fail(errors, show=accelerator.is_main_process)
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)
    normalize = Normalization(args.mean, args.std, device)
    statistics = dict(mean=args.mean, std=args.std, value_range=args.value_range)
    sample_options = dict(
        img_size=tuple(args.img_size),
        pixels=pixels,
        grid=model.encoder.grid,
        num_kept=model.num_kept,
        mask_strategy=args.mask_strategy,
        crop_scale=tuple(args.crop_scale),
        fast=args.fast_decoding,
    )

    # Optimizer
    lr_at = partial(
        learning_rate_at,
        peak=args.learning_rate,
        total_steps=length.total_steps,
        warmup_steps=length.warmup_steps,
        minimum=args.min_learning_rate,
    )
    decay = dict(bias_weight_decay=args.bias_weight_decay, norm_weight_decay=args.norm_weight_decay)
    groups = parameter_groups(model, args.weight_decay, **decay)
    optimizer = adamw(groups, betas=(0.9, 0.95))
    half = args.mixed_precision != "no"
    memory = needed_memory(model, model.activation_bytes(half_precision=half), accelerator)
    if args.micro_batch_size == "auto":
        options = dict(held=saved.get("micro_batch_size"), pixels=pixels, accelerator=accelerator, crew=crew)
        batch_plan = find_micro_batch(args, model.to(device), batch_plan, memory, normalize, **options)
    accelerator.gradient_accumulation_steps = batch_plan.accumulation
    sources = train_source, validation_source
    accelerator.print(describe_plan(args, model, batch_plan, length, accelerator, memory, *sources))

    # Prepare
    model, optimizer, plain_model = prepare(accelerator, model, optimizer)
    for source in (train_source, validation_source):
        if source:
            source.prepare(processes=args.num_workers or 1, progress=accelerator.is_main_process)

    # Resume
    measured = [{}]
    if accelerator.is_main_process and not args.dry_run:
        folder.clear_beyond(start_step)
        told = {"flags": vars(args), "data": describe_data(train_source, validation_source)}
        note_start(folder.path, told, start_step, accelerator.num_processes, fresh=checkpoint is None)
        measured = [truncate_log(folder.path, start_step)]
    (measured,) = broadcast_object_list(measured)  # after `start_step`, before the run was interrupted
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
    train_data = PretrainingDataset(train_source, seed=args.seed, train=True, **sample_options)
    sampler = StepSampler(
        len(train_source),
        global_batch_size=batch_plan.global_size,
        micro_batch_size=batch_plan.micro,
        total_steps=2**40 if args.dry_run else length.total_steps,
        start_step=start_step,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        views=args.repeated_augmentation,
    )
    batches = iter(make_loader(train_data, sampler, num_workers=args.num_workers, pin_memory=args.pin_memory))
    save_every = args.save_checkpoint_steps or math.ceil(args.save_checkpoint_interval * length.steps_per_epoch)
    repository = args.hub_model_id if accelerator.is_main_process else None
    push_every = args.hub_every * length.steps_per_epoch
    publisher = Publisher(folder.path, repository, every=push_every, private=args.hub_private)
    options = dict(total_steps=length.total_steps, steps_per_epoch=length.steps_per_epoch, log_every=args.log_every)
    options |= dict(global_batch_size=batch_plan.global_size, start_step=start_step, seconds=saved.get("seconds", 0.0))
    progress = Progress(accelerator, folder.path, **options)

    def train(step):
        first = sampler.first_position
        positions = range(first, first + batch_plan.per_process, batch_plan.micro)
        return optimizer_step(
            model,
            optimizer,
            batches,
            normalize,
            [model_seed(args.seed, step, position) for position in positions],
            accelerator=accelerator,
            waiting=progress.waiting,
            max_grad_norm=args.max_grad_norm,
        )

    model.train()
    if args.dry_run:
        read_ahead = math.ceil(2 * args.num_workers / batch_plan.accumulation)
        left_out = "validation, k-NN and saving" if args.knn_every else "validation and saving"
        rehearse(train, crew, progress, read_ahead=read_ahead, left_out=left_out)
        accelerator.end_training()
        return
    num_images = len(train_source) + (len(validation_source) if validation_source else 0)
    damaged_images = DamagedImages(
        folder.path, num_images, is_main_process=accelerator.is_main_process, replace=args.on_damaged == "replace"
    )
    new_damage = []
    read = partial(
        own_batches,
        batch_size=min(batch_plan.micro, 256),
        num_workers=args.num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        stop=crew.wanted,
    )
    shared = dict(read=read, accelerator=accelerator, crew=crew, progress=progress)
    validation_data = PretrainingDataset(validation_source or train_source, seed=0, train=False, **sample_options)
    held_out = range(len(validation_source)) if validation_source else spread(1000, len(train_source))
    bank_and_queries = with_labels(train_source, validation_source, **sample_options) if args.knn_every else None

    def validate(step):
        """The metrics that are due after `step` steps, or None where the run is asked to stop meanwhile."""
        values, last = dict(measured) if step == start_step else {}, step == length.total_steps
        if (last or is_due(step, args.validate_every * length.steps_per_epoch)) and "val_loss" not in values:
            previews = args.num_preview_images, args.preview_channels
            pictures = dict(previews=previews, folder=folder.path / "reconstructions")
            found = evaluate(
                plain_model(), validation_data, held_out, normalize, step, damage=new_damage, **pictures, **shared
            )
            if found is None:
                return None
            values.update(found)
        if (
            args.knn_every
            and (last or is_due(step, args.knn_every * length.steps_per_epoch))
            and "knn_top1" not in values
        ):
            found = classify(plain_model(), *bank_and_queries, normalize, step, **shared)
            if found is None:
                return None
            values.update(found)
        return values

    def save(step):
        with progress.paused(), crew.saving():
            damaged_images.add(crew.gather(new_damage))
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
            damaged_images.add(crew.gather(new_damage))
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
    damaged_images.add(crew.gather(new_damage))
    progress.close()
    trained = plain_model()
    if accelerator.is_main_process:
        run = {
            "step": step,
            "epoch": step / length.steps_per_epoch,
            "seconds": round(progress.seconds, 1),
            "images_per_second": round(step * batch_plan.global_size / progress.seconds, 2),
        }
        finish(folder.path, trained, {**run, **metrics}, **statistics)
    finish_trackers(accelerator)
    accelerator.end_training()
    publisher.finish(stop=lambda: bool(crew.signal_name))  # last of all: no other process waits for it


if __name__ == "__main__":
    launch.run_script(main)
