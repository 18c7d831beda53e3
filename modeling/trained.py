"""From weights of any known layout to the module that they are of, ready to be used."""

from pathlib import Path
from typing import NamedTuple

from modeling.classifier import Classifier
from modeling.files import Stored, WeightsError, find_weights, read_state_dict, read_stored
from modeling.mae import MaskedAutoencoder
from modeling.upernet import Segmenter, default_layers
from modeling.vit import VisionTransformer
from modeling.weights import classifier_kind, decoder_sizes, encoder_grid, encoder_sizes, load_weights, segmenter_kind

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Trained(NamedTuple):
    """A trained module, and how images are prepared for it."""

    model: MaskedAutoencoder | Classifier | Segmenter | VisionTransformer  # on the CPU, in evaluation mode
    path: Path  # the file or folder that was read
    layout: str  # "this project", "the official MAE", "transformers' ViT", ...
    mean: list[float]  # of the channels, by which images in [0, 1] are normalised
    std: list[float]
    classes: list[str]  # names, of a classifier or segmenter; otherwise []
    crop_ratio: float  # the part of a resized image that evaluation sees, of an encoder or a classifier
    resize: tuple[int, int] | None  # LONG, SHORT: the sides that images fit in evaluation, of a segmenter
    value_range: tuple[float, float] | None  # the pixels that become 0 and 1; None: 0 and 255
    assumed: tuple[str, ...]  # what nobody told and was assumed, in words

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder, which is the whole model or a part of it."""
        return self.model if isinstance(self.model, VisionTransformer) else self.model.encoder


def open_trained(path: str | Path, *, whole: bool = True, told: Stored = Stored()) -> Trained:  # noqa: B008
    """The module whose weights `path` leads to: a run, one of its checkpoints or exported folders, a file or folder of
    the official MAE, timm or transformers, or hf:OWNER/NAME[@revision].

    `whole` asks for the autoencoder where there is one, otherwise the encoder is enough. `told` is what the caller
    knows and nothing beside the weights tells. Raises WeightsError, whose message begins with the path, for weights
    that cannot be read, do not fit together or are of no module of this project, and where `told` contradicts them.
    """
    path = find_weights(path, whole=whole)
    state, stored = read_state_dict(path), read_stored(path)
    for name, value in told._asdict().items():
        known = getattr(stored, name)
        if value is not None and known not in (None, value):
            raise WeightsError(f"{path}: tells {name} {known} itself, against the {value} given; leave that out")
        if value is not None:
            stored = stored._replace(**{name: value})
    try:
        return _build(path, state, stored, whole=whole)
    except (WeightsError, ValueError) as error:  # the latter for sizes that do not go together
        raise WeightsError(f"{path}: {error}") from error


def _build(path: Path, state: dict, stored: Stored, *, whole: bool) -> Trained:
    """As `open_trained`, of weights that are read."""
    sizes, grid, assumed = encoder_sizes(state, stored), encoder_grid(state, stored), []
    if sizes["num_heads"] is None:
        raise WeightsError("does not tell its number of attention heads; give --encoder_num_heads to push_to_hub.py")
    if grid is None:
        raise WeightsError("positions that make no square, of a grid that nobody tells; give a folder with config.json")
    img_size = tuple(side * sizes["patch_size"] for side in grid)
    kind, head, decoder = segmenter_kind(state), classifier_kind(state), decoder_sizes(state, stored)
    extras, num_classes = {}, 0
    if kind:
        extras = dict(relative_position_bias=kind.relative_position_bias, layer_scale=1.0 if kind.layer_scale else None)
    encoder = VisionTransformer(img_size=img_size, **sizes, **extras)
    if kind:
        num_classes = kind.num_classes
        layers = stored.layers
        if layers is None:
            layers = default_layers(sizes["depth"]) if kind.head == "upernet" else [sizes["depth"] - 1]
            assumed.append(f"the head sees the blocks {' '.join(map(str, layers))}")
        options = dict(head=kind.head, head_width=kind.head_width or 512, layers=layers, auxiliary=kind.auxiliary)
        model = Segmenter(encoder, num_classes, **options)
    elif decoder and whole:
        if decoder["decoder_num_heads"] is None:
            decoder["decoder_num_heads"] = 16
            assumed.append("16 heads in the decoder, as in the paper")
        if stored.mask_ratio is None:
            assumed.append("a mask ratio of 0.75")
        if stored.norm_pix_loss is None:
            assumed.append("a target of pixels normalised per patch")
        options = dict(mask_ratio=stored.mask_ratio or 0.75, norm_pix_loss=stored.norm_pix_loss is not False)
        model = MaskedAutoencoder(encoder, **decoder, **options)
    elif head:
        num_classes, pooling, linear_probe = head
        if stored.pooling is None:
            assumed.append("a head on the cls token" if pooling == "cls" else "a head on the mean of the patch tokens")
        model = Classifier(encoder, num_classes, pooling=pooling, linear_probe=linear_probe)
    else:
        model = encoder
    report = load_weights(model, state, stored=stored)

    if num_classes and len(stored.classes or []) != num_classes:
        assumed.append("no names of classes")
    classes = stored.classes if len(stored.classes or []) == num_classes else None
    mean, std = stored.mean, stored.std
    if mean is None or std is None or len(mean) != encoder.in_channels or len(std) != encoder.in_channels:
        colour = encoder.in_channels == 3
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if colour else ([0.5] * encoder.in_channels,) * 2
        assumed.append(f"images normalised by {'the mean and deviation of ImageNet' if colour else '0.5 and 0.5'}")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise WeightsError("weights that are not finite; give an earlier checkpoint, before they diverged")
    if stored.norm_eps is not None:
        assumed.append(f"norms with an epsilon of 1e-6, where these weights had {stored.norm_eps:g}")
    if kind and stored.resize is None:
        assumed.append(f"images that fit {4 * img_size[0]} x {img_size[0]} pixels in evaluation")
    if stored.crop_ratio is None and head and not kind and report.layout != "this project":
        assumed.append("images resized bicubically, proportions kept, and cut to their centre")
    return Trained(
        model.eval(),
        path,
        report.layout,
        list(mean),
        list(std),
        list(classes or (f"LABEL_{i}" for i in range(num_classes))),
        stored.crop_ratio or (0.875 if max(img_size) <= 224 else 1.0),  # as finetune_classifier.py evaluates
        tuple(stored.resize or (4 * img_size[0], img_size[0])) if kind else None,
        tuple(stored.value_range) if stored.value_range else None,
        tuple(assumed),
    )
