"""Show in a browser what trained models do with an image: reconstruction, features, attention, classes, objects.

    python demo.py work_dir/quickstart_pretrain

serves a page on this machine and prints its address; several models are shown side by side. Without a model, the
newest run in work_dir/ is shown. Images are uploaded, taken by a webcam, or validation images of the run. Uploads
are deleted after ten minutes. `pip install -r requirements-demo.txt` installs what the page needs.
"""

import contextlib
import importlib.util
import math
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from data.batches import FIXED_EPOCH, ListedDataset, Normalization, centre_crop, make_loader
from data.decode import PixelFormat, decode, preview_channels
from data.detection import SHOWN, as_results, drawings, fill_of, fit_and_size
from data.examples import drawn_examples, held_out_examples
from data.files import find_images
from data.index import DataError
from data.masking import mask_noise
from data.sampling import sample_generator
from data.segmentation import palette, view_and_preview, view_sizes
from data.transforms import CentreCrop
from data.values import DamagedImage
from modeling.classifier import Classifier
from modeling.detector import Detector, in_original_pixels
from modeling.files import WeightsError
from modeling.hub import find_weights, is_on_hub
from modeling.inspection import attention_maps, feature_colours, fill, keep_patches, patch_features, similarities
from modeling.mae import MaskedAutoencoder
from modeling.sliding_window import predict
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from training import arguments, launch
from training.arguments import integer
from training.card import find_record
from training.launch import fail
from training.metrics import reconstruction_metrics, visible_mean
from training.neighbours import nearest
from training.pictures import attention_tiles, detection_picture, displayable, reconstruction_tiles
from training.ports import free_port
from training.processes import check_settings
from training.wording import in_one_line

MAX_PIXELS = 50_000_000  # limit per image, which takes 150 MB of memory as 8-bit RGB
PREVIEW_SIZE = 1024  # maximum of the longer side of a segmented image, in pixels, as in predict.py
NUM_EXAMPLES, NUM_NEAREST = 12, 8
MAKE_ONE = "make one with: accelerate launch pretrain_mae.py @recipes/quickstart/pretrain.args"


def parse_args(argv=None):
    """Return the flags and a list of errors in them."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag("models", nargs="*", metavar="MODEL", help="run, checkpoint, file, folder, hf:OWNER/NAME (default newest run)")
    flag("--nearest", metavar="FOLDER", help="folder whose nearest images to an image are shown (default none)")
    flag("--max_pixels", type=integer(1), default=MAX_PIXELS, help=f"refuse larger images (default {MAX_PIXELS})")
    flag = parser.add_argument_group("server").add_argument
    # A Hugging Face Space sets these two variables
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    flag("--host", default=host, help="address to listen at; 0.0.0.0 lets other machines in (default 127.0.0.1)")
    flag("--port", type=integer(1, 65535), default=port, help="port; the next free one if it is in use (default 7860)")
    flag("--share", action=arguments.Pair, default=False, help="also serve a public address through Gradio (off)")
    return parser.read(argv)


def newest_run(folder):
    """Return the newest run in a folder that has weights, None if there is none."""
    for path in sorted(Path(folder).glob("*/args.json"), key=lambda path: -path.stat().st_mtime):
        try:
            find_weights(path.parent, whole=True)
            return str(path.parent)
        except WeightsError:
            continue
    return None


def name_of(path, record):
    """Return the name of a model on the page: its path from the run folder on, or its repository on the Hub."""
    if is_on_hub(path):
        return str(path)
    path = Path(path).resolve()
    return str(path.relative_to(record.folder.parent)) if record else path.name


class Inputs(NamedTuple):
    """An image as a model takes it."""

    whole: torch.Tensor  # (C, *img_size): centre crop with the whole shorter side, for reconstruction
    view: torch.Tensor  # (C, h, w): input of an encoder, classifier, segmenter or detector, as in predict.py
    picture: torch.Tensor  # (C, H, W): `view`, or the image of a segmenter or detector at its own proportions
    original: tuple[int, int] = ()  # height and width of a detector's image


class Reconstruction(NamedTuple):
    """A reconstruction of an image."""

    tiles: list[Image.Image]  # see training.pictures.RECONSTRUCTION
    errors: np.ndarray  # (h, w): root mean squared error of each predicted patch, NaN for the others
    metrics: dict[str, float]  # with the names of metrics.json
    baseline: dict[str, float] | None  # metrics of the visible pixels' mean colour; None if every patch is predicted
    num_kept: int


def score(images, prediction, mask):
    """Return the metrics of one image and its prediction (1, C, H, W) by name."""
    return {name: value.item() for name, value in reconstruction_metrics(images, prediction, mask).items()}


class PageModel:
    """A model on the page, with methods that compute what is shown; visitors do not change its state.

    Legend: as in mae.py; images are (C, H, W).
    """

    def __init__(self, path, *, device, max_pixels):
        """Open a model. Raises WeightsError."""
        self.path, self.record, self.device, self.trained = str(path), find_record(path), device, open_trained(path)
        self.name = name_of(path, self.record)
        self.model, self.encoder = self.trained.model.to(device), self.trained.encoder
        self.pixels = PixelFormat(self.encoder.in_channels, self.trained.value_range, max_pixels=max_pixels)
        self.normalize = Normalization(self.trained.mean, self.trained.std, device)
        self.classifies, self.segments = isinstance(self.model, Classifier), isinstance(self.model, Segmenter)
        self.detects, self.least_score = isinstance(self.model, Detector), SHOWN
        self.compares = not (self.segments or self.detects)  # features, which need the final norm of the encoder
        self.reconstructs = isinstance(self.model, MaskedAutoencoder) and self.model.target.invertible
        self.grid, self.img_size, self.classes = self.encoder.grid, self.encoder.img_size, self.trained.classes
        self.num_patches, self.mask_ratio = math.prod(self.grid), getattr(self.model, "mask_ratio", None)
        self.colours = palette(len(self.classes)) if self.segments or self.detects else None
        self.leaks = self.reconstructs and self.model.target.uses_true_patch_statistics
        self.attends = "query" if getattr(self.model, "pooling", None) == "attentive" else "head"
        self.source = self.bank = None  # see `index`

    def prepare(self, data):
        """Return the Inputs of an encoded image or an array. Raises DamagedImage."""
        image, size = decode(data, self.pixels), self.encoder.img_size
        whole = CentreCrop(size)(image)
        if self.segments:
            sides = dict(resize=self.trained.resize, crop_size=size[0], patch_size=self.encoder.patch_size)
            sizes = partial(view_sizes, mode="slide", scales=[1.0], **sides)
            return Inputs(whole, *view_and_preview(image, 0, sizes=sizes, longest=PREVIEW_SIZE)[:2])
        if self.detects:
            fill = fill_of(self.trained.mean, self.trained.value_range)
            view, (h, w), original = fit_and_size(image, 0, side=size[0], fill=fill)
            return Inputs(whole, view, displayable(view)[:, :h, :w], tuple(original.tolist()))
        (view,) = centre_crop(image, 0, size=size, crop_ratio=self.trained.crop_ratio)
        return Inputs(whole, view, view)

    def thumbnail(self, data):
        """Return a small picture of an encoded image or an array. Raises DamagedImage."""
        picture = to_pil_image(displayable(decode(data, self.pixels)))
        picture.thumbnail((256, 256))
        return picture

    def draw_mask(self, index, *, mask_ratio, strategy, seed, clicks=()):
        """Return the noise (1, L) and the number of visible patches of a mask, with the patches at `clicks` inverted.

        Without clicks, it is predict.py's mask. A click is (x, y) in [0, 1]. No mask keeps or removes all patches.
        """
        h, w = self.grid
        num_kept = min(max(int(h * w * (1 - mask_ratio)), 1), h * w - 1)
        noise = mask_noise(strategy, sample_generator(seed, FIXED_EPOCH, index), self.grid, num_kept)
        removed = np.argsort(noise.argsort(kind="stable")) >= num_kept
        changed = removed.copy()
        for x, y in clicks:
            patch = min(int(y * h), h - 1) * w + min(int(x * w), w - 1)
            changed[patch] = not changed[patch]
            if changed.all() or not changed.any():
                changed[patch] = not changed[patch]
        if (changed != removed).any():
            noise, num_kept = changed.astype(np.float32), int((~changed).sum())
        return torch.from_numpy(noise)[None], num_kept

    @torch.no_grad()
    def reconstruct(self, image, noise, num_kept, *, true_statistics=True, everywhere=False):
        """Return the Reconstruction of an image from the patches that noise (1, L) keeps, as predict.py does.

        With `everywhere`, each patch is predicted from masks that remove it. Without `true_statistics`, predictions of
        normalized pixels are inverted by the mean and variance of the visible patches, not by those of the true patch.
        """
        model, images = keep_patches(self.model, num_kept), self.normalize(image[None].to(self.device))
        noise = noise.to(self.device)
        if everywhere:
            prediction, removed = fill(model, images, noise, true_statistics=true_statistics), torch.ones_like(noise)
        else:
            _, prediction, removed = model(images, noise)
            prediction = model.reconstruct(images, prediction, mask=None if true_statistics else removed)
        prediction, images = (self.normalize.undo(each) for each in (prediction, images))
        mask = model.pixel_mask(removed)
        metrics, baseline = score(images, prediction, mask), None
        if not everywhere:
            baseline = score(images, visible_mean(images, 1 - mask).expand_as(images), mask)
        errors = (prediction.clamp(0, 1) - images).square().mean(dim=1, keepdim=True)
        errors = F.avg_pool2d(errors, self.encoder.patch_size)[0, 0].sqrt().cpu().numpy()
        errors[removed.reshape(errors.shape).cpu().numpy() == 0] = np.nan
        tiles = reconstruction_tiles(images, prediction, mask, preview_channels(self.pixels))[0]
        return Reconstruction(tiles, errors, metrics, baseline, num_kept)

    @torch.no_grad()
    def classify(self, image):
        """Return the probabilities of the classes or labels of an image, or its numbers, by name."""
        answers = self.model.answer(self.model(self.normalize(image[None].to(self.device))))
        return dict(zip(self.classes, answers[0].tolist(), strict=True))

    @torch.no_grad()
    def segment(self, inputs):
        """Return the class of each pixel (H, W), uint8, of `inputs.picture`."""
        view, size = self.normalize(inputs.view[None].to(self.device)), inputs.picture.shape[1:]
        return predict(self.model, [view], tuple(size), flip=False, window=self.encoder.img_size[0])[0].cpu().numpy()

    @torch.no_grad()
    def detect(self, inputs):
        """Return the objects in an image as COCO's records."""
        images, size = self.normalize(inputs.view[None].to(self.device)), tuple(inputs.picture.shape[1:])
        return as_results(in_original_pixels(self.model(images, [size])[0], size, inputs.original))

    def draw_objects(self, inputs, records, least_score):
        """Draw the records of `detect` that score at least `least_score`; return the picture and these records."""
        records = [record for record in records if record["score"] >= least_score]
        shown = drawings(records, inputs.original, tuple(inputs.picture.shape[1:]))
        return detection_picture(inputs.picture.numpy(), shown, self.classes, self.colours), records

    @torch.no_grad()
    def look(self, pair):
        """Return the patch features (2, L, D) of two Inputs and, for each, pictures of its features and attention.

        The attention is that of the class token per head or, for attentive pooling, that of its queries.
        """
        pixels = [inputs.whole if self.segments else inputs.view for inputs in pair]
        images = self.normalize(torch.stack(pixels).to(self.device))
        features = patch_features(self.encoder, images).cpu()
        if self.attends == "query":
            attention = self.model.attention_maps(self.encoder(images))
        else:
            attention = attention_maps(self.encoder, images).unflatten(-1, self.grid)
        colours = (255 * feature_colours(features) + 0.5).to(torch.uint8).unflatten(1, self.grid)
        pairs = zip(pixels, attention.cpu().numpy(), strict=True)
        tiles = [attention_tiles(displayable(image).numpy(), maps)[1:] for image, maps in pairs]
        return features, [Image.fromarray(each.numpy()) for each in colours], tiles

    def compare(self, features, image, x, y):
        """Return the cosine similarities (2, h, w) of all patches to one patch, and the row and column of that patch.

        The patch is at (x, y) in [0, 1] of `image`, 0 or 1; `features` are those of `look`.
        """
        row, column = (min(int(place * side), side - 1) for place, side in zip((y, x), self.grid, strict=True))
        values = similarities(features, image, row * self.grid[1] + column)
        return values.unflatten(1, self.grid).numpy(), (row, column)

    @torch.no_grad()
    def embed(self, images):
        """Return the features (B, D) of images (B, C, H, W), as `predict.py --features` does."""
        tokens = self.encoder(self.normalize(images.to(self.device)))
        features = self.model.pool(tokens) if self.classifies else self.encoder.split(tokens)[1].mean(dim=1)
        return features.cpu()

    def index(self, source):
        """Compute the features of all readable images of a source, for `nearest`."""
        transform = partial(centre_crop, size=self.encoder.img_size, crop_ratio=self.trained.crop_ratio)
        dataset = ListedDataset(source, pixels=self.pixels, prepare=transform)
        batches = [range(len(source))[start : start + 16] for start in range(0, len(source), 16)]
        loader = make_loader(dataset, batches, num_workers=min(launch.default_workers(), len(batches) - 1))
        features, indices = [torch.empty(0, self.encoder.embed_dim)], []
        with tqdm(total=len(source), unit="image", desc=f"features of {self.name}") as bar:
            for batch in loader:
                features += [self.embed(batch.inputs[0])] if batch.indices else []
                indices += batch.indices
                for index, reason in batch.damaged:
                    tqdm.write(f"warning: {source.name(index)}: {reason}", file=sys.stderr)
                bar.update(len(batch.indices) + len(batch.damaged))
        self.source, self.bank = source, (torch.cat(features), torch.tensor(indices, dtype=torch.long))

    def nearest(self, image):
        """Return pictures of the nearest indexed images, each with its name and cosine similarity."""
        closest = nearest(*self.bank, self.embed(image[None]), NUM_NEAREST)  # (similarities, indices), (1, k) each
        results = []
        for value, i in zip(*(each[0].tolist() for each in closest), strict=True):
            with contextlib.suppress(DamagedImage):  # the file has changed since it was indexed
                picture = self.thumbnail(*self.source.fetch([i]))
                results.append((picture, f"{value:.3f} {Path(self.source.name(i)).name}"))
        return results


def find_examples(model):
    """Return validation images of a run's data or drawn scenes, each with a small picture, and a caption."""
    flags = model.record.flags if model.record else {}
    path, channels, reason = flags.get("path_to_data") or "builtin:shapes", model.pixels.channels, None
    if path != "builtin:shapes":
        try:
            examples = held_out_examples(flags, model.pixels, NUM_EXAMPLES, annotated=model.detects)
            if pairs := with_pictures(examples, model):
                return pairs, f"Validation images of {Path(flags.get('path_to_validation_data') or path).name}"
            reason = "holds out no image that can be read"
        except (DataError, OSError, ImportError) as error:
            reason = f"cannot be read ({in_one_line(error)})"
    drawable = model.pixels.value_range is None and channels in (1, 3)
    if reason:
        print(f"{path} {reason}; " + ("drawn scenes are shown instead" if drawable else "the page starts empty"))
    if not drawable:
        return [], ""
    return with_pictures(drawn_examples(channels, NUM_EXAMPLES), model), "Drawn scenes, none of them trained on"


def with_pictures(examples, model):
    """Return the examples that can be read, with a small picture of each."""
    pairs = []
    for example in examples:
        with contextlib.suppress(DamagedImage):
            pairs.append((example, model.thumbnail(example.data)))
    return pairs


class Choice(NamedTuple):
    """The image that a visitor chose."""

    name: str
    index: int  # its masks depend on it
    inputs: list[Inputs | str]  # for each model, its Inputs or the reason why it cannot read the image
    time: int  # distinguishes one choice from the next


def pick(models, name, index, data):
    """Return an image as a Choice, or the reason as a str if no model can read it."""
    inputs = []
    for model in models:
        try:
            inputs.append(model.prepare(data))
        except DamagedImage as error:
            inputs.append(in_one_line(error))
    if all(isinstance(each, str) for each in inputs):
        return inputs[0]
    return Choice(name, index, inputs, time.monotonic_ns())


def main(argv=None):
    """Run the script; see the module's docstring."""
    # Flags and models
    args, errors = parse_args(argv)
    errors += check_settings("no")
    if importlib.util.find_spec("gradio") is None:
        errors.append("gradio is not installed; run: pip install -r requirements-demo.txt")
    source, paths = None, args.models or list(filter(None, [newest_run("work_dir")]))
    if not paths:
        errors.append(f"work_dir/ holds no run with weights; {MAKE_ONE}; or give a model")
    if args.nearest:
        source, image_errors = find_images([args.nearest])
        errors += [f"--nearest {error}" for error in image_errors]
    models, device = [], Accelerator(mixed_precision="no").device
    launch.set_speed(device, tf32=False)
    for path in paths:
        try:
            models.append(PageModel(path, device=device, max_pixels=args.max_pixels))
        except WeightsError as error:
            errors.append(str(error))
    if source and not errors and not any(model.compares for model in models):
        words = "is a segmentation model or a detector, whose encoder has no norm"
        errors.append(f"--nearest needs features, and {models[0].path} {words}")
    port, port_errors = free_port(args.host, args.port)
    errors += port_errors
    if errors:
        fail(errors)
    if port != args.port:
        print(f"port {args.port} is in use; using {port}")
    for model in models:
        print(f"model      {model.path} ({model.trained.layout})")
        for assumption in model.trained.assumed:
            print(f"           assumed: {assumption}")
        if source and model.compares:
            model.index(source)

    # Page
    examples, caption = find_examples(models[0])
    with tempfile.TemporaryDirectory(prefix="demo_") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}  # read when gradio is imported
        from training.app import build_page, serve

        page = build_page(models, examples, caption, partial(pick, models))
        serve(page, host=args.host, port=port, share=args.share)


if __name__ == "__main__":
    launch.run_script(main, remedy="repeat the same command")
