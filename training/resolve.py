"""Resolve flags whose values follow from the data, the weights, or the run to resume."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from training.launch import InputError, check
from training.wording import as_flags

ENCODER_FLAGS = {name: name for name in ("patch_size", "num_cls_tokens")}  # argument of the model -> flag
ENCODER_FLAGS |= {name: f"encoder_{name}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
USUAL_SIZES = dict(mlp_ratio=4.0, num_cls_tokens=1)
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

DETECTION_RECIPES = ((12, 0.7, 0.1), (24, 0.8, 0.4), (math.inf, 0.9, 0.5))  # greatest depth, layer decay, drop path


class ImageFormat(NamedTuple):
    """The format of the pixels, in fields named like the flags; None for a flag that was not given."""

    input_channels: int | None
    value_range: Sequence[float] | None  # the values of black and white; None: 8 bits
    nodata: float | None
    mean: list[float] | None  # of each channel, in [0, 1]
    std: list[float] | None

    @classmethod
    def from_dict(cls, values: dict | None) -> "ImageFormat | None":
        """Return the format in a dict, such as flags or statistics.json; None if the dict is empty or None."""
        if not values:
            return None
        channels = values.get("input_channels", values.get("channels"))
        return cls(channels, *(values.get(name) for name in cls._fields[1:]))


def resolve_images(
    given: ImageFormat, *, known: ImageFormat | None, trained: ImageFormat | None = None, adapt_channels: bool = False
) -> ImageFormat:
    """Return the format of the images, with a value for every flag that was left out.

    Defaults are channels, value range and no-data value of the data, and mean and standard deviation of the weights.

    Args:
        given: the flags.
        known: the format of the run to resume, or the statistics of the data.
        trained: the format that the weights to start from were trained with.
        adapt_channels: whether the weights are converted to the number of channels of the data.

    Raises:
        InputError: for contradictions, one line each.
    """
    channels = given.input_channels or (known and known.input_channels)
    channels = channels or (trained.input_channels if trained and not adapt_channels else 3)
    data = known if known and known.input_channels == channels else None
    if trained and not len(trained.mean or []) == len(trained.std or []) == channels:
        trained = None
    nodata = data.nodata if given.nodata is None and data else given.nodata
    value_range = given.value_range or getattr(data or trained, "value_range", None)
    errors = []
    source = trained or data
    if source and not (given.mean and given.std):
        same = list(source.value_range or [0, 255]) == list(value_range or [0, 255])
        unknown = trained and None in (trained.value_range, value_range)  # weights of other libraries do not store it
        if not same and not unknown:
            errors.append(
                f"--value_range {in_range(value_range)} is not the range of the known mean and standard deviation, "
                f"{in_range(source.value_range)}; give that range, or --mean and --std too"
            )
    usual = ImageFormat(channels, None, None, [0.5] * channels, [0.5] * channels)
    usual = usual._replace(mean=IMAGENET_MEAN, std=IMAGENET_STD) if channels == 3 else usual
    mean, std = (list(getattr(given, name) or getattr(source or usual, name)) for name in ("mean", "std"))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            errors.append(f"--{name} has {len(values)} values for {channels} channels; give one per channel")
    check(errors)
    return ImageFormat(channels, value_range, nodata, mean, std)


def in_range(value_range: Sequence[float] | None) -> str:
    """Return a value range in words: "0 to 10000"."""
    return "{:.9g} to {:.9g}".format(*(value_range or (0, 255)))


def encoder_sizes(flags: dict, defaults: dict) -> dict:
    """Return the sizes of the encoder, by the names of its arguments.

    Args:
        flags: `patch_size`, `encoder_embed_dim`, ...; None for those that were left out.
        defaults: `patch_size`, `embed_dim`, `depth`, `num_heads`, ... of a named size or of trained weights.
    """
    given, defaults = {name: flags[flag] for name, flag in ENCODER_FLAGS.items()}, USUAL_SIZES | defaults
    return {name: defaults[name] if value is None else value for name, value in given.items()}


def resolve_inputs(flags: dict, *, previous: dict, statistics: dict | None, weights=None) -> ImageFormat:
    """Return the format of the images of a fine-tuning run, see `resolve_images`.

    Args:
        flags: the script's flags.
        previous: the flags of the run to resume, or {}.
        statistics: the content of statistics.json, which lies beside the data.
        weights: `modeling.weights.Weights` to start from, or None.
    """
    known, trained = ImageFormat.from_dict(previous) or ImageFormat.from_dict(statistics), None
    if weights:
        stored = weights.stored
        trained = ImageFormat(weights.sizes["in_channels"], stored.value_range, None, stored.mean, stored.std)
    given, adapt = ImageFormat.from_dict(flags), flags["adapt_channels"]
    return resolve_images(given, known=known, trained=trained, adapt_channels=adapt)


def resolve_encoder(flags: dict, named_sizes: dict[str, dict], *, previous: dict, weights=None) -> dict:
    """Return the sizes of the encoder of a fine-tuning run, with `img_size` (H, W) if `flags` have it.

    Each is that of the flag, else of --model, else of the run to resume, else of the weights, else of ViT-B.

    Raises:
        InputError: for sizes that contradict each other, one line each.
    """
    defaults = named_sizes[flags["model"] or "base"]
    if previous or weights:
        known = {name: previous[flag] for name, flag in ENCODER_FLAGS.items()} if previous else weights.sizes
        defaults = defaults | {"num_cls_tokens": known["num_cls_tokens"]} if flags["model"] else known
    sizes = encoder_sizes(flags, defaults)
    if sizes["num_heads"] is None:
        raise InputError("the weights do not store the encoder's number of heads; give --encoder_num_heads")
    errors = check_width("encoder", sizes["embed_dim"], sizes["num_heads"])
    if "img_size" in flags:
        trained = weights and weights.grid and [side * sizes["patch_size"] for side in weights.grid]
        sizes["img_size"] = tuple(flags["img_size"] or previous.get("img_size") or trained or [224, 224])
        errors += check_size("img_size", sizes["img_size"], sizes["patch_size"])
    check(errors)
    return sizes


def check_trained(flags: dict, named_sizes: dict[str, dict], encoder) -> None:
    """Raise InputError for sizes that were given for a trained model and are not those of its encoder."""
    model, actual = flags["model"], encoder_flags(vars(encoder))
    named = {"num_cls_tokens": encoder.num_cls_tokens, **named_sizes[model]} if model else {}
    prefix, defaults = (f"--model {model}: ", named) if model else ("--", vars(encoder))
    for flag, value in encoder_flags(encoder_sizes(flags, defaults)).items():
        if value != actual[flag]:
            raise InputError(f"{prefix}{flag} {value:g} is not the trained model's {actual[flag]:g}; leave it out")
    if not flags["adapt_channels"] and flags["input_channels"] not in (None, encoder.in_channels):
        raise InputError(
            f"--input_channels {flags['input_channels']} does not fit the trained model, of {encoder.in_channels}; "
            "leave it out, or give --adapt_channels"
        )


def encoder_flags(sizes: dict) -> dict:
    """Return the sizes of an encoder under the names of their flags."""
    return {flag: sizes[name] for name, flag in ENCODER_FLAGS.items()}


def check_width(part: str, dim: int, heads: int) -> list[str]:
    """Return error messages for the width and the number of heads of the "encoder" or "decoder"."""
    errors = []
    if dim % heads:
        errors.append(f"--{part}_embed_dim {dim} is not divisible by --{part}_num_heads {heads}; take a multiple")
    if dim % 4:
        errors.append(f"--{part}_embed_dim {dim} is not divisible by 4, as its positions require; take a multiple of 4")
    return errors


def check_size(flag: str, sides: Sequence[int], patch_size: int) -> list[str]:
    """Return error messages for the sides of images (or crops), in pixels, that the flag gives."""
    flag = f"--{flag} {' '.join(map(str, sides))}"
    errors = [f"{flag} is too small; expected at least 6 pixels a side"] if min(sides) < 6 else []
    if any(side % patch_size for side in sides):
        errors.append(f"{flag} is not divisible by --patch_size {patch_size}; take multiples of {patch_size}")
    return errors


def check_preview(channels: Sequence[int] | None, input_channels: int | None = None) -> list[str]:
    """Return error messages if --preview_channels are not one or three existing channels."""
    text, beyond = " ".join(map(str, channels or [])), input_channels and max(channels or [0]) >= input_channels
    if not channels or (len(channels) in (1, 3) and not beyond):
        return []
    numbers = f" of 0 to {input_channels - 1}" if input_channels else ""
    return [f"--preview_channels {text} cannot be shown; expected one or three{numbers}"]


def resolve_augmentation(magnitude: int, default: int, images: ImageFormat) -> int:
    """Return the magnitude of RandAugment: 0 for formats that it lacks; raise InputError if one was given for them."""
    if not magnitude or (images.value_range is None and images.input_channels in (1, 3)):
        return magnitude
    if magnitude != default:
        raise InputError(f"--random_aug_magnitude {magnitude} is for 8-bit images in colour or grey; give 0")
    return 0


def resolve_crop(crop_size: int, patch_size: int, *, min_patches: int) -> tuple[int, int]:
    """Return H and W of square crops, in pixels.

    Raises:
        InputError: for crops that do not fit the patches, or have fewer than `min_patches` a side.
    """
    check(check_size("crop_size", [crop_size], patch_size))
    if crop_size < min_patches * patch_size:
        raise InputError(f"--crop_size {crop_size} is too small for the head; give at least {min_patches * patch_size}")
    return crop_size, crop_size


def resolve_head(flags: dict, depth: int, head_class, default_layers: Callable[[int, int], list[int]]) -> dict:
    """Return the flags of a segmenter's head with their values.

    Args:
        flags: `head`, `layers`, `head_width`, `auxiliary_weight`; None for those that were left out.
        depth: number of blocks of the encoder.
        head_class: the head's class in `modeling.upernet.HEADS`.
        default_layers: returns the indices of the blocks that feed the head, given the depth and their number.

    Raises:
        InputError: for layers that the encoder does not have, or not as many as the head takes.
    """
    layers, count, errors = flags["layers"], head_class.num_layers, []
    if depth < count and not layers:
        name = flags["head"]
        raise InputError(f"--head {name} needs an encoder of at least {count} blocks, not {depth}; give --head linear")
    layers = layers or default_layers(depth, count)
    text = "--layers " + " ".join(map(str, layers))
    if max(layers) >= depth:
        errors.append(f"{text} is beyond the encoder's {depth} blocks; expected 0 to {depth - 1}")
    if len(layers) != count or layers != sorted(set(layers)):
        errors.append(f"{text} does not fit --head {flags['head']}; expected {count} different numbers in rising order")
    check(errors)
    width, weight = flags["head_width"] or head_class.default_width, flags["auxiliary_weight"]
    weight = head_class.default_auxiliary_weight if weight is None else weight
    return dict(head=flags["head"], layers=layers, head_width=width, auxiliary_weight=weight)


def resolve_detector(flags: dict, depth: int, lacks_masks: str, *, settings: dict, defaults: dict) -> dict:
    """Return the flags of a detector that follow from the encoder's depth, the data and the weights.

    Layer decay and drop path are ViTDet's for ViT-B, L and H (Li et al. 2022, appendix A.2).

    Args:
        flags: `head`, `drop_path`, `layer_decay`, `relative_position_bias`, and those in `defaults`, None for those
            that were left out; and `freeze_encoder`.
        lacks_masks: why the masks of the data cannot be used; "" if they can.
        settings: the flags of the run to resume, or the `settings` of the weights, or {}.
        defaults: defaults of the flags that do not depend on the data or the encoder.

    Raises:
        InputError: if --head mask_rcnn is given, and the data have no masks that can be used.
    """
    if flags["head"] == "mask_rcnn" and lacks_masks:
        raise InputError(f"--head mask_rcnn needs masks, and {lacks_masks}; add masks, or give --head faster_rcnn")
    layer_decay, drop_path = next(recipe for most, *recipe in DETECTION_RECIPES if depth <= most)
    if flags["freeze_encoder"]:
        layer_decay, drop_path = 1.0, 0.0
    head = "faster_rcnn" if lacks_masks else "mask_rcnn"
    defaults = {**defaults, "head": head, "drop_path": drop_path, "layer_decay": layer_decay}
    defaults["relative_position_bias"] = bool(settings.get("relative_position_bias"))
    resolved = {name: value if flags[name] is None else flags[name] for name, value in defaults.items()}
    return resolved | {"layer_scale": 1.0 if settings.get("layer_scale") else None}


def check_trained_detector(flags: dict, settings: dict, lacks_masks: str) -> None:
    """Raise InputError for flags that are not the `settings` of a trained detector, and for data that it cannot see."""
    errors = [
        f"{as_flags({name: flags[name]})} is not the trained model's, which has {as_flags({name: value})}; leave it out"
        for name, value in settings.items()
        if flags[name] not in (None, value)
    ]
    if settings["head"] == "mask_rcnn" and lacks_masks:
        errors.append(f"the trained model detects masks, and {lacks_masks}; give data with masks")
    check(errors)


def check_detector_sizes(encoder: dict) -> dict:
    """Check the arguments of a detector's encoder, and return them unchanged.

    Raises InputError for patches of other than 4, 8, 16 or 32 pixels, and sides that are no multiple of 4 patches.
    """
    patch_size, side = encoder["patch_size"], encoder["img_size"][0]
    if patch_size not in (4, 8, 16, 32):
        expected = "expected 4, 8, 16 or 32; give --patch_size 16, to which weights are resized"
        raise InputError(f"--patch_size {patch_size} does not fit a detector; {expected}")
    multiple = 4 * patch_size
    if side % multiple:
        expected = f"expected a multiple of {multiple}, 4 patches of {patch_size}"
        remedy = f"give {max(1, side // multiple) * multiple}"
        raise InputError(f"--img_size {side} does not fit a detector; {expected}; {remedy}")
    return encoder


def check_blocks(trainable_blocks: float | None, depth: int) -> None:
    """Raise InputError for more trainable blocks than the encoder has."""
    if trainable_blocks is not None and trainable_blocks > depth:
        raise InputError(
            f"--trainable_blocks {trainable_blocks:g} is more than the encoder has; expected at most {depth}"
        )


def resolve_queries(num_queries: int | None, width: int) -> int:
    """Return the number of queries: `num_queries`, or the largest power of two up to 32 that divides `width`.

    Raises:
        InputError: if `num_queries` does not divide the width.
    """
    if num_queries and width % num_queries:
        raise InputError(f"--num_queries {num_queries} does not divide the encoder's width of {width}; give a divisor")
    return num_queries or math.gcd(32, width)


def check_classifier_batch(size: int, *, mixing: bool, probe: bool) -> list[str]:
    """Return error messages for a classifier's micro-batches of `size` images."""
    errors = []
    if mixing and size % 2:
        errors.append(
            f"--mixup_alpha and --cutmix_alpha mix pairs of images, and the micro-batch of {size} is odd; give an even "
            "one, or 0 for both"
        )
    if probe and size < 2:
        errors.append(f"a probe has a BatchNorm: --micro_batch_size {size} is too small; give at least 2")
    return errors


def check_segmenter_batch(size: int, *, min_batch: int) -> list[str]:
    """Return an error message if micro-batches of `size` images are too small for a segmenter's BatchNorms."""
    message = f"the head has BatchNorms that see one value per image; give micro-batches of at least {min_batch} images"
    return [message] if size < min_batch else []
