"""Flags of a pre-training's views, masks, decoder and target, and how they are checked."""

import argparse
import math
from collections.abc import Iterable

from training.arguments import Pair, Parser, integer, number
from training.resolve import check_width

# Argument of the decoder -> flag
DECODER_FLAGS = {name: f"decoder_{name}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}


def add_mask_flags(parser: Parser, *, strategies: Iterable[str]) -> None:
    """Add the views of an image and their masks; `strategies` are the names that --mask_strategy takes."""
    flag = parser.add_argument_group("views and masks").add_argument
    flag("--repeated_augmentation", type=integer(1), default=1, metavar="K", help="views of each image (default 1)")
    flag("--mask_ratio", type=number(0, 1), default=0.75, help="share of patches to remove (default 0.75)")
    flag("--mask_strategy", choices=tuple(strategies), default="random", help="how patches are chosen (default random)")


def add_decoder_flags(parser: Parser) -> None:
    """Add the sizes of the decoder, its target, and the weights to start from."""
    flag = parser.add_argument_group("decoder and target").add_argument
    flag("--decoder_embed_dim", type=integer(1), default=512, help="width (default 512)")
    flag("--decoder_depth", type=integer(1), default=8, help="number of blocks (default 8)")
    flag("--decoder_num_heads", type=integer(1), default=16, help="attention heads (default 16)")
    flag("--decoder_mlp_ratio", type=number(0.1), default=4.0, help="hidden width of the MLPs / width (default 4)")
    flag("--init_from", metavar="PATH", help="weights to start from: of this project, the official MAE, transformers")
    flag("--norm_pix_loss", action=Pair, default=True, help="predict pixels normalized per patch, not plain (on)")
    flag("--adapt_channels", action=Pair, default=False, help="convert --init_from to --input_channels (off)")


def check_masks(args: argparse.Namespace) -> list[str]:
    """Return error messages for the flags of masks on the grid of --img_size and --patch_size, which fit."""
    num_patches = math.prod(side // args.patch_size for side in args.img_size)
    num_kept = int(num_patches * (1 - args.mask_ratio))
    if 0 < num_kept < num_patches:
        return []
    return [
        f"--mask_ratio {args.mask_ratio:g} keeps {num_kept} of {num_patches} patches; expected a ratio that keeps and "
        "removes at least one"
    ]


def check_decoder(args: argparse.Namespace) -> list[str]:
    """Return error messages for the flags of `add_decoder_flags`."""
    errors = check_width("decoder", args.decoder_embed_dim, args.decoder_num_heads)
    if args.adapt_channels and not args.init_from:
        errors.append("--adapt_channels converts the weights of --init_from, which is missing; give both or none")
    return errors


def check_views(views: int, micro_batch_size: int) -> list[str]:
    """Return an error message if --repeated_augmentation does not divide the micro-batch."""
    if micro_batch_size % views == 0:
        return []
    return [
        f"--repeated_augmentation {views} does not divide the micro-batch of {micro_batch_size} images; give a batch "
        "and micro-batch that are multiples of it"
    ]
