"""Convert trained models to ONNX files, and compare ONNX Runtime's outputs with those of the model.

Legend: B batch, C channels, H W pixels, h w patches, L = h * w, T class tokens, D width, N classes.
"""

import copy
import json
import math
import warnings

import torch
from torch import nn

from modeling.classifier import Classifier
from modeling.mae import MaskedAutoencoder
from modeling.trained import Trained
from modeling.upernet import Segmenter
from modeling.vit import Grid, VisionTransformer

OPSET = 18  # the version that torch's exporter writes without a conversion
MAX_BYTES = 2**31 - 2**24  # size of the weights: protobuf's limit is 2 GiB, and the graph needs part of it
TOLERANCES = {False: 1e-4, True: 1e-2}  # half precision -> largest allowed difference of outputs
OUTPUTS = {
    "features": ("features", "cls_tokens", "patch_tokens"),
    "classes": ("logits", "probabilities"),
    "labels": ("logits", "probabilities"),
    "numbers": ("numbers",),
    "segmentation": ("logits", "labels"),
    "reconstruction": ("reconstruction", "mask"),
}


class DeployError(ValueError):
    """Raised for a model that cannot become an ONNX file; the message is one line."""


def task_of(trained: Trained, *, features: bool) -> str:
    """Return the key in OUTPUTS for a model; with `features` for the encoder alone, except of a Segmenter."""
    model = trained.model
    if isinstance(model, Classifier) and not features:
        return model.problem
    if isinstance(model, Segmenter):
        return "segmentation"
    return "reconstruction" if isinstance(model, MaskedAutoencoder) and not features else "features"


def dynamic_size_misfit(trained: Trained, task: str) -> str | None:
    """Return the reason why a model has no ONNX form for images of any size, None if it has one."""
    if task == "reconstruction":
        return "an autoencoder, whose noise and number of visible patches are those of one size"
    if task == "segmentation" and trained.model.head != "linear":
        return f"a segmenter with {trained.model.decode_head.title}, whose graph depends on the size"
    if trained.encoder.relative_position_bias:
        return "a model with a relative position bias, whose graph depends on the size"
    return None


class Deployed(nn.Module):
    """Compute the outputs of an ONNX file from its inputs.

    Args:
        trained: the trained model, which is copied.
        task: a key in OUTPUTS.
        raw_pixels: normalize the images in the module. They are uint8 or, for a model with a `value_range`, float32 in
            the units of that range. Otherwise the inputs are normalized images in float32.
        half: store weights in float16, except a classifier's head; inputs and outputs keep their types.
    """

    def __init__(self, trained: Trained, task: str, *, raw_pixels: bool = False, half: bool = False):
        super().__init__()
        self.task, self.raw_pixels = task, raw_pixels
        self.dtype = torch.float16 if half else torch.float32
        self.low, self.high = trained.value_range or (0.0, 255.0)
        self.image_type = torch.uint8 if raw_pixels and trained.value_range is None else torch.float32
        whole = task != "features" or isinstance(trained.model, Classifier)  # a classifier's head pools the features
        self.model = copy.deepcopy(trained.model if whole else trained.encoder).requires_grad_(False)
        if half:
            (self.encoder if isinstance(self.model, Classifier) else self.model).half()
        if isinstance(self.model, MaskedAutoencoder):
            self.model.target.float()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(trained, name)).view(-1, 1, 1))
        self.eval()

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder, which is the whole model or a part of it."""
        # Not an attribute: its parameters would have two names, and the exported file would compute wrong outputs.
        return getattr(self.model, "encoder", self.model)

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Return the outputs named in OUTPUTS for images (B, C, H, W); reconstruction also needs noise (B, L)."""
        if self.raw_pixels:
            scaled = (images.float() - self.low) / (self.high - self.low)
            images = (scaled.clamp(0, 1) - self.mean) / self.std
        if self.task == "reconstruction":
            return self.reconstruct(images, noise)
        if self.task == "segmentation":
            logits = self.model(images.to(self.dtype)).float()
            return logits, logits.argmax(dim=1).to(torch.uint8)
        tokens = self.encoder(images.to(self.dtype)).float()
        if self.task == "features":
            return self.pool(tokens), *self.encoder.split(tokens)
        logits = self.model.classify(tokens)
        answer = self.model.answer(logits)
        return (answer,) if self.task == "numbers" else (logits, answer)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the features (B, D) that predict.py writes, from tokens (B, T + L, D)."""
        is_classifier = isinstance(self.model, Classifier)
        return self.model.pool(tokens) if is_classifier else self.encoder.split(tokens)[1].mean(dim=1)

    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prediction (B, C, H, W), denormalized but not clipped, and the mask (B, 1, H, W), 1: masked."""
        no_target = noise.new_zeros(*noise.shape, self.model.target.width)  # the loss is not needed
        _, prediction, mask = self.model(images.to(self.dtype), noise, features=no_target)
        pixels = self.model.reconstruct(images, prediction)
        return pixels * self.std + self.mean, self.model.pixel_mask(mask)

    def example(self, count: int, size: Grid) -> tuple[torch.Tensor, ...]:
        """Return random inputs: `count` smooth images of `size` with some noise, and what else the task needs."""
        generator = torch.Generator().manual_seed(count)
        shape = (count, self.encoder.in_channels)
        coarse = torch.rand(*shape, 4, 4, generator=generator)
        pixels = nn.functional.interpolate(coarse, size=size, mode="bilinear")
        pixels = (0.9 * pixels + 0.1 * torch.rand(*shape, *size, generator=generator)).clamp(0, 1)
        if not self.raw_pixels:
            images = (pixels - self.mean) / self.std
        else:
            images = (self.low + pixels * (self.high - self.low)).to(self.image_type)
        if self.task != "reconstruction":
            return (images,)
        return images, torch.rand(count, math.prod(self.encoder.grid), generator=generator)


def to_onnx(deployed: Deployed, metadata: dict, *, dynamic_size: bool = False) -> bytes:
    """Return the content of an ONNX file for any batch size.

    Args:
        metadata: properties of the file; values that are not strings are stored as JSON.
        dynamic_size: accept images of any size that patches divide, two patches a side at least, not only the model's.

    Raises:
        DeployError: if the weights are too large for one file, or an operation has no ONNX form.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in deployed.state_dict().values())
    if size > MAX_BYTES:
        remedy = "give a smaller model" if deployed.dtype == torch.float16 else "export them in half precision"
        words = f"expected at most {MAX_BYTES / 1e9:.3g} GB, the limit of an ONNX file; {remedy}"
        raise DeployError(f"has {size / 1e9:.3g} GB of weights; {words}")
    (height, width), side = deployed.encoder.img_size, deployed.encoder.patch_size
    shapes, axes = {0: torch.export.Dim("batch")}, {0: "batch"}
    if dynamic_size:  # the example's size differs from that of the positions, so that the graph resizes them
        shapes |= {axis: side * torch.export.Dim(f"patches_{axis}", min=2) for axis in (2, 3)}
        axes |= {2: "height", 3: "width"}
        height, width = height + side, width + 2 * side
    example = deployed.example(2, (height, width))
    names = dict(input_names=["images", "noise"][: len(example)], output_names=list(OUTPUTS[deployed.task]))
    names["dynamic_shapes"] = (axes, {0: "batch"})[: len(example)]
    # Guards would refuse sizes at which the model's code branches, such as the size of its own positions.
    capture = dict(strict=False, prefer_deferred_runtime_asserts_over_guards=True)
    capture["dynamic_shapes"] = (shapes, {0: shapes[0]})[: len(example)]
    options = dict(dynamo=True, verbose=False, opset_version=OPSET)
    options["custom_translation_table"] = {torch.ops.aten.sort.stable: _stable_sort}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the warnings are about torch's and onnxscript's code
            program = torch.onnx.export(torch.export.export(deployed, example, **capture), **names, **options)
    except RuntimeError as error:  # the base of what torch.export and torch.onnx raise
        raise DeployError(f"has an operation without an ONNX form ({_reason(error)}); give another model") from error
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with paths of this machine
    facts = metadata | {"opset": OPSET, "torch": torch.__version__}
    program.model.metadata_props.update(
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    )
    return program.model_proto.SerializeToString()


def _stable_sort(values, stable=True, dim=-1, descending=False):
    """Translate torch's stable sort to ONNX's TopK, which puts the lower index first among equal values."""
    from onnxscript import opset18 as op

    size = op.Shape(values, start=dim, end=dim + 1 or None)
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


def _reason(error: BaseException) -> str:
    """Return the first line of the message of the first exception in a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0].rstrip(". ")


@torch.no_grad()
def largest_difference(content: bytes, trained: Trained, deployed: Deployed, *, dynamic_size: bool = False) -> float:
    """Return the largest difference between a file's outputs in ONNX Runtime and those of the model in float32.

    Two batch sizes are compared, and with `dynamic_size` two image sizes. The difference of an output is the largest
    absolute difference, divided by the largest absolute value if that is above 1. For a map of labels, it compares the
    model's logits of these labels with the largest logits. A wrong shape or NaN gives infinity.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    original = Deployed(trained, deployed.task, raw_pixels=deployed.raw_pixels)
    (height, width), side = trained.encoder.img_size, trained.encoder.patch_size
    distances = []
    for size in [(height, width), (height + 2 * side, width + side)][: 1 + dynamic_size]:
        for count in (1, 3):
            example = deployed.example(count, size)
            feed = {known.name: value.numpy() for known, value in zip(session.get_inputs(), example, strict=True)}
            expected = original(*example)
            outputs = [torch.from_numpy(output) for output in session.run(None, feed)]
            if deployed.task == "segmentation":
                best = expected[0].gather(1, outputs[1].long().unsqueeze(1))
                outputs[1], expected = best, (expected[0], expected[0].amax(dim=1, keepdim=True))
            for output, wanted in zip(outputs, expected, strict=True):
                if output.shape != wanted.shape:
                    return math.inf
                distance = (output - wanted).abs().max() / wanted.abs().max().clamp(min=1)
                distances.append(distance.nan_to_num(math.inf, math.inf).item())
    return max(distances)
