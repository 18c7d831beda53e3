"""Estimate the hours of pre-training runs from the known speed of one recipe.

    python benchmarks/hours.py recipes/budget/hour_1.args recipes/budget/hours_10.args --images_per_second 1980

The time of a recipe is its floating-point operations divided by the operations per second. These are the images per
second of --reference times its operations per image and step. The default speed is derived from 800 epochs of ViT-B in
18 hours on eight A100 (Wu et al. 2024, "DailyMAE", arXiv 2404.00509). That run used progressive resolution, but the
speed counts all images as 224 pixels wide, so the hours are a lower bound. On your own machine,
`pretrain_mae.py @RECIPE --dry_run` measures the speed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

import pretrain_mae
from training.arguments import Parser, integer, number
from training.launch import fail, run_script
from training.plan import plan_length
from training.pretraining import DECODER_FLAGS, plan_stages
from training.resolve import ENCODER_FLAGS

ROOT = Path(__file__).parent.parent


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("recipes", nargs="+", metavar="RECIPE.args", help="files of flags of pretrain_mae.py")
    flag("--reference", default=str(ROOT / "recipes/paper/pretrain_base.args"), help="recipe whose speed is known")
    help_text = "speed of the reference (default 1980, ViT-B on an A100)"
    flag("--images_per_second", type=number(1e-3), default=1980, metavar="N", help=help_text)
    flag("--num_images", type=integer(1), default=1_281_167, help="images of an epoch (default those of ImageNet-1k)")
    return parser.read(argv)


def read_recipe(path, num_images):
    """Return a recipe's images per step, the operations of a training step per image at each stage, and its stages."""
    args, errors = pretrain_mae.parse_args([f"@{path}", "--path_to_data", "IMAGES"])
    if errors:
        fail([f"{path}: {error}" for error in errors])
    encoder = {name: getattr(args, flag) for name, flag in ENCODER_FLAGS.items()}
    encoder |= dict(img_size=tuple(args.img_size), in_channels=args.input_channels or 3)
    decoder = {name: getattr(args, flag) for name, flag in DECODER_FLAGS.items()}
    decoder |= dict(inputs=args.decoder_inputs) if args.decoder == "cross" else {}
    options = {name: getattr(args, name) for name in pretrain_mae.MODEL_FLAGS}
    model = pretrain_mae.build_model(encoder, decoder, kind=args.decoder, width=args.num_components, **options)
    lengths = {name: getattr(args, name) for name in ("epochs", "max_steps", "warmup_epochs", "warmup_steps")}
    num_samples = num_images * args.repeated_augmentation
    length = plan_length(**lengths, num_samples=num_samples, global_batch_size=args.global_batch_size or 256)
    stages = plan_stages(args.img_size_schedule, args.img_size, length.total_steps)
    return args.global_batch_size or 256, [model.training_flops(stage.size) for stage in stages], stages


def main(argv=None):
    """Run the benchmark; see the module's docstring."""
    args, errors = parse_args(argv)
    if errors:
        fail(errors)
    _, (*_, reference), _ = read_recipe(args.reference, args.num_images)
    per_second = reference * args.images_per_second
    print(f"{args.reference}: {reference / 1e9:.3g} GFLOP per image and step, {per_second / 1e12:.3g} TFLOP/s\n")
    print("| recipe | GFLOP per image and step | images | images/s | hours |\n|---|---|---|---|---|")
    for path in args.recipes:
        batch, costs, stages = read_recipe(path, args.num_images)
        images = [batch * len(stage.steps) for stage in stages]
        total = sum(cost * count for cost, count in zip(costs, images, strict=True))
        mean = total / sum(images)
        numbers = f"{mean / 1e9:.3g} | {sum(images):,} | {per_second / mean:,.0f} | {total / per_second / 3600:.3g}"
        print(f"| `{path}` | {numbers} |")


if __name__ == "__main__":
    run_script(main)
