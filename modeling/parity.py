"""Compare an exported folder, as transformers and timm load it, with the original module."""

from collections.abc import Iterator
from pathlib import Path

import torch

from modeling.classifier import Classifier
from modeling.detector import Detector
from modeling.export import libraries_of, pixio_misfit, vit_mae_misfit
from modeling.mae import MaskedAutoencoder
from modeling.trained import open_trained
from modeling.upernet import Segmenter, resize
from modeling.weights import Model


@torch.no_grad()
def differences(folder: str | Path, model: Model) -> tuple[dict[str, float], list[str]]:
    """Return each library's difference from `model` on two random images, and notes on libraries that are left out.

    The difference is the largest absolute one of outputs, divided by the largest absolute output if that is above 1.
    Outputs are tokens of encoders, the loss of autoencoders under the same noise, pyramids of detectors, and otherwise
    logits. `model` must be on the CPU and in evaluation mode. Exceptions of the libraries are not caught.
    """
    import timm
    import transformers

    folder, encoder = Path(folder), getattr(model, "encoder", model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_channels, *encoder.img_size, generator=generator)
    has_head = isinstance(model, Classifier | Segmenter)
    whole = has_head or isinstance(model, Detector)
    expected = _outputs(model if whole else encoder, images)
    in_units = model.answer(expected) if getattr(model, "problem", None) == "numbers" else expected
    outputs, libraries = {}, libraries_of(model)  # library -> its outputs and the expected ones
    notes = list(_limits(model, libraries))
    if "transformers" in libraries and isinstance(model, Segmenter):
        theirs = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder)
        logits = resize(theirs(images).logits, images.shape[2:])
        outputs[f"transformers {type(theirs).__name__}"] = logits, expected
    elif "transformers" in libraries:
        name = "AutoModelForImageClassification" if has_head else "AutoModel"
        theirs = getattr(transformers, name).from_pretrained(folder)(images)
        outputs[f"transformers {name}"] = theirs.logits if has_head else theirs.last_hidden_state, in_units
    if "timm" in libraries:
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        outputs["timm"] = theirs(images) if has_head else theirs.forward_features(images), in_units
    if (folder / "encoder").is_dir() and libraries_of(encoder):
        theirs = transformers.AutoModel.from_pretrained(folder / "encoder")(images)
        outputs["transformers AutoModel, encoder/"] = theirs.last_hidden_state, encoder(images)
    outputs["this project"] = _outputs(open_trained(folder, whole=False).model, images), expected
    if isinstance(model, MaskedAutoencoder):
        noise = torch.rand(2, encoder.grid[0] * encoder.grid[1], generator=generator)
        shape = 2, noise.shape[1], model.target.width
        features = torch.randn(shape, generator=generator) if model.target.name == "teacher" else None
        loss = model(images, noise, features=features).loss
        if reason := vit_mae_misfit(model):
            notes.append(f"transformers' ViTMAE {reason}, so pretraining/ is for this project alone.")
        else:
            theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder / "pretraining")
            outputs["transformers ViTMAEForPreTraining"] = theirs(images, noise=noise).loss, loss
        theirs = open_trained(folder).model(images, noise, features=features)
        outputs["this project, pretraining/"] = theirs.loss, loss
    distances = {
        library: ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1)).nan_to_num(torch.inf, torch.inf).item()
        for library, (theirs, ours) in outputs.items()
    }
    return distances, notes


def _outputs(model: Model, images: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a model; the maps of a detector are joined to one tensor (B, values)."""
    outputs = model(images)
    return torch.cat([part.flatten(1) for part in outputs], dim=1) if isinstance(outputs, tuple) else outputs


def _limits(model: Model, libraries: list[str]) -> Iterator[str]:
    """Yield sentences that say which libraries do not load the folder of a model, and why."""
    encoder = getattr(model, "encoder", model)
    if isinstance(model, Detector):
        yield "transformers has no ViTDet with region-based heads, so this project alone loads the model."
    elif encoder.num_cls_tokens > 1 and isinstance(model, Classifier | Segmenter):
        yield "No other library has a head on an encoder of several class tokens, so this project alone loads it."
    elif encoder.num_cls_tokens > 1:
        yield "timm has no encoders with several class tokens."
        if reason := pixio_misfit(encoder):
            yield f"transformers' PixioModel {reason}, so the folder is for this project alone."
    elif getattr(model, "pooling", None) == "attentive":
        yield "No other library has attentive pooling, so this project alone loads the whole model."
    elif libraries == ["transformers"]:
        yield "timm has no segmentation models, so the folder is for transformers and this project."
