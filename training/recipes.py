"""Default flags of a classifier: the paper's recipes, by what trains and by the size of the encoder."""

PROBE = dict(  # defaults of both probes
    **dict(epochs=90, warmup_epochs=10, base_learning_rate=0.1, min_learning_rate=0.0, layer_decay=1.0),
    **dict(optimizer="lars", betas=[0.9, 0.999], weight_decay=0.0, max_grad_norm=0.0),
    **dict(drop_path=0.0, random_aug_magnitude=0, random_erase=0.0),
    **dict(mixup_alpha=0.0, cutmix_alpha=0.0, label_smoothing=0.0),
)
# Defaults for ViT-B (He et al. 2021, tables 9 to 11). Partial fine-tuning uses the first recipe.
RECIPES = {
    "fine-tuning": dict(
        **dict(epochs=100, warmup_epochs=5, base_learning_rate=5e-4, min_learning_rate=1e-6, layer_decay=0.65),
        **dict(optimizer="adamw", betas=[0.9, 0.999], weight_decay=0.05, max_grad_norm=1.0),
        **dict(pooling="mean", drop_path=0.1, random_aug_magnitude=9, random_erase=0.25),
        **dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
    ),
    "linear probe": dict(PROBE, pooling="cls"),
    "attentive probe": dict(PROBE, pooling="attentive"),  # Psomas et al. 2026, arXiv 2506.10178
    "from scratch": dict(
        **dict(epochs=300, warmup_epochs=20, base_learning_rate=1e-4, min_learning_rate=0.0, layer_decay=1.0),
        **dict(optimizer="adamw", betas=[0.9, 0.95], weight_decay=0.3, max_grad_norm=1.0),
        **dict(pooling="mean", drop_path=0.1, random_aug_magnitude=9, random_erase=0.0),
        **dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
    ),
}
LARGER = {  # what differs for larger encoders
    "ViT-L fine-tuning": dict(epochs=50, base_learning_rate=1e-3, layer_decay=0.75, drop_path=0.2),
    "ViT-H fine-tuning": dict(epochs=50, base_learning_rate=1e-3, layer_decay=0.75, drop_path=0.3),
    "ViT-L linear probe": dict(epochs=50),
    "ViT-H linear probe": dict(epochs=50),
    "ViT-L from scratch": dict(epochs=200, drop_path=0.2),
    "ViT-H from scratch": dict(epochs=200, drop_path=0.2),
}
UNFIT = {"classes": (), "labels": ("label_smoothing",), "numbers": ("label_smoothing", "mixup_alpha", "cutmix_alpha")}
NAMES = {(1024, 24): "ViT-L", (1280, 32): "ViT-H"}  # width and depth; all other encoders take ViT-B's recipe


def choose_kind(weights: str | None, *, linear_probe: bool, attentive_probe: bool) -> str:
    """Return the key in RECIPES that three flags choose."""
    if attentive_probe:
        return "attentive probe"
    return "linear probe" if linear_probe else "fine-tuning" if weights else "from scratch"


def choose_recipe(kind: str, encoder: dict, *, learning_rate: float | None, target: str) -> tuple[str, dict]:
    """Return the name of the recipe for an encoder, and its flags.

    Args:
        kind: a key in RECIPES.
        encoder: the sizes of the encoder, among them `embed_dim` and `depth`.
        learning_rate: the flag; the default of --min_learning_rate does not exceed it.
        target: the flag; the recipe's flags in UNFIT[target] become 0.
    """
    name = f"{NAMES.get((encoder['embed_dim'], encoder['depth']), 'ViT-B')} {kind}"
    recipe = {**RECIPES[kind], **LARGER.get(name, {})}
    if learning_rate is not None:
        recipe["min_learning_rate"] = min(recipe["min_learning_rate"], learning_rate)
    return name, {**recipe, **dict.fromkeys(UNFIT[target], 0.0)}


def describe_recipe(name: str, flags: dict) -> tuple[str, str]:
    """Return the recipe and its augmentation in words, given its name and the resolved flags."""
    blocks = flags["trainable_blocks"]
    name += "" if blocks is None else f" of the last {blocks:g} blocks, norm and head"
    summary = f"{name}: {flags['optimizer']}, weight decay {flags['weight_decay']:g}, layer decay "
    summary += f"{flags['layer_decay']:g}, drop path {flags['drop_path']:g}"
    summary += f", weights averaged by {flags['ema_decay']:g}" if flags["ema_decay"] else ""
    augmentation = f"RandAugment {flags['random_aug_magnitude']}, erasing {flags['random_erase']:g}, mixup "
    augmentation += f"{flags['mixup_alpha']:g}, CutMix {flags['cutmix_alpha']:g}, smoothing "
    augmentation += f"{flags['label_smoothing']:g}"
    return summary, "each encoded once, as its centre crop" if flags["cache_features"] else augmentation
