"""Define, read and check the flags that the scripts share."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from training.command_line import expand, suggest
from training.launch import default_workers, fail, is_main_process
from training.upload import check_hub
from training.wording import as_flags, as_typed

# Flags that may differ between a run and its resumption: they change neither samples nor losses. The data set is
# compared by its fingerprint, the batch by its global size.
FREE_FLAGS = {
    *("experiment_name", "working_directory", "path_to_data", "resume_from_checkpoint", "num_workers", "pin_memory"),
    *("path_to_validation_data", "data_format", "drop_unlabelled", "cache_dir", "on_damaged", "preview_channels"),
    *("wandb_run_name", "log_wandb", "report_to", "log_every", "validate_every", "knn_every", "num_preview_images"),
    *("knn_images", "evaluate_every", "compile", "deterministic", "gradient_checkpointing", "dry_run"),
    *("save_checkpoint_interval", "save_checkpoint_steps", "keep_checkpoints"),
    *("push_to_hub", "hub_model_id", "hub_every", "hub_private"),
    *("per_gpu_batch_size", "micro_batch_size", "gradient_accumulation_steps", "time_limit"),
}
TRACKERS = ("wandb", "tensorboard")
Pair = argparse.BooleanOptionalAction  # --x and --no-x
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")


def integer(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """Return an argparse type: a whole number in [minimum, maximum]."""
    bounds = f"of at least {minimum}" if maximum == 2**63 - 1 else f"from {minimum} to {maximum}"

    def read(text: str) -> int:
        if re.fullmatch(r"[+-]?\d+", text) and minimum <= int(text) <= maximum:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; expected a whole number {bounds}")

    return read


def number(minimum: float = 0.0, maximum: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite number in [minimum, maximum]."""
    bounds = f" of at least {minimum:g}" if maximum == math.inf else f" from {minimum:g} to {maximum:g}"
    expected = f"expected a number{'' if minimum == -math.inf else bounds}"

    def read(text: str) -> float:
        if NUMBER.fullmatch(text) and math.isfinite(float(text)) and minimum <= float(text) <= maximum:
            return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; {expected}")

    return read


def number_or(word: str, read: Callable) -> Callable[[str], float | str]:
    """Return an argparse type: `word` itself, or the value that `read` returns for other text."""
    return lambda text: word if text == word else read(text)


def hours_and_minutes(text: str) -> str:
    """Check a time HH:MM of at least one minute, and return it: an argparse type."""
    if re.fullmatch(r"\d{1,4}:[0-5]\d", text) and in_seconds(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not valid; expected hours and minutes, HH:MM, of at least 00:01")


def in_seconds(time: str) -> int:
    """Return the seconds of a time HH:MM."""
    hours, minutes = time.split(":")
    return 3600 * int(hours) + 60 * int(minutes)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with `@FILE` for recipes, no abbreviations, and errors as `error:` lines."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="@FILE inserts the flags of a recipe file (# starts a comment); later flags win.",
        )
        self._recipe_errors: list[str] = []
        self._negative_number_matcher = NUMBER  # Python 3.11 takes -3.4e38, the no-data value of GeoTIFFs, for a flag

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and the message, after those of unreadable recipes, which may be its cause."""
        message = message.removeprefix("argument ")
        fail([*self._recipe_errors, f"{message}; {self.prog} --help lists the flags"], show=is_main_process())

    def describe_defaults(self, recipes: dict[str, dict]) -> None:
        """Add to the help of each flag its default by kind of run: `recipes` maps kind -> flag -> value."""
        for action in self._actions:
            name = action.dest
            kinds = {}  # default -> kinds of run
            for kind in [kind for kind, recipe in recipes.items() if name in recipe]:
                kinds.setdefault(as_typed(recipes[kind][name]), []).append(kind)
            if kinds:
                text = "; ".join(f"{', '.join(same)}: {value}" for value, same in kinds.items())
                text = text if len(kinds) > 1 else next(iter(kinds))
                action.help = f"{action.help.partition('(default')[0].rstrip()} (default {text})"

    def read(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """Return the flags, and error messages for unknown flags, recipes that cannot be read and contradictions."""
        words, errors = expand(sys.argv[1:] if argv is None else argv)
        self._recipe_errors = list(errors)
        args, unknown = self.parse_known_intermixed_args(words)  # flags may stand between positional arguments
        known = [option for action in self._actions for option in action.option_strings]
        for before, word in zip(["", *unknown], unknown, strict=False):
            if before.startswith("-") and "=" not in before and not word.startswith("-"):
                continue  # the value of an unknown flag
            word = word.partition("=")[0]
            similar = suggest(word, known)
            hint = f"did you mean {similar}?" if similar else f"{self.prog} --help lists the flags"
            errors.append(f"{word} is not a flag of {self.prog}; {hint}")
        if hasattr(args, "resume_from_checkpoint") and args.num_workers is None:
            args.num_workers = default_workers()
        if hasattr(args, "report_to"):
            if "none" in args.report_to and len(args.report_to) > 1:
                errors.append(f"--report_to {' '.join(args.report_to)} contradicts itself; give none or trackers")
            names = {*args.report_to, *(["wandb"] if args.log_wandb else [])}
            args.report_to = [name for name in TRACKERS if name in names]
        return args, errors


SOURCES = (
    "folder of images, with train/ and val/ or without; hf:OWNER/NAME[:config][@revision] or a folder or parquet files "
    "of the library datasets; tar shards 'train-{0000..0146}.tar'; a list .csv, .tsv or .jsonl (path, label, mask); a "
    "folder written by prepare_data.py"
)
DATA_FORMATS = ("folder", "parquet", "tar", "list", "hub")


def _default(value) -> str:
    return "" if value is None else f" (default {value})"


def add_run_flags(parser: Parser, *, name: str, data: str = SOURCES) -> None:
    """Add flags for a run's folder and data, and for how it starts and resumes; `data` is help on --path_to_data."""
    flag = parser.add_argument_group("run").add_argument
    flag("--experiment_name", default=name, help=f"name of the run and its folder (default {name})")
    flag("--working_directory", default="work_dir", help="folder that holds the runs (default work_dir)")
    flag("--path_to_data", help=f"{data}; or builtin:shapes (required)")
    flag("--path_to_validation_data", help="validation images in any of these forms (default: those of --path_to_data)")
    flag("--cache_dir", help="folder for indices of large data sets (default ~/.cache/masked-autoencoders)")
    flag("--seed", type=integer(0, 2**32 - 1), default=0, help="seed of samples, masks and weights (default 0)")
    flag("--dry_run", action=Pair, default=False, help="print the plan, time some steps, write nothing (off)")
    flag("--resume_from_checkpoint", metavar="latest|auto|FOLDER", help="continue a run; auto also starts a new one")
    flag("--time_limit", type=hours_and_minutes, metavar="HH:MM", help="save and stop before HH:MM (default none)")
    help_text = "loader workers per process (default min(32, cores / processes); a GPU keeps two cores free)"
    flag("--num_workers", type=integer(0), help=help_text)
    flag("--pin_memory", action=Pair, help="copy batches to the GPU from pinned memory (default: on a GPU)")
    help_text = "precision of the forward pass (default: Accelerate's value; if that is no, bf16 on a GPU that has it)"
    flag("--mixed_precision", choices=("no", "bf16", "fp16"), help=help_text)


def add_source_flags(parser: Parser, *, has_labels: bool = False) -> None:
    """Add flags for how --path_to_data is read; `has_labels` says that the script needs labels."""
    flag = parser.add_argument_group("data").add_argument
    flag("--data_format", choices=DATA_FORMATS, help="kind of the data (default: detected from suffixes and content)")
    if has_labels:
        help_text = "leave out images whose label is empty or -1, or that are in no class folder (off)"
        flag("--drop_unlabelled", action=Pair, default=False, help=help_text)


def add_length_flags(parser: Parser, *, epochs: int | None, steps: int | None = None, warmup: int | str) -> None:
    """Add flags for the length of a run, by default `epochs` or, if that is None, `steps`, and for its warmup."""
    flag = parser.add_argument_group("steps").add_argument
    flag("--epochs", type=integer(1), default=epochs, help="passes over the data" + _default(epochs))
    flag("--max_steps", type=integer(1), help="optimizer steps; overrides --epochs" + _default(steps))
    help_text = f"epochs of linear warmup, in a shorter run the same share of it (default {warmup})"
    flag("--warmup_epochs", type=number(), help=help_text)
    flag("--warmup_steps", type=integer(0), help="steps of linear warmup; overrides --warmup_epochs")


def add_batch_flags(parser: Parser, *, global_default: int | None = None) -> None:
    """Add flags for the batch: by default 256 images per process, or `global_default` over all processes."""
    flag = parser.add_argument_group("batch").add_argument
    per_process = 256 if global_default is None else None
    flag("--per_gpu_batch_size", type=integer(1), help="images per process per optimizer step" + _default(per_process))
    flag("--gradient_accumulation_steps", type=integer(1), help="micro-batches per optimizer step (default 1)")
    flag("--global_batch_size", type=integer(1), help="images per step, over all processes" + _default(global_default))
    help_text = "images per process per forward pass; auto: the most that fit on the GPU"
    flag("--micro_batch_size", type=number_or("auto", integer(1)), metavar="N|auto", help=help_text)


def add_optimizer_flags(
    parser: Parser, *, weight_decay: float, base_learning_rate: float | None = None, learning_rate: float | None = None
) -> None:
    """Add flags for the learning rate (for 256 images, or absolute), weight decay and clipping."""
    flag = parser.add_argument_group("optimizer").add_argument
    help_text = "peak learning rate, absolute"
    if base_learning_rate is not None:
        base = f"peak learning rate for 256 images; scaled by global batch / 256 (default {base_learning_rate})"
        flag("--base_learning_rate", type=number(), default=base_learning_rate, help=base)
        help_text += "; overrides --base_learning_rate"
    flag("--learning_rate", type=number(), default=learning_rate, help=help_text + _default(learning_rate))
    flag("--min_learning_rate", type=number(), default=0.0, help="learning rate of the last step (default 0)")
    flag("--weight_decay", type=number(), default=weight_decay, help=f"weight decay (default {weight_decay})")
    flag("--bias_weight_decay", action="store_true", help="decay biases too")
    flag("--norm_weight_decay", action="store_true", help="decay weights and biases of norms too")
    flag("--max_grad_norm", type=number(), default=1.0, help="clip the global gradient norm, 0 for none (default 1.0)")


def add_crop_flags(parser: Parser, *, crop_scale: tuple[float, float]) -> None:
    """Add flags for the size and the crops of images in pre-training and classification."""
    flag = parser.add_argument_group("crops").add_argument
    flag("--img_size", type=integer(1), nargs="+", metavar="H [W]", help="pixels (default 224)")
    help_text = "decode JPEGs at 1/2, 1/4 or 1/8 of their size where crops need no more: for large photographs (off)"
    flag("--fast_decoding", action=Pair, default=False, help=help_text)
    help_text = "share of an image's area that random crops take (default {:g} {:g})".format(*crop_scale)
    options = dict(type=number(1e-3, 1), nargs=2, metavar=("MIN", "MAX"))
    flag("--crop_scale", default=list(crop_scale), help=help_text, **options)


def add_image_flags(parser: Parser) -> None:
    """Add flags for the format of the pixels and their normalization."""
    flag = parser.add_argument_group("images").add_argument
    source = "that of statistics.json in the data's folder, otherwise"
    flag("--input_channels", type=integer(1), help=f"3 (colour), 1 (grey), or bands of TIFF, .npy (default {source} 3)")
    flag("--mean", type=number(), nargs="+", help=f"channel means of images in [0, 1] (default {source} ImageNet's)")
    flag("--std", type=number(1e-6), nargs="+", help="channel standard deviations, likewise")
    help_text = f"read 16-bit and float pixels at full depth, LO as 0 and HI as 1 (default {source} 8 bits)"
    flag("--value_range", type=number(-math.inf), nargs=2, metavar=("LO", "HI"), help=help_text)
    flag("--nodata", type=number(-math.inf), help="value of pixels without data, besides a GeoTIFF's own and NaN")
    flag("--max_pixels", type=integer(1), default=178956970, help="treat larger images as damaged (default 178956970)")
    help_text = "show the next readable image, or end the run; damaged.jsonl names damaged images (default replace)"
    flag("--on_damaged", choices=("replace", "error"), default="replace", help=help_text)


def add_preview_flag(flag: Callable) -> None:
    """Add the flag for the channels that pictures show; `flag` is the add_argument of a group."""
    help_text = "one or three channels to show, from 0, contrast-stretched (default: the first three, or the first)"
    flag("--preview_channels", type=integer(0), nargs="+", metavar="C", help=help_text)


def add_encoder_flags(parser: Parser, *, sizes: Iterable[str], drop_path: float = 0.0) -> None:
    """Add flags for the encoder and its stochastic depth; `sizes` are the names that --model takes."""
    flag = parser.add_argument_group("encoder").add_argument
    flag("--model", choices=tuple(sizes), help="named sizes of the next five flags (default base)")
    flag("--patch_size", type=integer(1), help="pixels (default 16; huge: 14)")
    flag("--encoder_embed_dim", type=integer(1), help="width; this and the next two override --model")
    flag("--encoder_depth", type=integer(1), help="number of blocks")
    flag("--encoder_num_heads", type=integer(1), help="attention heads")
    flag("--encoder_mlp_ratio", type=number(0.1), help="hidden width of the MLPs / width (default 4)")
    flag("--num_cls_tokens", type=integer(1), help="class tokens (default 1, or those of the weights to fine-tune)")
    flag("--drop_path", type=number(0, 0.99), default=drop_path, help="stochastic depth rate" + _default(drop_path))
    flag("--custom_weight_init", action=Pair, default=True, help="use the paper's initialization, not PyTorch's (on)")


def add_finetuning_flags(parser: Parser, *, weights: str, betas: list[float] | None, layer_decay: float | None) -> None:
    """Add the flags that fine-tuning scripts share; `weights` is the flag for the pre-trained weights."""
    flag = parser.add_argument_group("fine-tuning").add_argument
    help_text = "weights: a run of pretrain_mae.py, its encoder/, the official MAE's .pth, a folder or file of timm or "
    help_text += "transformers; their sizes, --mean and --std become the defaults (left out: train from scratch)"
    flag(weights, metavar="PATH", help=help_text)
    flag("--adapt_channels", action=Pair, default=False, help="convert the weights to --input_channels (off)")
    help_text = "betas of AdamW" + (" (default {:g} {:g})".format(*betas) if betas else "")
    flag("--betas", type=number(0, 0.99999), nargs=2, metavar=("B1", "B2"), default=betas, help=help_text)
    help_text = "learning rate of a block / that of the block above" + _default(layer_decay)
    flag("--layer_decay", type=number(0.01, 1), default=layer_decay, help=help_text)
    help_text = f"only measure the trained model that {weights} gives; flags for training are not read (off)"
    flag("--eval_only", action=Pair, default=False, help=help_text)


def add_segmenter_flags(parser: Parser, *, heads: Iterable[str]) -> None:
    """Add flags for a segmenter's head, loss and evaluation; `heads` are the names that --head takes."""
    flag = parser.add_argument_group("segmenter").add_argument
    help_text = "train the head alone, on frozen features: --drop_path, --layer_decay and the next two are off (off)"
    flag("--freeze_encoder", action=Pair, default=False, help=help_text)
    flag("--relative_position_bias", action=Pair, help="add a learned relative position bias (on; dpt: off)")
    flag("--layer_scale", type=number(), help="initial LayerScale of the blocks (0: off, default 1; dpt: 0)")
    parser.set_defaults(drop_path=None, layer_decay=None)  # check_segmenter fills them in
    flag("--head", choices=tuple(heads), default="upernet", help="head on the encoder (default upernet)")
    flag("--head_width", type=integer(1), help="channels of the head's layers (default upernet: 512, dpt: 256)")
    layers = "blocks, from 0, that feed the head (default: after 1/3, 1/2, 2/3 and all of them; linear: the last)"
    flag("--layers", type=integer(0), nargs="+", metavar="I", help=layers)
    flag("--auxiliary_weight", type=number(), help="loss weight of UperNet's auxiliary head (0: off, default 0.4)")
    weights = "loss weight of each class; or balanced, which favours rare classes (default equal)"
    flag("--class_weights", type=number_or("balanced", number()), nargs="+", metavar="W", help=weights)

    flag = parser.add_argument_group("evaluation").add_argument
    mode = "slide a window of the crop's size, or squeeze the whole image into one crop (default slide)"
    flag("--evaluation_mode", "--evaluate", dest="evaluate", choices=("slide", "whole"), default="slide", help=mode)
    flag("--evaluate_scales", type=number(0.1, 8), nargs="+", default=[1.0], help="average over sizes (default 1)")
    flag("--evaluate_flip", action=Pair, default=False, help="average over the image and its mirror image (off)")
    every = "steps between validations (0: at the end only, default 16000)"
    flag("--evaluate_every", type=integer(0), default=16_000, help=every)
    flag("--num_preview_images", type=integer(0), default=8, help="rows of the pictures (default 8)")


def add_detector_flags(
    parser: Parser, *, heads: Iterable[str], window_size: int, head_width: int, num_regions: int
) -> None:
    """Add flags for a detector's inputs, windows, heads and evaluation; `heads` are the names that --head takes."""
    flag = parser.add_argument_group("detector").add_argument
    flag("--img_size", type=integer(1), nargs="+", metavar="S", help="side of the square inputs (default 1024)")
    help_text = "images are resized to fit S times a factor between these, then cut or padded (default 0.1 2)"
    flag("--scale_jitter", type=number(0.01, 10), nargs=2, metavar=("MIN", "MAX"), default=[0.1, 2.0], help=help_text)
    flag(
        "--head", choices=tuple(heads), help="boxes and masks, or only boxes (default mask_rcnn if the data has masks)"
    )
    help_text = "side of the attention windows, in patches, of all but four blocks (0: no windows, default "
    flag("--window_size", type=integer(0), help=f"{help_text}{window_size})")
    help_text = "learned relative position bias in all blocks (default: as in the weights, otherwise off)"
    flag("--relative_position_bias", action=Pair, help=help_text)
    flag("--head_width", type=integer(4), help=f"channels of pyramid and heads (default {head_width})")
    regions = f"regions of an image that train the heads; half as many anchors train the RPN (default {num_regions})"
    flag("--num_regions", type=integer(2), default=num_regions, help=regions)
    flag("--freeze_encoder", action=Pair, default=False, help="train pyramid and heads alone, on frozen features (off)")
    schedule = "step: learning rate times 0.1 after 8/9 and again after 26/27 of the run; or cosine (default step)"
    flag("--lr_schedule", choices=("step", "cosine"), default="step", help=schedule)
    parser.set_defaults(drop_path=None, layer_decay=None)  # resolve_detector fills them in by the encoder's depth

    flag = parser.add_argument_group("evaluation").add_argument
    every = "steps between validations (0: at the end only, default 5000)"
    flag("--evaluate_every", type=integer(0), default=5_000, help=every)
    flag("--num_preview_images", type=integer(0), default=8, help="rows of the pictures (default 8)")


def add_speed_flags(parser: Parser) -> None:
    """Add flags for speed, memory and precision."""
    flag = parser.add_argument_group("speed").add_argument
    flag("--compile", action=Pair, default=False, help="compile the training step with torch.compile (off)")
    flag("--gradient_checkpointing", action=Pair, default=False, help="recompute activations to save memory (off)")
    help_text = "use deterministic GPU kernels: slower, and a resumed run is bit-exact (off)"
    flag("--deterministic", action=Pair, default=False, help=help_text)
    flag("--tf32", action=Pair, default=True, help="TF32 for matrix products and convolutions of float32 on a GPU (on)")


def add_logging_flags(parser: Parser) -> None:
    """Add flags for logs and trackers."""
    flag = parser.add_argument_group("logging").add_argument
    flag("--log_every", type=integer(1), default=50, help="optimizer steps between two log lines (default 50)")
    help_text = "also log to wandb, tensorboard or both (default none); WANDB_MODE=offline works"
    flag("--report_to", choices=("none", *TRACKERS), nargs="+", default=["none"], help=help_text)
    flag("--log_wandb", action="store_true", help="the same as --report_to wandb")
    flag("--wandb_run_name", help="run name in wandb; its project is the experiment's name")


def add_saving_flags(parser: Parser, *, interval: int | None = None, steps: int | None = None) -> None:
    """Add flags for when checkpoints are written, by default every `interval` epochs or every `steps` steps."""
    flag = parser.add_argument_group("checkpoints").add_argument
    help_text = "epochs between two checkpoints (0: only the last step)" + _default(interval)
    flag("--save_checkpoint_interval", type=number(), default=interval, help=help_text)
    flag("--save_checkpoint_steps", type=integer(1), help="the same in optimizer steps; overrides it" + _default(steps))
    flag("--keep_checkpoints", type=integer(1), default=3, help="number of newest checkpoints to keep (default 3)")


def add_hub_flags(parser: Parser) -> None:
    """Add flags for pushing the run to the Hub, see push_to_hub.py."""
    flag = parser.add_argument_group("Hugging Face Hub").add_argument
    flag("--push_to_hub", action=Pair, default=False, help="push the run at its end, with a model card (off)")
    flag("--hub_model_id", metavar="OWNER/NAME", help="repository, created if it does not exist")
    flag("--hub_every", type=integer(0), default=0, help="epochs between two uploads (0: at the end only, default 0)")
    flag("--hub_private", action=Pair, default=False, help="create the repository as private (off)")


def check_run(args: argparse.Namespace) -> list[str]:
    """Return error messages for the flags that every training script has."""
    errors = [] if args.path_to_data else ["--path_to_data is missing; give a folder of images or builtin:shapes"]
    if not args.experiment_name.strip() or Path(args.experiment_name).name in ("", ".."):
        name = args.experiment_name
        errors.append(f"--experiment_name {name!r} names no folder inside --working_directory; give a name")
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        low, high = args.value_range
        errors.append(f"--value_range {low:.9g} {high:.9g} is empty; give the value of black first, then a larger one")
    if args.micro_batch_size == "auto" and args.gradient_accumulation_steps:
        errors.append(
            f"--micro_batch_size auto chooses --gradient_accumulation_steps, which is given as "
            f"{args.gradient_accumulation_steps}; give one of the two"
        )
    hub = dict(repository=args.hub_model_id, every=args.hub_every, private=args.hub_private)
    return errors + check_hub(args.push_to_hub, **hub)


def check_crops(args: argparse.Namespace) -> list[str]:
    """Return error messages for --crop_scale and --img_size, and turn the latter into [H, W] if it was given."""
    errors = []
    if args.crop_scale[0] > args.crop_scale[1]:
        low, high = args.crop_scale
        errors.append(f"--crop_scale {low:g} {high:g} is empty; give the smaller share first")
    if args.img_size:
        if len(args.img_size) > 2:
            errors.append(f"--img_size {' '.join(map(str, args.img_size))} has more than two values; expected H or H W")
        args.img_size = (args.img_size * 2)[:2] if len(args.img_size) == 1 else args.img_size[:2]
    return errors


def check_finetuning(args: argparse.Namespace, weights: str) -> list[str]:
    """Return error messages for the flags of `add_finetuning_flags`."""
    path = getattr(args, weights.removeprefix("--"))
    errors = [f"{weights} is empty; give a path, or leave the flag out to train from scratch"] if path == "" else []
    names = ("linear_probe", "attentive_probe", "trainable_blocks", "freeze_encoder", "adapt_channels", "eval_only")
    for name in names:
        if not path and getattr(args, name, None) not in (None, False):
            errors.append(f"--{name} needs trained weights; give {weights}")
    reasons = {
        "resume_from_checkpoint": f"give the checkpoint's folder as {weights}, and an --experiment_name",
        "linear_probe": "the head is read from the weights",
        "attentive_probe": "the head is read from the weights",
        "dry_run": "nothing trains",
        "push_to_hub": "nothing trains",
    }
    return errors + [
        f"--{name} does not go with --eval_only: {reason}; leave it out"
        for name, reason in reasons.items()
        if args.eval_only and getattr(args, name, None)
    ]


def check_detector(args: argparse.Namespace) -> list[str]:
    """Return error messages for the flags of `add_detector_flags`."""
    errors, (low, high) = [], args.scale_jitter
    if low > high:
        errors.append(f"--scale_jitter {low:g} {high:g} is empty; give the smaller factor first")
    wrong = {name: getattr(args, name) for name in ("drop_path", "layer_decay") if getattr(args, name) is not None}
    if args.freeze_encoder and wrong:
        errors.append(f"{as_flags(wrong)} does not go with --freeze_encoder; leave it out")
    if args.img_size and (len(args.img_size) > 2 or len({*args.img_size}) > 1):
        errors.append(f"{as_flags({'img_size': args.img_size})} is not square; give one side")
    return errors


def check_segmenter(args: argparse.Namespace, head_class) -> list[str]:
    """Return error messages for a segmenter's flags and --resize, and fill in defaults for training its encoder."""
    errors, weights = [], args.class_weights
    if args.resize and args.resize[0] < args.resize[1]:
        errors.append(f"--resize {args.resize[0]} {args.resize[1]} has its longer side last; give LONG SHORT")
    if weights and "balanced" in weights and len(weights) > 1:
        errors.append("--class_weights mixes balanced and numbers; give one or the other")
    elif weights and not any(weights):
        errors.append("--class_weights are all 0: nothing would be learned; give at least one above 0")
    extras = dict(relative_position_bias=False, layer_scale=0.0)
    of_head = dict(head_width=head_class.default_width, auxiliary_weight=head_class.default_auxiliary_weight)
    of_head = {name: None for name, default in of_head.items() if default is None}
    of_head |= extras if head_class.plain_encoder else {}
    frozen = dict(drop_path=0.0, layer_decay=1.0, **extras) if args.freeze_encoder else {}
    defaults = dict(drop_path=0.1, layer_decay=0.65, relative_position_bias=True, layer_scale=1.0)
    for cause, fixed in ((f"--head {args.head}", of_head), ("--freeze_encoder", frozen)):
        wrong = {name: vars(args)[name] for name in fixed if vars(args)[name] not in (None, fixed[name])}
        errors += [f"{as_flags(wrong)} does not go with {cause}; leave it out"] if wrong else []
        defaults |= fixed
    vars(args).update({name: value for name, value in defaults.items() if vars(args)[name] is None})
    return errors
