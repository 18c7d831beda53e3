"""Tests of weights on the Hub, downloaded over HTTP from a Hub on this machine."""

import hub as server
import pytest
import torch
from random_modules import build_autoencoder
from safetensors.torch import save_file

from modeling.export import export_autoencoder, export_encoder
from modeling.files import WeightsError
from modeling.hub import find_weights
from modeling.mae import MaskedAutoencoder
from modeling.trained import open_trained
from modeling.vit import VisionTransformer
from modeling.weights import open_weights

STATISTICS = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])


@pytest.fixture
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()


@pytest.fixture
def folder(encoder, tmp_path):
    """Export a pre-trained model as push_to_hub.py does; return the folder."""
    folder = tmp_path / "published"
    export_encoder(encoder, folder, **STATISTICS)
    model = build_autoencoder(encoder, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    export_autoencoder(model, folder / "pretraining", **STATISTICS)
    (folder / "loss.png").write_bytes(b"a picture")
    return folder


def fetched(hub) -> list[str]:
    """Return the files that were downloaded since the last call."""
    names = [path.partition("/resolve/")[2].partition("/")[2] for verb, path in hub.requests if verb == "GET"]
    hub.requests.clear()
    return sorted(name for name in names if name)


def test_only_what_is_read_is_downloaded_and_once(hub, folder, encoder, tmp_path, monkeypatch):
    hub.enter(monkeypatch, tmp_path)
    hub.add("owner/mae", folder)
    weights = open_weights("hf:owner/mae")
    assert fetched(hub) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert all(torch.equal(weights.state[name], value) for name, value in encoder.state_dict().items())
    assert (weights.stored.mean, weights.stored.num_heads) == (STATISTICS["mean"], 2)
    trained = open_trained("hf:owner/mae")
    assert fetched(hub) == ["pretraining/config.json", "pretraining/model.safetensors"]  # the third is cached
    assert isinstance(trained.model, MaskedAutoencoder)
    assert isinstance(open_trained("hf:owner/mae", whole=False).model, VisionTransformer) and fetched(hub) == []


def test_a_revision(hub, folder, tmp_path, monkeypatch):
    hub.enter(monkeypatch, tmp_path)
    first = hub.add("owner/mae", folder)
    (folder / "model.safetensors").unlink()
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    hub.add("owner/mae", folder)
    assert "cls_token" in open_weights(f"hf:owner/mae@{first}").state
    with pytest.raises(WeightsError, match="unknown layout"):
        open_weights("hf:owner/mae@main")


def test_without_a_network_the_cache_is_read(hub, folder, tmp_path, monkeypatch):
    hub.enter(monkeypatch, tmp_path)
    hub.add("owner/mae", folder)
    before = find_weights("hf:owner/mae", whole=True)
    assert (before.name, (before / "model.safetensors").is_file()) == ("pretraining", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    assert find_weights("hf:owner/mae", whole=True) == before
    with pytest.raises(WeightsError, match=r"hf:owner/other: could not be downloaded \(.*ConnectError"):
        find_weights("hf:owner/other", whole=True)


@pytest.mark.parametrize(
    "name, token, said",
    [
        ("hf:owner/mae/model", server.VALID, "not a repository name; expected hf:OWNER"),
        ("hf:owner/mae@nothing", server.VALID, "has no revision nothing; expected a branch, tag or commit"),
        ("hf:owner/nothing", server.VALID, "no such model repository"),
        ("hf:owner/hidden", None, "a private or gated one; correct the name, or ask for access"),
        ("hf:owner/mae", server.EXPIRED, "token has not expired"),
        ("hf:owner/mae", server.UNKNOWN, "could not be downloaded"),
        ("hf:owner/empty", server.VALID, "a repository without weights that can be read here"),
    ],
)
def test_names_that_lead_nowhere(name, token, said, hub, folder, tmp_path, monkeypatch):
    hub.enter(monkeypatch, tmp_path, token=token)
    hub.add("owner/mae", folder)
    hub.add("owner/hidden", folder, private=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "mae.pth").write_bytes(b"of another name")
    hub.add("owner/empty", tmp_path / "empty")
    with pytest.raises(WeightsError) as refusal:
        find_weights(name, whole=False)
    text = str(refusal.value)
    assert text.startswith(f"{name}: ") and said in text and "\n" not in text
