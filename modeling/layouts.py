"""Convert parameter names of several libraries to ours, and infer the settings of a model from its parameters.

Legend: C channels, P patch side, h w patches, T class tokens, Q queries, D width.
"""

import math
import re

import torch

from modeling.files import WeightsError
from modeling.upernet import HEADS

State = dict[str, torch.Tensor]  # name -> parameter

# Names of MaskedAutoencoder, Classifier and Segmenter -> names in transformers' files: those of `vit` (ViT and ViTMAE)
# and, with other prefixes, of BEiT. Used in both directions.
TRANSFORMERS_NAMES = [
    ("encoder.cls_token", "vit.embeddings.cls_token"),
    ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
    ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "vit.encoder.layer."),
    ("encoder.norm.", "vit.layernorm."),
    ("fc_norm.", "vit.pooler.layernorm."),  # BEiT's
    ("head.", "classifier."),
    ("mask_token", "decoder.mask_token"),
    ("decoder.pos_embed", "decoder.decoder_pos_embed"),
    ("decoder.embed.", "decoder.decoder_embed."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    ("decoder.norm.", "decoder.decoder_norm."),
    ("decoder.pred.", "decoder.decoder_pred."),
    ("fpn.fpn1.", "backbone.fpn1."),
    ("fpn.fpn2.", "backbone.fpn2.0."),
    (".gamma_", ".lambda_"),  # BEiT's
    (".attn.relative_position_bias_table", ".attention.attention.relative_position_bias.relative_position_bias_table"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),  # after attn.proj, which has the same ending
]
QKV = ".attn.qkv."  # one parameter (3D, ...) here, three (D, ...) in transformers
TRANSFORMERS_QKV = (".attention.attention.query.", ".attention.attention.key.", ".attention.attention.value.")

# Names that transformers 5 uses in memory, or writes by mistake -> those of its files; its mlp.fc1 and fc2 equal ours.
TRANSFORMERS_5_NAMES = [
    ("vit.layers.", "vit.encoder.layer."),
    ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),  # the mistake; 4.x cannot read these names
    (".attention.q_proj.", TRANSFORMERS_QKV[0]),
    (".attention.k_proj.", TRANSFORMERS_QKV[1]),
    (".attention.v_proj.", TRANSFORMERS_QKV[2]),
    (".attention.o_proj.", ".attention.output.dense."),
    (".attention.attention.relative_position_bias.", ".relative_position_bias."),  # files have the prefix, added next
    (".relative_position_bias.", ".attention.attention.relative_position_bias."),
    ("backbone.fpn.fpn1.conv_transpose1.", "backbone.fpn1.0."),
    ("backbone.fpn.fpn1.normalization.", "backbone.fpn1.1."),
    ("backbone.fpn.fpn1.conv_transpose2.", "backbone.fpn1.3."),
    ("backbone.fpn.fpn2.", "backbone.fpn2.0."),
]

SEGMENTATION_HEADS = ("decode_head.", "auxiliary_head.")  # the same names here and in transformers
# Prefixes of everything after an encoder, except decoders
HEAD_PREFIXES = ("head.", "head_norm.", "fc_norm.", "attentive_pool.", "number_", "vit.pooler.", "fpn.")
HEAD_PREFIXES += (*SEGMENTATION_HEADS, "rpn.", "roi_heads.")
DECODER = ("mask_token", "decoder.", "target.")
OFFICIAL_DECODER = ("mask_token", "decoder_")  # in the official MAE and in older checkpoints of this project
BLOCKS = {"encoder": "encoder.blocks.", "decoder": "decoder.blocks."}
QUERIES = "attentive_pool.queries"  # (1, Q, D)
CLS_TOKEN = "encoder.cls_token"  # (1, T, D)
DETECTION_CLASSES = "roi_heads.box_predictor.cls_score.weight"  # (1 + classes, 4 * width)
PROJECTION = "encoder.patch_embed.proj.weight"  # (D, C, P, P)
# Options of an encoder -> endings of the parameters that they add to every block
EXTRAS = {
    "relative_position_bias": (".attn.relative_position_bias_table",),  # ((2h-1)*(2w-1) + 3, heads)
    "layer_scale": (".gamma_1", ".gamma_2"),
}


def rename(name: str, pairs: list[tuple[str, str]]) -> str:
    """Replace the first part of each pair by the second in a parameter's name, except for segmentation heads."""
    if name.startswith(SEGMENTATION_HEADS):
        return name
    for old, new in pairs:
        name = name.replace(old, new, 1)
    return name


def to_ours(state: State) -> tuple[str, State]:
    """Return the name of the layout of `state`, and its parameters under the names of this project's modules.

    Parameters without a counterpart here keep their names.

    Raises:
        WeightsError: if the layout is unknown or there is no encoder.
    """
    # Older versions of transformers and of BEiT store these indices, which follow from the grid.
    state = {name: value for name, value in state.items() if not name.endswith(".relative_position_index")}
    if any(name.startswith("encoder.blocks.") for name in state):
        return "this project", {re.sub("^decoder_", "decoder.", name): value for name, value in state.items()}
    if {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= state.keys():
        layout = f"a timm or MAE {'classifier' if 'head.weight' in state else 'encoder'}"
        layout = "the official MAE" if any(name.startswith(OFFICIAL_DECODER) for name in state) else layout
        others = OFFICIAL_DECODER + HEAD_PREFIXES
        state = {n if n.startswith(others) else f"encoder.{n}": t for n, t in state.items()}
        return layout, {re.sub("^decoder_", "decoder.", name): value for name, value in state.items()}
    if any(f"backbone.{part}embeddings.cls_token" in state for part in ("", "beit.")):
        layout, prefix = "transformers' UperNet", r"^backbone\.(beit\.)?(?!fpn)"
    elif "beit.embeddings.cls_token" in state:
        layout, prefix = "transformers' BEiT", r"^beit\."
    elif "vit.embeddings.cls_token" in state or "embeddings.cls_token" in state:
        kind = "ViTMAE" if "decoder.mask_token" in state else "ViT"
        kind = "Pixio" if state.get("embeddings.cls_token", torch.empty(1, 1)).shape[1] > 1 else kind
        layout = f"transformers' {kind}"
        prefix = "^" if "embeddings.cls_token" in state else r"^vit\."  # ViTModel and ViTMAEModel have no prefix
    else:
        raise WeightsError(
            f"weights without an encoder, or of an unknown layout ({', '.join(list(state)[:4])}, ...); expected those "
            "of this project, facebookresearch/mae, timm's ViT or transformers' ViT, ViTMAE, Pixio, BEiT and UperNet "
            "with a BEiT; give or rename them to one of these"
        )
    state = {re.sub(prefix, "vit.", name): value for name, value in state.items()}
    return layout, _from_transformers({rename(name, TRANSFORMERS_5_NAMES): value for name, value in state.items()})


def _from_transformers(state: State) -> State:
    """Rename the parameters in transformers' files to ours, the inverse of `export.to_transformers`."""
    pairs = [(theirs, ours) for ours, theirs in TRANSFORMERS_NAMES]
    query, others = TRANSFORMERS_QKV[0], TRANSFORMERS_QKV[1:]
    ours = {}
    for name, value in state.items():
        if query in name:  # if a part is missing, the shape is wrong, which is reported later
            parts = [state.get(name.replace(query, part)) for part in TRANSFORMERS_QKV]
            if name.endswith(".bias") and parts[1] is None:  # BEiT has no key bias, because the softmax cancels it
                parts[1] = torch.zeros_like(value)
            ours[rename(name.replace(query, QKV), pairs)] = torch.cat([part for part in parts if part is not None])
        elif not any(part in name for part in others):
            ours[rename(name, pairs)] = value
    return ours


def extra_names(state: State, option: str) -> list[str]:
    """Return the names of the encoder's parameters in `state`, under our names, that an option of EXTRAS adds."""
    return [name for name in state if name.startswith(BLOCKS["encoder"]) and name.endswith(EXTRAS[option])]


def model_settings(state: State) -> dict[str, object]:
    """Infer the settings of a model from its parameters under our names; the keys are named like the scripts' flags.

    There is `encoder_embed_dim` if there is an encoder, `decoder_embed_dim` and `decoder` if there is a decoder,
    `pooling` if there is a classification head, and `head` if there is a head for segmentation or detection.
    """
    settings = {option: bool(extra_names(state, option)) for option in EXTRAS}
    for part, blocks in BLOCKS.items():
        fc1 = state.get(f"{blocks}0.mlp.fc1.weight")
        if fc1 is not None and PROJECTION in state:
            indices = [name.removeprefix(blocks).partition(".")[0] for name in state if name.startswith(blocks)]
            depth = 1 + max(int(index) for index in indices if index.isdecimal())
            # Rounded up, because a model rounds width * mlp_ratio down.
            ratio = math.ceil(round(fc1.shape[0] / fc1.shape[1] * 1e4, 3)) / 1e4
            settings |= {f"{part}_embed_dim": fc1.shape[1], f"{part}_depth": depth, f"{part}_mlp_ratio": ratio}
    if "decoder_embed_dim" in settings:
        settings["decoder"] = "cross" if f"{BLOCKS['decoder']}0.attn.kv.weight" in state else "self"
        settings["decoder_inputs"] = "weighted" if "decoder.layer_weights" in state else "last"
    if PROJECTION in state:
        settings |= dict(patch_size=state[PROJECTION].shape[-1], input_channels=state[PROJECTION].shape[1])
        settings["num_cls_tokens"] = state[CLS_TOKEN].shape[1] if CLS_TOKEN in state else 1
    if "head.weight" in state:
        pooling = "mean" if "fc_norm.weight" in state else "cls"
        if QUERIES in state:
            pooling, settings["num_queries"] = "attentive", state[QUERIES].shape[1]
        settings |= dict(num_classes=len(state["head.weight"]), pooling=pooling)
        settings["probe"] = "head_norm.running_mean" in state  # exports have it folded into the head
    head = state.get("decode_head.classifier.weight")
    name = next((name for name, kind in HEADS.items() if kind.own_parameter in state), None)
    if head is not None and name:
        settings |= dict(num_classes=len(head), head=name)
        settings["head_width"] = head.shape[1] if HEADS[name].default_width else None
        settings["auxiliary"] = "auxiliary_head.classifier.weight" in state
    if DETECTION_CLASSES in state:
        masks = any(name.startswith("roi_heads.mask_head.") for name in state)
        settings |= dict(num_classes=len(state[DETECTION_CLASSES]) - 1, head="mask_rcnn" if masks else "faster_rcnn")
        settings["head_width"] = state[DETECTION_CLASSES].shape[1] // 4
    return settings
