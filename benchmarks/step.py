"""Time a training step against transformers and timm.

    python benchmarks/step.py --task mae --model base --compile

A step is forward, backward, clipping and fused AdamW on random images. The masked autoencoder is compared with
transformers' ViTMAEForPreTraining with its fast attention (sdpa), the encoder on whole images and a classifier of 1000
classes with timm's ViT. Both sides have the same weights, inputs, precision and optimizer, and must compute the same
loss and gradient norm, otherwise nothing is timed. --compile adds ours compiled against the faster of theirs, compiled
or not. On a GPU the figures include TFLOP/s, but for the encoder.
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

from benchmarks.compare import figure, new_parser, rates, read_step_flags, report, time_in_turns
from modeling.classifier import Classifier
from modeling.export import export_autoencoder
from modeling.mae import MaskedAutoencoder
from modeling.vit import SIZES, VisionTransformer
from training.launch import RunError, fail, run_script
from training.optimizer import adamw, set_learning_rate

PEERS = {"mae": transformers, "encoder": timm, "classifier": timm}
NUM_CLASSES = 1000


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = new_parser(__doc__, rounds=5)
    flag = parser.add_argument
    flag("--task", choices=PEERS, default="mae", help="model to train (default mae)")
    flag("--compile", action="store_true", help="also compile both sides")
    return read_step_flags(parser, argv)


class Side(NamedTuple):
    """A model with all that its training step needs, eager or compiled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of images (B, C, H, W) and noise (B, L)
    inputs: tuple[torch.Tensor, torch.Tensor]
    precision: str

    def backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the norm of its gradients, which are then clipped as in pretrain_mae.py."""
        with torch.autocast(self.inputs[0].device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(*self.inputs)
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def step(self) -> None:
        """Make a training step and wait for the device."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.inputs[0].is_cuda:
            torch.cuda.synchronize()


def new_model(task: str, size: dict) -> nn.Module:
    """Return our model of a task; `size` are arguments of the encoder."""
    encoder = VisionTransformer(**size)
    if task == "mae":
        return MaskedAutoencoder(encoder)
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
    sizes = {key: getattr(encoder, key) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    head = dict(num_classes=0) if encoder is model else dict(num_classes=NUM_CLASSES, global_pool="avg")
    peer = timm.models.VisionTransformer(**sizes, **head)
    peer.load_state_dict({name.removeprefix("encoder."): value for name, value in model.state_dict().items()})
    peer.pos_embed.requires_grad_(encoder.pos_embed.requires_grad)
    return peer.train()


def loss_function(task: str, model: nn.Module, *, compiled: bool, fullgraph: bool) -> Callable:
    """Return a function of (images, noise): the autoencoder's own loss, the mean square of the encoder's features, or
    the classifier's cross-entropy, with labels that are drawn from the noise.
    """
    forward = model.forward_features if task == "encoder" else model.forward
    if compiled:
        forward = torch.compile(forward, fullgraph=fullgraph, dynamic=False)
    if task == "mae":  # as in pretrain_mae.py, our model skips the patches that the loss does not need
        if isinstance(model, MaskedAutoencoder):
            return lambda images, noise: forward(images, noise, loss_only=True)
        return lambda images, noise: forward(images, noise=noise).loss
    if task == "classifier":
        return lambda images, noise: F.cross_entropy(forward(images).float(), noise.argmax(dim=1) % NUM_CLASSES)
    return lambda images, noise: forward(images).float().square().mean()


def new_sides(
    task: str, size: dict, *, batch_size: int, precision: str, compiled: bool = False
) -> dict[tuple[str, str], Side]:
    """Return both sides by ("ours" or "theirs", "eager" or "compiled"), on the GPU if there is one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = new_model(task, size)
    models = {"ours": ours, "theirs": transformers_peer(ours) if task == "mae" else timm_peer(ours)}
    optimizers = {}
    for name, model in models.items():
        parameters = [parameter for parameter in model.to(device).parameters() if parameter.requires_grad]
        optimizers[name] = adamw([{"params": parameters, "weight_decay": 0.05}], betas=(0.9, 0.95))
        set_learning_rate(optimizers[name], 1e-4)
    images = torch.randn(batch_size, 3, size["img_size"], size["img_size"], device=device)
    noise = torch.rand(batch_size, (size["img_size"] // size["patch_size"]) ** 2, device=device)
    sides = {}
    for mode in ("eager", "compiled") if compiled else ("eager",):
        for name, model in models.items():
            loss = loss_function(task, model, compiled=mode == "compiled", fullgraph=name == "ours")
            sides[name, mode] = Side(model, optimizers[name], loss, (images, noise), precision)
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
    """Yield images/s of a training step, of ours compiled against the faster of theirs; on a GPU also TFLOP/s."""
    seconds = time_in_turns({key: side.step for key, side in sides.items()}, rounds=rounds, warmup=2)
    batch_size = len(sides["ours", "eager"].inputs[0])
    speeds = {key: rates(batch_size, values) for key, values in seconds.items()}
    modes = [mode for side, mode in sides if side == "ours"]
    their_best = max(modes, key=lambda mode: median(speeds["theirs", mode]))
    for mode, rival in zip(modes, ("eager", their_best), strict=False):
        speed = figure(f"{name} {mode}, theirs {rival}", speeds["ours", mode], "images/s", speeds["theirs", rival])
        yield speed
        model = sides["ours", mode].model
        if torch.cuda.is_available() and hasattr(model, "training_flops"):
            yield figure(f"{name} {mode}: rate", [model.training_flops() * speed["ours"] / 1e12], "TFLOP/s")


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
    sides = new_sides(args.task, SIZES[args.model] | dict(img_size=args.img_size), **options)
    check_equal_work(sides)
    report(measure(f"train: {args.task} {args.model}", sides, rounds=args.rounds), args.json)


if __name__ == "__main__":
    run_script(main)
