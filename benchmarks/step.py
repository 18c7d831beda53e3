"""Time a training step against transformers and timm.

    python benchmarks/step.py --task mae --model base --compile

A step copies random 8-bit images to the device, normalizes them, and runs the forward pass, the backward pass, gradient
clipping and fused AdamW. The masked autoencoder is compared with transformers' ViTMAEForPreTraining with its fast
attention (sdpa); the encoder on whole images and a classifier of 1000 classes are compared with timm's ViT. Both sides
have the same weights, inputs, precision and optimizer, and must compute the same loss and gradient norm, otherwise
nothing is timed. --compile also compares our compiled step with the faster of theirs, compiled or eager.
--official_manner also compares ours with an eager step as in the official code (benchmarks/official.py), with float32
images and PyTorch's default AdamW.

On a GPU the copies come from pinned memory, a measurement is the mean of 20 steps between two events, and the figures
include peak memory and, except for the encoder, TFLOP/s.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

from benchmarks.compare import clock, events, figure, new_parser, rates, read_step_flags, report, time_in_turns
from benchmarks.official import OfficialManner, timm_encoder
from data.batches import Normalization
from data.transforms import empty_images
from modeling.classifier import Classifier
from modeling.decoder import Decoder
from modeling.export import export_autoencoder
from modeling.mae import MaskedAutoencoder
from modeling.vit import SIZES, VisionTransformer
from training.launch import RunError, fail, run_script
from training.optimizer import adamw, set_learning_rate

PEERS = {"mae": transformers, "encoder": timm, "classifier": timm}
NUM_CLASSES = 1000
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = new_parser(__doc__, rounds=5)
    flag = parser.add_argument
    flag("--task", choices=PEERS, default="mae", help="model to train (default mae)")
    flag("--compile", action="store_true", help="also compile both sides")
    flag("--official_manner", action="store_true", help="also time a step in the manner of the official code (mae)")
    args, errors = read_step_flags(parser, argv)
    if args.official_manner and args.task != "mae":
        errors.append(f"--official_manner has no --task {args.task}; give --task mae or leave it out")
    return args, errors


class Side(NamedTuple):
    """A model and everything that its training step needs, eager or compiled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # takes images (B, C, H, W) and noise (B, L)
    inputs: tuple[torch.Tensor, torch.Tensor]  # on the CPU, in pinned memory if there is a GPU
    precision: str

    def backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the norm of its gradients, which are then clipped as in pretrain_mae.py."""
        device = next(self.model.parameters()).device
        images, noise = (part.to(device, non_blocking=True) for part in self.inputs)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(images, noise)
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def step(self) -> None:
        """Make a training step, without waiting for the device."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_memory(self) -> int:
        """Return the bytes that a step needs on the GPU, with its model and optimizer but without other sides."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        own = [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, states)]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - before + sum(tensor.nbytes for tensor in own if tensor.is_cuda)


def new_model(task: str, size: dict) -> nn.Module:
    """Return our model of a task; `size` holds the arguments of the encoder."""
    encoder = VisionTransformer(**size)
    if task == "mae":
        return MaskedAutoencoder(encoder, Decoder(encoder))
    if task == "encoder":
        return encoder
    model = Classifier(encoder, NUM_CLASSES)
    nn.init.normal_(model.head.weight, std=0.02)  # with the small initial head, gradients below it are rounding errors
    return model


def transformers_peer(model: MaskedAutoencoder) -> nn.Module:
    """Return transformers' model with the sizes and weights of `model`."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_autoencoder(model, folder, mean=[0.5] * 3, std=[0.5] * 3)
        peer = transformers.ViTMAEForPreTraining.from_pretrained(folder, attn_implementation="sdpa")
    peer.vit.embeddings.position_embeddings.requires_grad_(False)  # from_pretrained of 5.23 makes positions trainable
    peer.decoder.decoder_pos_embed.requires_grad_(False)
    return peer.train()


def timm_peer(model: VisionTransformer | Classifier) -> nn.Module:
    """Return timm's model with the sizes and weights of `model`; its positions are fixed or trained as ours are."""
    encoder = getattr(model, "encoder", model)
    head = dict(num_classes=0) if encoder is model else dict(num_classes=NUM_CLASSES, global_pool="avg")
    peer = timm_encoder(encoder, **head)
    peer.load_state_dict({name.removeprefix("encoder."): value for name, value in model.state_dict().items()})
    peer.pos_embed.requires_grad_(encoder.pos_embed.requires_grad)
    return peer.train()


def loss_function(task: str, model: nn.Module, normalize: Normalization, *, compiled: bool) -> Callable:
    """Return the loss of a task as a function of (8-bit images, noise).

    It is the autoencoder's own loss, the mean square of the encoder's features, or the classifier's cross-entropy with
    labels that are drawn from the noise.
    """
    is_ours = isinstance(model, MaskedAutoencoder | VisionTransformer | Classifier)
    if task == "mae" and is_ours:  # as in pretrain_mae.py, our model skips the patches that the loss does not need

        def forward(images, noise):
            return model(images, noise, normalize=normalize.patches, loss_only=True)
    elif task == "mae":

        def forward(images, noise):
            return model(normalize(images), noise=noise).loss
    else:

        def forward(images, noise):
            features = model.forward_features if task == "encoder" else model
            return features(normalize(images)).float()

    if compiled:
        forward = torch.compile(forward, fullgraph=is_ours, dynamic=False)
    if task == "classifier":
        return lambda images, noise: F.cross_entropy(forward(images, noise), noise.argmax(dim=1) % NUM_CLASSES)
    return forward if task == "mae" else lambda images, noise: forward(images, noise).square().mean()


def random_batch(size: dict, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (B, C, H, W) and noise (B, L) as the loader of pretrain_mae.py does."""
    side = size["img_size"]
    images = empty_images(batch_size, 3, (side, side), torch.uint8).random_(256)
    return images, torch.rand(batch_size, (side // size["patch_size"]) ** 2)


def new_sides(
    task: str,
    size: dict,
    *,
    batch_size: int,
    precision: str,
    compiled: bool = False,
    peer: bool = True,
    official_manner: bool = False,
) -> dict[tuple[str, str], Side]:
    """Return both sides by ("ours" or "theirs", "eager" or "compiled"), on the GPU if there is one.

    `official_manner`, for the task "mae", adds ("official manner", "eager"). Without `peer`, there is no "theirs".
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, (images, noise) = new_model(task, size), random_batch(size, batch_size)
    models = {"ours": ours}
    if peer:
        models["theirs"] = transformers_peer(ours) if task == "mae" else timm_peer(ours)
    inputs = {"ours": images, "theirs": images.contiguous()}
    if official_manner:
        models["official manner"] = OfficialManner(ours)
        inputs["official manner"] = Normalization(MEAN, STD, "cpu")(images)
    normalize, sides = Normalization(MEAN, STD, device), {}
    for name, model in models.items():
        parameters = [parameter for parameter in model.to(device).parameters() if parameter.requires_grad]
        groups, betas = [{"params": parameters, "weight_decay": 0.05}], (0.9, 0.95)
        official = name == "official manner"
        optimizer = torch.optim.AdamW(groups, betas=betas) if official else adamw(groups, betas=betas)
        set_learning_rate(optimizer, 1e-4)
        batch = tuple(part.pin_memory() if device.type == "cuda" else part for part in (inputs[name], noise))
        for mode in ("eager", "compiled") if compiled and not official else ("eager",):
            loss = model if official else loss_function(task, model, normalize, compiled=mode == "compiled")
            sides[name, mode] = Side(model, optimizer, loss, batch, precision)
    return sides


def check_equal_work(sides: dict[tuple[str, str], Side]) -> None:
    """Raise RunError unless all sides compute the same loss and gradient norm."""
    results = {}
    for name, side in sides.items():
        results[name] = torch.stack(side.backward()).tolist()
        side.optimizer.zero_grad()
    tolerance = 1e-2 if side.precision == "bf16" else 1e-4
    expected = next(iter(results.values()))
    if any(abs(a - b) > tolerance * abs(b) for pair in results.values() for a, b in zip(pair, expected, strict=True)):
        values = "; ".join(f"{' '.join(name)}: {loss:.6f}, {norm:.6f}" for name, (loss, norm) in results.items())
        raise RunError(
            f"the two sides do not compute the same loss and gradient norm ({values}); expected a relative difference "
            f"of at most {tolerance:g}; compare the installed libraries with requirements.txt"
        )


def measure(name: str, sides: dict[tuple[str, str], Side], *, rounds: int) -> Iterator[dict]:
    """Yield the speed and, on a GPU, GB and TFLOP/s of a step; ours compiled is compared with their faster mode."""
    on_gpu = torch.cuda.is_available()
    works = {key: side.step for key, side in sides.items()}
    seconds = time_in_turns(works, rounds=rounds, warmup=2, timer=events if on_gpu else clock)
    batch_size = len(sides["ours", "eager"].inputs[0])
    speeds = {key: rates(batch_size, values) for key, values in seconds.items()}
    modes = [mode for side, mode in sides if side == "ours"]
    their_best = max(modes, key=lambda mode: median(speeds["theirs", mode]))
    pairs = [(mode, ("theirs", rival)) for mode, rival in zip(modes, ("eager", their_best), strict=False)]
    pairs += [(mode, rival) for mode in modes for rival in sides if rival[0] == "official manner"]
    for mode, rival in pairs:
        label = f"{name} {mode}, {' '.join(rival)}"
        yield figure(label, speeds["ours", mode], "images/s", speeds[rival])
        if on_gpu:
            ours, theirs = ([sides[key].peak_memory() / 1e9] for key in (("ours", mode), rival))
            yield figure(f"{label}: peak memory", ours, "GB", theirs, lower_is_better=True)
    if on_gpu and hasattr(sides["ours", "eager"].model, "training_flops"):
        flops = sides["ours", "eager"].model.training_flops() / 1e12
        for mode in modes:
            yield figure(f"{name} {mode}: rate", [flops * speed for speed in speeds["ours", mode]], "TFLOP/s")


def main(argv=None):
    """Run the benchmark; see the module's docstring."""
    args, errors = parse_args(argv)
    if errors:
        fail(errors)
    peer = PEERS[args.task]
    print(
        f"{args.mixed_precision.replace('no', 'float32')}, {torch.get_num_threads()} threads, batch {args.batch_size}, "
        f"{args.img_size} pixels; theirs: {peer.__name__} {peer.__version__}, attention sdpa"
    )
    options = dict(batch_size=args.batch_size, precision=args.mixed_precision, compiled=args.compile)
    size = SIZES[args.model] | dict(img_size=args.img_size)
    sides = new_sides(args.task, size, **options, official_manner=args.official_manner)
    check_equal_work(sides)
    report(measure(f"train: {args.task} {args.model}", sides, rounds=args.rounds), args.json)


if __name__ == "__main__":
    run_script(main)
