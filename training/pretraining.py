"""Define, check and describe the flags of pre-training: views, sizes, masks, decoder and target.

The stages of a run whose images grow are planned here too: their steps, batches and cost.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from training.arguments import Pair, Parser, integer, number
from training.launch import check
from training.plan import Stage
from training.resolve import check_size, check_width
from training.wording import several

PIXEL_TARGETS = ("normalized", "pixels")
# Argument of the decoder -> flag
DECODER_FLAGS = {name: f"decoder_{name}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}


def add_mask_flags(parser: Parser, *, strategies: Iterable[str], validities: Iterable[str]) -> None:
    """Add flags for views, sizes and masks, given the names that --mask_strategy and --validity take."""
    flag = parser.add_argument_group("views, sizes and masks").add_argument
    help_text = "square images of SIZE pixels until a SHARE of the steps, such as 96:0.5 160:0.8 224:1 (default: all "
    help_text += "of --img_size)"
    flag("--img_size_schedule", type=size_and_share, nargs="+", metavar="SIZE:SHARE", help=help_text)
    flag("--repeated_augmentation", type=integer(1), default=1, metavar="K", help="views of each image (default 1)")
    flag("--mask_ratio", type=number(0, 1), default=0.75, help="share of patches to remove (default 0.75)")
    flag("--mask_strategy", choices=tuple(strategies), default="random", help="how patches are chosen (default random)")
    help_text = "side of the square blocks, in patches, that are removed as a whole under random masks (default 1)"
    flag("--mask_block", type=integer(1), default=1, metavar="N", help=help_text)
    help_text = "mark of invalid pixels: a missing value (nodata), besides that the last channel or a mask; or none "
    help_text += "(default nodata if --nodata is known and the target is normalized or pixels)"
    flag("--validity", choices=("none", *validities), help=help_text)
    help_text = "share of the masked patches that is predicted in training, evenly spread (default 1)"
    flag("--predict_ratio", type=number(0, 1), default=1.0, metavar="R", help=help_text)


def add_decoder_flags(parser: Parser, *, decoders: Iterable[str], targets: Iterable[str]) -> None:
    """Add flags for the decoder, its target, and the weights to start from.

    `decoders` and `targets` are the names that --decoder and --target take.
    """
    flag = parser.add_argument_group("decoder and target").add_argument
    help_text = "attention among all tokens, or from mask tokens to visible tokens only, as in CrossMAE (default self)"
    flag("--decoder", choices=tuple(decoders), default="self", help=help_text)
    help_text = "what the blocks of a cross decoder read: the encoder's last tokens, or each a learned weighted sum of "
    help_text += "all its layers (default last)"
    flag("--decoder_inputs", choices=("last", "weighted"), default="last", help=help_text)
    flag("--decoder_embed_dim", type=integer(1), default=512, help="width (default 512)")
    flag("--decoder_depth", type=integer(1), help="number of blocks (default self: 8, cross: 12)")
    flag("--decoder_num_heads", type=integer(1), default=16, help="attention heads (default 16)")
    flag("--decoder_mlp_ratio", type=number(0.1), default=4.0, help="hidden width of the MLPs / width (default 4)")
    flag("--init_from", metavar="PATH", help="weights to start from: of this project, the official MAE, transformers")
    help_text = "what is predicted for a patch; HOG and a teacher's features have no pictures (default normalized)"
    flag("--target", choices=tuple(targets), help=help_text)
    flag("--norm_pix_loss", action=Pair, help="the same as --target normalized; --no-norm_pix_loss: --target pixels")
    flag("--num_components", type=integer(1), metavar="N", help="principal components of --target pca (default 96)")
    help_text = (
        "frozen encoder of --target teacher: as --init_from, or a DINOv2, DINOv3, CLIP or SigLIP of transformers"
    )
    flag("--teacher", metavar="PATH|hf:NAME", help=help_text)
    flag("--adapt_channels", action=Pair, default=False, help="convert --init_from to --input_channels (off)")


def size_and_share(text: str) -> str:
    """Check SIZE:SHARE, pixels and a share of the run, and return it: an argparse type."""
    size, _, share = text.partition(":")
    try:
        return f"{integer(1)(size)}:{number(0, 1)(share):.9g}"
    except argparse.ArgumentTypeError:
        expected = "expected SIZE:SHARE, pixels and a share of the run from 0 to 1, such as 96:0.5"
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; {expected}") from None


def read_schedule(schedule: Sequence[str]) -> list[tuple[int, float]]:
    """Return the sizes and shares of --img_size_schedule."""
    return [(int(size), float(share)) for size, share in (text.split(":") for text in schedule)]


def check_sizes(args: argparse.Namespace) -> list[str]:
    """Return error messages for the sizes of images and the masks on them, and fill in --img_size."""
    schedule = read_schedule(args.img_size_schedule or [])
    last = [schedule[-1][0]] * 2 if schedule else [224, 224]
    args.img_size = args.img_size or last
    errors = [] if schedule else check_size("img_size", args.img_size, args.patch_size)
    if schedule:
        sizes, shares = map(list, zip(*schedule, strict=True))
        text = f"--img_size_schedule {' '.join(args.img_size_schedule)}"
        if sizes != sorted({*sizes}) or shares != sorted({*shares}):
            errors.append(f"{text} does not rise; expected rising sizes and shares, such as 96:0.5 160:0.8 224:1")
        if shares[-1] != 1:
            errors.append(f"{text} ends before the run; expected a share of 1 for the last size")
        if args.img_size != last:
            size = " ".join(map(str, args.img_size))
            errors.append(f"--img_size {size} is not the last size of {text}; leave --img_size out")
        errors += [error for size in sizes for error in check_size("img_size_schedule", [size], args.patch_size)]
    smaller = [
        f"--img_size_schedule {size}: {error}" for size, _ in schedule[:-1] for error in check_masks(args, [size] * 2)
    ]
    return errors or check_masks(args, args.img_size) or smaller


def check_masks(args: argparse.Namespace, img_size: Sequence[int]) -> list[str]:
    """Return error messages for the flags of masks on images of a size that --patch_size divides."""
    grid = [side // args.patch_size for side in img_size]
    num_patches, errors = math.prod(grid), []
    num_kept = int(num_patches * (1 - args.mask_ratio))
    num_removed = num_patches - num_kept
    if not 0 < num_kept < num_patches:
        errors.append(
            f"--mask_ratio {args.mask_ratio:g} keeps {num_kept} of {num_patches} patches; expected a ratio that keeps "
            "and removes at least one"
        )
    elif not round(num_removed * args.predict_ratio):
        errors.append(
            f"--predict_ratio {args.predict_ratio:g} predicts none of {num_removed} masked patches; expected a ratio "
            "that predicts at least one"
        )
    return errors + check_mask_block(args.mask_block, args.mask_strategy, grid)


def check_mask_block(block: int, strategy: str, grid: Sequence[int]) -> list[str]:
    """Return error messages for masks of `block` x `block` patches that do not fit the grid or --mask_strategy."""
    errors = []
    if any(side % block for side in grid):
        errors.append(
            f"--mask_block {block} does not divide the grid of {grid[0]} x {grid[1]} patches; take a divisor of both"
        )
    if block > 1 and strategy != "random":
        errors.append(f"--mask_block {block} does not go with --mask_strategy {strategy}; leave one out")
    return errors


def check_decoder(args: argparse.Namespace, decoder_class) -> list[str]:
    """Return error messages for the flags of the decoder, and fill in the default depth of --decoder."""
    if args.decoder_depth is None:
        args.decoder_depth = decoder_class.default_depth
    errors = check_width("decoder", args.decoder_embed_dim, args.decoder_num_heads)
    if args.decoder_inputs == "weighted" and args.decoder != "cross":
        errors.append(
            "--decoder_inputs weighted needs --decoder cross, whose blocks all read the encoder's tokens; give both or "
            "none"
        )
    if args.adapt_channels and not args.init_from:
        errors.append("--adapt_channels converts the weights of --init_from, which is missing; give both or none")
    return errors


def check_target(args: argparse.Namespace) -> list[str]:
    """Return error messages for the flags of the target, and replace --norm_pix_loss by the --target that it means."""
    errors, normalized = [], vars(args).pop("norm_pix_loss")
    if normalized is not None:
        flag, same = ("--norm_pix_loss", "normalized") if normalized else ("--no-norm_pix_loss", "pixels")
        if args.target not in (None, same):
            contradiction = f"contradicts --target {args.target}; leave one of them out"
            errors.append(f"{flag} means --target {same}, which {contradiction}")
        args.target = args.target or same
    args.target = args.target or "normalized"
    for name, target in (("num_components", "pca"), ("teacher", "teacher")):
        value = getattr(args, name)
        if value is not None and args.target != target:
            errors.append(f"--{name} {value} has no effect without --target {target}; add it, or leave --{name} out")
    if args.validity not in (None, "none") and args.target not in PIXEL_TARGETS:
        errors.append(f"--validity {args.validity} needs --target normalized or pixels, not {args.target}; drop one")
    if args.target == "teacher" and not args.teacher:
        errors.append("--target teacher needs --teacher PATH, the encoder whose features are predicted; give it")
    return errors


def check_components(num_components: int | None, num_values: int) -> list[str]:
    """Return an error message if --num_components is more than a patch has values."""
    if (num_components or 0) <= num_values:
        return []
    return [f"--num_components {num_components} is more than the {num_values} values of a patch; give at most that"]


def resolve_validity(given: str | None, target: str, nodata: float | None, previous: dict) -> str | None:
    """Return how invalid pixels are marked, None if all pixels are valid.

    Args:
        given: --validity, None if it was left out.
        target: --target.
        nodata: the value of pixels without data, None if there is none.
        previous: the flags of the run to resume, or {}.
    """
    if given is None and previous:
        return previous.get("validity")
    if given is None:
        return "nodata" if nodata is not None and target in PIXEL_TARGETS else None
    return None if given == "none" else given


def check_views(views: int, micro_batch_size: int) -> list[str]:
    """Return an error message if --repeated_augmentation does not divide the micro-batch."""
    if micro_batch_size % views == 0:
        return []
    return [
        f"--repeated_augmentation {views} does not divide the micro-batch of {micro_batch_size} images; give a batch "
        "and micro-batch that are multiples of it"
    ]


def plan_stages(schedule: Sequence[str] | None, img_size: Sequence[int], total_steps: int) -> list[Stage]:
    """Return the stages of --img_size_schedule; without one, a single stage.

    Raises:
        InputError: for a stage without a step.
    """
    if not schedule:
        return [Stage(tuple(img_size), range(total_steps))]
    sizes, shares = zip(*read_schedule(schedule), strict=True)
    ends = [round(share * total_steps) for share in shares]
    stages = [Stage((size, size), range(*steps)) for size, *steps in zip(sizes, [0, *ends[:-1]], ends, strict=True)]
    remedy = "give it a larger share, or more steps"
    empty = [word for word, stage in zip(schedule, stages, strict=True) if not stage.steps]
    check([f"--img_size_schedule {word} has no step in a run of {total_steps}; {remedy}" for word in empty])
    return stages


def staged_batches(stages: list[Stage], load: Callable, start_step: int, rehearsal=None) -> Iterator:
    """Return an iterator over the batches of a run from `start_step` on, `load(stage)` of one stage after the other.

    In a dry run, `rehearsal` times the stages one after the other.
    """
    left = [Stage(size, range(max(steps.start, start_step), steps.stop)) for size, steps in stages]
    first, *others = [stage for stage in left if stage.steps] or left[-1:]
    if rehearsal:
        return rehearsal.walk([first, *others], load)
    return chain(load(first), chain.from_iterable(map(load, others)))


def describe_model(
    model, stages: list[Stage], *, mask_strategy: str, mask_block: int, validity: str | None
) -> list[str]:
    """Return the plan's lines about a masked autoencoder and its images."""
    encoder, decoder = model.encoder, model.decoder
    parameters, in_encoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, encoder))
    height, width = encoder.img_size
    num_patches = math.prod(encoder.grid)
    tokens = f" of {encoder.num_cls_tokens} class tokens" if encoder.num_cls_tokens > 1 else ""
    masks = mask_strategy + ", of patches with valid pixels" * bool(validity)
    masks += f", blocks of {mask_block} x {mask_block}" if mask_block > 1 else ""
    chosen = f"{model.num_kept} kept"
    if model.num_predicted < num_patches - model.num_kept:
        chosen += f", {model.num_predicted} of {num_patches - model.num_kept} others predicted"
    return [
        f"model      {encoder.embed_dim} x {len(encoder.blocks)} encoder{tokens}, "
        f"{decoder.embed_dim} x {decoder.depth} {decoder.title}: "
        f"{parameters:.3g} M parameters ({in_encoder:.3g} M encoder), "
        f"{model.training_flops() / 1e9:.3g} GFLOP per image and step",
        f"images     {height} x {width}, {several(encoder.in_channels, 'channel')}, {num_patches} patches "
        f"of {encoder.patch_size}, {chosen} ({masks}); target: {model.target.title}",
        *describe_stages(model, stages),
    ]


def describe_stages(model, stages: list[Stage]) -> list[str]:
    """Return the plan's lines about several stages: the cost of each, and of the run."""
    if len(stages) == 1:
        return []
    costs = [model.training_flops(stage.size) for stage in stages]
    totals = [cost * len(stage.steps) for cost, stage in zip(costs, stages, strict=True)]
    lines, side = [], model.encoder.patch_size
    for (size, steps), cost, total in zip(stages, costs, totals, strict=True):
        num_patches = size[0] * size[1] // side**2
        lines.append(
            f"{size[0]} x {size[1]} for {several(len(steps), 'step')}, {model.count(num_patches)[0]} of {num_patches} "
            f"patches kept, {cost / 1e9:.3g} GFLOP per image and step: {total / sum(totals):.0%} of the cost"
        )
    share = sum(totals) / (costs[-1] * stages[-1].steps.stop)
    lines.append(f"{share:.0%} of the cost of {size[0]} x {size[1]} throughout")
    return [f"{'' if number else 'sizes':11}{line}" for number, line in enumerate(lines)]
