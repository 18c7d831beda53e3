"""Load weights of several libraries into our modules, with a report of every parameter.

Unexpected or missing parameters are an error that lists all of them. Legend: as in layouts.py, L patches.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from modeling.classifier import Classifier
from modeling.detector import Detector
from modeling.files import Stored, WeightsError, read_state_dict, read_stored
from modeling.hub import find_weights
from modeling.layouts import DECODER, EXTRAS, HEAD_PREFIXES, PROJECTION, State, extra_names, model_settings, to_ours
from modeling.mae import MaskedAutoencoder
from modeling.position import cut_biases, resize_biases, resize_positions
from modeling.upernet import Segmenter
from modeling.vit import SIZES, Grid, VisionTransformer

NUM_HEADS = {(size["embed_dim"], size["depth"]): size["num_heads"] for size in SIZES.values()}
Model = MaskedAutoencoder | Classifier | Segmenter | Detector | VisionTransformer


class LoadReport(NamedTuple):
    """The report of `load_weights`, with our names of parameters; `str` gives one line for the console."""

    layout: str
    loaded: int  # number of parameters, resized and adapted ones included
    missing: tuple[str, ...]  # only in the model, left as initialized: a new decoder, EXTRAS
    ignored: tuple[str, ...]  # only in the checkpoint
    resized: tuple[str, ...]  # "name 14x14 -> 32x32"
    adapted: tuple[str, ...]  # "name 3 -> 1 channels"

    def __str__(self) -> str:
        parts = sorted({re.match(r"(?:vit\.)?((?:encoder\.)?[^.]+)", name)[1] for name in self.ignored})
        new = [option.replace("_", " ") for option in EXTRAS if extra_names(self.missing, option)]
        new += ["decoder"] * any(name.startswith(DECODER) for name in self.missing)
        line = (
            f"weights of {self.layout}: {self.loaded} loaded, {len(self.missing)} missing, {len(self.ignored)} ignored"
        )
        reason = ": the head does not use it" if parts == ["encoder.norm"] else ""
        line += f" ({', '.join(parts)}{reason})" if parts else ""
        for change, names in (("resized", self.resized), ("adapted", self.adapted), ("newly initialized", new)):
            line += f", {change}: {', '.join(names)}" if names else ""
        return line


class Weights(NamedTuple):
    """Weights in memory, and the known facts about their model."""

    path: Path
    state: State
    stored: Stored
    settings: dict  # see `model_settings`
    sizes: dict  # arguments of the VisionTransformer, without image size; num_heads may be None
    grid: Grid | None  # h and w of the positions: as stored, otherwise a square; None if they are no square


def open_weights(
    path: str | Path,
    *,
    whole: bool = False,
    given: Stored = Stored(),  # noqa: B008 - immutable
) -> Weights:
    """Read the weights of an encoder, alone or in a larger model; see `find_weights` for `path` and `whole`.

    Raises:
        WeightsError: with a message that begins with the path, if weights cannot be read or `given` contradicts them.
    """
    path = find_weights(path, whole=whole)
    state, stored = read_state_dict(path), read_stored(path)
    for name, value in given._asdict().items():
        known = getattr(stored, name)
        if None not in (known, value) and known != value:
            raise WeightsError(f"{path}: its {name} is {known}, but {value} was given; leave out this value")
        stored = stored._replace(**{name: known if value is None else value})
    try:
        layout, shapes = to_ours({name: value.to("meta") for name, value in state.items()})
    except WeightsError as error:
        raise WeightsError(f"{path}: {error.message}") from error
    settings = model_settings(shapes)
    if "encoder_embed_dim" not in settings:
        raise WeightsError(
            f"{path}: weights of {layout} do not show the sizes of an encoder; give those of a plain ViT or MAE"
        )
    sizes = {name: settings[f"encoder_{name}"] for name in ("embed_dim", "depth", "mlp_ratio")}
    sizes |= dict(patch_size=settings["patch_size"], in_channels=settings["input_channels"])
    sizes["num_cls_tokens"] = settings["num_cls_tokens"]
    sizes["num_heads"] = stored.num_heads or NUM_HEADS.get((sizes["embed_dim"], sizes["depth"]))
    grid, positions = stored.grid, shapes.get("encoder.pos_embed")
    if grid is None and positions is not None and positions.ndim == 3:
        count = positions.shape[1] - sizes["num_cls_tokens"]
        side = math.isqrt(max(0, count))
        grid = (side, side) if side * side == count else None
    return Weights(path, state, stored, settings, sizes, grid)


def resize_patches(weights: Weights, patch_size: int) -> Weights:
    """Return weights whose patch projection is resized bicubically to `patch_size`, antialiased if it shrinks.

    It is scaled by the ratio of areas, so that tokens keep their magnitude. ViTDet takes ViT-H from 14 to 16 pixels.
    """
    state = {**to_ours(weights.state)[1]}
    old, size = weights.sizes["patch_size"], (patch_size, patch_size)
    options = dict(mode="bicubic", align_corners=False, antialias=patch_size < old)
    resized = F.interpolate(state[PROJECTION].float(), size=size, **options)
    state[PROJECTION] = resized * (old / patch_size) ** 2
    return weights._replace(state=state, sizes={**weights.sizes, "patch_size": patch_size})


def start_from(weights: Weights, module: Model, *, mean: list[float], std: list[float], **options) -> str:
    """Load `weights` into `module` as `load_weights` does, and return a report of one line.

    It says if `mean` and `std`, which normalize the images of this run, are not those that the weights had.
    """
    stored = weights.stored
    try:
        report = str(load_weights(module, weights.state, stored=stored, **options))
    except WeightsError as error:
        raise WeightsError(f"{weights.path}: {error.message}", error.settings) from error
    if stored.mean not in (None, mean) or stored.std not in (None, std):
        report += f"; the weights were trained with mean {stored.mean} and std {stored.std}, "
        report += f"this run has mean {mean} and std {std}"
    return report


def load_weights(
    model: Model,
    state: State,
    *,
    stored: Stored = Stored(),  # noqa: B008 - immutable
    adapt_channels: bool = False,
) -> LoadReport:
    """Copy the parameters of any known layout into `model`, and report what was done with each.

    Heads that the model lacks are ignored. A VisionTransformer also ignores a decoder and, like a Segmenter or a
    Detector, a final norm that it lacks. A missing decoder is left as initialized, and so are missing EXTRAS, except in
    a Segmenter or a Detector. Positions and relative position biases are resized to the model's grid.

    Args:
        stored: facts from files beside the weights. If the grid is unknown, it is the model's if the number of patches
            agrees, otherwise a square. The number of heads is checked only if it is known.
        adapt_channels: convert weights to the model's number of channels.

    Raises:
        WeightsError: before anything is copied, with all settings or all parameters that do not fit.
    """
    layout, state = to_ours(state)
    prefix = "encoder." if isinstance(model, VisionTransformer) else ""
    target = {prefix + name: value for name, value in model.state_dict().items()}
    theirs = model_settings(state)
    _check_settings(layout, model, theirs, model_settings(target), stored, adapt_channels=adapt_channels)
    _check_head(layout, model, theirs, stored, needs_norm="encoder.norm.weight" in target.keys() - state.keys())
    adapted = _adapt_channels(state, target)
    resized, problems = _resize_tables(state, target, getattr(model, "encoder", model).grid, stored.grid)

    has_decoder = any(name.startswith(DECODER) for name in state)
    new = [] if has_decoder else [name for name in target if name.startswith(DECODER)]
    if not isinstance(model, Segmenter | Detector):
        new += [name for option in EXTRAS if not extra_names(state, option) for name in extra_names(target, option)]
    planned = (*HEAD_PREFIXES, *DECODER) if prefix else HEAD_PREFIXES
    planned += ("encoder.norm.",) if prefix or isinstance(model, Segmenter | Detector) else ()
    ignored = sorted(name for name in state.keys() - target.keys() if name.startswith(planned))
    problems += _list_misfits(state, target, expected={*new, *ignored})
    if isinstance(model, MaskedAutoencoder) and has_decoder and stored.target not in (None, model.target.name):
        problems.append(f"target is {stored.target} instead of {model.target.name}")
    if problems:
        remedy = "give those of a plain ViT or MAE"
        if any(problem.startswith(("decoder.pred.", "target")) for problem in problems):
            remedy = "the decoder predicts other values: give the file of its encoder alone"
        raise WeightsError(f"weights of {layout} do not fit: {'; '.join(problems)}; {remedy}")
    values = {name: state.get(name, value) for name, value in target.items()}
    model.load_state_dict({name.removeprefix(prefix): value for name, value in values.items()})
    return LoadReport(layout, len(target) - len(new), tuple(new), tuple(ignored), tuple(resized), tuple(adapted))


def _check_head(layout: str, model: Model, theirs: dict, stored: Stored, *, needs_norm: bool) -> None:
    """Raise WeightsError for features or pooling that no model here has, or a final norm lost in fine-tuning."""
    if stored.unsupported:
        reason = f"were trained with {stored.unsupported}, which no model here has"
        raise WeightsError(f"weights of {layout} {reason}; give others")
    if isinstance(model, Classifier) and stored.pooling not in (None, theirs.get("pooling")):
        raise WeightsError(
            f"weights of {layout} have a head on the {stored.pooling} of normed tokens; expected one on the cls token, "
            "or on the mean followed by a norm (fc_norm); give such a classifier"
        )
    if needs_norm and ("head" in theirs or theirs.get("pooling") == "mean"):
        message = f"weights of {layout} lost their final norm in fine-tuning"
        if isinstance(model, MaskedAutoencoder):
            raise WeightsError(f"{message}; give the weights that they were fine-tuned from")
        raise WeightsError(message, dict(pooling="mean"))


def _check_settings(
    layout: str, model: Model, theirs: dict, ours: dict, stored: Stored, *, adapt_channels: bool
) -> None:
    """Raise WeightsError that lists all settings in which model and weights differ, with the values that fit."""
    theirs |= dict(encoder_num_heads=stored.num_heads, decoder_num_heads=stored.decoder_num_heads)
    ours |= dict(encoder_num_heads=getattr(model, "encoder", model).num_heads)
    if isinstance(model, MaskedAutoencoder):
        ours["decoder_num_heads"] = model.decoder.num_heads
    if not isinstance(model, Segmenter | Detector):  # other models may initialize the extras that weights lack
        theirs |= {option: theirs[option] or ours[option] for option in EXTRAS}
    if adapt_channels:
        theirs.pop("input_channels", None)
    settings = {name: value for name, value in theirs.items() if name in ours and value not in (None, ours[name])}
    if settings:
        words = ", ".join(f"{name} is {value} instead of {ours[name]}" for name, value in settings.items())
        if {*EXTRAS} & settings.keys():
            words += (
                "; only an encoder of a segmenter or detector can have this, others need weights of a plain ViT or MAE"
            )
        if settings.pop("input_channels", None):
            settings["adapt_channels"] = True
        if "layer_scale" in settings:
            settings["layer_scale"] = 1.0
        if "encoder_embed_dim" in settings:
            known = NUM_HEADS.get((theirs["encoder_embed_dim"], theirs["encoder_depth"]))
            settings.setdefault("encoder_num_heads", stored.num_heads or known or "N")
        if "decoder_embed_dim" in settings:
            settings.setdefault("decoder_num_heads", stored.decoder_num_heads or "N")
        if {"decoder", "decoder_inputs"} & settings.keys():
            words += " (the file of its encoder alone fits)"
        raise WeightsError(f"weights of {layout} do not fit the model: {words}", settings)


def _list_misfits(state: State, target: State, expected: set[str]) -> list[str]:
    """Return a message for each parameter that is missing, unexpected or of another shape, but not in `expected`."""
    problems = [f"{name} is missing" for name in target if name not in state and name not in expected]
    problems += [f"{name} is unexpected" for name in sorted(state.keys() - target.keys() - expected)]
    return problems + [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in target.items()
        if name in state and state[name].shape != value.shape
    ]


def _resize_tables(state: State, target: State, grid: Grid, old_grid: Grid | None) -> tuple[list[str], list[str]]:
    """Resize positions (1, T + L, D) and relative position biases in `state`; return changes and error messages."""
    resized, problems, their_grid = [], [], grid
    prefix_tokens = model_settings(target)["num_cls_tokens"]
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        if name in target and name in state and state[name].ndim == 3:
            count = state[name].shape[1] - prefix_tokens
            side = math.isqrt(count)
            their_grid = old_grid or (grid if count == math.prod(grid) else (side, side))
            if math.prod(their_grid) != count:
                problems.append(f"{name} has {count} positions, which do not fit a grid of {their_grid}")
            elif their_grid != grid:
                state[name] = resize_positions(state[name], their_grid, grid, prefix_tokens=prefix_tokens)
                resized.append(f"{name} {their_grid[0]}x{their_grid[1]} -> {grid[0]}x{grid[1]}")
    changes = Counter()
    for name in (name for name in extra_names(state, "relative_position_bias") if name in target):
        theirs, ours = (_bias_grid(table[name], side) for table, side in ((state, their_grid), (target, grid)))
        if None not in (theirs, ours) and theirs != ours:
            # The offsets in a window do not depend on the grid
            change = resize_biases if (theirs, ours) == (their_grid, grid) else cut_biases
            state[name] = change(state[name], theirs, ours)
            changes["{}x{} -> {}x{}".format(*theirs, *ours)] += 1
    resized += [f"{count} relative position biases {sides}" for sides, count in changes.items()]
    return resized, problems


def _bias_grid(table: torch.Tensor, grid: Grid) -> Grid | None:
    """Return the grid of a table of relative position biases: `grid`, or else a square window; None if neither fits."""
    count = len(table) - 3
    if count == math.prod(2 * side - 1 for side in grid):
        return grid
    side = (math.isqrt(max(0, count)) + 1) // 2
    return (side, side) if count == (2 * side - 1) ** 2 else None


def _adapt_channels(state: State, target: State) -> list[str]:
    """Convert the parameters in `state` that see or predict pixels to the channels of `target`; return the changes.

    Old and new channels are paired in order, and the shorter list repeats: 3 -> 1 gives (0, 0) (1, 0) (2, 0), and
    3 -> 4 gives (0, 0) (1, 1) (2, 2) (0, 3). In place of each old channel, the model then sees the mean of the new
    channels paired with it. For each new channel, it predicts the mean of the old channels paired with it. So an image
    with equal channels keeps its tokens.
    """
    old, new = model_settings(state).get("input_channels"), target[PROJECTION].shape[1]
    if old in (None, new):
        return []
    pairs = torch.zeros(new, old, device=state[PROJECTION].device)
    for k in range(max(new, old)):
        pairs[k % new, k % old] = 1
    to_input = pairs / pairs.sum(dim=0)  # the new weights of an old channel sum to its weight
    to_output = pairs / pairs.sum(dim=1, keepdim=True)

    state[PROJECTION] = torch.einsum("ji,dihw->djhw", to_input, state[PROJECTION].float())
    adapted, pixels = [PROJECTION], math.prod(target[PROJECTION].shape[2:])
    for name in ("decoder.pred.weight", "decoder.pred.bias"):
        if name in target and name in state and state[name].shape[:1] == (pixels * old,):
            value = state[name].float().unflatten(0, (pixels, old))  # (P*P, C, ...), in the order of `patchify`
            state[name] = torch.einsum("ji,pi...->pj...", to_output, value).flatten(0, 1)
            adapted.append(name)
    return [f"{name} {old} -> {new} channels" for name in adapted]
