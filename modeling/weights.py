"""Loading weights: parameters of several libraries -> our modules, with a report of every one.

Nothing is skipped in silence: what is not planned for is an error that lists all of it. Legend: as in mae.py.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from modeling.classifier import Classifier
from modeling.files import Stored, WeightsError, find_weights, read_state_dict, read_stored
from modeling.mae import MaskedAutoencoder
from modeling.position import resize_positions
from modeling.upernet import Segmenter
from modeling.vit import SIZES, VisionTransformer

# Names of MaskedAutoencoder, Classifier and Segmenter, and of transformers' files (those of `vit`, ViTMAE and ViT
# alike, and with another prefix those of BEiT); read both ways.
TRANSFORMERS_NAMES = [
    ("encoder.cls_token", "vit.embeddings.cls_token"),
    ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
    ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "vit.encoder.layer."),
    ("encoder.norm.", "vit.layernorm."),
    ("fc_norm.", "vit.pooler.layernorm."),  # BEiT's
    ("head.", "classifier."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_embed.", "decoder.decoder_embed."),
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
    ("fpn.fpn1.", "backbone.fpn1."),
    ("fpn.fpn2.", "backbone.fpn2.0."),
    (".gamma_", ".lambda_"),  # BEiT's
    (".attn.relative_position_bias_table", ".attention.attention.relative_position_bias.relative_position_bias_table"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),  # after attn.proj, which ends alike
]
QKV = ".attn.qkv."  # one parameter of (3D, ...) here, three of (D, ...) there
TRANSFORMERS_QKV = (".attention.attention.query.", ".attention.attention.key.", ".attention.attention.value.")

# Names that transformers 5 has in memory, or writes by mistake -> those of its files. (Its mlp.fc1 and fc2 are ours.)
TRANSFORMERS_5_NAMES = [
    ("vit.layers.", "vit.encoder.layer."),
    ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),  # the mistake; 4.x does not read it
    (".attention.q_proj.", TRANSFORMERS_QKV[0]),
    (".attention.k_proj.", TRANSFORMERS_QKV[1]),
    (".attention.v_proj.", TRANSFORMERS_QKV[2]),
    (".attention.o_proj.", ".attention.output.dense."),
    (".attention.attention.relative_position_bias.", ".relative_position_bias."),  # so that files keep theirs below
    (".relative_position_bias.", ".attention.attention.relative_position_bias."),
    ("backbone.fpn.fpn1.conv_transpose1.", "backbone.fpn1.0."),
    ("backbone.fpn.fpn1.normalization.", "backbone.fpn1.1."),
    ("backbone.fpn.fpn1.conv_transpose2.", "backbone.fpn1.3."),
    ("backbone.fpn.fpn2.", "backbone.fpn2.0."),
]

OFFICIAL_LINEAR_PROBE_NAMES = [("head.0.", "head_norm."), ("head.1.", "head.")]

SEGMENTATION_HEADS = ("decode_head.", "auxiliary_head.")  # named alike here and in transformers
# What stands on top of an encoder
HEADS = ("head.", "head_norm.", "fc_norm.", "vit.pooler.", "fpn.", *SEGMENTATION_HEADS)
DECODER = ("mask_token", "decoder_")
BLOCKS = {"encoder": "encoder.blocks.", "decoder": "decoder_blocks."}
# What a segmentation model may add to each block: how the names of its parameters end; the flags without and with it
EXTRAS = {
    "relative position bias": (".attn.relative_position_bias_table",),  # ((2h-1)*(2w-1) + 3, heads)
    "layer scale": (".gamma_1", ".gamma_2"),
}
EXTRA_FLAGS = {
    "relative position bias": ("--no-relative_position_bias", "--relative_position_bias"),
    "layer scale": ("--layer_scale 0", "--layer_scale 1"),
}
SIZE_NAMES = {(size["embed_dim"], size["depth"]): name for name, size in SIZES.items()}
PROJECTION = "encoder.patch_embed.proj.weight"  # (D, C, P, P)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, in the names of `to_ours`; `str` is one line for the console."""

    layout: str
    loaded: int  # parameters, resized and adapted ones included
    missing: tuple[str, ...]  # in the model only: a new decoder's or EXTRAS, left as they were initialised
    ignored: tuple[str, ...]  # in the checkpoint only
    resized: tuple[str, ...]  # "name 14x14 -> 32x32"
    adapted: tuple[str, ...] = ()  # "name 3 -> 1 channels"

    def __str__(self) -> str:
        parts = sorted({re.match(r"(?:vit\.)?((?:encoder\.)?[^.]+)", name)[1] for name in self.ignored})
        ignored = f"{len(self.ignored)} ignored" + (f" ({', '.join(parts)})" if parts else "")
        line = f"weights of {self.layout}: {self.loaded} loaded, {len(self.missing)} missing, {ignored}, "
        line += f"resized: {', '.join(self.resized) or 'none'}"
        if self.adapted:
            line += f", adapted: {', '.join(self.adapted)}"
        if self.missing:
            parts = {part: any(n.endswith(ends) for n in self.missing) for part, ends in EXTRAS.items()}
            parts["decoder"] = any(name.startswith(DECODER) for name in self.missing)
            names = ", ".join(part for part, new in parts.items() if new)
            line += f", {names}: newly initialised ({len(self.missing)} parameters missing)"
        return line


class Weights(NamedTuple):
    """Trained weights as they lie in files, and what is told of the encoder in them."""

    path: Path
    state: dict[str, torch.Tensor]
    stored: Stored
    sizes: dict  # the arguments of its VisionTransformer, see `encoder_sizes`
    grid: tuple[int, int] | None  # of its positions, see `encoder_grid`


def open_weights(path: str | Path) -> Weights:
    """The weights of an encoder, alone or below a head, that `path` leads to, see `find_weights`.

    Raises WeightsError, whose message begins with the path.
    """
    try:
        path = find_weights(path, whole=False)
        state, stored = read_state_dict(path), read_stored(path)
        return Weights(path, state, stored, encoder_sizes(state, stored), encoder_grid(state, stored))
    except WeightsError as error:
        raise WeightsError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def start_from(
    weights: Weights,
    module: Classifier | Segmenter | VisionTransformer,
    *,
    adapt_channels: bool,
    mean: list[float],
    std: list[float],
) -> str:
    """Loads `weights` into `module`, for images that are normalised by `mean` and `std`. Returns what became of them,
    in a line. Raises WeightsError."""
    stored = weights.stored
    report = str(load_weights(module, weights.state, stored=stored, adapt_channels=adapt_channels))
    if stored.mean in (None, mean) and stored.std in (None, std):
        return report
    theirs, ours = (f"mean {numbers[0]} and std {numbers[1]}" for numbers in ((stored.mean, stored.std), (mean, std)))
    return f"{report}; they were trained with {theirs}, this run has {ours}"


def rename(name: str, pairs: list[tuple[str, str]]) -> str:
    """`name` with the first member of each pair replaced by the second, in the order given; heads of segmentation keep
    theirs."""
    if name.startswith(SEGMENTATION_HEADS):
        return name
    for old, new in pairs:
        name = name.replace(old, new, 1)
    return name


def to_ours(state: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    """Parameters of any known layout -> the layout's name, and the parameters under the names of MaskedAutoencoder,
    Classifier and Segmenter.

    What has no counterpart keeps its name. Raises WeightsError where there is no encoder of a layout that is known.
    """
    # Numbers that follow from the grid, which older versions of transformers and of BEiT store
    state = {name: value for name, value in state.items() if not name.endswith(".relative_position_index")}
    if any(name.startswith("encoder.blocks.") for name in state):
        return "this project", state
    if {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= state.keys():
        if "head.1.weight" in state:
            state = {rename(name, OFFICIAL_LINEAR_PROBE_NAMES): value for name, value in state.items()}
        layout = f"a timm or MAE {'classifier' if 'head.weight' in state else 'encoder'}"
        layout = "the official MAE" if any(name.startswith(DECODER) for name in state) else layout
        return layout, {n if n.startswith(DECODER + HEADS) else f"encoder.{n}": t for n, t in state.items()}
    if any(f"backbone.{part}embeddings.cls_token" in state for part in ("", "beit.")):
        state = {re.sub(r"^backbone\.(beit\.)?(?!fpn)", "vit.", name): value for name, value in state.items()}
        state = {rename(name, TRANSFORMERS_5_NAMES): value for name, value in state.items()}
        return "transformers' UperNet", _from_transformers(state)
    if "embeddings.cls_token" in state:  # ViTModel and ViTMAEModel, which are the `vit` of the other classes
        state = {f"vit.{name}": value for name, value in state.items()}
    if "vit.embeddings.cls_token" in state or "beit.embeddings.cls_token" in state:
        layout = "transformers' ViTMAE" if "decoder.mask_token" in state else "transformers' ViT"
        if "beit.embeddings.cls_token" in state:
            layout = "transformers' BEiT"
            state = {re.sub(r"^beit\.", "vit.", name): value for name, value in state.items()}
        state = {rename(name, TRANSFORMERS_5_NAMES): value for name, value in state.items()}
        return layout, _from_transformers(state)
    raise WeightsError(
        f"weights without an encoder, or of an unknown layout ({', '.join(list(state)[:4])}, ...); expected those of "
        "this project, facebookresearch/mae, timm's ViT or transformers' ViT, ViTMAE, BEiT and UperNet with a BEiT; "
        "give or rename them to one of these"
    )


def _from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of transformers' files -> ours; the inverse of `export.to_transformers`."""
    back = [(theirs, ours) for ours, theirs in TRANSFORMERS_NAMES]
    query, others = TRANSFORMERS_QKV[0], TRANSFORMERS_QKV[1:]
    ours = {}
    for name, value in state.items():
        if query in name:  # a part that is absent shows as a wrong shape
            parts = [state.get(name.replace(query, part)) for part in TRANSFORMERS_QKV]
            if name.endswith(".bias") and parts[1] is None:  # BEiT has none, as the softmax takes it away
                parts[1] = torch.zeros_like(value)
            ours[rename(name.replace(query, QKV), back)] = torch.cat([part for part in parts if part is not None])
        elif not any(part in name for part in others):
            ours[rename(name, back)] = value
    return ours


def load_weights(
    model: MaskedAutoencoder | Classifier | Segmenter | VisionTransformer,
    state: dict[str, torch.Tensor],
    *,
    stored: Stored = Stored(),  # noqa: B008 - immutable
    adapt_channels: bool = False,
    new_decoder: bool = False,
) -> LoadReport:
    """Copy the parameters of any known layout into `model`, and say what became of each.

    A Classifier or Segmenter takes its head too; otherwise heads are left out, and for a VisionTransformer the decoder,
    and the norm where mean pooling or segmentation took it off the model. Positions and relative position biases of
    another grid are resized; where `stored` does not tell theirs, it is the model's own if the number of patches
    agrees, otherwise a square. Weights without relative position bias or layer scale leave those of an encoder as they
    were initialised. `adapt_channels` converts weights for images of another number of channels; `new_decoder` takes
    weights that hold no decoder at all, and leaves the model's as it was initialised. Raises WeightsError, before
    anything is copied: for other sizes, pooling and heads in words, otherwise with every parameter that is missing,
    unexpected or of another shape. A different number of attention heads, or other layers, show in `stored` alone.
    """
    layout, state = to_ours(state)
    encoder_only = isinstance(model, VisionTransformer)
    grid = model.grid if encoder_only else model.encoder.grid
    wanted = {f"encoder.{n}" if encoder_only else n: value for n, value in model.state_dict().items()}
    if stored.unlike:
        raise WeightsError(
            f"weights of {layout} were trained with {' and '.join(stored.unlike)}, which no model here has; give others"
        )
    _check_sizes(layout, state, wanted, adapt_channels, _other_heads(model, stored))
    if isinstance(model, Segmenter):
        _check_segmenter(layout, state, wanted)
    else:
        _check_extras(layout, state, wanted)
        _check_head(layout, state, wanted, stored)
    adapted = _adapt_channels(state, wanted)
    resized, problems = _resize_tables(state, wanted, grid, stored.grid)

    no_decoder = isinstance(model, MaskedAutoencoder) and not any(name.startswith(DECODER) for name in state)
    new = [name for name in wanted if name.startswith(DECODER)] if no_decoder and new_decoder else []
    if not isinstance(model, Segmenter):
        new += [name for part in EXTRAS if not _extras(state, part) for name in _extras(wanted, part)]
    planned = (*HEADS, *DECODER) if encoder_only else HEADS
    planned += ("encoder.norm.",) if encoder_only or isinstance(model, Segmenter) else ()
    ignored = sorted(name for name in state.keys() - wanted.keys() if name.startswith(planned))
    problems += _misfits(state, wanted, expected={*new, *ignored})
    if problems:
        remedy = "give those of a plain ViT or MAE"
        if no_decoder and not new_decoder:
            remedy = "they hold no decoder: give those of a whole autoencoder"
        raise WeightsError(f"weights of {layout} do not fit: {'; '.join(problems)}; {remedy}")
    values = {name: state.get(name, value) for name, value in wanted.items()}
    model.load_state_dict({n.removeprefix("encoder.") if encoder_only else n: value for n, value in values.items()})
    return LoadReport(layout, len(wanted) - len(new), tuple(new), tuple(ignored), tuple(resized), tuple(adapted))


def encoder_sizes(state: dict[str, torch.Tensor], stored: Stored = Stored()) -> dict:  # noqa: B008 - immutable
    """The arguments of the VisionTransformer that fits weights of any known layout, but for its image size.

    Parameters do not tell the number of heads: where `stored` does not either, it is that of the known size of this
    width and depth, or None. Raises WeightsError for weights without an encoder.
    """
    layout, state = to_ours(_without_values(state))
    sizes = _sizes(state, "encoder")
    if sizes is None:
        found = ", ".join(sorted(state)[:4])
        raise WeightsError(
            f"weights of {layout} do not tell the sizes of an encoder ({found}, ...); expected {PROJECTION} "
            f"(D, C, P, P) and {BLOCKS['encoder']}0.mlp.fc1.weight; give those of a plain ViT or MAE"
        )
    name = SIZE_NAMES.get((sizes.width, sizes.depth))
    return dict(
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=stored.num_heads or (SIZES[name]["num_heads"] if name else None),
        mlp_ratio=sizes.mlp_ratio,
        patch_size=sizes.patch_size,
        in_channels=_channels(state),
    )


def decoder_sizes(state: dict[str, torch.Tensor], stored: Stored = Stored()) -> dict | None:  # noqa: B008 - immutable
    """The arguments of the MaskedAutoencoder that fits the decoder in weights of any known layout; None where they hold
    none. The number of heads is what `stored` tells, or None. Raises WeightsError for weights without an encoder."""
    sizes = _sizes(to_ours(_without_values(state))[1], "decoder")
    if sizes is None:
        return None
    return dict(
        decoder_embed_dim=sizes.width,
        decoder_depth=sizes.depth,
        decoder_num_heads=stored.decoder_num_heads,
        decoder_mlp_ratio=sizes.mlp_ratio,
    )


def encoder_grid(state: dict[str, torch.Tensor], stored: Stored = Stored()) -> tuple[int, int] | None:  # noqa: B008
    """The h w patches of the positions in weights of any known layout: what `stored` tells, otherwise a square; None
    where they make none. Raises WeightsError for weights without an encoder."""
    positions = to_ours(_without_values(state))[1].get("encoder.pos_embed")
    if stored.grid or positions is None or positions.ndim != 3:
        return stored.grid
    side = math.isqrt(positions.shape[1] - 1)
    return (side, side) if side * side == positions.shape[1] - 1 else None


def classifier_kind(state: dict[str, torch.Tensor]) -> tuple[int, str, bool] | None:
    """The number of classes, the pooling and whether it is a linear probe, of the Classifier that fits weights of any
    known layout; None where they hold no head. A folded linear probe is none any more. Raises WeightsError for weights
    without an encoder."""
    return _kind(to_ours(_without_values(state))[1])


class SegmenterKind(NamedTuple):
    """What parameters tell of a Segmenter, beyond its encoder's sizes."""

    num_classes: int
    head: str  # "upernet" or "linear"
    head_width: int  # of a linear head 0
    auxiliary: bool
    relative_position_bias: bool
    layer_scale: bool


def segmenter_kind(state: dict[str, torch.Tensor]) -> SegmenterKind | None:
    """The Segmenter that fits weights of any known layout; None where they hold no head of segmentation. Raises
    WeightsError for weights without an encoder."""
    return _segmenter_kind(to_ours(_without_values(state))[1])


def _segmenter_kind(state: dict[str, torch.Tensor]) -> SegmenterKind | None:
    """As `segmenter_kind`, of parameters under our names."""
    classifier, linear = state.get("decode_head.classifier.weight"), "decode_head.batch_norm.running_var" in state
    if classifier is None or classifier.ndim != 4 or not (linear or "fpn.fpn2.weight" in state):
        return None
    head = ("linear", 0) if linear else ("upernet", classifier.shape[1])
    auxiliary, extras = "auxiliary_head.classifier.weight" in state, (bool(_extras(state, part)) for part in EXTRAS)
    return SegmenterKind(classifier.shape[0], *head, auxiliary, *extras)


def _extras(state: dict[str, torch.Tensor], part: str) -> list[str]:
    """The names of the encoder's parameters that belong to one of EXTRAS."""
    return [name for name in state if name.startswith(BLOCKS["encoder"]) and name.endswith(EXTRAS[part])]


def _without_values(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The shapes alone, which cost nothing to rearrange."""
    return {name: value.to("meta") for name, value in state.items()}


def _kind(state: dict[str, torch.Tensor]) -> tuple[int, str, bool] | None:
    """As `classifier_kind`, of parameters under our names."""
    head = state.get("head.weight")
    if head is None or head.ndim != 2:
        return None
    return head.shape[0], "mean" if "fc_norm.weight" in state else "cls", "head_norm.running_mean" in state


def _misfits(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], expected: set[str]) -> list[str]:
    """Every parameter that is missing in `state`, unexpected there or of another shape, but for those in `expected`."""
    problems = [f"{name} is missing" for name in wanted if name not in state and name not in expected]
    problems += [f"{name} is unexpected" for name in sorted(state.keys() - wanted.keys() - expected)]
    return problems + [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]


def _resize_tables(
    state: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    grid: tuple[int, int],
    old_grid: tuple[int, int] | None,
) -> tuple[list[str], list[str]]:
    """Brings the position tables in `state`, (1, 1 + L, D), and those of relative position biases to `grid`: what was
    resized, and what could not be."""
    resized, problems, grid_there = [], [], grid
    for name in ("encoder.pos_embed", "decoder_pos_embed"):
        if name in wanted and name in state and state[name].ndim == 3:
            count = state[name].shape[1] - 1
            side = math.isqrt(count)
            grid_there = old_grid or (grid if count == math.prod(grid) else (side, side))
            if math.prod(grid_there) != count:
                problems.append(f"{name} has {count} positions, which are no grid of {grid_there}")
            elif grid_there != grid:
                state[name] = resize_positions(state[name], grid_there, grid)
                resized.append(f"{name} {grid_there[0]}x{grid_there[1]} -> {grid[0]}x{grid[1]}")
    h, w = grid_there
    biases = [name for name in _extras(state, "relative position bias") if name in wanted]
    biases = [name for name in biases if state[name].shape[0] == (2 * h - 1) * (2 * w - 1) + 3]
    if biases and grid_there != grid:
        state.update((name, _resize_biases(state[name], grid_there, grid)) for name in biases)
        resized.append(f"{len(biases)} relative position biases {h}x{w} -> {grid[0]}x{grid[1]}")
    return resized, problems


def _resize_biases(table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Bilinear resizing of a table of relative position biases to another grid, as transformers' BEiT does it:
    ((2h-1)*(2w-1) + 3, heads) -> ((2h'-1)*(2w'-1) + 3, heads). The last three rows are the cls token's."""
    (h, w), size = old_grid, [2 * side - 1 for side in new_grid]
    offsets = table[:-3].T.reshape(1, -1, 2 * h - 1, 2 * w - 1).float()
    offsets = F.interpolate(offsets, size=size, mode="bilinear", align_corners=False)
    return torch.cat([offsets[0].flatten(1).T.to(table.dtype), table[-3:]])


def _adapt_channels(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Gives the parameters in `state` that see or predict pixels as many channels as in `wanted`; names them.

    Old and new channels are paired by counting through both, the fewer again and again: 3 -> 1 as (0, 0) (1, 0) (2, 0),
    3 -> 4 as (0, 0) (1, 1) (2, 2) (0, 3). The model then does what the checkpoint's would on converted images, whose
    old channels are each the mean of the new ones paired with it, and predicts a new channel as the mean of the old
    ones paired with it. So an image whose channels are all equal keeps its tokens.
    """
    old, new = _channels(state), _channels(wanted)
    if old in (None, new):
        return []
    pairs = torch.zeros(new, old, device=state[PROJECTION].device)
    for k in range(max(new, old)):
        pairs[k % new, k % old] = 1
    seen = pairs / pairs.sum(dim=0)  # the new weights of an old channel add up to its own
    predicted = pairs / pairs.sum(dim=1, keepdim=True)

    state[PROJECTION] = torch.einsum("ji,dihw->djhw", seen, state[PROJECTION].float())
    adapted, pixels = [PROJECTION], math.prod(wanted[PROJECTION].shape[2:])
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in wanted and name in state and state[name].shape[:1] == (pixels * old,):
            value = state[name].float().unflatten(0, (pixels, old))  # (P*P, C, ...), in the order of `patchify`
            state[name] = torch.einsum("ji,pi...->pj...", predicted, value).flatten(0, 1)
            adapted.append(name)
    return [f"{name} {old} -> {new} channels" for name in adapted]


def _channels(state: dict[str, torch.Tensor]) -> int | None:
    """The number of input channels, None where no projection of patches (D, C, P, P) tells it."""
    projection = state.get(PROJECTION)
    return projection.shape[1] if projection is not None and projection.ndim == 4 else None


class PartSizes(NamedTuple):
    """What the parameters of an encoder or a decoder tell of its sizes; the number of heads is not among it."""

    width: int
    depth: int
    mlp_ratio: float
    patch_size: int | None  # of an encoder

    def describe(self, *, mlp: bool) -> str:
        """In words, with the MLP ratio where `mlp`: "1024 x 24 with patches of 16 and an MLP ratio of 4"."""
        details = [f"patches of {self.patch_size}"] if self.patch_size else []
        details += [f"an MLP ratio of {self.mlp_ratio:g}"] if mlp else []
        return f"{self.width} x {self.depth}" + (f" with {' and '.join(details)}" if details else "")


def _sizes(state: dict[str, torch.Tensor], part: str) -> PartSizes | None:
    """The sizes of the "encoder" or "decoder" in `state`; None where the parameters that tell them are not there."""
    blocks = BLOCKS[part]
    fc1 = state.get(f"{blocks}0.mlp.fc1.weight")
    if fc1 is None or fc1.ndim != 2 or _channels(state) is None:
        return None
    hidden, width = fc1.shape
    indices = [name.removeprefix(blocks).partition(".")[0] for name in state if name.startswith(blocks)]
    depth = 1 + max(int(index) for index in indices if index.isdecimal())
    mlp_ratio = math.ceil(round(hidden / width * 1e4, 3)) / 1e4  # upwards, as a model rounds width * mlp_ratio down
    return PartSizes(width, depth, mlp_ratio, state[PROJECTION].shape[-1] if part == "encoder" else None)


def _other_heads(
    model: MaskedAutoencoder | Classifier | Segmenter | VisionTransformer, stored: Stored
) -> list[tuple[str, str]]:
    """Where checkpoint and model differ in their number of attention heads, or in the layers that a segmentation head
    sees, in words, and the flag to give."""
    encoder = getattr(model, "encoder", model)
    heads = [("encoder", stored.num_heads, encoder.num_heads)]
    if isinstance(model, MaskedAutoencoder):
        heads.append(("decoder", stored.decoder_num_heads, model.decoder_blocks[0].attn.num_heads))
    differences = [
        (f"{there} {part} heads, the model {here}", f"--{part}_num_heads {there}")
        for part, there, here in heads
        if there not in (None, here)
    ]
    if isinstance(model, Segmenter) and stored.layers not in (None, model.layers):
        there, here = (" ".join(map(str, layers)) for layers in (stored.layers, model.layers))
        differences.append((f"a head on the layers {there}, the model on {here}", f"--layers {there}"))
    return differences


def _check_sizes(
    layout: str,
    state: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    adapt_channels: bool,
    other_heads: list[tuple[str, str]],
) -> None:
    """Raises WeightsError, in words and with the flags to give, where checkpoint and model differ in their sizes."""
    words, remedies = [], []
    for article, part in (("an", "encoder"), ("a", "decoder")):
        there, here = _sizes(state, part), _sizes(wanted, part)
        if there and here and there != here:
            mlp = there.mlp_ratio != here.mlp_ratio
            words.append(f"{article} {part} of {there.describe(mlp=mlp)}, the model {here.describe(mlp=mlp)}")
            remedies.append(_flags(part, there, here))
    there, here = _channels(state), _channels(wanted)
    if there not in (None, here) and not adapt_channels:
        words.append(f"{there} input channels, the model {here}")
        remedies.append(f"--adapt_channels to convert them (or --input_channels {there})")
    if not words:  # other widths have other heads, and say so
        words, remedies = ([pair[i] for pair in other_heads] for i in (0, 1))
    if words:
        raise WeightsError(f"weights of {layout} have {'; '.join(words)}; give {', '.join(remedies)}")


def _check_head(layout: str, state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], stored: Stored) -> None:
    """Raises WeightsError, in words and with the flags to give, where pooling or head are not those of the model."""
    there, here = _kind(state), _kind(wanted)
    if here is None:
        pooled, segmented = "fc_norm.weight" in state, any(name.startswith(SEGMENTATION_HEADS) for name in state)
        if "encoder.norm.weight" in wanted and "encoder.norm.weight" not in state and (pooled or segmented):
            task = "for segmentation" if segmented else "with mean pooling"
            remedy = "those that it was fine-tuned from" if "mask_token" in wanted else "--pooling mean"
            raise WeightsError(f"weights of {layout} were trained {task}, so their encoder has no norm; give {remedy}")
        return
    if there is None:
        raise WeightsError(f"weights of {layout} hold no classifier's head; give those of a trained classifier")
    if stored.pooling not in (None, there[1]):
        raise WeightsError(
            f"weights of {layout} have a head on the {stored.pooling} of normed tokens; expected one on the cls token, "
            "or on the mean with the norm (fc_norm) behind it; give such a classifier"
        )
    words, remedies = [], []
    if there[0] != here[0]:
        words.append(f"a head of {there[0]} classes, the model {here[0]}")
        remedies.append(f"--num_classes {there[0]}")
    if there[1] != here[1]:
        words.append(f"{there[1]} pooling, the model {here[1]}")
        remedies.append(f"--pooling {there[1]}")
    if there[2] != here[2]:
        words.append("the BatchNorm of a linear probe" if there[2] else "no BatchNorm of a linear probe")
        remedies.append("--linear_probe" if there[2] else "no --linear_probe")
    if words:
        raise WeightsError(f"weights of {layout} have {'; '.join(words)}; give {', '.join(remedies)}")


def _check_extras(layout: str, state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raises WeightsError, with the flags to give, where only the checkpoint's encoder has what EXTRAS are."""
    parts = [part for part in EXTRAS if _extras(state, part) and not _extras(wanted, part)]
    if parts:
        flags = " ".join(EXTRA_FLAGS[part][1] for part in parts)
        raise WeightsError(
            f"weights of {layout} have {' and '.join(parts)}, the model none; give {flags} in segmentation, elsewhere "
            "those of a plain ViT or MAE"
        )


def _check_segmenter(layout: str, state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raises WeightsError, in words and with the flags to give, where the Segmenter of `state` is not the model's."""
    there, here = _segmenter_kind(state), _segmenter_kind(wanted)
    if there is None:
        raise WeightsError(
            f"weights of {layout} hold no head of segmentation (upernet or linear); give those of a trained "
            "segmentation model, as model.safetensors has them"
        )
    words, remedies = [], []
    if there.num_classes != here.num_classes:
        words.append(f"a head of {there.num_classes} classes, the model {here.num_classes}")
        remedies.append(f"data of {there.num_classes} classes")
    if there.head != here.head:
        words.append(f"the head {there.head}, the model {here.head}")
        remedies.append(f"--head {there.head}")
    elif there.head_width != here.head_width:
        words.append(f"a head of width {there.head_width}, the model {here.head_width}")
        remedies.append(f"--head_width {there.head_width}")
    if there.auxiliary != here.auxiliary and there.head == here.head:
        words.append("an auxiliary head" if there.auxiliary else "no auxiliary head")
        remedies.append(f"--auxiliary_weight {0.4 if there.auxiliary else 0}")
    for part in EXTRAS:
        given = bool(_extras(state, part))
        if given != bool(_extras(wanted, part)):
            words.append(part if given else f"no {part}")
            remedies.append(EXTRA_FLAGS[part][given])
    if words:
        raise WeightsError(f"weights of {layout} have {'; '.join(words)}; give {', '.join(remedies)}")


def _flags(part: str, there: PartSizes, here: PartSizes) -> str:
    """The flags that turn an encoder or decoder of the sizes `here` into one of those `there`."""
    model = SIZE_NAMES.get((there.width, there.depth)) if part == "encoder" else None
    wider, deeper = there.width != here.width, there.depth != here.depth
    flags = [f"--{part}_embed_dim {there.width}"] if wider else []
    flags += [f"--{part}_depth {there.depth}"] if deeper else []
    flags += [f"--{part}_num_heads {SIZES[model]['num_heads']}"] if wider and model else []
    patch_sizes = {here.patch_size}  # that the model may have once the flags above are given
    if model and flags:
        flags = [f"--model {model} (or {' '.join(flags)})"]
        patch_sizes.add(SIZES[model]["patch_size"])
    flags += [f"--patch_size {there.patch_size}"] if patch_sizes != {there.patch_size} else []
    flags += [f"--{part}_mlp_ratio {there.mlp_ratio:g}"] if there.mlp_ratio != here.mlp_ratio else []
    told = " ".join(flags)
    return f"{told} with the --{part}_num_heads of its training" if wider and not model else told
