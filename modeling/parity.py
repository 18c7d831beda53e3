"""Compare an exported folder, as transformers and timm load it, with the module it was made of."""

from pathlib import Path

import torch

from modeling.classifier import Classifier
from modeling.mae import MaskedAutoencoder
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer
from modeling.weights import Model


@torch.no_grad()
def differences(folder: str | Path, model: Model) -> tuple[dict[str, float], list[str]]:
    """Return each library's difference from `model` on two random images, and notes on libraries that are left out.

    The difference is the largest absolute one of outputs, divided by the largest absolute output if that is above 1.
    Outputs are an encoder's tokens, an autoencoder's loss under the same noise, otherwise logits. `model` is on the
    CPU, in evaluation mode. Errors of the libraries are raised as they are.
    """
    import timm
    import transformers

    folder, distances, notes = Path(folder), {}, []
    encoder = model if isinstance(model, VisionTransformer) else model.encoder
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_channels, *encoder.img_size, generator=generator)

    def compare(library: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        distance = (theirs - ours).abs().max() / ours.abs().max().clamp(min=1)
        distances[library] = distance.nan_to_num(torch.inf).item()

    def load(name: str, path: Path = folder) -> torch.nn.Module:
        return getattr(transformers, name).from_pretrained(path).eval()

    if isinstance(model, Segmenter):
        name, logits = "UperNetForSemanticSegmentation", model(images)
        compare(f"transformers {name}", load(name)(images).logits, logits)
        compare("this project", open_trained(folder).model(images), logits)
        return distances, ["timm has no UperNet, so the folder is for transformers and this project."]
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
    return distances, notes
