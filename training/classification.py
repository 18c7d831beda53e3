"""Define and check the flags of classifiers."""

import argparse

from training.arguments import Pair, Parser, integer, number
from training.objectives import LOSSES
from training.recipes import RECIPES, UNFIT, choose_kind


def add_optimizer_flags(parser: Parser) -> None:
    """Add flags for the optimizer and the average of the weights."""
    flag = parser.add_argument_group("optimizer of a classifier").add_argument
    flag("--optimizer", choices=("adamw", "lars"), help="AdamW or LARS")
    flag("--ema_decay", type=number(0, 0.9999999), default=0.0, help="decay of averaged weights (0: off, default 0)")


def add_target_flags(parser: Parser) -> None:
    """Add flags for the parts that train, the target and the head."""
    flag = parser.add_argument_group("what trains (default: everything)").add_argument
    flag("--linear_probe", action=Pair, default=False, help="the head alone, on frozen features")
    flag("--attentive_probe", action=Pair, default=False, help="attentive pooling and the head, on frozen features")
    flag("--trainable_blocks", type=number(), metavar="N", help="the last N blocks (0.5: one MLP) and the head")
    help_text = "encode every image once, as its centre crop without augmentation; for probes (default off)"
    flag("--cache_features", action=Pair, default=False, help=help_text)
    flag = parser.add_argument_group("what is learned").add_argument
    help_text = "one class per image, several labels, or numbers (default classes)"
    flag("--target", choices=tuple(UNFIT), default="classes", help=help_text)
    help_text = "columns of labels (0 or 1; or one column of lists) or numbers (default: column label or labels)"
    flag("--label_columns", nargs="+", metavar="COLUMN", help=help_text)
    help_text = "weight of a label's positive images: balanced is negatives / positives (default 1)"
    flag("--positive_weights", choices=("balanced",), help=help_text)
    flag("--regression_loss", choices=tuple(LOSSES), help="loss of standardized numbers (default l2)")
    flag = parser.add_argument_group("head").add_argument
    flag("--num_queries", type=integer(1), metavar="Q", help="queries of attentive pooling (default at most 32)")
    flag("--num_classes", type=integer(2), help="number of classes (default: that of the data)")
    flag(
        "--pooling", choices=("mean", "cls"), help="input of the head: mean of the patch tokens, or of the class tokens"
    )


def add_augmentation_flags(parser: Parser) -> None:
    """Add flags for the augmentation of a classifier's images."""
    flag = parser.add_argument_group("augmentation").add_argument
    help_text = "draw random crops as torchvision, or as the official linear probe, whose crops are larger"
    styles = ("torchvision", "official")
    flag("--crop_style", choices=styles, default=styles[0], help=f"{help_text} (default {styles[0]})")
    flag("--random_aug_magnitude", type=integer(0, 10), help="RandAugment magnitude (0: off)")
    flag("--random_erase", type=number(0, 1), help="probability of erasing a part of an image (0: off)")
    flag("--mixup_alpha", type=number(), help="mixup alpha (0: off)")
    flag("--cutmix_alpha", type=number(), help="CutMix alpha (0: off)")
    flag("--mixup_probability", type=number(0, 1), default=1.0, help="share of mixed micro-batches (default 1)")
    flag("--mixup_switch", type=number(0, 1), default=0.5, help="share of CutMix if both are on (default 0.5)")
    flag("--label_smoothing", type=number(0, 0.99), help="label smoothing (0: off)")


def check_classifier(args: argparse.Namespace) -> list[str]:
    """Return error messages for flags that contradict each other or do not apply."""
    probes = dict(linear_probe=args.linear_probe, attentive_probe=args.attentive_probe)
    kind = choose_kind(args.path_to_pretrained_mae_weights, **probes)
    usual_optimizer, errors = RECIPES[kind]["optimizer"], []
    if args.optimizer not in (None, usual_optimizer) and args.learning_rate is None:
        errors.append(
            f"--optimizer {args.optimizer} has no default learning rate here; give --learning_rate, or use "
            f"{usual_optimizer}"
        )
    modes = {"linear_probe": args.linear_probe, "attentive_probe": args.attentive_probe}
    modes["trainable_blocks"] = args.trainable_blocks is not None
    modes = [f"--{name}" for name, given in modes.items() if given]
    if len(modes) > 1:
        errors.append(f"{' and '.join(modes)} contradict each other; give one of them")
    elif args.linear_probe or args.attentive_probe:
        none = {"mixup_alpha": 0, "cutmix_alpha": 0, "drop_path": 0, "layer_decay": 1}
        values = {name: getattr(args, name) for name in none}
        given = [f"--{name} {value:g}" for name, value in values.items() if value not in (None, none[name])]
        if args.attentive_probe and args.pooling:
            given.append(f"--pooling {args.pooling}")
        if given:
            errors.append(
                f"{modes[0]} trains a head on frozen features, to which {', '.join(given)} does not apply; leave it out"
            )
    if args.cache_features:
        augmentation = {name: getattr(args, name) for name in ("random_erase", "random_aug_magnitude")}
        given = [f"--{name} {value:g}" for name, value in augmentation.items() if value]
        if given:
            errors.append(f"--cache_features has no augmentation, so {', '.join(given)} does not apply; leave it out")
        if not (args.linear_probe or args.attentive_probe):
            errors.append("--cache_features needs a frozen encoder; add --linear_probe or --attentive_probe")
    if args.num_queries and not args.attentive_probe:
        errors.append(f"--num_queries {args.num_queries} has no effect without --attentive_probe; leave it out")
    if args.trainable_blocks is not None and args.trainable_blocks % 1 and args.trainable_blocks != 0.5:
        errors.append(f"--trainable_blocks {args.trainable_blocks:g} is not valid; expected 0.5 or a whole number")
    return errors + ([] if args.eval_only else _check_target(args))


def _check_target(args: argparse.Namespace) -> list[str]:
    """Return error messages for flags that do not fit --target."""
    targets = dict(label_columns=("labels", "numbers"), positive_weights=("labels",), regression_loss=("numbers",))
    targets |= dict(num_classes=("classes",), drop_unlabelled=("classes",))
    unfit = [name for name, fit in targets.items() if getattr(args, name) and args.target not in fit]
    unfit += [name for name in UNFIT[args.target] if getattr(args, name)]
    errors = [f"--{name} has no meaning for --target {args.target}; leave it out" for name in unfit]
    columns = args.label_columns or []
    if len({*columns}) < len(columns):
        errors.append(f"--label_columns {' '.join(columns)} names a column twice; give each once")
    return errors
