"""Fine-tune a pre-trained encoder for segmentation: UperNet on ADE20K, or on any data set of images and masks.

    accelerate launch finetune_segmentation.py @recipes/quickstart/finetune_segmentation.args

prints the plan, then a bar with the loss and, every --evaluate_every steps, the mean IoU. It writes to
work_dir/EXPERIMENT_NAME/: log.jsonl, checkpoints/, predictions/ (image, annotation, prediction), best/ and, at the end,
metrics.json and model/. transformers loads best/ and model/ with AutoModelForSemanticSegmentation. Kill it at any
moment: the same command with --resume_from_checkpoint auto continues it exactly.

    accelerate launch finetune_segmentation.py --path_to_data ADEChallengeData2016 \\
        --path_to_backbone_checkpoint work_dir/pretrain_mae

is the published recipe (mmsegmentation's mae-base_upernet): 512 x 512 crops, batches of 16, 160,000 steps; except that
gradients are clipped. Without a checkpoint, everything is trained from scratch.
"""

import math
from functools import partial
from itertools import groupby, repeat

import numpy as np
import torch
from accelerate.utils import broadcast

from data.batches import Normalization, own_batches, training_batches
from data.decode import PixelFormat
from data.index import DataError
from data.masks import MaskFormat
from data.pairs import check_annotations, check_class_weights, check_trained_classes, class_weights, open_pairs
from data.sampling import StepSampler, seed_everything
from data.segmentation import EvaluationPairs, SegmentationBatch, SegmentationDataset, palette, view_sizes
from data.sources import describe_data
from data.statistics import read_statistics
from data.transforms import empty_images
from modeling.export import export_segmenter
from modeling.files import Stored, WeightsError
from modeling.sliding_window import predict
from modeling.trained import open_trained
from modeling.upernet import HEADS, Segmenter, default_layers, segmentation_loss
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import open_weights, start_from
from training import arguments
from training.checkpoint import check_outside
from training.files import replace_folder
from training.launch import InputError, RunError, put_back, run_script
from training.metrics import segmentation_areas
from training.optimizer import DECAY_FLAGS, adamw, clip_gradients, parameter_groups, set_learning_rate
from training.pictures import displayable, segmentation_grid
from training.resolve import (
    ImageFormat,
    check_segmenter_batch,
    check_trained,
    encoder_flags,
    resolve_crop,
    resolve_encoder,
    resolve_head,
    resolve_images,
    resolve_inputs,
)
from training.run import Run
from training.schedule import learning_rate_at
from training.scores import score_segmentation
from training.wording import several

STEPS, WARMUP_STEPS, SAVE_STEPS, BATCH_SIZE, CROP_SIZE = 160_000, 1_500, 1_000, 16, 512
WEIGHTS = "--path_to_backbone_checkpoint"


def parse_args(argv=None):
    """Return the flags, and error messages for those that contradict each other."""
    parser = arguments.Parser(__doc__)
    data = f"folder with ADE20K's layout; or, with masks, a {arguments.SOURCES}"
    arguments.add_run_flags(parser, name="finetune_segmentation", data=data)
    arguments.add_source_flags(parser)
    flag = parser.add_argument_group("masks").add_argument
    names = "names of the classes: a line each, a table, JSON, or ade20k (default classes.txt in the data)"
    flag("--path_to_classes", metavar="FILE", help=names)
    flag("--mask_offset", type=int, choices=(0, 1), help="label of the first class; if 1, 0 is void (default 1)")
    flag("--void_label", type=arguments.integer(-1, 65535), metavar="N", help="another label that is void, such as 255")
    arguments.add_length_flags(parser, epochs=None, steps=STEPS, warmup=f"{WARMUP_STEPS} steps")
    arguments.add_batch_flags(parser, global_default=BATCH_SIZE)
    arguments.add_optimizer_flags(parser, learning_rate=1e-4, weight_decay=0.05)
    arguments.add_finetuning_flags(parser, weights=WEIGHTS, betas=[0.9, 0.999], layer_decay=0.65)
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, steps=SAVE_STEPS)
    arguments.add_hub_flags(parser)
    arguments.add_image_flags(parser)
    flag = parser.add_argument_group("crops").add_argument
    flag("--crop_size", type=arguments.integer(1), help=f"side of crops and windows, pixels (default {CROP_SIZE})")
    size = "sides that images are resized to fit, scaled by 0.5 to 2 in training (default 4 x crop size, crop size)"
    flag("--resize", type=arguments.integer(1), nargs=2, metavar=("LONG", "SHORT"), help=size)
    arguments.add_encoder_flags(parser, sizes=SIZES, drop_path=0.1)
    arguments.add_segmenter_flags(parser, heads=HEADS)
    args, errors = parser.read(argv)

    if args.epochs is None and args.max_steps is None:
        args.max_steps = STEPS
    if args.save_checkpoint_interval is None and args.save_checkpoint_steps is None:
        args.save_checkpoint_steps = SAVE_STEPS
    return args, errors + check_flags(args)


def check_flags(args):
    """Return error messages for flags that contradict each other."""
    errors = arguments.check_run(args) + arguments.check_finetuning(args, WEIGHTS)
    return errors + arguments.check_segmenter(args, HEADS[args.head])


def build_model(encoder, extras, num_classes, head, *, custom_weight_init):
    """Build the segmenter from arguments of VisionTransformer and add_extras, and the values of `resolve_head`."""
    encoder = VisionTransformer(**encoder).initialize(custom_weight_init).add_extras(**extras)
    options = dict(head=head["head"], layers=head["layers"], head_width=head["head_width"])
    options["auxiliary"] = bool(head["auxiliary_weight"])
    return Segmenter(encoder, num_classes, custom_weight_init=custom_weight_init, **options)


def optimizer_step(accelerator, model, optimizer, batches, normalize, *, weights, auxiliary_weight, max_grad_norm):
    """Take one optimizer step, accumulating gradients over the micro-batches.

    Args:
        batches: an iterator over (seed of the model's randomness, SegmentationBatch).
        weights: class weights of the loss, (num_classes,), or None.
        auxiliary_weight: loss weight of the auxiliary head.
        max_grad_norm: the norm that gradients are clipped to; 0 for none.

    Returns:
        Loss () and gradient norm (), both left on the device, and [(index, reason)] of damaged images.
    """
    loss, damaged = 0.0, []
    for _ in range(accelerator.gradient_accumulation_steps):
        seed, batch = next(batches)
        with accelerator.accumulate(model):
            seed_everything(seed)
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))  # (B, C, H, W)
            masks = batch.masks.to(accelerator.device, non_blocking=True)  # (B, H, W)
            with accelerator.autocast():
                output = model(images)  # (B, num_classes, H', W')
            logits, auxiliary = output if isinstance(output, tuple) else (output, None)
            micro_loss = segmentation_loss(logits, masks, class_weights=weights)
            if auxiliary is not None:
                micro_loss += auxiliary_weight * segmentation_loss(auxiliary, masks, class_weights=weights)
            accelerator.backward(micro_loss)
            loss += micro_loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, model, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        damaged += batch.damaged
    return loss, grad_norm, damaged


def empty_step(accelerator, model, optimizer, size, *, normalize, pixels):
    """Take one optimizer step on black images, to measure memory or to warm up DDP before a checkpoint is loaded."""
    crop = accelerator.unwrap_model(model).encoder.img_size
    images = empty_images(size, pixels.channels, crop, pixels.dtype).zero_()
    batch = SegmentationBatch(images, torch.zeros(size, *crop, dtype=torch.uint8), [], [])
    options = dict(weights=None, auxiliary_weight=1.0, max_grad_norm=1.0)
    optimizer_step(accelerator, model, optimizer, repeat((0, batch)), normalize, **options)


@torch.no_grad()
def evaluate(run, model, dataset, normalize, *, read, predict, num_previews, export=None):
    """Score a model on all images of the dataset, each once and at its annotation's own size, and log the scores.

    Args:
        read: read(dataset, indices) yields the batches of this process; damaged images are left out.
        predict: predict(forward, views, size) returns classes (B, *size), uint8.
        export: writes the model into a folder, which becomes best/ if the model is the best so far.
    """
    training, classes = model.training, dataset.source.classes
    model.eval()
    for buffer in model.buffers():  # BatchNorm's statistics are those of the main process, as in a checkpoint
        broadcast(buffer)
    rows, previews, damaged = [], [], []
    indices = {int(i) for i in np.linspace(0, len(dataset) - 1, min(num_previews, len(dataset)))}
    for batch in read(dataset, range(len(dataset))):
        damaged += [(dataset.source.name(pair.index), pair.damaged) for pair in batch if pair.damaged]
        intact = [pair for pair in batch if not pair.damaged]
        for size, group in groupby(intact, key=lambda pair: tuple(pair.mask.shape)):
            pairs = list(group)
            batches = zip(*(pair.views for pair in pairs), strict=True)
            views = [normalize(torch.stack([view.to(run.device, non_blocking=True) for view in v])) for v in batches]
            with run.accelerator.autocast():
                predictions = predict(model.forward, views, size)  # not compiled: sizes vary
            for pair, prediction in zip(pairs, predictions, strict=True):
                mask = pair.mask.to(run.device, non_blocking=True)
                areas = segmentation_areas(prediction, mask, len(classes))
                rows.append((pair.index, areas.tolist()))
                if pair.index in indices:
                    picture = displayable(pair.image).numpy()
                    previews.append((pair.index, picture, pair.mask.numpy(), prediction.cpu().numpy()))
    model.train(training)
    run.note_damage(damaged)
    rows, previews = sorted(run.crew.gather(rows)), sorted(run.crew.gather(previews), key=lambda row: row[0])
    if not rows:
        raise RunError(f"none of the {len(dataset)} validation images can be read; see damaged.jsonl, and repair them")
    if not any(sum(labelled) for _, (_, _, labelled) in rows):
        raise RunError("no pixel of the validation annotations has a class; give annotations that are not all void")
    scores = []
    if run.is_main_process:
        scores = [score_segmentation(rows, classes)]
    (scores,) = run.crew.gather(scores)
    if export and run.is_best("mean_iou", scores):
        replace_folder(run.folder / "best", partial(export, model))
    text = f"step {run.step}: {describe_scores(scores)}"
    if previews and run.is_main_process:
        path = run.folder / "predictions" / f"step_{run.step:08d}.png"
        segmentation_grid(path, [row[1:] for row in previews], classes, palette(len(classes)), title=text)
        run.progress.picture(path, "predictions", run.step)
    run.record(scores, text)


def describe_scores(scores):
    """Return the scores in words."""
    return (
        f"mean IoU {scores['mean_iou']:.2f} %, mean accuracy {scores['mean_accuracy']:.2f} %, pixel accuracy "
        f"{scores['overall_accuracy']:.2f} %"
    )


def build_evaluation(flags, source, pixels, *, crop_size, resize, patch_size):
    """Build the evaluation dataset and the predict function from the flags."""
    mode, sides = flags["evaluate"], dict(resize=tuple(resize), crop_size=crop_size, patch_size=patch_size)
    sizes = partial(view_sizes, mode=mode, scales=flags["evaluate_scales"], **sides)
    predict_views = partial(predict, window=crop_size if mode == "slide" else None, flip=flags["evaluate_flip"])
    return EvaluationPairs(source, pixels=pixels, sizes=sizes), predict_views


def evaluate_trained(run):
    """Measure a trained segmenter, as it is, on the validation images (--eval_only)."""
    flags, path = run.given, run.given.path_to_backbone_checkpoint
    with run.refusing(WeightsError, InputError, flag=WEIGHTS):
        check_outside(path, run.folder)
        crop = flags.crop_size and (flags.crop_size, flags.crop_size)
        given = Stored(num_heads=flags.encoder_num_heads)
        channels = flags.input_channels if flags.adapt_channels else None
        trained = open_trained(path, whole=False, given=given, img_size=crop, in_channels=channels)
        if not isinstance(trained.model, Segmenter):
            raise InputError(f"{trained.path} holds no segmenter; give a model/, best/ or checkpoint")
    run.gate()
    model, encoder = trained.model, trained.encoder
    with run.refusing(InputError, DataError):
        check_trained(vars(flags), SIZES, encoder)
        resolve_crop(encoder.img_size[0], encoder.patch_size, min_patches=model.decode_head.min_patches)
        known = ImageFormat(encoder.in_channels, trained.value_range, None, trained.mean, trained.std)
        images = resolve_images(ImageFormat.from_dict(vars(flags)), known=None, trained=known)
        pixels = PixelFormat(images.input_channels, images.value_range, images.nodata, flags.max_pixels)
        masks = MaskFormat.from_flags(vars(flags), trained.masks)
        places = dict(validation=flags.path_to_validation_data, cache=flags.cache_dir, data_format=flags.data_format)
        _, source = open_pairs(flags.path_to_data, pixels, masks, class_file=flags.path_to_classes, **places)
        check_trained_classes(flags.path_to_data, source.classes, trained.class_names, model.num_classes)
    run.gate()
    sizes = dict(crop_size=encoder.img_size[0], resize=list(flags.resize or trained.resize))
    resolved = {**images._asdict(), **encoder_flags(vars(encoder)), **sizes, **masks.numbering}
    resolved |= {"head": model.head, "layers": model.layers}
    run.start_evaluation(resolved, source, {"classes": source.classes, "data": describe_data(source, source)})
    with run.refusing(DataError):
        check_annotations({"validation": source}, pixels, strict=True, **run.checking)
    run.gate()
    dataset, predict_views = build_evaluation(vars(flags), source, pixels, patch_size=encoder.patch_size, **sizes)
    read = partial(own_batches, batch_size=min(run.batch.micro, 8), **run.reading)
    normalize, options = Normalization(*images[3:], run.device), dict(num_previews=flags.num_preview_images)
    evaluate(run, model.to(run.device), dataset, normalize, read=read, predict=predict_views, **options)
    run.end(f"{describe_scores(run.metrics)}; {run.folder / 'metrics.json'}")


def describe_model(model, head, recipe, images):
    """Return the plan's lines about model, recipe and images; `recipe` and `images` are texts."""
    encoder, layers = model.encoder, head["layers"]
    kind = "frozen encoder" if model.frozen_encoder else "encoder"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    name = model.decode_head.title + (f" of width {head['head_width']}" if head["head_width"] else "")
    return [
        f"model      {encoder.embed_dim} x {len(encoder.blocks)} {kind}, {name} after block{'s' * (len(layers) > 1)} "
        f"{', '.join(map(str, layers))}: {parameters:.3g} M parameters, "
        f"{model.training_flops() / 1e9:.3g} GFLOP per image and step",
        f"recipe     {recipe}",
        f"images     {images}, {several(encoder.in_channels, 'channel')}, {math.prod(encoder.grid)} patches of "
        f"{encoder.patch_size}",
    ]


@put_back()
def main(argv=None):
    """Run the script; see the module's docstring."""
    args, errors = parse_args(argv)
    run = Run(args, errors, default_batch_size=BATCH_SIZE)  # bad flags end here
    if args.eval_only:
        return evaluate_trained(run)
    synchronized = run.num_processes > 1 and run.device.type == "cuda"

    # Weights, data, plan and model: run.gate() prints all errors; a block that depends on a failed one is skipped
    with run.refusing(InputError, WeightsError, flag=WEIGHTS):
        path = None if run.checkpoint else args.path_to_backbone_checkpoint
        check_outside(path, run.folder)
        weights = open_weights(path) if path else None
    with run.refusing(InputError, DataError):
        statistics = read_statistics(args.path_to_data)
        images = resolve_inputs(vars(args), previous=run.previous, statistics=statistics, weights=weights)
        pixels = PixelFormat(images.input_channels, images.value_range, images.nodata, args.max_pixels)
    with run.refusing(InputError):
        encoder = resolve_encoder(vars(args), SIZES, previous=run.previous, weights=weights)
        crop_size = args.crop_size or run.previous.get("crop_size") or CROP_SIZE
        resize = args.resize or run.previous.get("resize") or [4 * crop_size, crop_size]
        img_size = resolve_crop(crop_size, encoder["patch_size"], min_patches=HEADS[args.head].min_patches)
    with run.refusing(InputError):
        head = resolve_head(vars(args), encoder["depth"], HEADS[args.head], default_layers)
    with run.refusing(DataError):
        if run.checkpoint:  # it has accepted its masks; older runs do not store their numbering
            run.previous["mask_offset"] = MaskFormat(run.previous.get("mask_offset")).first_label
        masks = MaskFormat.from_flags(vars(args), run.previous)
        places = dict(validation=args.path_to_validation_data, cache=args.cache_dir, data_format=args.data_format)
        sources = open_pairs(args.path_to_data, pixels, masks, class_file=args.path_to_classes, **places)
        classes = sources[0].classes
        check_class_weights(args.class_weights, len(classes))
    with run.refusing(InputError):
        alone = not synchronized or args.micro_batch_size == "auto"  # auto tries steps without synchronized BatchNorm
        check_batch = partial(check_segmenter_batch, min_batch=HEADS[args.head].min_batch if alone else 1)
        run.plan_steps(len(sources[0]), check_batch, recipe_steps=(WARMUP_STEPS, STEPS))
    with run.refusing(WeightsError, flag=WEIGHTS):
        torch.manual_seed(args.seed)
        encoder |= dict(in_channels=pixels.channels, img_size=img_size)
        extras = dict(drop_path=args.drop_path, layer_scale=args.layer_scale or None)
        extras["relative_position_bias"] = args.relative_position_bias
        model = build_model(encoder, extras, len(classes), head, custom_weight_init=args.custom_weight_init)
        model.encoder.gradient_checkpointing = run.gradient_checkpointing
        if weights:
            channels = dict(adapt_channels=args.adapt_channels, mean=images.mean, std=images.std)
            run.accelerator.print(f"{WEIGHTS} {weights.path}: {start_from(weights, model.encoder, **channels)}")
        if args.freeze_encoder:
            model.freeze_encoder()
    run.gate()
    resolved = {**images._asdict(), **encoder_flags(encoder), **head, **masks.numbering}
    resolved |= dict(crop_size=crop_size, resize=resize)
    run.compare(resolved, *sources, defaults=vars(parse_args([])[0]))
    model.to(run.device)

    # Optimizer
    normalize = Normalization(images.mean, images.std, run.device)
    groups = parameter_groups(model, **{name: getattr(args, name) for name in DECAY_FLAGS})
    optimizer = adamw(groups, betas=tuple(args.betas))
    empty = partial(empty_step, run.accelerator, normalize=normalize, pixels=pixels)
    if args.micro_batch_size == "auto":
        run.fit_micro_batch(empty, model, optimizer)
    recipe = f"AdamW, weight decay {args.weight_decay:g}, layer decay {args.layer_decay:g}, drop path "
    recipe += f"{args.drop_path:g}, auxiliary loss {head['auxiliary_weight'] or 0:g}"
    crops = f"crops of {crop_size} x {crop_size} from images in {resize[0]} x {resize[1]}, times 0.5 to 2"
    words = dict(targets=f"{len(classes)} classes", decay=f"linear to {args.min_learning_rate:g}")
    run.print_plan(describe_model(model, head, recipe, crops), images, **words)
    run.prepare_sources()
    with run.refusing(DataError):
        areas = check_annotations(dict(zip(("training", "validation"), sources, strict=True)), pixels, **run.checking)
    run.gate()
    loss_weights = class_weights(args.class_weights, areas["training"], run.device)
    if args.compile:
        model.compile(fullgraph=True, dynamic=False)
    if synchronized:
        model.synchronize_batch_norms()
    model, optimizer = run.prepare(model, optimizer)
    if run.needs_warm_up:
        empty(model, optimizer, run.batch.micro)
    run.resume({"classes": classes, "data": describe_data(*sources)})

    # Batches
    sizes = dict(crop_size=crop_size, resize=tuple(resize))
    fill = [value if images.value_range else round(255 * value) for value in images.mean]
    train_data = SegmentationDataset(sources[0], pixels=pixels, seed=args.seed, fill=fill, **sizes)
    sampler = StepSampler(len(sources[0]), **run.sampling)
    batches = run.timed(training_batches(train_data, sampler, **run.loading))
    sizes["patch_size"] = encoder["patch_size"]
    validation_data, predict_views = build_evaluation(vars(args), sources[1], pixels, **sizes)
    read = partial(own_batches, batch_size=min(run.batch.micro, 8), **run.reading)
    normalization = dict(mean=images.mean, std=images.std, value_range=images.value_range)
    export = partial(export_segmenter, classes=classes, resize=resize, masks=masks.numbering, **normalization)
    evaluation = dict(read=read, predict=predict_views, num_previews=args.num_preview_images, export=export)

    # Loop
    options = dict(weights=loss_weights, auxiliary_weight=head["auxiliary_weight"], max_grad_norm=args.max_grad_norm)
    model.train()
    for step in run.steps:  # completed optimizer steps
        if run.is_due(step, args.evaluate_every, "mean_iou"):
            with run.paused():
                evaluate(run, run.plain_model(), validation_data, normalize, **evaluation)
        if step == run.plan.length.total_steps:
            break
        set_learning_rate(optimizer, learning_rate_at(step, linear=True, **run.plan.schedule))
        loss, grad_norm, damaged = optimizer_step(run.accelerator, model, optimizer, batches, normalize, **options)
        run.completed(step + 1, loss, grad_norm, damaged)  # logs, saves, raises Stopped if the run is asked to stop

    # Finish
    trained = run.plain_model()
    if run.is_main_process:
        replace_folder(run.folder / "model", partial(export, trained))
    run.end(f"{describe_scores(run.metrics)}; {run.folder / 'metrics.json'}", best="mean_iou")


if __name__ == "__main__":
    run_script(main)
