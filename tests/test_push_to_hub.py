"""Tests of push_to_hub.py: from a run to the Hub and back, and input that it refuses."""

import json
import os
import re
import shlex
import shutil

import pytest
import timm
import torch
from conftest import TINY, log_of, run, run_code, run_each
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_house import SCRIPTS, commands
from transformers import AutoModel, ViTMAEForPreTraining

import push_to_hub
from modeling.export import to_official
from modeling.trained import open_trained
from training.files import alone_at
from training.launch import RunError

MORE = ["--num_workers", 0, "--mixed_precision", "no", "--log_every", 1, "--learning_rate", 1e-3]
CLASSIFIER = [*MORE, "--per_gpu_batch_size", 8, "--max_steps", 3, "--ema_decay", 0.9]
SEGMENTER = [*MORE, "--crop_size", 32, "--global_batch_size", 4, "--head_width", 8, "--max_steps", 3]
SEGMENTER += ["--resize", 128, 40, "--layers", 0, 1, 2, 3]


@pytest.fixture(scope="session")
def runs(image_folder, scenes, tmp_path_factory):
    """Return a folder with a finished run of each script."""
    cwd = tmp_path_factory.mktemp("runs")
    work = cwd / "work_dir"
    data = ["--path_to_data", image_folder]
    deeper = ["--encoder_depth", 4]
    run("pretrain_mae.py", *TINY, *deeper, *data, "--max_steps", 10, "--save_checkpoint_steps", 4, cwd=cwd)
    weights = work / "pretrain_mae"
    run("finetune_classifier.py", *CLASSIFIER, *data, "--path_to_pretrained_mae_weights", weights, cwd=cwd)
    data = ["--path_to_data", scenes]
    run("finetune_segmentation.py", *SEGMENTER, *data, "--path_to_backbone_checkpoint", weights, cwd=cwd)
    return work


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """Write photo.jpg to a new working directory, and return its path."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").crop((20, 40, 220, 190)).save("photo.jpg")
    return tmp_path / "photo.jpg"


def same_weights(model, other) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def push(*words) -> None:
    push_to_hub.main([str(word) for word in words])


def errors_of(*words, capsys) -> str:
    """Return the error messages of bad input, which ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        push(*words)
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and stderr.startswith("error: ") and stderr.count("\n") == stderr.count("error: ")
    return stderr


def run_card(text: str, hub, photo, image_folder, scenes) -> tuple[int, int]:
    """Run the Python code and the commands of a card's "Use" section on images; return the number of each."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, {})
    lines = text.partition("```bash\n")[2].partition("```")[0].splitlines()
    for line in lines:
        python, script, *words = shlex.split(line)
        assert python == "python"
        words = [{"IMAGES": image_folder, "DATA": scenes}.get(word, word) for word in words]
        if script == "predict.py":
            words += [] if "--features" in words else ["--output", "predictions"]
        else:
            words += SEGMENTER if "segmentation" in script else CLASSIFIER
        run(script, *words, cwd=photo.parent, **hub.variables(photo.parent))
        for folder in ("predictions", "work_dir/finetune_classifier", "work_dir/finetune_segmentation"):
            shutil.rmtree(photo.parent / folder, ignore_errors=True)
    return len(blocks), len(lines)


def test_training_uploads_what_all_libraries_load(hub, image_folder, photo, monkeypatch):
    """Training uploads while it runs and at its end, and the libraries load the model from the Hub."""
    cwd, variables = photo.parent, hub.variables(photo.parent)
    flags = [*TINY, "--path_to_data", image_folder, "--epochs", 2, "--hub_every", 1]
    flags += ["--push_to_hub", "--hub_private", "--hub_model_id", "owner/mae"]
    stdout = run("pretrain_mae.py", *flags, cwd=cwd, **variables).stdout
    assert "uploading step 5 " in stdout and "uploaded the finished run" in stdout
    assert (cwd / "work_dir" / "pretrain_mae" / "checkpoints" / "step_00000005").is_dir()  # saved only for the upload
    messages = list(hub.repositories["owner/mae"].messages.values())
    assert messages[-1] == "Weights of step 10" and hub.repositories["owner/mae"].private
    assert set(messages[1:]) <= {"Weights of step 5", "Weights of step 10"}

    mae = open_trained(cwd / "work_dir" / "pretrain_mae").model
    hub.enter(monkeypatch, cwd)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    autoencoder = ViTMAEForPreTraining.from_pretrained("owner/mae", subfolder="pretraining")
    with torch.inference_mode():
        features, loss = mae.encoder(images), mae(images, noise).loss
        for output, expected in (
            (AutoModel.from_pretrained("owner/mae")(images).last_hidden_state, features),
            (timm.create_model("hf-hub:owner/mae", pretrained=True).eval().forward_features(images), features),
            (autoencoder(images, noise=noise).loss, loss),
        ):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
    assert same_weights(open_trained("hf:owner/mae").model, mae)


def test_cards_of_the_three_scripts(runs, hub, image_folder, scenes, photo, monkeypatch):
    hub.enter(monkeypatch, photo.parent)
    for name, metric in (
        ("pretrain_mae", "masked_psnr"),
        ("finetune_classifier", "top1"),
        ("finetune_segmentation", "mean_iou"),
    ):
        words = ["--repo_id", f"owner/{name}", "--license", "apache-2.0", "--datasets", "owner/images"]
        push(runs / name, "--output", name, *words)
        assert same_weights(open_trained(f"hf:owner/{name}").model, open_trained(runs / name).model)
        files = hub.files(f"owner/{name}")
        metrics, flags = (json.loads((runs / name / f"{part}.json").read_text()) for part in ("metrics", "args"))
        text = files["README.md"].decode()
        card = ModelCard(text)
        values = [result.metric_value for result in card.data.eval_results]
        assert round(metrics[metric], 4) in values and card.data.license == "apache-2.0"
        assert card.data.datasets == ["owner/images"]
        assert flags["command"] in text and f"{flags['data']['images']:,} images" in text
        assert all(f"| {flag} |" in text for flag, value in flags["flags"].items() if value is not None)
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert files[picture].startswith(b"\x89PNG")
        assert "loss.png" in files and len(files) >= 7
        for script, words in commands(text):
            errors = SCRIPTS[script].parse_args(words)[1]
            assert not errors, words
        counts = run_card(text, hub, photo, image_folder, scenes)
        assert counts == {"pretrain_mae": (3, 4), "finetune_classifier": (2, 1)}.get(name, (1, 1))


def test_card_of_a_grey_model(hub, image_folder, scenes, photo, monkeypatch):
    hub.enter(monkeypatch, photo.parent)
    flags = [*TINY, "--encoder_depth", 4, "--path_to_data", image_folder, "--input_channels", 1, "--max_steps", 1]
    run("pretrain_mae.py", *flags, cwd=photo.parent)
    push("work_dir/pretrain_mae")
    text = (photo.parent / "work_dir" / "pretrain_mae" / "hub" / "README.md").read_text()
    assert run_card(text, hub, photo, image_folder, scenes) == (3, 4)


def test_card_of_a_branch(runs, hub, photo, monkeypatch):
    hub.enter(monkeypatch, photo.parent)
    push(runs / "pretrain_mae", "--output", "out", "--repo_id", "owner/mae", "--revision", "draft")
    text = hub.files("owner/mae", "draft")["README.md"].decode()
    assert text.count('"owner/mae", revision="draft"') == 4 and text.count("hf-hub:owner/mae@draft") == 1
    assert text.count("hf:owner/mae@draft") == 4
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {})


def test_checkpoint_flag(runs, tmp_path, capsys):
    work = shutil.copytree(runs, tmp_path / "work")
    for name, checkpoint, place, step in (
        ("pretrain_mae", "last", "encoder/pretraining", 10),
        ("pretrain_mae", "step_00000004", "checkpoints/step_00000004", 4),
        ("finetune_classifier", "best", "best", None),
        ("finetune_classifier", "last", "model", 3),
    ):
        push(work / name, "--checkpoint", checkpoint, "--output", tmp_path / "out")
        assert same_weights(open_trained(tmp_path / "out").model, open_trained(work / name / place).model)
        text = (tmp_path / "out" / "README.md").read_text()
        if step is None:
            step = json.loads((work / name / "metrics.json").read_text())["best_step"]
        assert f"The weights are those after step {step} of {'10' if name == 'pretrain_mae' else '3'}." in text
    capsys.readouterr()

    (work / "pretrain_mae" / "metrics.json").unlink()  # an unfinished run
    shutil.rmtree(work / "pretrain_mae" / "checkpoints" / "step_00000010")
    push(work / "pretrain_mae")
    assert "the run is not finished: these are the weights after step 8" in capsys.readouterr().out
    folder, checkpoint = work / "pretrain_mae" / "hub", work / "pretrain_mae" / "checkpoints" / "step_00000008"
    assert "**The run is not finished:** the weights are those after step 8 " in (folder / "README.md").read_text()
    assert same_weights(open_trained(folder).model, open_trained(checkpoint).model)
    files = ".mae-accelerate.json README.md config.json loss.png model.safetensors preprocessor_config.json pretraining"
    assert sorted(path.name for path in folder.iterdir()) == [*files.split(), "transformers_model.safetensors"]


def test_weights_of_other_projects(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mae = open_trained(runs / "pretrain_mae").model
    classifier = open_trained(runs / "finetune_classifier").model
    torch.save({"model": to_official(mae.state_dict())}, "mae.pth")
    torch.save({"model": to_official(classifier.state_dict())}, "finetuned.pth")
    heads = ["--encoder_num_heads", 2]
    push("mae.pth", "--output", "mae", *heads, "--decoder_num_heads", 2, "--mean", 0.1, 0.2, 0.3, "--std", 1, 1, 1)
    push("finetuned.pth", "--output", "classifier", *heads)
    stdout = capsys.readouterr().out
    assert "read as the official MAE" in stdout and "assumed, as the weights do not say: unnamed classes" in stdout
    for folder, model in (("mae", mae), ("classifier", classifier)):
        again = open_trained(folder)
        assert same_weights(again.model, model) and timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert "model-index" not in ModelCard.load(f"{folder}/README.md").data.to_dict()
    assert open_trained("mae").mean == [0.1, 0.2, 0.3]
    official = to_official(open_trained("mae").model.state_dict())
    stored = torch.load("mae.pth", weights_only=True)["model"]
    assert official.keys() == stored.keys() and all(torch.equal(official[name], stored[name]) for name in stored)


def test_bad_input_is_an_error_before_anything_is_written(runs, tmp_path, capsys):
    work = shutil.copytree(runs, tmp_path / "work")
    mae, empty, out = work / "pretrain_mae", tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    state = to_official(open_trained(mae).model.state_dict())
    torch.save(state, tmp_path / "fits.pth")
    torch.save(state | {"blocks.1.norm1.bias": torch.ones(5)}, tmp_path / "shapes.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    started = shutil.copytree(mae, tmp_path / "started")
    for part in ("checkpoints", "encoder"):
        shutil.rmtree(started / part)
    (started / "metrics.json").unlink()
    for words, expected in (
        ([empty, "--output", out], "a folder without weights; expected"),
        ([tmp_path / "nothing", "--output", out], "no such file or folder"),
        ([started], "has no such checkpoint; give last, best or one of: none yet"),
        ([mae, "--checkpoint", "best"], "has no best/; expected a validated fine-tuning run; give last"),
        ([mae, "--checkpoint", "step_1"], "has no such checkpoint; give last, best or one of: step_00000004, step_"),
        ([mae / "encoder"], "--output is missing"),
        ([tmp_path / "typo"], "typo: no such file or folder; expected a run or weights"),
        ([mae / "encoder", "--output", out, "--checkpoint", "best"], "--checkpoint best needs a run, but"),
        ([mae, "--output", tmp_path / "taken"], "exists and was not written by push_to_hub.py"),
        ([tmp_path / "shapes.pth", "--output", out, "--encoder_num_heads", 2], "(5,) instead of (32,)"),
        ([tmp_path / "cut.safetensors", "--output", out], "not readable"),
        ([mae, "--repo_id", "no owner"], "--repo_id 'no owner' is not a valid repository name"),
        ([mae, "--repo_id", "mae"], "expected OWNER/NAME"),
        ([mae, "--private", "--revision", "y"], "--revision needs an upload; add --repo_id OWNER/NAME"),
        (["--repo_id", "owner/x"], "the following arguments are required: RUN_FOLDER"),
        ([mae, "--mean", 0.5, 0.5], "its mean is [0.485, 0.456, 0.406], but [0.5, 0.5] was given"),
        ([mae, "--encoder_num_heads", 4], "its num_heads is 2, but 4 was given; leave out this value"),
        (
            [tmp_path / "fits.pth", "--output", out, "--encoder_num_heads", 2, "--mean", 0.5, 0.5],
            "--mean has 2 values for 3 channels; give one per channel",
        ),
        ([mae, "--licence", "mit"], "--licence is not a flag of"),
    ):
        assert expected in errors_of(*words, capsys=capsys), words
    errors = errors_of(mae, "--repo_id", "a b", "--bogus", "--checkpoint", "nothing", capsys=capsys)
    assert errors.count("error: ") == 3
    assert not out.exists() and not (mae / "hub").exists() and (tmp_path / "taken" / "mine.txt").exists()


class Hostile:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_code_in_weights_never_runs(runs, image_folder, scenes, photo):
    """Code in a file, in a folder or in the checkpoint to resume from is an error."""
    cwd, folder, file = photo.parent, photo.parent / "weights", photo.parent / "hostile.pth"
    folder.mkdir()
    for path in (file, folder / "pytorch_model.bin"):
        torch.save({"model": Hostile(cwd / "trace")}, path)
    data = ["--path_to_data", image_folder]
    for script, *flags in (
        ("push_to_hub.py", file, "--output", "out"),
        ("predict.py", file, photo),
        ("pretrain_mae.py", *TINY, *data, "--max_steps", 1, "--init_from", file),
        ("finetune_classifier.py", *CLASSIFIER, *data, "--path_to_pretrained_mae_weights", folder),
        ("finetune_segmentation.py", *SEGMENTER, "--path_to_data", scenes, "--path_to_backbone_checkpoint", file),
    ):
        (stderr,) = run_each(script, [flags], cwd=cwd, code=2)
        assert re.search(r"^error: .*not read, because it is damaged or holds objects that run", stderr, re.M), stderr
        assert "Traceback" not in stderr

    run("pretrain_mae.py", *TINY, *data, "--max_steps", 2, "--save_checkpoint_steps", 1, cwd=cwd)
    checkpoints = cwd / "work_dir" / "pretrain_mae" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000002")
    optimizer, state = (checkpoints / "step_00000001" / name for name in ("optimizer.pt", "state.json"))
    torch.save({"optimizer": Hostile(cwd / "trace")}, optimizer)
    content = json.loads(state.read_text())
    content["files"]["optimizer.pt"] = optimizer.stat().st_size
    state.write_text(json.dumps(content))
    flags = [*TINY, *data, "--max_steps", 2, "--save_checkpoint_steps", 1, "--resume_from_checkpoint", "latest"]
    (stderr,) = run_each("pretrain_mae.py", [flags], cwd=cwd, code=1)
    assert re.search(r"^error: .*optimizer.pt is missing, damaged, or holds objects", stderr, re.M), stderr
    assert not (cwd / "trace").exists()
    torch.load(optimizer, weights_only=False)  # an unsafe load runs the code
    assert (cwd / "trace").exists()


def test_folder_with_other_outputs_is_not_written(runs, tmp_path, monkeypatch):
    export = push_to_hub.export_model

    def wrong(trained, folder):
        export(trained, folder)
        state = load_file(folder / "transformers_model.safetensors")
        state["layernorm.weight"].view(-1)[0] += 1e-3
        save_file(state, folder / "transformers_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(push_to_hub, "export_model", wrong)
    with pytest.raises(RunError, match=r"transformers AutoModel differs by .*, expected at most 0.0001; nothing was"):
        push(runs / "pretrain_mae", "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_weights_with_nan_and_folders_that_cannot_be_written(runs, tmp_path, capsys):
    state = to_official(open_trained(runs / "pretrain_mae").model.state_dict())
    torch.save(state | {"norm.bias": torch.full((32,), torch.nan)}, tmp_path / "nan.pth")
    heads = ["--encoder_num_heads", 2, "--decoder_num_heads", 2]
    errors = errors_of(tmp_path / "nan.pth", "--output", tmp_path / "out", *heads, capsys=capsys)
    assert "weights that are not finite; give an earlier checkpoint" in errors
    for output in ("/dev/null/x", "/proc/x"):
        with pytest.raises(RunError, match=f"{output} cannot be written"):
            push(runs / "pretrain_mae", "--output", output)
    with alone_at(tmp_path / "taken"):
        run("push_to_hub.py", runs / "pretrain_mae", "--output", tmp_path / "taken", cwd=tmp_path, code=1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "taken").exists()


def test_training_continues_without_the_hub(image_folder, hub, tmp_path):
    """A failed upload prints a warning; a missing token is an error before the first step."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 10, "--push_to_hub", "--hub_model_id", "owner/mae"]
    code = "import sys, pretrain_mae; from training import upload; upload.SCRIPT = 'lost.py'; "
    end = run_code(code + "pretrain_mae.main(sys.argv[1:])", *flags, cwd=tmp_path, **hub.variables(tmp_path))
    output, folder = end.stdout + end.stderr, tmp_path / "work_dir" / "pretrain_mae"
    assert "warning: the finished run is not uploaded: " in output and "repeat with: python" in output
    assert (folder / "metrics.json").is_file() and log_of(folder)[-1]["step"] == 10

    variables = hub.variables(tmp_path, token=None)
    flags += ["--experiment_name", "without"]
    stderr = run("pretrain_mae.py", *flags, cwd=tmp_path, code=2, **variables).stderr
    assert "error: no valid token for the Hugging Face Hub" in stderr and stderr.count("error: ") == 1


@pytest.mark.parametrize("script", ["pretrain_mae.py", "finetune_classifier.py", "finetune_segmentation.py"])
def test_flags_of_training_scripts(script):
    data, upload = ["--path_to_data", "builtin:shapes"], ["--push_to_hub", "--hub_model_id", "owner/mae"]
    assert not SCRIPTS[script].parse_args([*data, *upload, "--hub_every", "2"])[1]
    (error,) = SCRIPTS[script].parse_args([*data, "--hub_every", "2"])[1]
    assert error == "--hub_every needs --push_to_hub; add it, or leave --hub_every out"
    if script != "pretrain_mae.py":
        weights = "--path_to_pretrained_mae_weights" if "classifier" in script else "--path_to_backbone_checkpoint"
        errors = SCRIPTS[script].parse_args(["--path_to_data", "x", weights, "y", "--eval_only", *upload])[1]
        assert "--push_to_hub does not go with --eval_only" in errors[0]
