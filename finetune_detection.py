"""Fine-tune a pre-trained encoder to detect objects: ViTDet's Mask or Faster R-CNN on COCO, Pascal VOC or YOLO data.

    accelerate launch finetune_detection.py @recipes/quickstart/finetune_detection.args

prints the plan, then a bar with the loss and, every --evaluate_every steps, the average precision, and writes
work_dir/EXPERIMENT_NAME/: log.jsonl, checkpoints/, predictions/ (annotations and detections), detections.json (COCO's
results of the last validation), best/ and, at the end, metrics.json and model/, which predict.py loads. Kill it at any
moment: the same command with --resume_from_checkpoint auto continues it exactly.

    accelerate launch finetune_detection.py --path_to_data coco --path_to_backbone_checkpoint work_dir/pretrain_mae

is the published recipe (Li et al. 2022, ViTDet): 1024 x 1024, batches of 64, 184,375 steps; docs/detection.md lists
the differences. Without a checkpoint, everything is trained from scratch.
"""

import math
from functools import partial
from itertools import repeat

import numpy as np
import torch

from data.annotations import open_objects
from data.batches import Normalization, own_batches, training_batches
from data.decode import PixelFormat
from data.detection import (
    SHOWN,
    DetectionBatch,
    DetectionDataset,
    EvaluationImages,
    as_results,
    as_truths,
    drawings,
    fill_of,
)
from data.index import DataError
from data.pairs import check_trained_classes
from data.sampling import StepSampler, seed_everything
from data.segmentation import palette
from data.sources import describe_data
from data.statistics import read_statistics
from data.transforms import empty_images
from modeling.detector import HEADS, Detector, in_original_pixels
from modeling.export import export_detector
from modeling.files import Stored, WeightsError
from modeling.trained import open_trained
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import open_weights, resize_patches, start_from
from training import arguments
from training.checkpoint import check_outside
from training.files import replace_folder, write_json
from training.launch import InputError, RunError, put_back, run_script
from training.optimizer import DECAY_FLAGS, adamw, clip_gradients, parameter_groups, set_learning_rate
from training.pictures import detection_grid, displayable
from training.resolve import (
    ImageFormat,
    check_detector_sizes,
    check_trained,
    check_trained_detector,
    encoder_flags,
    resolve_detector,
    resolve_encoder,
    resolve_images,
    resolve_inputs,
)
from training.run import Run
from training.schedule import learning_rate_at, stepped_learning_rate
from training.scores import score_detection
from training.wording import several

STEPS, WARMUP_STEPS, SAVE_STEPS, BATCH_SIZE, IMG_SIZE = 184_375, 250, 1_000, 64, 1024
WEIGHTS = "--path_to_backbone_checkpoint"
DEFAULTS = dict(window_size=Detector.default_window, head_width=Detector.default_width)


def parse_args(argv=None):
    """Return the flags, and error messages for those that contradict each other."""
    parser = arguments.Parser(__doc__)
    data = "folder with the layout of COCO, Pascal VOC or YOLO"
    arguments.add_run_flags(parser, name="finetune_detection", data=data)
    flag = parser.add_argument_group("data").add_argument
    names = "names of the classes of Pascal VOC or YOLO, one on a line (default classes.txt or data.yaml in the data)"
    flag("--path_to_classes", metavar="FILE", help=names)
    arguments.add_length_flags(
        parser, epochs=None, steps=STEPS, warmup=f"{WARMUP_STEPS} steps, at most a tenth of the run"
    )
    arguments.add_batch_flags(parser, global_default=BATCH_SIZE)
    arguments.add_optimizer_flags(parser, learning_rate=1e-4, weight_decay=0.1)
    decay = "0.7 up to 12 blocks, 0.8 up to 24, otherwise 0.9"
    arguments.add_finetuning_flags(parser, weights=WEIGHTS, betas=[0.9, 0.999], layer_decay=decay)
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, steps=SAVE_STEPS)
    arguments.add_hub_flags(parser)
    arguments.add_image_flags(parser)
    arguments.add_encoder_flags(parser, sizes=SIZES, drop_path="0.1 up to 12 blocks, 0.4 up to 24, otherwise 0.5")
    arguments.add_detector_flags(parser, heads=HEADS, **DEFAULTS, num_regions=Detector.default_regions)
    args, errors = parser.read(argv)

    if args.epochs is None and args.max_steps is None:
        args.max_steps = STEPS
    if args.save_checkpoint_interval is None and args.save_checkpoint_steps is None:
        args.save_checkpoint_steps = SAVE_STEPS
    errors += check_flags(args)
    args.img_size = args.img_size and [args.img_size[0]] * 2
    return args, errors


def check_flags(args):
    """Return error messages for flags that contradict each other."""
    return arguments.check_run(args) + arguments.check_finetuning(args, WEIGHTS) + arguments.check_detector(args)


def build_model(encoder, num_classes, resolved, *, num_regions, custom_weight_init):
    """Build the detector from arguments of VisionTransformer, the values of `resolve_detector`, and flags."""
    extras = {name: resolved[name] for name in ("drop_path", "relative_position_bias", "layer_scale")}
    encoder = VisionTransformer(**encoder).initialize(custom_weight_init).add_extras(**extras)
    sizes = dict(window=resolved["window_size"], width=resolved["head_width"], num_regions=num_regions)
    return Detector(encoder, num_classes, masks=resolved["head"] == "mask_rcnn", **sizes)


def optimizer_step(accelerator, model, optimizer, batches, normalize, *, max_grad_norm):
    """Take one optimizer step, accumulating gradients over the micro-batches.

    Args:
        batches: an iterator over (seed of the model's randomness, DetectionBatch).
        max_grad_norm: the norm that gradients are clipped to; 0 for none.

    Returns:
        Loss () and gradient norm (), both left on the device, and [(index, reason)] of damaged images.
    """
    loss, damaged = 0.0, []
    for _ in range(accelerator.gradient_accumulation_steps):
        seed, batch = next(batches)
        with accelerator.accumulate(model):
            seed_everything(seed)
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))  # (B, C, S, S)
            with accelerator.autocast():
                losses = model(images, batch.sizes, batch.targets(accelerator.device))
            micro_loss = sum(losses.values())
            accelerator.backward(micro_loss)
            loss += micro_loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, model, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        damaged += batch.damaged
    return loss, grad_norm, damaged


def empty_step(accelerator, model, optimizer, size, *, normalize, pixels):
    """Take one optimizer step on black images: to measure memory, or to warm up DDP.

    Each image has one object or, for Mask R-CNN, a hundred, because masks take memory.
    """
    plain = accelerator.unwrap_model(model)
    side, count = plain.encoder.img_size[0], 1 + 99 * (plain.head == "mask_rcnn")
    images = empty_images(size, pixels.channels, (side, side), pixels.dtype).zero_()
    boxes, labels = torch.tensor([[0.0, 0.0, side, side]]), torch.ones(size * count, dtype=torch.int64)
    masks = torch.ones(size * count * side * side, dtype=torch.uint8) if count > 1 else None
    objects = ([(side, side)] * size, [count] * size, boxes.repeat(size * count, 1), labels, masks, [0] * size)
    batches = repeat((0, DetectionBatch(images, *objects, [])))
    optimizer_step(accelerator, model, optimizer, batches, normalize, max_grad_norm=1.0)


@torch.no_grad()
def evaluate(run, model, dataset, normalize, *, read, num_previews, export=None):
    """Score a model on all images of the dataset, each once and in its own pixels, and log the scores.

    Args:
        read: read(dataset, indices) yields batches of one image, so that rounding does not depend on other images;
            damaged images are left out.
        num_previews: number of images in the picture, evenly spread over the dataset.
        export: writes the model into a folder, which becomes best/ if the model is the best so far.
    """
    training, source = model.training, dataset.source
    model.eval()
    rows, previews, damaged = [], [], []
    indices = {int(i) for i in np.linspace(0, len(dataset) - 1, min(num_previews, len(dataset)))}
    for (sample,) in read(dataset, range(len(dataset))):
        if sample.damaged:
            damaged.append((source.name(sample.index), sample.damaged))
            continue
        with run.accelerator.autocast():
            (detections,) = model.forward(normalize(sample.image[None].to(run.device)), [sample.size])
        results = as_results(in_original_pixels(detections, sample.size, sample.original))
        rows.append((sample.index, sample.original, as_truths(sample.objects), results))
        if sample.index in indices:
            (h, w), picture = sample.size, displayable(sample.image).numpy()
            likely = [record for record in results if record["score"] >= SHOWN]
            parts = (drawings(part, sample.original, sample.size) for part in (rows[-1][2], likely))
            previews.append((sample.index, picture[:, :h, :w], *parts))
    model.train(training)
    run.note_damage(damaged)
    rows, previews = (sorted(run.crew.gather(part), key=lambda row: row[0]) for part in (rows, previews))
    if not any(not truth["iscrowd"] for _, _, truths, _ in rows for truth in truths):
        reason = "" if rows else "; none can be read (damaged.jsonl says why)"
        words = f"none of the {len(dataset)} validation images has an object that is not a crowd{reason}"
        raise RunError(f"{words}; give images with objects")
    scores = []
    if run.is_main_process:
        scores = [score_detection(rows, source.classes, masks=model.head == "mask_rcnn")]
    (scores,) = run.crew.gather(scores)
    if export and run.is_best("box_ap", scores):
        replace_folder(run.folder / "best", partial(export, model))
    text = f"step {run.step}: {describe_scores(scores)}"
    if run.is_main_process:
        write_json(run.folder / "detections.json", list_results(rows, source))
    if previews and run.is_main_process:
        path = run.folder / "predictions" / f"step_{run.step:08d}.png"
        colours = palette(len(source.classes))
        detection_grid(path, [row[1:] for row in previews], source.classes, colours, title=text)
        run.progress.picture(path, "predictions", run.step)
    run.record(scores, text)


def list_results(rows, source):
    """Return the detections as COCO's results, with the image and class numbers of the annotations."""
    return [
        {**record, "image_id": source.image_ids[index], "category_id": source.class_ids[record["category_id"] - 1]}
        for index, _, _, results in rows
        for record in results
    ]


def describe_scores(scores):
    """Return the scores in words, "-" for a score without objects."""
    names = [name for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50") if name in scores]
    values = ("-" if scores[name] is None else f"{scores[name]:.2f} %" for name in names)
    return ", ".join(f"{name.replace('_ap', ' AP')} {value}" for name, value in zip(names, values, strict=True))


def evaluate_trained(run):
    """Measure a trained detector, as it is, on the validation images (--eval_only)."""
    args, path = run.given, run.given.path_to_backbone_checkpoint
    with run.refusing(WeightsError, InputError, flag=WEIGHTS):
        check_outside(path, run.folder)
        given = Stored(num_heads=args.encoder_num_heads)
        channels = args.input_channels if args.adapt_channels else None
        size = args.img_size and tuple(args.img_size)
        trained = open_trained(path, whole=False, given=given, img_size=size, in_channels=channels)
        if not isinstance(trained.model, Detector):
            raise InputError(f"{trained.path} holds no detector; give a model/, best/ or checkpoint")
    run.gate()
    model, encoder = trained.model, trained.encoder
    with run.refusing(InputError, DataError):
        check_trained(vars(args), SIZES, encoder)
        known = ImageFormat(encoder.in_channels, trained.value_range, None, trained.mean, trained.std)
        images = resolve_images(ImageFormat.from_dict(vars(args)), known=None, trained=known)
        pixels = PixelFormat(images.input_channels, images.value_range, images.nodata, args.max_pixels)
        places = dict(validation=args.path_to_validation_data, cache=args.cache_dir)
        _, source = open_objects(args.path_to_data, pixels, class_file=args.path_to_classes, **places)
        classes = (source.classes, trained.class_names, model.num_classes)
        check_trained_classes(args.path_to_data, *classes, model="detector")
        settings = dict(head=model.head, window_size=model.window, head_width=model.width)
        settings["relative_position_bias"] = encoder.blocks[0].attn.bias_grid is not None
        check_trained_detector(vars(args), settings, source.lacks_masks)
    run.gate()
    resolved = {**images._asdict(), **encoder_flags(vars(encoder)), **settings}
    facts = {"classes": source.classes, "class_ids": source.class_ids, "data": describe_data(source, source)}
    run.start_evaluation(resolved, source, facts)
    shape = dict(side=encoder.img_size[0], fill=fill_of(images.mean, images.value_range))
    dataset = EvaluationImages(source, pixels=pixels, **shape)
    read = partial(own_batches, batch_size=1, **run.reading)
    normalize = Normalization(*images[3:], run.device)
    evaluate(run, model.to(run.device), dataset, normalize, read=read, num_previews=args.num_preview_images)
    run.end(f"{describe_scores(run.metrics)}; {run.folder / 'metrics.json'}")


def describe_model(model, recipe, jitter):
    """Return the plan's lines about model, recipe and images."""
    encoder, side = model.encoder, model.encoder.img_size[0]
    kind = "frozen encoder" if model.frozen_encoder else "encoder"
    windows = sum(hasattr(block.attn, "window") for block in encoder.blocks)
    attention = f"windows of {model.window} x {model.window} in {windows} blocks" if windows else "global attention"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return [
        f"model      {encoder.embed_dim} x {encoder.depth} {kind}, {attention}, {model.head} of width {model.width}: "
        f"{parameters:.3g} M parameters, {model.training_flops() / 1e9:.3g} GFLOP per image and step before the heads",
        f"recipe     {recipe}",
        f"images     {side} x {side}, times {jitter[0]:g} to {jitter[1]:g}, {several(encoder.in_channels, 'channel')}, "
        f"{math.prod(encoder.grid)} patches of {encoder.patch_size}",
    ]


@put_back()
def main(argv=None):
    """Run the script; see the module's docstring."""
    args, errors = parse_args(argv)
    run = Run(args, errors, default_batch_size=BATCH_SIZE)  # bad flags end here
    if args.eval_only:
        return evaluate_trained(run)

    # Weights, data, plan and model: run.gate() prints all errors; a block that depends on a failed one is skipped
    with run.refusing(InputError, WeightsError, flag=WEIGHTS):
        path = None if run.checkpoint else args.path_to_backbone_checkpoint
        check_outside(path, run.folder)
        weights = open_weights(path) if path else None
        if weights and args.patch_size not in (None, weights.sizes["patch_size"]):
            run.accelerator.print(f"{WEIGHTS}: patches resized from {weights.sizes['patch_size']} to {args.patch_size}")
            weights = resize_patches(weights, args.patch_size)
    with run.refusing(InputError, DataError):
        statistics = read_statistics(args.path_to_data)
        images = resolve_inputs(vars(args), previous=run.previous, statistics=statistics, weights=weights)
        pixels = PixelFormat(images.input_channels, images.value_range, images.nodata, args.max_pixels)
    with run.refusing(InputError):
        img_size = args.img_size or run.previous.get("img_size") or [IMG_SIZE, IMG_SIZE]
        known = dict(previous=run.previous, weights=weights)
        encoder = check_detector_sizes(resolve_encoder({**vars(args), "img_size": img_size}, SIZES, **known))
    with run.refusing(DataError):
        places = dict(validation=args.path_to_validation_data, cache=args.cache_dir)
        sources = open_objects(args.path_to_data, pixels, class_file=args.path_to_classes, **places)
        classes = sources[0].classes
    with run.refusing(InputError):
        lacks_masks = next((source.lacks_masks for source in sources if source.lacks_masks), "")
        settings = run.previous or (weights.settings if weights else {})
        resolved = resolve_detector(vars(args), encoder["depth"], lacks_masks, settings=settings, defaults=DEFAULTS)
    with run.refusing(InputError):
        run.plan_steps(len(sources[0]), lambda size: [], recipe_steps=(WARMUP_STEPS, 10 * WARMUP_STEPS))
    with run.refusing(WeightsError, flag=WEIGHTS):
        torch.manual_seed(args.seed)
        encoder |= dict(in_channels=pixels.channels)
        others = dict(num_regions=args.num_regions, custom_weight_init=args.custom_weight_init)
        model = build_model(encoder, len(classes), resolved, **others)
        model.encoder.gradient_checkpointing = run.gradient_checkpointing
        if weights:
            channels = dict(adapt_channels=args.adapt_channels, mean=images.mean, std=images.std)
            run.accelerator.print(f"{WEIGHTS} {weights.path}: {start_from(weights, model.encoder, **channels)}")
        if args.freeze_encoder:
            model.freeze_encoder()
    run.gate()
    resolved |= {**images._asdict(), **encoder_flags(encoder), "img_size": list(img_size)}
    run.compare(resolved, *sources, defaults=vars(parse_args([])[0]))
    model.to(run.device)

    # Optimizer
    normalize = Normalization(images.mean, images.std, run.device)
    groups = parameter_groups(model, **{name: run.flags[name] for name in DECAY_FLAGS})
    optimizer = adamw(groups, betas=tuple(args.betas))
    empty = partial(empty_step, run.accelerator, normalize=normalize, pixels=pixels)
    if args.micro_batch_size == "auto":
        run.fit_micro_batch(empty, model, optimizer)
    recipe = f"AdamW, weight decay {args.weight_decay:g}, layer decay {resolved['layer_decay']:g}, drop path "
    recipe += f"{resolved['drop_path']:g}, {args.num_regions} regions of an image"
    step_lr = stepped_learning_rate if args.lr_schedule == "step" else learning_rate_at
    cosine = f"cosine to {args.min_learning_rate:g}"
    decay = "times 0.1 at 8/9 and again at 26/27 of the run" if args.lr_schedule == "step" else cosine
    lines = describe_model(model, recipe, args.scale_jitter)
    run.print_plan(lines, images, targets=f"{len(classes)} classes", decay=decay)
    run.prepare_sources()
    if args.compile:
        model.compile_features()
    model, optimizer = run.prepare(model, optimizer)
    if run.needs_warm_up:
        empty(model, optimizer, run.batch.micro)
    class_ids = sources[0].class_ids
    run.resume({"classes": classes, "class_ids": class_ids, "data": describe_data(*sources)})

    # Batches
    shape = dict(side=encoder["img_size"][0], fill=fill_of(images.mean, images.value_range))
    jitter = dict(scales=tuple(args.scale_jitter), masks=resolved["head"] == "mask_rcnn")
    train_data = DetectionDataset(sources[0], pixels=pixels, seed=args.seed, **jitter, **shape)
    sampler = StepSampler(len(sources[0]), **run.sampling)
    batches = run.timed(training_batches(train_data, sampler, **run.loading))
    validation_data = EvaluationImages(sources[1], pixels=pixels, **shape)
    read = partial(own_batches, batch_size=1, **run.reading)
    normalization = dict(mean=images.mean, std=images.std, value_range=images.value_range)
    export = partial(export_detector, classes=classes, class_ids=class_ids, **normalization)
    evaluation = dict(read=read, num_previews=args.num_preview_images, export=export)

    # Loop
    model.train()
    take_step = partial(optimizer_step, run.accelerator, max_grad_norm=args.max_grad_norm)
    for step in run.steps:  # completed optimizer steps
        if run.is_due(step, args.evaluate_every, "box_ap"):
            with run.paused():
                evaluate(run, run.plain_model(), validation_data, normalize, **evaluation)
        if step == run.plan.length.total_steps:
            break
        set_learning_rate(optimizer, step_lr(step, **run.plan.schedule))
        loss, grad_norm, damaged = take_step(model, optimizer, batches, normalize)
        run.completed(step + 1, loss, grad_norm, damaged)  # logs, saves, raises Stopped if the run is asked to stop

    # Finish
    trained = run.plain_model()
    if run.is_main_process:
        replace_folder(run.folder / "model", partial(export, trained))
    run.end(f"{describe_scores(run.metrics)}; {run.folder / 'metrics.json'}", best="box_ap")


if __name__ == "__main__":
    run_script(main)
