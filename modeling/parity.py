"""Whether an exported folder gives in stock transformers and stock timm what our own module gives."""

from pathlib import Path

import torch

from modeling.classifier import Classifier
from modeling.mae import MaskedAutoencoder
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer


@torch.no_grad()
def differences(
    folder: str | Path, model: MaskedAutoencoder | Classifier | Segmenter | VisionTransformer
) -> tuple[dict[str, float], list[str]]:
    """How far each library that loads `folder` is from `model` on two random images, and what a library does not allow,
    in a sentence each.

    A distance is the largest absolute difference of outputs, divided by the largest absolute output where that is above
    1. The outputs are tokens of an encoder, the loss of an autoencoder under the same noise, logits of others. `model`
    is in evaluation mode, on the CPU. Raises what a library raises where it cannot load the folder.
    """
    import timm
    import transformers

    folder, found, notes = Path(folder), {}, []
    encoder = model if isinstance(model, VisionTransformer) else model.encoder
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_channels, *encoder.img_size, generator=generator)

    def compare(library: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        distance = (theirs - ours).abs().max() / ours.abs().max().clamp(min=1)
        found[library] = distance.nan_to_num(torch.inf).item()

    def load(name: str, place: Path = folder) -> torch.nn.Module:
        return getattr(transformers, name).from_pretrained(place).eval()

    if isinstance(model, Segmenter):
        name = "UperNetForSemanticSegmentation"
        logits = model(images)
        compare(f"transformers {name}", load(name)(images).logits, logits)
        compare("this project", open_trained(folder).model(images), logits)
        return found, ["timm has no UperNet, so the folder is for transformers and this project."]
    if isinstance(model, Classifier):
        name, expected = "AutoModelForImageClassification", model(images)
        compare(f"transformers {name}", load(name)(images).logits, expected)
    else:
        expected = encoder(images)
        compare("transformers AutoModel", load("AutoModel")(images).last_hidden_state, expected)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    compare("timm", theirs(images) if isinstance(model, Classifier) else theirs.forward_features(images), expected)
    compare("this project", open_trained(folder, whole=False).model(images), expected)
    if isinstance(model, MaskedAutoencoder):
        noise = torch.rand(2, encoder.grid[0] * encoder.grid[1], generator=generator)
        loss, name = model(images, noise).loss, "ViTMAEForPreTraining"
        if encoder.img_size[0] == encoder.img_size[1]:
            compare(f"transformers {name}", load(name, folder / "pretraining")(images, noise=noise).loss, loss)
        else:
            notes.append(f"transformers' {name} takes square images only, so pretraining/ is for this project alone.")
        compare("this project, pretraining/", open_trained(folder).model(images, noise).loss, loss)
    return found, notes
