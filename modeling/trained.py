"""Open trained weights of any known layout as the module that they belong to, ready for use."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from modeling.classifier import Classifier
from modeling.decoder import DECODERS
from modeling.detector import HEADS as DETECTORS
from modeling.detector import Detector
from modeling.export import CROP_RATIO
from modeling.files import Stored, WeightsError
from modeling.layouts import State
from modeling.mae import MaskedAutoencoder
from modeling.targets import TARGETS
from modeling.upernet import Segmenter
from modeling.vit import Grid, VisionTransformer
from modeling.weights import Model, Weights, load_weights, open_weights

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PAPER = dict(decoder_num_heads=16, mask_ratio=0.75, target="normalized")


class Trained(NamedTuple):
    """A trained module, and how to prepare images for it.

    The image or crop size is `encoder.img_size`, and the number of channels is `encoder.in_channels`.
    """

    model: Model  # on the CPU, in evaluation mode
    path: Path  # file or folder that was read
    layout: str  # of the weights: "this project", "the official MAE", "transformers' ViT", ...
    mean: list[float]  # of the channels, for the normalization of images in [0, 1]
    std: list[float]
    class_names: list[str] | None  # None if no file states them
    crop_ratio: float  # of an encoder or classifier: side of the centre crop / side of the resized image
    resize: tuple[int, int] | None  # of a segmenter: LONG and SHORT side that images fit into
    masks: dict[str, int | None]  # "mask_offset" and "void_label" of the masks that a segmenter was trained on
    value_range: tuple[float, float] | None  # pixel values that become 0 and 1; None: 0 and 255
    class_ids: Sequence[int] = ()  # numbers of the classes in the annotations of a detector; if unknown, from 1
    assumed: tuple[str, ...] = ()  # descriptions of assumptions where no file states a fact

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder, which is the whole model or a part of it."""
        return self.model if isinstance(self.model, VisionTransformer) else self.model.encoder

    @property
    def classes(self) -> list[str]:
        """The names of the head's classes, LABEL_0, ... if unknown; [] without a head."""
        return self.class_names or [f"LABEL_{i}" for i in range(getattr(self.model, "num_classes", 0))]

    @property
    def categories(self) -> dict[int, str]:
        """The names of the classes by their numbers in the annotations."""
        return dict(zip(self.class_ids, self.classes, strict=True))


def open_trained(
    path: str | Path,
    *,
    whole: bool = True,
    given: Stored = Stored(),  # noqa: B008 - immutable
    img_size: tuple[int, int] | None = None,
    in_channels: int | None = None,
) -> Trained:
    """Open trained weights as a MaskedAutoencoder, Classifier, Segmenter, Detector or VisionTransformer.

    Args:
        path: a run, one of its checkpoints or exported folders, a file or folder of the official MAE, timm or
            transformers, or hf:OWNER/NAME[@revision].
        whole: open the autoencoder if there is one, not only the encoder.
        given: facts that the files beside the weights do not state.
        img_size: H and W in pixels, to which positions are resized; evaluation then uses the defaults for this size.
        in_channels: number of channels to which the weights are converted; None: their own.

    Raises:
        WeightsError: with a message that begins with the path, if weights cannot be read or fit no model here, or
            `given` contradicts the files.
    """
    weights = open_weights(path, whole=whole, given=given)
    stored = weights.stored
    try:
        model = _build(weights, whole=whole, img_size=img_size, in_channels=in_channels)
        if getattr(model, "problem", None) == "numbers":
            _take_out_of_head(weights.state, model.num_classes, stored)
        report = load_weights(model, weights.state, stored=stored, adapt_channels=in_channels is not None)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise WeightsError("weights that are not finite; give an earlier checkpoint, before they diverged")
    except ValueError as error:  # a WeightsError, or sizes that do not fit together
        message = getattr(error, "message", str(error))
        raise WeightsError(f"{weights.path}: {message}", getattr(error, "settings", None)) from error

    encoder, num_classes = getattr(model, "encoder", model), getattr(model, "num_classes", 0)
    side, channels = encoder.img_size[0], encoder.in_channels
    if img_size:
        stored = stored._replace(crop_ratio=None, resize=None)
    if not len(stored.mean or []) == len(stored.std or []) == channels:
        stored = stored._replace(mean=None, std=None)
    if len(stored.classes or []) != num_classes:
        stored = stored._replace(classes=None)
    if len(stored.class_ids or []) != num_classes:
        stored = stored._replace(class_ids=[*range(1, num_classes + 1)])
    trained = Trained(
        model=model.eval(),
        path=weights.path,
        layout=report.layout,
        mean=list(stored.mean or (IMAGENET_MEAN if channels == 3 else [0.5] * channels)),
        std=list(stored.std or (IMAGENET_STD if channels == 3 else [0.5] * channels)),
        class_names=stored.classes or None,
        class_ids=stored.class_ids,
        crop_ratio=stored.crop_ratio or (CROP_RATIO if max(encoder.img_size) <= 224 else 1.0),
        resize=tuple(stored.resize or (4 * side, side)) if isinstance(model, Segmenter) else None,
        masks=dict(mask_offset=stored.mask_offset, void_label=stored.void_label),
        value_range=stored.value_range and tuple(stored.value_range),
    )
    return trained._replace(assumed=tuple(_assumptions(trained, stored)))


def _build(weights: Weights, *, whole: bool, img_size: Grid | None, in_channels: int | None) -> Model:
    """Return a newly initialized module that fits the weights."""
    settings, stored, sizes = weights.settings, weights.stored, dict(weights.sizes)
    if sizes["num_heads"] is None:
        message = "no file states the number of attention heads; convert the weights with push_to_hub.py"
        raise WeightsError(message, dict(encoder_num_heads="N"))
    if weights.grid is None and img_size is None:
        raise WeightsError("a table of positions that is not square, of unknown height; give a folder with config.json")
    img_size = img_size or tuple(side * sizes["patch_size"] for side in weights.grid)
    sizes["in_channels"] = in_channels or sizes["in_channels"]
    encoder = VisionTransformer(img_size=img_size, **sizes)
    if head := settings.get("head"):
        scale = 1.0 if settings["layer_scale"] else None
        encoder.add_extras(relative_position_bias=settings["relative_position_bias"], layer_scale=scale)
        if head in DETECTORS:
            window = Detector.default_window if stored.window_size is None else stored.window_size
            options = dict(masks=head == DETECTORS[0], window=window, width=settings["head_width"])
            return Detector(encoder, settings["num_classes"], **options)
        options = dict(head_width=settings["head_width"], auxiliary=settings["auxiliary"])
        return Segmenter(encoder, settings["num_classes"], head=head, layers=stored.layers, **options)
    if whole and "decoder_embed_dim" in settings:
        options = {name: settings[f"decoder_{name}"] for name in ("embed_dim", "depth", "mlp_ratio")}
        known = PAPER | {name: getattr(stored, name) for name in PAPER if getattr(stored, name) is not None}
        outputs = weights.state.get("decoder.pred.bias", ())  # only this project has other targets
        target = TARGETS[known.pop("target")](encoder, len(outputs) or None)
        options |= dict(num_heads=known.pop("decoder_num_heads"), num_outputs=target.width)
        if settings["decoder"] == "cross":
            options["inputs"] = settings["decoder_inputs"]
        return MaskedAutoencoder(encoder, DECODERS[settings["decoder"]](encoder, **options), target, **known)
    if "pooling" in settings:
        kind = {name: settings[name] for name in ("pooling", "probe", "num_queries") if name in settings}
        problem = stored.problem if stored.problem in ("labels", "numbers") else "classes"
        return Classifier(encoder, settings["num_classes"], problem=problem, **kind)
    return encoder


def _take_out_of_head(state: State, num_classes: int, stored: Stored) -> None:
    """Undo the folding of standardized numbers into the head of an exported classifier, see `export_classifier`."""
    if "number_mean" in state:  # a checkpoint
        return
    known = stored.standardization or dict(mean=[0.0] * num_classes, std=[1.0] * num_classes)
    state.update({f"number_{name}": torch.tensor(known[name]) for name in ("mean", "std")})
    if stored.standardization:
        state["head.weight"] = state["head.weight"] / state["number_std"][:, None]
        state["head.bias"] = torch.tensor(known["bias"])


def _assumptions(trained: Trained, stored: Stored) -> Iterator[str]:
    """Yield a description of each assumption that replaces a fact missing from `stored`."""
    model = trained.model
    if isinstance(model, Segmenter) and stored.layers is None:
        yield f"the head sees the blocks {' '.join(map(str, model.layers))}"
    if isinstance(model, MaskedAutoencoder):
        yield from (
            f"{name} {value}, as in the paper" for name, value in PAPER.items() if getattr(stored, name) is None
        )
    if isinstance(model, Classifier) and stored.pooling is None and model.pooling != "attentive":
        yield f"a head on {'the cls token' if model.pooling == 'cls' else 'the mean of the patch tokens'}"
    if isinstance(model, Classifier | Segmenter | Detector) and stored.classes is None:
        yield "unnamed classes"
    if stored.mean is None:
        yield f"images normalized by the mean {trained.mean} and the standard deviation {trained.std}"
    if stored.norm_eps is not None:
        yield f"norms with an epsilon of 1e-6 (these weights: {stored.norm_eps:g})"
    if isinstance(model, Segmenter) and stored.resize is None:
        yield "images that fit {} x {} pixels in evaluation".format(*trained.resize)
    if isinstance(model, Classifier) and stored.crop_ratio is None and trained.layout != "this project":
        yield "images resized bicubically with their aspect ratio, and cropped to their centre"
