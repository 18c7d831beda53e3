"""Tests of finding and reading weight files and the facts stored beside them, and of error messages."""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from random_modules import randomize
from safetensors.torch import load_file, save_file
from test_weights import (
    EXTRAS,
    IMAGES,
    NAMES,
    NOISE,
    SIZES_OF_SMALL,
    SMALL,
    THEIRS,
    new_autoencoder,
    new_classifier,
    new_encoder,
    new_segmenter,
    official,
    stock_segmenter,
    trained,
    trained_classifier,
)
from transformers import UperNetConfig, UperNetForSemanticSegmentation, ViTConfig, ViTModel

from modeling.classifier import Classifier
from modeling.export import export_autoencoder, export_classifier, export_encoder, export_segmenter
from modeling.files import Stored, WeightsError, read_state_dict, read_stored
from modeling.hub import find_weights
from modeling.mae import MaskedAutoencoder
from modeling.weights import load_weights, open_weights


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin", "model.safetensors", "pytorch_model.bin"])
def test_files_and_folders(name, tmp_path):
    state = new_encoder().state_dict()
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    paths = [tmp_path / name, str(tmp_path / name)] + ([tmp_path] if "model" in name else [])
    for path in paths:
        read = read_state_dict(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("safe", [True, False])
def test_shards_are_read_by_their_index(safe, tmp_path):
    """Read shards as transformers writes them, and .bin shards with the prefix of a wrapper."""
    model = ViTModel(ViTConfig(**SIZES_OF_SHARDED)).eval()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    if not safe:
        content = json.loads(index.read_text())
        for name in {*content["weight_map"].values()}:
            shard = {f"module.{key}": value for key, value in load_file(tmp_path / name).items()}
            torch.save(shard, tmp_path / name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
            (tmp_path / name).unlink()
        text = json.dumps(content["weight_map"]).replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": json.loads(text)}))
        index.unlink()
    shards = [*tmp_path.glob("*-of-*")]
    assert len(shards) > 2
    state, whole = read_state_dict(tmp_path), load_file(tmp_path / "whole" / "model.safetensors")
    assert state.keys() == whole.keys() and all(torch.equal(state[name], value) for name, value in whole.items())
    for path in (tmp_path, next(tmp_path.glob("*.index.json"))):
        weights = open_weights(path)
        assert (weights.sizes["num_heads"], weights.stored.grid) == (2, (4, 4))
    shards[0].unlink()
    with pytest.raises(WeightsError, match=f"{shards[0].name}: not readable .*; expected a whole file; copy it again"):
        read_state_dict(tmp_path)


SIZES_OF_SHARDED = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SIZES_OF_SHARDED |= dict(image_size=32, patch_size=8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not readable .*; expected an index of shards; copy it again"),
        ("[]", "expected an index of shards"),
        ('{"weight_map": {}}', "its weight_map names no files beside it"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "its weight_map names no files beside it"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "its weight_map names no files beside it"),
        ('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}', "no shard holds b, one of 1; copy the shards"),
    ],
)
def test_an_index_that_is_none(content, expected, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=expected):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["a.pth", "model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(WeightsError, match=r"a pointer of Git LFS, .*; get these with git lfs pull"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_wrappers_are_taken_off(prefix, wrapper, tmp_path):
    state = new_autoencoder().state_dict()
    wrapped = {prefix + name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in state.items()}
    torch.save({wrapper: wrapped, "epoch": 3} if wrapper else wrapped, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth").keys() == state.keys()


def test_a_training_checkpoint_of_the_official_code(tmp_path):
    state = official(new_autoencoder())
    args = argparse.Namespace(lr=1.5e-4, output_dir="here")
    torch.save({"model": state, "optimizer": {"step": 3}, "epoch": 7, "args": args}, tmp_path / "checkpoint-7.pth")
    assert read_state_dict(tmp_path / "checkpoint-7.pth").keys() == state.keys()


class Hostile:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped, tmp_path):
    file, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    content = {"model": new_encoder().state_dict(), "args": Hostile(trace)}
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"args": Hostile(trace)}, protocol=2))
    with pytest.raises(WeightsError, match=r"hostile\.pth: not read.*expected tensors.*safetensors"):
        read_state_dict(file)
    assert not trace.exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert trace.exists()  # the file does run code if it is loaded without protection


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_cut_file_is_refused_wherever_it_is_cut(name, tmp_path):
    file = tmp_path / name
    state = new_encoder().state_dict()
    save_file(state, file) if name == "a.safetensors" else torch.save(state, file)
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=f"{name}: ") as error:
            read_state_dict(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"model": {}}, [torch.ones(1)], {"a": 1}, {"model": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: holds no state dict"):
        read_state_dict(tmp_path / "a.pth")


def test_half_precision_files_load_into_float32(tmp_path):
    source, ours = randomize(new_encoder()), new_encoder()
    save_file({name: value.bfloat16() for name, value in source.state_dict().items()}, tmp_path / "a.safetensors")
    load_weights(ours, load_file(tmp_path / "a.safetensors"))
    assert ours.cls_token.dtype == torch.float32
    torch.testing.assert_close(ours.cls_token, source.cls_token, rtol=0.01, atol=0)


# Runs and folders


def write_checkpoint(folder: Path, model: MaskedAutoencoder) -> Path:
    """Write a checkpoint as a run leaves it, but without the optimizer, and return its folder."""
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": int(folder.name[5:])}))
    return folder


@pytest.fixture
def run_folder(tmp_path) -> tuple[Path, MaskedAutoencoder]:
    """Return the folder of a finished run and its model; the checkpoints hold other weights."""
    run, model = tmp_path / "run", randomize(new_autoencoder())
    statistics = dict(mean=[0.5] * 3, std=[0.5] * 3)
    export_encoder(model.encoder, run / "encoder", **statistics)
    export_autoencoder(model, run / "encoder" / "pretraining", **statistics)
    for step in (9, 10, 100):
        write_checkpoint(run / "checkpoints" / f"step_{step:08d}", new_autoencoder())
    (run / "args.json").write_text("{}")
    return run, model


def test_the_weights_of_a_run(run_folder):
    run, model = run_folder
    encoder, autoencoder = run / "encoder", run / "encoder" / "pretraining"
    checkpoints = sorted((run / "checkpoints").iterdir())
    for whole, given, found in [
        (True, run, autoencoder),
        (True, encoder, autoencoder),
        (False, run, encoder),
        (False, encoder, encoder),
        *((whole, path, path) for whole in (True, False) for path in (autoencoder, *checkpoints)),
        *((whole, path, path) for whole in (True, False) for path in run.rglob("*.safetensors")),
    ]:
        assert find_weights(given, whole=whole) == find_weights(str(given), whole=whole) == found
        read_state_dict(found)
    ours, features = new_autoencoder(), new_encoder()
    assert load_weights(ours, read_state_dict(find_weights(run, whole=True))).layout == "transformers' ViTMAE"
    assert torch.equal(ours(IMAGES, NOISE).prediction, model(IMAGES, NOISE).prediction)
    assert load_weights(features, read_state_dict(find_weights(run, whole=False))).layout == "a timm or MAE encoder"
    assert torch.equal(features(IMAGES), model.encoder(IMAGES))


def test_heads_and_grid_stand_beside_the_weights(tmp_path):
    """An export's configuration or the flags of a checkpoint's run give heads and grid; wrong heads are an error."""
    wide = randomize(new_autoencoder(img_size=(16, 64), patch_size=8))
    heads, decoder_heads = wide.encoder.num_heads, wide.decoder.num_heads
    run, statistics = tmp_path / "run", dict(mean=[0.5] * 3, std=[0.5] * 3)
    export_encoder(wide.encoder, run / "encoder", **statistics)
    export_autoencoder(wide, run / "encoder" / "pretraining", **statistics)
    checkpoint = write_checkpoint(run / "checkpoints" / "step_00000003", wide)
    flags = dict(img_size=[16, 64], patch_size=8, encoder_num_heads=heads, decoder_num_heads=decoder_heads)
    flags.update(statistics, mask_ratio=0.75, norm_pix_loss=True)
    (run / "args.json").write_text(json.dumps({"flags": flags}))
    assert read_stored(run / "encoder") == Stored((2, 8), heads, None, *statistics.values(), crop_ratio=0.875)
    whole = (run / "encoder" / "pretraining", checkpoint, checkpoint / "model.safetensors")
    known = Stored((2, 8), heads, decoder_heads, *statistics.values(), mask_ratio=0.75, target="normalized")
    assert [read_stored(path)._replace(crop_ratio=None) for path in whole] == [known] * 3
    assert read_stored(tmp_path) == read_stored(tmp_path / "mae.pth") == Stored()

    larger = new_autoencoder(img_size=(32, 64), patch_size=8)
    report = load_weights(larger, wide.state_dict(), stored=read_stored(checkpoint))
    assert report.resized == ("encoder.pos_embed 2x8 -> 4x8", "decoder.pos_embed 2x8 -> 4x8")
    with pytest.raises(WeightsError, match=f"encoder_num_heads is 16 instead of {heads}"):
        load_weights(wide, wide.state_dict(), stored=Stored(num_heads=16))
    with pytest.raises(WeightsError, match="set decoder_num_heads=16"):
        load_weights(wide, wide.state_dict(), stored=Stored(decoder_num_heads=16))


def test_a_run_that_is_not_finished(run_folder):
    run, _ = run_folder
    old, middle, new = sorted((run / "checkpoints").iterdir())
    (run / "encoder" / "pretraining" / "config.json").unlink()  # as if the export was killed: it writes this file last
    assert find_weights(run, whole=True) == new
    (run / "encoder" / "config.json").unlink()
    assert find_weights(run, whole=False) == new
    (new / "state.json").unlink()  # as if the checkpoint is half removed
    (run / "checkpoints" / ".saving_step_00000200").mkdir()
    shutil.copytree(old, run / "checkpoints" / "step_best")  # a copy that the user made
    assert find_weights(run, whole=True) == find_weights(run, whole=False) == middle
    (middle / "model.safetensors").unlink()
    assert find_weights(run, whole=True) == old
    load_weights(new_autoencoder(), read_state_dict(old))
    (old / "state.json").unlink()
    for whole in (True, False):
        with pytest.raises(WeightsError, match=r"run is a run without a checkpoint yet; wait"):
            find_weights(run, whole=whole)


@pytest.fixture
def classifier_run(tmp_path) -> tuple[Path, Classifier]:
    """Return the folder of a finished linear probe and its model; the checkpoints hold other weights."""
    run, model = tmp_path / "run", trained_classifier("cls", probe=True)
    export_classifier(model, run / "model", classes=NAMES, mean=[0.5] * 3, std=[0.25] * 3, crop_ratio=0.875)
    for step in (1, 2):
        write_checkpoint(run / "checkpoints" / f"step_{step:08d}", trained_classifier("cls", probe=True))
    flags = dict(img_size=[32, 32], patch_size=8, encoder_num_heads=2, mean=[0.5] * 3, std=[0.25] * 3)
    (run / "args.json").write_text(json.dumps({"flags": flags}))
    return run, model


@torch.inference_mode()
def test_the_weights_of_a_classifiers_run(classifier_run):
    run, model = classifier_run
    newest = run / "checkpoints" / "step_00000002"
    assert find_weights(run, whole=False) == find_weights(run / "model", whole=False) == run / "model"
    assert find_weights(newest, whole=False) == newest
    known = Stored((4, 4), 2, None, [0.5] * 3, [0.25] * 3)
    assert read_stored(newest) == read_stored(newest / "model.safetensors") == known
    for path in (run / "model", run / "model" / "model.safetensors"):
        assert read_stored(path) == known._replace(classes=NAMES, pooling="cls", crop_ratio=0.875)
    state = read_state_dict(run / "model")
    ours = new_classifier("cls")  # no probe: the export has merged the probe's BatchNorm into the head
    load_weights(ours, state, stored=read_stored(run / "model"))
    torch.testing.assert_close(ours(IMAGES), model(IMAGES), rtol=0, atol=1e-5)

    export_encoder(new_encoder(), run / "encoder", mean=[0.5] * 3, std=[0.5] * 3)
    assert find_weights(run, whole=False) == run / "encoder"
    (run / "encoder" / "config.json").unlink()
    (run / "model" / "config.json").unlink()  # as if the export is half written
    assert find_weights(run, whole=False) == newest


def test_the_averaged_weights_come_first(classifier_run):
    run, model = classifier_run
    newest = run / "checkpoints" / "step_00000002"
    average = {f"module.{name}": value for name, value in model.state_dict().items()}  # as averages are saved
    save_file(average, newest / "ema.safetensors")
    read = read_state_dict(newest)
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.items())
    assert read_stored(newest / "ema.safetensors") == read_stored(newest)
    plain = read_state_dict(find_weights(newest / "model.safetensors", whole=False))  # the file itself is still read
    assert not torch.equal(plain["head_norm.running_mean"], read["head_norm.running_mean"])
    (newest / "model.safetensors").unlink()
    assert find_weights(newest, whole=False) == newest


def test_the_weights_of_a_segmentation_run(tmp_path):
    run, model = tmp_path / "run", trained(new_segmenter(**EXTRAS))
    statistics = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    newest = write_checkpoint(run / "checkpoints" / "step_00000002", model)
    flags = dict(crop_size=32, patch_size=8, encoder_num_heads=2, layers=[0, 1, 2, 3], **statistics)
    flags["resize"] = [128, 32]
    (run / "args.json").write_text(json.dumps({"flags": flags, "classes": NAMES}))
    assert find_weights(run, whole=False) == newest
    known = Stored((4, 4), 2, None, *statistics.values(), NAMES, layers=[0, 1, 2, 3], resize=[128, 32])
    assert read_stored(newest) == known
    export_segmenter(model, run / "model", classes=NAMES, resize=(128, 32), **statistics)
    assert find_weights(run, whole=False) == run / "model" and read_stored(run / "model") == known
    for path in (newest, run / "model"):
        ours, encoder = new_segmenter(**EXTRAS), new_segmenter(img_size=64, **EXTRAS).encoder
        load_weights(ours, read_state_dict(path), stored=read_stored(path))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.state_dict().items())
        assert len(load_weights(encoder, read_state_dict(path), stored=read_stored(path)).resized) == 2


def test_what_timm_writes(tmp_path):
    theirs = timm.create_model("vit_base_patch16_224", num_classes=5, global_pool="avg", **SMALL)
    theirs.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    statistics = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    timm.models.save_for_hf(theirs, tmp_path, model_config=dict(label_names=NAMES))
    _, state, stored, settings, sizes, _ = open_weights(tmp_path)
    known = Stored((4, 4), 2, None, *statistics, NAMES, "mean", crop_ratio=0.9)
    assert stored == read_stored(tmp_path / "model.safetensors") == known
    assert (settings["num_classes"], settings["pooling"], sizes) == (5, "mean", SIZES_OF_SMALL)
    load_weights(new_classifier(), state, stored=stored)

    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["model_args"]  # older versions of timm write only the arguments given
    config["label_names"] = dict(enumerate(NAMES))
    file.write_text(json.dumps(config))
    assert read_stored(tmp_path) == known._replace(grid=None, num_heads=None)
    flat = config["pretrained_cfg"] | dict(architecture="vit_base_patch16_224")  # the form of the oldest versions
    file.write_text(json.dumps(flat))
    assert read_stored(tmp_path) == Stored(None, None, None, *statistics, crop_ratio=0.9)
    for damaged in ("[]", "{", '{"image_size": 32, "patch_size": 0}', '{"image_size": [32], "patch_size": 8}'):
        file.write_text(damaged)
        with pytest.raises(
            WeightsError, match=r"config.json: cannot be read \(.*\); expected the configuration of a ViT"
        ):
            read_stored(tmp_path)


@pytest.mark.parametrize(
    "stored, said",
    [
        (Stored(pooling="max"), "have a head on the max of normed tokens"),
        (Stored(pooling="mean"), "have a head on the mean of normed tokens"),
        (Stored(unsupported="the activation relu"), "were trained with the activation relu, which no model here has"),
    ],
)
def test_what_parameters_do_not_show_is_refused(stored, said):
    model = new_classifier("cls")
    with pytest.raises(WeightsError, match=said):
        load_weights(model, model.state_dict(), stored=stored)


def test_other_activations_and_poolings_are_seen(tmp_path):
    segmenter = stock_segmenter()
    backbone = segmenter.config.backbone_config
    other = UperNetConfig(backbone_config=backbone, hidden_size=12, num_labels=5, pool_scales=[2, 3, 4, 6])
    for model, unsupported in (
        (ViTModel(ViTConfig(**THEIRS, hidden_act="relu")), "the activation relu"),
        (ViTModel(ViTConfig(**THEIRS)), None),
        (UperNetForSemanticSegmentation(other), "the pyramid pooling 2 3 4 6"),
        (segmenter, None),
    ):
        model.save_pretrained(tmp_path)
        assert read_stored(tmp_path).unsupported == unsupported
    for change, pooling, unsupported in (
        (dict(global_pool="avgmax"), "avgmax", None),
        (dict(global_pool="avg"), "mean", None),
        (dict(global_pool="token", act_layer="relu"), "cls", "the activation relu"),
    ):
        config = dict(architecture="vit_base_patch16_224", model_args=SMALL | change, pretrained_cfg={})
        (tmp_path / "config.json").write_text(json.dumps(config))
        stored = read_stored(tmp_path)
        assert (stored.pooling, stored.unsupported) == (pooling, unsupported)


def test_an_encoder_folder_without_an_autoencoder(tmp_path):
    export_encoder(new_encoder(), tmp_path / "encoder", mean=[0.5] * 3, std=[0.5] * 3)
    for whole in (True, False):  # `load_weights` reports what is missing
        assert find_weights(tmp_path / "encoder", whole=whole) == tmp_path / "encoder"
    assert find_weights(tmp_path, whole=False) == tmp_path / "encoder"
    with pytest.raises(WeightsError, match="a folder without weights"):
        find_weights(tmp_path, whole=True)


@pytest.mark.parametrize("whole", [True, False])
def test_paths_that_lead_to_no_weights(whole, tmp_path):
    with pytest.raises(WeightsError, match=r"nothing: no such file or folder; expected .*; correct the path"):
        find_weights(tmp_path / "nothing", whole=whole)
    with pytest.raises(WeightsError, match=r"a folder without weights; expected .*model\.safetensors or"):
        find_weights(tmp_path, whole=whole)


def test_a_damaged_export_is_refused_with_its_name(run_folder):
    run, _ = run_folder
    file = run / "encoder" / "pretraining" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"pretraining/model\.safetensors: not readable"):
        read_state_dict(find_weights(run, whole=True))
