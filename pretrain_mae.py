"""Pre-trains a masked autoencoder (He et al. 2021).

    accelerate launch pretrain_mae.py @recipes/quickstart/pretrain.args

prints its plan, then a bar with the loss; writes work_dir/EXPERIMENT_NAME/ with log.jsonl, checkpoints/,
reconstructions/ (look at them), and at the end metrics.json and encoder/, which transformers, timm and the fine-tuning
scripts load. Kill it at any moment: the same command with --resume_from_checkpoint auto continues it exactly.
"""

import argparse
import math
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.batches import FIXED_EPOCH, Normalization, PretrainingDataset, make_loader
from data.masking import MASK_STRATEGIES
from data.sampling import StepSampler, model_seed
from data.sources import DataError, open_sources
from modeling.export import export_autoencoder, export_encoder
from modeling.mae import MaskedAutoencoder
from modeling.vit import SIZES, VisionTransformer
from training import arguments
from training.arguments import RunError, fail, integer, number, one_of
from training.checkpoint import (
    RunFolder,
    compare_with_run,
    describe_environment,
    load_training,
    read_state,
    save_training,
    write_json,
)
from training.metrics import reconstruction_metrics
from training.optimizer import adamw, parameter_groups, set_learning_rate
from training.pictures import reconstruction_grid
from training.progress import DamagedImages, Progress, start_wandb, truncate_log
from training.schedule import learning_rate_at
from training.stopping import Crew

DEFAULT_WARMUP_EPOCHS = 40


def parse_args(argv=None):
    """The flags, resolved as far as they can be without processes and data, and what is wrong with them."""
    parser = arguments.Parser(__doc__)
    arguments.add_run_flags(parser, name="pretrain_mae")
    arguments.add_length_flags(parser, epochs=800, warmup_epochs=DEFAULT_WARMUP_EPOCHS)
    arguments.add_batch_flags(parser)
    arguments.add_optimizer_flags(parser, base_learning_rate=1.5e-4, weight_decay=0.05)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, interval=10)

    flag = parser.add_argument_group("images and masks").add_argument
    flag("--img_size", type=integer(1), nargs="+", default=[224], metavar="H [W]", help="pixels (default 224)")
    flag("--input_channels", type=integer(1), default=3, help="3 (colour) or 1 (grey) (default 3)")
    flag("--mean", type=number(), nargs="+", help="channel means of images in [0, 1] (default ImageNet's)")
    flag("--std", type=number(1e-6), nargs="+", help="channel deviations of images in [0, 1] (default ImageNet's)")
    flag("--mask_ratio", type=number(0, 1), default=0.75, help="share of patches that is removed (default 0.75)")
    flag("--mask_strategy", type=one_of(*MASK_STRATEGIES), default="random", help="random, block or grid")

    flag = parser.add_argument_group("model").add_argument
    flag("--model", type=one_of(*SIZES), default="base", help=f"{', '.join(SIZES)}: sets the four encoder flags")
    flag("--patch_size", type=integer(1), help="pixels (default 16; huge: 14)")
    flag("--encoder_embed_dim", type=integer(1), help="width; this and the next two override --model")
    flag("--encoder_depth", type=integer(1), help="number of blocks")
    flag("--encoder_num_heads", type=integer(1))
    flag("--encoder_mlp_ratio", type=number(0.1), default=4.0, help="hidden width of the MLPs / width (default 4)")
    flag("--decoder_embed_dim", type=integer(1), default=512, help="width (default 512)")
    flag("--decoder_depth", type=integer(1), default=8, help="number of blocks (default 8)")
    flag("--decoder_num_heads", type=integer(1), default=16, help="default 16")
    flag("--decoder_mlp_ratio", type=number(0.1), default=4.0, help="default 4")
    flag("--drop_path", type=number(0, 0.99), default=0.0, help="stochastic depth rate of the last block (default 0)")
    pair = partial(flag, action=argparse.BooleanOptionalAction, default=True)
    pair("--norm_pix_loss", help="predict pixels normalised per patch (default) or plain ones")
    pair("--custom_weight_init", help="initialise as the paper does (default) or as PyTorch does")

    flag = parser.add_argument_group("validation").add_argument
    flag("--validate_every", type=integer(0), default=10, help="epochs between validations, 0 = at the end only")
    flag("--num_preview_images", type=integer(0), default=8, help="rows of the pictures (default 8)")
    args, errors = parser.read(argv)

    size = SIZES[args.model]
    args.patch_size = args.patch_size or size["patch_size"]
    args.encoder_embed_dim = args.encoder_embed_dim or size["embed_dim"]
    args.encoder_depth = args.encoder_depth or size["depth"]
    args.encoder_num_heads = args.encoder_num_heads or size["num_heads"]
    imagenet = args.input_channels == 3
    args.mean = args.mean or ([0.485, 0.456, 0.406] if imagenet else [0.5] * args.input_channels)
    args.std = args.std or ([0.229, 0.224, 0.225] if imagenet else [0.5] * args.input_channels)
    return args, errors + check_flags(args)


def check_flags(args):
    """What is wrong with the flags of images, masks and model, a line each; --img_size becomes [H, W]."""
    errors = []
    if not args.path_to_data:
        errors.append("--path_to_data is missing; give a folder of images or builtin:shapes")
    if args.input_channels not in (1, 3):
        errors.append(f"--input_channels {args.input_channels} is not supported; expected 3 (colour) or 1 (grey)")
    for name in ("mean", "std"):
        if len(getattr(args, name)) != args.input_channels:
            errors.append(
                f"--{name} has {len(getattr(args, name))} values for {args.input_channels} channels; give one a channel"
            )
    if len(args.img_size) > 2:
        errors.append(f"--img_size {' '.join(map(str, args.img_size))} has more than two values; expected H or H W")
    args.img_size = (args.img_size * 2)[:2] if len(args.img_size) == 1 else args.img_size[:2]
    height, width = args.img_size
    if min(height, width) < 6:
        errors.append(f"--img_size {height} {width} is too small; expected at least 6 pixels a side")
    if height % args.patch_size or width % args.patch_size:
        errors.append(
            f"--img_size {height} {width} is not divided by --patch_size {args.patch_size}; "
            f"take multiples of {args.patch_size}"
        )
    else:
        num_patches = (height // args.patch_size) * (width // args.patch_size)
        kept = int(num_patches * (1 - args.mask_ratio))
        if not 0 < kept < num_patches:
            errors.append(
                f"--mask_ratio {args.mask_ratio:g} keeps {kept} of {num_patches} patches; "
                "take a ratio that keeps and removes at least one"
            )
    for part in ("encoder", "decoder"):
        dim, heads = getattr(args, f"{part}_embed_dim"), getattr(args, f"{part}_num_heads")
        if dim % heads:
            errors.append(
                f"--{part}_embed_dim {dim} is not divided by --{part}_num_heads {heads}; take a multiple of {heads}"
            )
        if dim % 4:
            errors.append(f"--{part}_embed_dim {dim} is not divided by 4, as its positions need; take a multiple of 4")
    return errors


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


def describe_plan(args, model, batch, length, accelerator, train_source, validation_source):
    """The resolved plan, printed before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    encoder_parameters = sum(p.numel() for p in model.encoder.parameters())
    grid = model.encoder.grid
    target = "pixels normalised per patch" if args.norm_pix_loss else "plain pixels"
    held_out = (
        f"{len(validation_source)} held out" if validation_source else "none held out: validated on some of these"
    )
    return "\n".join(
        [
            f"data       {args.path_to_data}: {len(train_source)} images, {held_out}",
            f"model      {args.encoder_embed_dim} x {args.encoder_depth} encoder, {args.decoder_embed_dim} x "
            f"{args.decoder_depth} decoder: {parameters / 1e6:.1f} M parameters ({encoder_parameters / 1e6:.1f} M "
            f"encoder), {model.training_flops() / 1e9:.3g} GFLOP per image and step",
            f"images     {args.img_size[0]} x {args.img_size[1]}, {args.input_channels} channels, "
            f"{grid[0] * grid[1]} patches of {args.patch_size}, {model.num_kept} kept ({args.mask_strategy}); "
            f"target: {target}",
            f"batch      {batch.global_size} = {accelerator.num_processes} processes x {batch.accumulation} "
            f"micro-batches x {batch.micro}",
            f"length     {length.total_steps} steps, {length.steps_per_epoch} an epoch, {length.warmup_steps} warmup",
            f"rate       {args.learning_rate:.3g} at its peak, cosine to {args.min_learning_rate:g}",
            f"precision  {args.mixed_precision.replace('no', 'float32')} on {accelerator.device}"
            + (f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""),
        ]
    )


def claim_run_folder(folder, wanted, accelerator):
    """Locks the run folder and finds the checkpoint to resume, on the main process: (its path or None, errors)."""
    found = [None, []]
    if accelerator.is_main_process:
        try:
            folder.lock()
            found[0] = folder.find(wanted)
        except RunError as error:
            found[1] = [str(error)]
    return broadcast_object_list(found)


@torch.no_grad()
def evaluate(
    model,
    dataset,
    normalize,
    step,
    *,
    accelerator,
    crew,
    progress,
    indices,
    batch_size,
    num_workers,
    num_previews,
    folder,
    damage,
):
    """Logs and returns means over the images `indices`, each once under its fixed mask: the masked loss, PSNR and SSIM,
    named as in metrics.json. Draws a picture of `num_previews` of them into `folder`; appends to `damage`.

    Returns None, at once, where the run is asked to stop meanwhile.
    """
    with progress.paused():
        model.eval()
        own = [(FIXED_EPOCH, index) for index in indices[accelerator.process_index :: accelerator.num_processes]]
        batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        loader = iter(make_loader(dataset, batches, num_workers=num_workers))
        sums, total = Counter(), Counter()
        for _ in range(math.ceil(len(indices) / accelerator.num_processes / batch_size)):  # the same on all processes
            if crew.wanted():  # the run stops; resumed, it validates this step again
                model.train()
                return None
            batch = next(loader, None)
            if batch is None:
                continue
            loss, images, prediction, mask = reconstruct(model, batch, normalize, accelerator)
            sums.update({"count": len(images), "val_loss": loss.item() * len(images)})
            for name, value in reconstruction_metrics(images, prediction, mask).items():
                sums[name] += value.cpu().double().sum().item()
            damage += [(dataset.source.name(index), reason) for index, reason in batch.damaged]
        for part in crew.gather([sums]):
            total.update(part)
        values = {name: total[name] / total["count"] for name in sorted(total) if name != "count"}

        epoch = step / progress.steps_per_epoch
        progress.write({"step": step, "epoch": epoch, **values})
        progress.say(
            f"epoch {epoch:.4g}: validation loss {values['val_loss']:.4f}, removed patches "
            f"{values['masked_psnr']:.2f} dB (visible mean: {values['masked_psnr_visible_mean']:.2f} dB)"
        )
        if num_previews and accelerator.is_main_process:
            chosen = [(FIXED_EPOCH, indices[i]) for i in spread(num_previews, len(indices))]
            shown = dataset.__getitems__(chosen)
            _, images, prediction, mask = reconstruct(model, shown, normalize, accelerator)
            reconstruction_grid(
                folder / f"step_{step:08d}.png",
                images,
                prediction,
                mask,
                title=f"step {step}, epoch {epoch:.4g}",
                uses_true_patch_statistics=model.norm_pix_loss,
            )
        model.train()
    return values


def reconstruct(model, batch, normalize, accelerator):
    """A batch's loss, its images and predictions (B, C, H, W) in [0, 1], and masks (B, 1, H, W)."""
    images, noise = normalize(batch.images.to(accelerator.device)), batch.noise.to(accelerator.device)
    with accelerator.autocast():
        loss, prediction, mask = model(images, noise)
    prediction = normalize.undo(model.reconstruct(images, prediction))
    return loss, normalize.undo(images), prediction, model.pixel_mask(mask)


def spread(count, total):
    """At most `count` indices, evenly spread over `total`."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def main(argv=None):
    """Runs the script; see the module's docstring."""
    # Accelerator, seed and run folder
    args, errors = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=arguments.resolve_precision(args.mixed_precision), log_with="wandb" if args.log_wandb else None
    )
    args.mixed_precision, device = accelerator.mixed_precision, accelerator.device
    if device.type == "cpu":
        arguments.use_all_cores()
    crew = Crew()
    folder = RunFolder(Path(args.working_directory) / args.experiment_name)
    checkpoint, found = claim_run_folder(folder, args.resume_from_checkpoint, accelerator)
    errors += found
    if args.num_workers is None:
        args.num_workers = min(32, arguments.cores_per_process())

    # Data, and the plan that follows from its size
    train_source = validation_source = None
    try:
        if args.path_to_data:
            train_source, validation_source = open_sources(args.path_to_data, args.input_channels)
    except DataError as error:
        errors.append(str(error))
    fingerprint = train_source.fingerprint() if train_source else None
    saved = read_state(checkpoint) if checkpoint else {}
    batch_plan, found = arguments.plan_batch(
        global_batch_size=args.global_batch_size,
        per_gpu_batch_size=args.per_gpu_batch_size,
        micro_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        held=saved.get("global_batch_size"),
    )
    errors += found
    args.global_batch_size, args.per_gpu_batch_size, args.micro_batch_size = batch_plan
    args.gradient_accumulation_steps = accelerator.gradient_accumulation_steps = batch_plan.accumulation
    if train_source:
        length, found = arguments.plan_length(
            epochs=args.epochs,
            max_steps=args.max_steps,
            warmup_epochs=args.warmup_epochs,
            warmup_steps=args.warmup_steps,
            default_warmup_epochs=DEFAULT_WARMUP_EPOCHS,
            num_samples=len(train_source),
            global_batch_size=batch_plan.global_size,
        )
        errors += found
        args.max_steps, args.warmup_steps = length.total_steps, length.warmup_steps
    if args.learning_rate is None:
        args.learning_rate = args.base_learning_rate * batch_plan.global_size / 256
    if args.min_learning_rate > args.learning_rate:
        errors.append(
            f"--min_learning_rate {args.min_learning_rate:g} is above the peak of {args.learning_rate:g}; "
            "take a lower one"
        )
    if checkpoint:
        errors += compare_with_run(checkpoint, vars(args), fingerprint)
    errors = crew.gather(errors)
    if errors:
        fail(errors, show=accelerator.is_main_process)
    if accelerator.is_main_process:
        folder.clear_beyond(saved.get("step", 0))
        if checkpoint is None:
            write_json(folder.path / "args.json", {"flags": vars(args), **describe_environment()})
    for source in (train_source, validation_source):
        if source:
            source.prepare(processes=args.num_workers or 1, progress=accelerator.is_main_process)

    # Model
    torch.manual_seed(args.seed)
    model = build_model(args)
    normalize = Normalization(args.mean, args.std, device)
    sample_options = dict(
        img_size=tuple(args.img_size),
        channels=args.input_channels,
        grid=model.encoder.grid,
        num_kept=model.num_kept,
        mask_strategy=args.mask_strategy,
    )
    validation_data = PretrainingDataset(validation_source or train_source, seed=0, train=False, **sample_options)

    # Optimizer
    lr_at = partial(
        learning_rate_at,
        peak=args.learning_rate,
        total_steps=length.total_steps,
        warmup_steps=length.warmup_steps,
        minimum=args.min_learning_rate,
    )
    groups = parameter_groups(
        model,
        args.weight_decay,
        bias_weight_decay=args.bias_weight_decay,
        norm_weight_decay=args.norm_weight_decay,
    )
    optimizer = adamw(groups, betas=(0.9, 0.95))
    accelerator.print(describe_plan(args, model, batch_plan, length, accelerator, train_source, validation_source))

    # Prepare
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)

    # Resume
    start_step = saved.get("step", 0)
    if checkpoint:
        load_training(checkpoint, accelerator, model, optimizer)
        accelerator.print(f"resuming from {checkpoint}, after step {start_step}")
    if accelerator.is_main_process:
        truncate_log(folder.path, start_step)
    if args.log_wandb:
        start_wandb(
            accelerator, folder.path, project=args.experiment_name, run_name=args.wandb_run_name, flags=vars(args)
        )
    accelerator.wait_for_everyone()

    # Loop
    train_data = PretrainingDataset(train_source, seed=args.seed, train=True, **sample_options)
    sampler = StepSampler(
        len(train_source),
        global_batch_size=batch_plan.global_size,
        micro_batch_size=batch_plan.micro,
        total_steps=length.total_steps,
        start_step=start_step,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    batches = iter(make_loader(train_data, sampler, num_workers=args.num_workers, pin_memory=args.pin_memory))
    save_every = args.save_checkpoint_steps or math.ceil(args.save_checkpoint_interval * length.steps_per_epoch)
    progress = Progress(
        accelerator,
        folder.path,
        total_steps=length.total_steps,
        steps_per_epoch=length.steps_per_epoch,
        global_batch_size=batch_plan.global_size,
        log_every=args.log_every,
        start_step=start_step,
        seconds=saved.get("seconds", 0.0),
    )
    num_images = len(train_source) + (len(validation_source) if validation_source else 0)
    damaged_images = DamagedImages(folder.path, num_images, is_main_process=accelerator.is_main_process)
    new_damage = []
    validate_every = args.validate_every * length.steps_per_epoch

    validate = partial(
        evaluate,
        plain_model,
        validation_data,
        normalize,
        accelerator=accelerator,
        crew=crew,
        progress=progress,
        indices=range(len(validation_source)) if validation_source else spread(1000, len(train_source)),
        batch_size=min(batch_plan.micro, 256),
        num_workers=args.num_workers,
        num_previews=args.num_preview_images,
        folder=folder.path / "reconstructions",
        damage=new_damage,
    )
    model.train()
    done = start_step
    for step in range(start_step, length.total_steps):
        if step and validate_every and step % validate_every == 0:
            validate(step)
        learning_rate = lr_at(step)
        set_learning_rate(optimizer, learning_rate)
        loss = 0.0
        for micro in range(batch_plan.accumulation):
            with progress.waiting():
                batch = next(batches)
            with accelerator.accumulate(model):
                torch.manual_seed(model_seed(args.seed, step, sampler.first_position + micro * batch_plan.micro))
                images = normalize(batch.images.to(device, non_blocking=True))
                output = model(images, batch.noise.to(device, non_blocking=True))
                accelerator.backward(output.loss)
                loss += output.loss.detach() / batch_plan.accumulation
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
                optimizer.step()
                optimizer.zero_grad()
            new_damage += [(train_source.name(index), reason) for index, reason in batch.damaged]
        done = step + 1
        logged = progress.step(done, loss, grad_norm, learning_rate)
        stopping = crew.wanted()
        saving = stopping or done == length.total_steps or (save_every and done % save_every == 0)
        if logged or saving:
            damaged_images.add(crew.gather(new_damage))
            new_damage.clear()
        if saving:
            with progress.paused():
                progress.check_finite()
                state = {
                    "step": done,
                    "epoch": done / length.steps_per_epoch,
                    "global_batch_size": batch_plan.global_size,
                    "data": fingerprint,
                    "seconds": progress.seconds,
                }
                save_training(folder, accelerator, crew, model, optimizer, state, keep=args.keep_checkpoints)
        if stopping:
            break

    # Evaluate
    values = None if crew.wanted() else validate(length.total_steps)
    if values is None:
        progress.say(
            f"stopped by {crew.signal_name or 'a signal'} after step {done}, which is saved; continue with "
            "--resume_from_checkpoint latest"
        )
        accelerator.end_training()
        return
    damaged_images.add(crew.gather(new_damage))
    progress.close()

    # Finish
    if accelerator.is_main_process:
        seconds = progress.seconds
        metrics = {
            "step": length.total_steps,
            "epoch": length.total_steps / length.steps_per_epoch,
            "seconds": round(seconds, 1),
            "images_per_second": round(length.total_steps * batch_plan.global_size / seconds, 2),
            **values,
            "uses_true_patch_statistics": args.norm_pix_loss,
        }
        export_encoder(plain_model.encoder, folder.path / "encoder", mean=args.mean, std=args.std)
        export_autoencoder(plain_model, folder.path / "encoder" / "pretraining", mean=args.mean, std=args.std)
        write_json(folder.path / "metrics.json", metrics)
        print(
            f"finished: {folder.path / 'metrics.json'}, pictures in {folder.path / 'reconstructions'}. "
            "Use the encoder:\n"
            f"  python -c \"import timm; timm.create_model('local-dir:{folder.path / 'encoder'}', pretrained=True)\"\n"
            '  python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder.path / 'encoder'}')\""
        )
    accelerator.end_training()


if __name__ == "__main__":
    arguments.run_script(main)
