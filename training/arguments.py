"""Flags that the scripts share, and how they are read and checked."""

import argparse
import contextlib
import difflib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from training.launch import cores_per_process, fail, is_main_process

# What may differ between a run and its resumption: it decides neither samples nor losses. The data set is compared by
# its fingerprint, the batch by its global size.
FREE_FLAGS = {
    *("experiment_name", "working_directory", "path_to_data", "resume_from_checkpoint", "num_workers", "pin_memory"),
    *("path_to_validation_data", "cache_dir", "on_damaged", "preview_channels"),
    *("wandb_run_name", "log_wandb", "report_to", "log_every", "validate_every", "knn_every", "num_preview_images"),
    "evaluate_every",
    *("compile", "gradient_checkpointing", "dry_run"),
    *("save_checkpoint_interval", "save_checkpoint_steps", "keep_checkpoints"),
    *("push_to_hub", "hub_model_id", "hub_every", "hub_private"),
    *("per_gpu_batch_size", "micro_batch_size", "gradient_accumulation_steps", "time_limit"),
}


TRACKERS = ("wandb", "tensorboard")


class Unreadable(NamedTuple):
    """Stands in for a flag's value that could not be read, so that all of them are reported together."""

    text: str
    expected: str


def integer(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int | Unreadable]:
    """A flag's type: a whole number in [minimum, maximum]."""
    bounds = f"of at least {minimum}" if maximum == 2**63 - 1 else f"from {minimum} to {maximum}"

    def read(text: str) -> int | Unreadable:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        return value if minimum <= value <= maximum else Unreadable(text, f"a whole number {bounds}")

    return read


def number(minimum: float = 0.0, maximum: float = math.inf) -> Callable[[str], float | Unreadable]:
    """A flag's type: a number in [minimum, maximum]."""
    bounds = f" of at least {minimum:g}" if maximum == math.inf else f" from {minimum:g} to {maximum:g}"
    bounds = "" if minimum == -math.inf else bounds

    def read(text: str) -> float | Unreadable:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        in_bounds = minimum <= value <= maximum and math.isfinite(value)
        return value if in_bounds else Unreadable(text, f"a number{bounds}")

    return read


def hours_and_minutes(text: str) -> str | Unreadable:
    """A flag's type: a time, HH:MM, of at least a minute."""
    if re.fullmatch(r"\d{1,4}:[0-5]\d", text) and in_seconds(text):
        return text
    return Unreadable(text, "hours and minutes, HH:MM, of at least 00:01")


def in_seconds(time: str) -> int:
    """A time, HH:MM."""
    hours, minutes = time.split(":")
    return 3600 * int(hours) + 60 * int(minutes)


def integer_or(word: str, minimum: int) -> Callable[[str], int | str | Unreadable]:
    """A flag's type: a whole number of at least `minimum`, or a word."""

    def read(text: str) -> int | str | Unreadable:
        value = word if text == word else integer(minimum)(text)
        return value._replace(expected=f"{word} or {value.expected}") if isinstance(value, Unreadable) else value

    return read


def one_of(*choices: str) -> Callable[[str], str | Unreadable]:
    """A flag's type: one of some words."""
    return lambda text: text if text in choices else Unreadable(text, f"one of {', '.join(choices)}")


class Parser(argparse.ArgumentParser):
    """argparse with `@FILE` for recipes, no abbreviations, and one report of all bad flags."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="@FILE inserts the flags of a recipe file (# starts a comment); later flags win.",
        )
        # Python 3.11 takes -3.4e38, which GeoTIFFs have where there are no data, for a flag
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        fail([f"{message}; {self.prog} --help lists the flags"], show=is_main_process())

    def tell_defaults(self, recipes: dict[str, dict]) -> None:
        """Says in the help of flags whose default depends on the kind of run which it is: kind -> flag -> value."""

        def shown(value) -> str:
            values = value if isinstance(value, list) else [value]
            return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)

        for action in self._actions:
            told = {kind: shown(recipe[action.dest]) for kind, recipe in recipes.items() if action.dest in recipe}
            if told:
                same = len(set(told.values())) == 1
                default = next(iter(told.values())) if same else ", ".join(f"{k}: {v}" for k, v in told.items())
                action.help = f"{action.help.partition('(default')[0].rstrip()} (default {default})"

    def read(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and what is wrong with them; a flag that could not be read then has its default."""
        words, errors = _expand_recipes(sys.argv[1:] if argv is None else argv)
        args, unknown = self.parse_known_intermixed_args(words)  # flags may stand between what is no flag
        known = [option for action in self._actions for option in action.option_strings]
        for before, word in zip(["", *unknown], unknown, strict=False):
            if before.startswith("-") and "=" not in before and not word.startswith("-"):
                continue  # the value of an unknown flag
            word = word.partition("=")[0]
            close = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the flags"
            errors.append(f"{word} is not a flag of {self.prog}; {hint}")
        for name, value in vars(args).items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Unreadable):
                    errors.append(f"--{name} {item.text} is no valid value; expected {item.expected}")
                    setattr(args, name, self.get_default(name))
        if hasattr(args, "resume_from_checkpoint") and args.num_workers is None:
            args.num_workers = min(32, cores_per_process())
        if hasattr(args, "report_to"):
            if "none" in args.report_to and len(args.report_to) > 1:
                errors.append(f"--report_to {' '.join(args.report_to)} contradicts itself; give none or trackers")
            wanted = {*args.report_to, *(["wandb"] if args.log_wandb else [])}
            args.report_to = [name for name in TRACKERS if name in wanted]
        return args, errors


def _expand_recipes(words: list[str]) -> tuple[list[str], list[str]]:
    """Replaces every `@FILE` by the words of that file."""
    expanded, errors = [], []
    for word in words:
        if not word.startswith("@"):
            expanded.append(word)
            continue
        try:
            expanded += shlex.split(Path(word[1:]).read_text(), comments=True)
        except OSError as error:
            errors.append(f"the recipe {word[1:]} cannot be read ({error.strerror}); expected a file of flags")
        except ValueError as error:
            errors.append(f"the recipe {word[1:]} cannot be read ({error}); expected flags as a shell would split them")
    return expanded, errors


SOURCES = (
    "folder of images, with train/ and val/ or without; hf:OWNER/NAME[:config][@revision] or a folder or parquet files "
    "of the library datasets; tar shards 'train-{0000..0146}.tar'; a list .csv or .jsonl (path, label, mask); what "
    "prepare_data.py wrote"
)


def add_run_flags(parser: Parser, *, name: str, data: str = SOURCES) -> None:
    """Where a run lives, what `data` it reads, how it starts and resumes."""
    group = parser.add_argument_group("run")
    flag = group.add_argument
    flag("--experiment_name", default=name, help=f"name of the run and its folder (default {name})")
    flag("--working_directory", default="work_dir", help="folder that holds the runs (default work_dir)")
    flag("--path_to_data", help=f"{data}; or builtin:shapes (required)")
    flag("--path_to_validation_data", help="images held out, of any of these kinds (default: what --path_to_data has)")
    flag("--cache_dir", help="where indices of large data sets are kept (default ~/.cache/masked-autoencoders)")
    flag("--seed", type=integer(0, 2**32 - 1), default=0, help="seed of samples, masks and weights (default 0)")
    flag(
        "--dry_run",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="print the plan, time some steps, say how long the run takes, write nothing",
    )
    flag("--resume_from_checkpoint", metavar="latest|auto|FOLDER", help="continue a run; auto also starts a new one")
    flag(
        "--time_limit",
        type=hours_and_minutes,
        metavar="HH:MM",
        help="save and stop in time before the process is so old, for queues that would kill it then (default none)",
    )
    flag("--num_workers", type=integer(0), help="loader workers per process (default min(32, cores / processes))")
    flag("--pin_memory", action="store_true", help="copy batches to the GPU from pinned memory")
    flag(
        "--mixed_precision",
        type=one_of("no", "bf16", "fp16"),
        help="no, bf16 or fp16 (default: Accelerate's value; where that is no, bf16 on a GPU that has it)",
    )


def add_length_flags(parser: Parser, *, epochs: int | None, steps: int | None = None, warmup: int | str) -> None:
    """How long a run is, in `epochs` or otherwise in `steps`, and its warmup, whose default is told as `warmup`."""
    flag = parser.add_argument_group("length").add_argument
    flag("--epochs", type=integer(1), default=epochs, help="passes over the data" + _default(epochs))
    flag(
        "--max_steps",
        type=integer(1),
        help="optimizer steps; overrides --epochs, and the schedule spans them" + _default(steps),
    )
    flag(
        "--warmup_epochs",
        type=number(),
        help=f"its first epochs, at a rising rate; left out, at most 5 %% of the run (default {warmup})",
    )
    flag("--warmup_steps", type=integer(0), help="optimizer steps; overrides --warmup_epochs")


def _default(value) -> str:
    """Of a flag, for its help; nothing where it has none."""
    return "" if value is None else f" (default {value})"


def add_batch_flags(parser: Parser, *, global_default: int | None = None) -> None:
    """How many images an optimizer step takes, and in which portions; by default 256 a process, or `global_default` in
    all."""
    own_default = 256 if global_default is None else None
    flag = parser.add_argument_group("batch").add_argument
    flag(
        "--per_gpu_batch_size",
        type=integer(1),
        help="images per process per optimizer step" + _default(own_default),
    )
    flag("--gradient_accumulation_steps", type=integer(1), help="micro-batches those are split into (default 1)")
    flag(
        "--global_batch_size",
        type=integer(1),
        help="images per optimizer step, over all processes" + _default(global_default),
    )
    flag(
        "--micro_batch_size",
        type=integer_or("auto", 1),
        metavar="N|auto",
        help="images per process per forward pass; auto takes the most that fit into memory",
    )


def add_optimizer_flags(
    parser: Parser, *, weight_decay: float, base_learning_rate: float | None = None, learning_rate: float | None = None
) -> None:
    """Learning rate, one for 256 images or an absolute one, weight decay and clipping."""
    flag = parser.add_argument_group("optimizer").add_argument
    help_text = "peak rate, absolute"
    if base_learning_rate is not None:
        help_text += "; overrides --base_learning_rate"
        flag(
            "--base_learning_rate",
            type=number(),
            default=base_learning_rate,
            help=f"peak rate for 256 images: the rate is this x global batch / 256 (default {base_learning_rate})",
        )
    flag("--learning_rate", type=number(), default=learning_rate, help=help_text + _default(learning_rate))
    flag("--min_learning_rate", type=number(), default=0.0, help="rate of the last step, absolute (default 0)")
    flag("--weight_decay", type=number(), default=weight_decay, help=f"of AdamW or LARS (default {weight_decay})")
    flag("--bias_weight_decay", action="store_true", help="also decay biases")
    flag("--norm_weight_decay", action="store_true", help="also decay weights and biases of norms")
    flag("--max_grad_norm", type=number(), default=1.0, help="clip the global gradient norm; 0 = none (default 1.0)")


def add_crop_flags(parser: Parser, *, crop_scale: tuple[float, float]) -> None:
    """What a network sees of an image that has one label, or none."""
    flag = parser.add_argument_group("crops").add_argument
    flag("--img_size", type=integer(1), nargs="+", metavar="H [W]", help="pixels (default 224)")
    flag(
        "--fast_decoding",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="decode large JPEGs at 1/2, 1/4 or 1/8 where no crop needs more: for photographs of many megapixels (off)",
    )
    flag(
        "--crop_scale",
        type=number(1e-3, 1),
        nargs=2,
        default=list(crop_scale),
        metavar=("MIN", "MAX"),
        help="share of an image's area that random crops take (default {:g} {:g})".format(*crop_scale),
    )


def add_image_flags(parser: Parser) -> None:
    """What the images are, and how they are normalised."""
    flag = parser.add_argument_group("images").add_argument
    told = "that of statistics.json in the data's folder, otherwise"
    flag("--input_channels", type=integer(1), help=f"3 (colour), 1 (grey), or bands of TIFF, .npy (default {told} 3)")
    flag("--mean", type=number(), nargs="+", help=f"channel means of images in [0, 1] (default {told} ImageNet's)")
    flag("--std", type=number(1e-6), nargs="+", help="channel deviations of images in [0, 1] (default likewise)")
    flag(
        "--value_range",
        type=number(-math.inf),
        nargs=2,
        metavar=("LO", "HI"),
        help=f"read 16-bit and float pixels at full depth, LO as 0 and HI as 1 (default {told} 8 bits)",
    )
    flag("--nodata", type=number(-math.inf), help="value of pixels without data, besides a GeoTIFF's own and NaN")
    flag("--max_pixels", type=integer(1), default=178956970, help="larger images are damaged (default 178956970)")
    flag(
        "--on_damaged",
        type=one_of("replace", "error"),
        default="replace",
        help="show the next readable image (default), or end the run; damaged.jsonl names what was damaged",
    )


def check_images(
    args: argparse.Namespace, statistics: dict | None = None, weights=None, *, adapt: bool = False
) -> list[str]:
    """Gives the flags of images that were left out their values; what is wrong with them.

    A run that is resumed has its own values. Otherwise the data's `statistics`, see prepare_data.py, tell channels,
    range and no data; the `weights` that are started from tell mean and deviation, in [0, 1], and what the data do not.
    `adapt` says that the weights are to fit other channels.
    """
    errors, run = [], _images_of_run(args)
    if args.input_channels is None:
        own = 3 if weights is None or adapt else weights.sizes["in_channels"]
        args.input_channels = (run or statistics or {}).get("channels", own)
    channels = args.input_channels
    if not args.path_to_data:
        errors.append("--path_to_data is missing; give a folder of images or builtin:shapes")
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        errors.append(
            "--value_range {:.9g} {:.9g} is no range; give first the value of black, a smaller one".format(
                *args.value_range
            )
        )
        args.value_range = None  # so that the rest is checked
    data, trained = run or statistics, None
    data = data if data and data["channels"] == channels else None
    if run is None and weights and len(weights.stored.mean or []) == len(weights.stored.std or []) == channels:
        trained = weights.stored._asdict()
    if args.nodata is None and data:
        args.nodata = data["nodata"]
    known = data or trained
    args.value_range = args.value_range or (known["value_range"] if known else None)
    if trained:
        ranges = trained["value_range"], args.value_range
        if None not in ranges and list(ranges[0]) != list(ranges[1]) and not (args.mean and args.std):
            errors.append(
                "--value_range {:.9g} {:.9g} is not that of the weights, {:.9g} to {:.9g}; give that, or --mean and "
                "--std too".format(*args.value_range, *trained["value_range"])
            )
        args.mean, args.std = args.mean or list(trained["mean"]), args.std or list(trained["std"])
    elif data:
        mean, std = _in_range(args.value_range, data)
        args.mean, args.std = args.mean or mean, args.std or std
    args.mean = args.mean or ([0.485, 0.456, 0.406] if channels == 3 else [0.5] * channels)
    args.std = args.std or ([0.229, 0.224, 0.225] if channels == 3 else [0.5] * channels)
    for name in ("mean", "std"):
        count = len(getattr(args, name))
        if count != channels:
            errors.append(f"--{name} has {count} values for {channels} channels; give one a channel")
    return errors


def _images_of_run(args: argparse.Namespace) -> dict | None:
    """What the run that is to be resumed knew of its images; None where there is none."""
    folder = Path(args.working_directory, args.experiment_name)
    if not args.resume_from_checkpoint or not any((folder / "checkpoints").glob("step_*")):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        flags = json.loads((folder / "args.json").read_text())["flags"]
        others = {name: flags.get(name) for name in ("value_range", "nodata")}
        return {"channels": flags["input_channels"], "mean": list(flags["mean"]), "std": list(flags["std"]), **others}
    return None


def _in_range(value_range: Sequence[float] | None, known: dict) -> tuple[list[float], list[float]]:
    """The mean and deviation of pixels that are measured, in units of another range; None is that of 8 bits."""
    (old_low, old_high), (low, high) = known["value_range"] or (0, 255), value_range or (0, 255)
    if (old_low, old_high) == (low, high):
        return known["mean"], known["std"]
    mean = [(old_low + value * (old_high - old_low) - low) / (high - low) for value in known["mean"]]
    return mean, [value * (old_high - old_low) / (high - low) for value in known["std"]]


def add_preview_flag(flag: Callable) -> None:
    """Which channels of an image a picture shows; `flag` adds a flag to its group."""
    flag(
        "--preview_channels",
        type=integer(0),
        nargs="+",
        metavar="C",
        help="one channel or three to show, from 0, with their contrast stretched (default: 8-bit images in colour or "
        "grey as they are; of others the first three, or the first)",
    )


def check_preview(shown: Sequence[int] | None, channels: int) -> list[str]:
    """What is wrong with the channels to show, in a list."""
    if shown is None or (len(shown) in (1, 3) and max(shown) < channels):
        return []
    named = " ".join(map(str, shown))
    return [f"--preview_channels {named} cannot be shown; expected one or three of 0 to {channels - 1}"]


def add_encoder_flags(parser: Parser, *, sizes: Iterable[str], drop_path: float = 0.0) -> None:
    """The sizes of the encoder, and its stochastic depth; `sizes` are the names that --model takes."""
    flag = parser.add_argument_group("encoder").add_argument
    flag("--model", type=one_of(*sizes), help=f"{', '.join(sizes)}: sets the next four (default base)")
    flag("--patch_size", type=integer(1), help="pixels (default 16; huge: 14)")
    flag("--encoder_embed_dim", type=integer(1), help="width; this and the next two override --model")
    flag("--encoder_depth", type=integer(1), help="number of blocks")
    flag("--encoder_num_heads", type=integer(1))
    flag("--encoder_mlp_ratio", type=number(0.1), help="hidden width of the MLPs / width (default 4)")
    rate = f"stochastic depth rate of the last block (default {drop_path:g})"
    flag("--drop_path", type=number(0, 0.99), default=drop_path, help=rate)
    flag(
        "--custom_weight_init",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="initialise as the paper does (default) or as PyTorch does",
    )


def check_crops(args: argparse.Namespace) -> list[str]:
    """Gives --img_size, as [H, W], its default where it was left out; what is wrong with the flags of crops."""
    errors = []
    if args.crop_scale[0] > args.crop_scale[1]:
        errors.append(
            f"--crop_scale {args.crop_scale[0]:g} {args.crop_scale[1]:g} is no range; give the smaller share first"
        )
    args.img_size = args.img_size or [224]
    if len(args.img_size) > 2:
        errors.append(f"--img_size {' '.join(map(str, args.img_size))} has more than two values; expected H or H W")
    args.img_size = (args.img_size * 2)[:2] if len(args.img_size) == 1 else args.img_size[:2]
    return errors


def check_encoder(args: argparse.Namespace, size: dict) -> list[str]:
    """Gives the flags of the encoder that were left out their values in `size`; what is wrong with them, and with the
    resolved --img_size or --crop_size."""
    args.patch_size = args.patch_size or size["patch_size"]
    for name in ("embed_dim", "depth", "num_heads", "mlp_ratio"):
        if getattr(args, f"encoder_{name}") is None:
            setattr(args, f"encoder_{name}", size.get(name, 4.0))
    errors = check_width("encoder", args.encoder_embed_dim, args.encoder_num_heads)
    sides = args.img_size if hasattr(args, "img_size") else [args.crop_size]
    flag = f"--{'img' if hasattr(args, 'img_size') else 'crop'}_size {' '.join(map(str, sides))}"
    if min(sides) < 6:
        errors.append(f"{flag} is too small; expected at least 6 pixels a side")
    if any(side % args.patch_size for side in sides):
        errors.append(f"{flag} is not divided by --patch_size {args.patch_size}; take multiples of {args.patch_size}")
    return errors


def check_width(part: str, dim: int, heads: int) -> list[str]:
    """What is wrong with the width and the number of heads of the "encoder" or "decoder"."""
    errors = []
    if dim % heads:
        errors.append(
            f"--{part}_embed_dim {dim} is not divided by --{part}_num_heads {heads}; take a multiple of {heads}"
        )
    if dim % 4:
        errors.append(f"--{part}_embed_dim {dim} is not divided by 4, as its positions need; take a multiple of 4")
    return errors


def add_speed_flags(parser: Parser) -> None:
    """What trades time, memory and precision against each other."""
    flag = parser.add_argument_group("speed").add_argument
    pair = argparse.BooleanOptionalAction
    flag("--compile", action=pair, default=False, help="compile the training step with torch.compile (off)")
    flag(
        "--gradient_checkpointing",
        action=pair,
        default=False,
        help="keep less for the backward pass, at the cost of a second forward pass (off)",
    )
    flag("--tf32", action=pair, default=True, help="TF32 for matrix products of float32 on a GPU (on)")


def add_logging_flags(parser: Parser) -> None:
    """What is logged, and where to."""
    flag = parser.add_argument_group("logging").add_argument
    flag("--log_every", type=integer(1), default=50, help="optimizer steps between two log lines (default 50)")
    flag(
        "--report_to",
        type=one_of("none", *TRACKERS),
        nargs="+",
        default=["none"],
        metavar="TRACKER",
        help="also log to wandb, tensorboard or both (default none); WANDB_MODE=offline works",
    )
    flag("--log_wandb", action="store_true", help="the same as --report_to wandb")
    flag("--wandb_run_name", help="name of the run there; its project is the experiment's name")


def add_saving_flags(parser: Parser, *, interval: int | None = None, steps: int | None = None) -> None:
    """When checkpoints are written, by default every `interval` epochs or otherwise every so many `steps`, and how many
    are kept; the last step is always saved."""
    flag = parser.add_argument_group("checkpoints").add_argument
    flag(
        "--save_checkpoint_interval",
        type=number(),
        default=interval,
        help="epochs between two checkpoints, 0 = none" + _default(interval),
    )
    flag(
        "--save_checkpoint_steps",
        type=integer(1),
        help="optimizer steps between two; overrides the interval" + _default(steps),
    )
    flag("--keep_checkpoints", type=integer(1), default=3, help="how many of the newest to keep (default 3)")


def add_hub_flags(parser: Parser) -> None:
    """Whether and where the run is published, see push_to_hub.py."""
    flag = parser.add_argument_group("Hugging Face Hub").add_argument
    pair = partial(flag, action=argparse.BooleanOptionalAction, default=False)
    pair("--push_to_hub", help="publish the run at its end, with a model card; a failure never stops it (off)")
    flag("--hub_model_id", metavar="OWNER/NAME", help="repository, made where it does not exist")
    flag("--hub_every", type=integer(0), default=0, help="epochs between two uploads, 0 = at the end only (default 0)")
    pair("--hub_private", help="make a new repository private (off)")
