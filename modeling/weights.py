"""Reading weights: files and folders of several libraries -> our modules, with a report of every parameter.

Nothing is skipped in silence: what is not planned for is an error that lists all of it. Legend: as in mae.py.
"""

import argparse
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling.mae import MaskedAutoencoder
from modeling.position import resize_positions
from modeling.vit import VisionTransformer

# Names of MaskedAutoencoder and of transformers' files (those of `vit`, ViTMAE and ViT alike); read both ways.
TRANSFORMERS_NAMES = [
    ("encoder.cls_token", "vit.embeddings.cls_token"),
    ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
    ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "vit.encoder.layer."),
    ("encoder.norm.", "vit.layernorm."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_embed.", "decoder.decoder_embed."),
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
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
]

HEADS = ("head.", "fc_norm.", "classifier.", "vit.pooler.")  # what other libraries put on top of an encoder
DECODER = ("mask_token", "decoder_")
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel and torch.compile


class WeightsError(ValueError):
    """Weights that cannot be read, or that do not fit; the message has the value, what was expected, the remedy."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, in MaskedAutoencoder's names; `str` is one line for the console."""

    layout: str
    loaded: int  # parameters, resized ones included
    missing: tuple[str, ...]  # in the model only
    ignored: tuple[str, ...]  # in the checkpoint only
    resized: tuple[str, ...]  # "name 14x14 -> 32x32"

    def __str__(self) -> str:
        parts = sorted({name.removeprefix("vit.").partition(".")[0] for name in self.ignored})
        ignored = f"{len(self.ignored)} ignored" + (f" ({', '.join(parts)})" if parts else "")
        resized = f"resized: {', '.join(self.resized) or 'none'}"
        return f"weights of {self.layout}: {self.loaded} loaded, {len(self.missing)} missing, {ignored}, {resized}"


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The parameters in a .safetensors or PyTorch file, or in a folder that holds one, under the names they have there.

    Takes them out of {'model': ...} or {'state_dict': ...} and strips the prefixes of wrappers. Nothing in the file is
    executed. Raises WeightsError for a path that is not there, a file that is cut, and one that holds other objects.
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise WeightsError(f"{path}: a folder without weights; expected {' or '.join(names)}; give the file itself")
        path = file
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected weights (.safetensors, .pth, .pt, .bin); correct the path")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the official code stores its flags as one
                state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, as it is damaged or holds objects that run code when they are read; expected tensors; "
            "if you trust its source, save its state dict as .safetensors"
        ) from error
    except Exception as error:  # what a cut file raises depends on where it is cut
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path}: not readable ({reason}); expected a whole file; copy it again") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no state dict; expected names and tensors, maybe under 'model'; save those")
    return {WRAPPERS.sub("", name): value for name, value in state.items()}


def rename(name: str, pairs: list[tuple[str, str]]) -> str:
    """`name` with the first member of each pair replaced by the second, in the order given."""
    for old, new in pairs:
        name = name.replace(old, new, 1)
    return name


def to_ours(state: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    """Parameters of any known layout -> the layout's name, and the parameters under MaskedAutoencoder's names.

    What has no counterpart, such as a head, keeps its name. Raises WeightsError for a layout that is not known.
    """
    if any(name.startswith("encoder.blocks.") for name in state):
        return "this project", dict(state)
    if {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= state.keys():
        layout = "the official MAE" if any(name.startswith(DECODER) for name in state) else "a timm or MAE encoder"
        return layout, {n if n.startswith(DECODER + HEADS) else f"encoder.{n}": t for n, t in state.items()}
    if "embeddings.cls_token" in state:  # ViTModel and ViTMAEModel, which are the `vit` of the other classes
        state = {f"vit.{name}": value for name, value in state.items()}
    if "vit.embeddings.cls_token" in state:
        layout = "transformers' ViTMAE" if "decoder.mask_token" in state else "transformers' ViT"
        state = {rename(name, TRANSFORMERS_5_NAMES): value for name, value in state.items()}
        return layout, _from_transformers(state)
    raise WeightsError(
        f"weights of an unknown layout ({', '.join(list(state)[:4])}, ...); expected those of this project, "
        "facebookresearch/mae, timm's ViT or transformers' ViT and ViTMAE; rename them to one of these"
    )


def _from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of transformers' files -> ours; the inverse of `export.to_transformers`."""
    back = [(theirs, ours) for ours, theirs in TRANSFORMERS_NAMES]
    query, others = TRANSFORMERS_QKV[0], TRANSFORMERS_QKV[1:]
    ours = {}
    for name, value in state.items():
        if query in name:  # a part that is absent, as the key bias of some models, shows as a wrong shape
            parts = [name.replace(query, part) for part in TRANSFORMERS_QKV]
            ours[rename(name.replace(query, QKV), back)] = torch.cat([state[part] for part in parts if part in state])
        elif not any(part in name for part in others):
            ours[rename(name, back)] = value
    return ours


def load_weights(
    model: MaskedAutoencoder | VisionTransformer,
    state: dict[str, torch.Tensor],
    *,
    old_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Copy the parameters of any known layout into `model`, and say what became of each.

    Heads are left out, and for a VisionTransformer the decoder too. Positions of another grid are resized; `old_grid`
    (h, w) is theirs, by default the model's own where the number of patches agrees, otherwise a square. Raises
    WeightsError, before anything is copied, that lists every parameter that is missing, unexpected or of another shape.
    """
    layout, state = to_ours(state)
    encoder_only = isinstance(model, VisionTransformer)
    grid = model.grid if encoder_only else model.encoder.grid
    wanted = {f"encoder.{n}" if encoder_only else n: value for n, value in model.state_dict().items()}

    resized, problems = [], []
    for name in ("encoder.pos_embed", "decoder_pos_embed"):
        if name in wanted and name in state and state[name].ndim == 3:
            count = state[name].shape[1] - 1
            side = math.isqrt(count)
            grid_there = old_grid or (grid if count == math.prod(grid) else (side, side))
            if math.prod(grid_there) != count:
                problems.append(f"{name} has {count} positions, which are no grid of {grid_there} (give old_grid)")
            elif grid_there != grid:
                state[name] = resize_positions(state[name], grid_there, grid)
                resized.append(f"{name} {grid_there[0]}x{grid_there[1]} -> {grid[0]}x{grid[1]}")

    planned = HEADS + DECODER if encoder_only else HEADS
    extra = state.keys() - wanted.keys()
    ignored = sorted(name for name in extra if name.startswith(planned))
    problems += [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unexpected" for name in sorted(extra.difference(ignored))]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise WeightsError(f"weights of {layout} do not fit: {'; '.join(problems)}; check the sizes of the model")
    model.load_state_dict({name.removeprefix("encoder.") if encoder_only else name: state[name] for name in wanted})
    return LoadReport(layout, len(wanted), (), tuple(ignored), tuple(resized))
