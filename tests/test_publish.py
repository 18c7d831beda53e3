"""Uploads to a Hub on this machine, by huggingface_hub and real HTTP: what arrives, what is refused, what is repeated;
and uploads beside a training."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import run_cold
from hub import EXPIRED, READ_ONLY, UNKNOWN, VALID
from huggingface_hub import ModelCard, constants, list_repo_files, snapshot_download

from training.launch import RunError
from training.publish import Publisher, check_hub, check_repo_id, check_token, upload

WEIGHTS = ["model.safetensors", "pretraining/model.safetensors", "reconstructions.png"]  # what goes by LFS


def write_folder(folder: Path, *, model_type: str = "vit", architecture: str = "ViTModel", content: str = "1") -> Path:
    """A folder as it is published, with small files in place of the weights."""
    (folder / "pretraining").mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, "architectures": [architecture]}
    for place in (folder, folder / "pretraining"):
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").write_bytes(f"{place.name} {content}".encode() * 1000)
    (folder / "reconstructions.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" + content.encode())
    (folder / "README.md").write_text(f"---\nlicense: mit\ntags:\n- mae-accelerate\n---\n# {content}\n")
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".hidden")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = write_folder(tmp_path / "folder")
    (folder / ".hidden").write_text("not for the Hub")
    return folder


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """The Hub, as which this process takes it."""
    hub.enter(monkeypatch, tmp_path)
    return hub


def push(folder: Path, repo_id: str = "owner/name", **options) -> str:
    defaults = dict(private=False, revision=None, create_pr=False, message="Weights of step 5")
    return upload(folder, repo_id, **defaults | options)


def changes(hub) -> list[tuple[str, str]]:
    """The requests that would change something on the Hub."""
    return [(method, path) for method, path in hub.requests if method not in ("GET", "HEAD")]


def commits(hub) -> list[str]:
    return [path for _, path in hub.requests if "/commit/" in path]


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_gets_the_folder_in_one_commit(private, here, folder):
    address = push(folder, private=private)
    repository = here.repositories["owner/name"]
    commit = repository.names["main"]
    assert address == f"{here.endpoint}/owner/name/commit/{commit}"
    assert repository.private == private and repository.messages[commit] == "Weights of step 5"
    assert here.files("owner/name") == content_of(folder) and len(repository.commits) == 2
    assert sorted(list_repo_files("owner/name")) == [".gitattributes", *sorted(content_of(folder))]
    assert ModelCard.load("owner/name").data.license == "mit"
    assert content_of(Path(snapshot_download("owner/name", local_dir=folder.parent / "again"))).items() >= (
        content_of(folder).items()
    )


def test_a_branch_is_made_and_main_stays(here, folder):
    push(folder)
    before = here.files("owner/name")
    write_folder(folder, content="2")
    for _ in range(2):  # the second time, the branch exists
        address = push(folder, revision="v2")
    assert here.files("owner/name", "v2") == content_of(folder) and here.files("owner/name") == before
    assert address.endswith(here.repositories["owner/name"].names["v2"])


def test_a_pull_request_to_a_repository_of_others(here, folder, tmp_path):
    here.add("others/name", write_folder(tmp_path / "theirs", content="theirs"))
    before = here.files("others/name")
    assert before
    assert push(folder, "others/name", create_pr=True) == f"{here.endpoint}/others/name/discussions/1"
    assert here.files("others/name") == before
    assert here.files("others/name", "refs/pr/1") == content_of(folder)
    with pytest.raises(RunError, match="a pull request is made to main; leave out --create_pr or --revision v2"):
        push(folder, create_pr=True, revision="v2")


def test_a_repeated_upload_sends_what_changed(here, folder):
    first = push(folder)
    assert len(here.uploads) == len(WEIGHTS)
    assert push(folder) == first and len(commits(here)) == 1  # nothing changed
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert push(folder) != first
    assert len(here.uploads) == len(WEIGHTS) + 1 and here.files("owner/name") == content_of(folder)


def test_what_an_earlier_model_left_is_removed(here, folder):
    """Files of ours that the new model does not have, which would be read before its own; not what others added."""
    for name in ("ema.safetensors", "loss.png", "pytorch_model.bin", "notes.md"):
        (folder / name).write_bytes(b"earlier\0")
    push(folder)
    for path in ("ema.safetensors", "loss.png", "pytorch_model.bin", "notes.md", "reconstructions.png"):
        (folder / path).unlink()
    shutil.rmtree(folder / "pretraining")
    push(folder)
    kept = {name: b"earlier\0" for name in ("pytorch_model.bin", "notes.md")}
    assert here.files("owner/name") == content_of(folder) | kept


def test_an_interrupted_upload_is_continued(here, folder):
    """Large files that arrived are not sent again, and nothing is to be seen before all have."""
    here.fail_uploads_after = 1
    with pytest.raises(RunError) as error:
        push(folder)
    told = rf"not uploaded: the Hub failed \(.*RequestTimeout.*\); {folder} is ready, repeat with: python .*"
    assert re.fullmatch(told, str(error.value))
    assert len(here.uploads) == 1 and here.files("owner/name") == {}
    here.fail_uploads_after = None
    push(folder)
    assert sorted(here.uploads) == sorted({*here.uploads}) and len(here.uploads) == len(WEIGHTS)
    assert here.files("owner/name") == content_of(folder)


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, "owner/name", "there is no token of the Hugging Face Hub; run `hf auth login`"),
        (EXPIRED, "owner/name", "the token is not valid or has expired; run `hf auth login`"),
        (UNKNOWN, "owner/name", "the token is not valid or has expired; run `hf auth login`"),
        (READ_ONLY, "owner/name", "the token may not write to owner/name; run `hf auth login`"),
        (VALID, "others/name", "the token may not write to others/name; .* give a --repo_id of an owner who may"),
        (VALID, "owner", "'owner' is no name of a repository on the Hub .it has no owner.; expected OWNER/NAME"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_who_may_not_upload(token, repo_id, words, exists, hub, folder, monkeypatch, tmp_path):
    hub.enter(monkeypatch, tmp_path, token=token)
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", "work dir/run", "--repo_id", repo_id])
    if exists:
        hub.add(repo_id, folder)
    before = hub.files(repo_id)
    again = re.escape(f"python push_to_hub.py 'work dir/run' --repo_id {repo_id}")
    with pytest.raises(RunError, match=f"^not uploaded: {words}.*; {folder} is ready, repeat with: {again}$"):
        push(folder, repo_id)
    assert hub.files(repo_id) == before and not hub.uploads


def test_without_a_network(here, folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(RunError, match=f"^not uploaded: {endpoint} cannot be reached .*refused.*; check the network"):
        push(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"^not uploaded: HF_HUB_OFFLINE is set; unset it; "):
        push(folder)
    assert not here.requests


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (dict(model_type="beit", architecture="BeitForImageClassification"), "beit BeitForImageClassification"),
        (dict(architecture="ViTForImageClassification"), "vit ViTForImageClassification"),
        ("{}", "unknown"),
        ("no JSON", "no configuration of transformers"),
    ],
)
@pytest.mark.parametrize("options", [{}, dict(create_pr=True), dict(revision="new")])
def test_a_repository_of_another_model_is_left_alone(theirs, words, options, here, folder, tmp_path):
    other = write_folder(tmp_path / "other", **(theirs if isinstance(theirs, dict) else {}))
    if isinstance(theirs, str):
        (other / "config.json").write_text(theirs)
    here.add("owner/name", other)
    told = rf"owner/name holds a model of another type \({words}, and this is vit ViTModel\); give another --repo_id"
    with pytest.raises(RunError, match=told):
        push(folder, **options)
    assert not changes(here)


def test_a_repository_that_holds_no_model_or_a_larger_one_is_used(here, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("soon")
    here.add("owner/name", empty)
    push(folder)
    here.add("owner/name", write_folder(tmp_path / "larger", content="22"), revision="large")
    push(folder, revision="large")
    assert here.files("owner/name", "large") == here.files("owner/name") == content_of(folder)


def test_a_public_repository_is_not_taken_for_a_private_one(here, folder, tmp_path):
    here.add("owner/name", folder)
    with pytest.raises(RunError, match="owner/name exists and is public; make it private in its settings, or leave"):
        push(folder, private=True)
    assert not changes(here)
    here.add("owner/hidden", folder, private=True)
    push(write_folder(tmp_path / "new", content="3"), "owner/hidden", private=True)
    assert here.files("owner/hidden")["README.md"].endswith(b"# 3\n")


def test_what_the_hub_refuses_is_told(here, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(RunError, match=r"^not uploaded: the Hub failed \(Invalid metadata in README.md"):
        push(folder)
    assert not here.uploads and not commits(here)


@pytest.mark.parametrize(
    "repo_id", ["", "name", "owner/", "/name", "a/b/c", "o/a b", "o/a--b", "o/.a", "o/" + 97 * "a"]
)
def test_names_that_are_refused(repo_id, hub):
    (error,) = check_repo_id(repo_id)
    assert error.startswith(repr(repo_id)) and error.endswith("; expected OWNER/NAME") and "\n" not in error


def test_names_and_tokens_that_are_taken(hub, monkeypatch, tmp_path):
    for repo_id in ("owner/name", "Owner-1/a_b.C-2"):
        assert not check_repo_id(repo_id)
    for token, count in ((VALID, 0), (None, 1)):
        hub.enter(monkeypatch, tmp_path, token=token)
        assert len(check_token()) == count
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "token").write_text(VALID)  # as `hf auth login` leaves it
    assert not check_token() and not hub.requests


@pytest.mark.parametrize(
    ("push_to_hub", "repository", "every", "private", "expected"),
    [
        (False, None, 0, False, []),
        (True, "owner/name", 5, True, []),
        (True, None, 0, False, ["--push_to_hub needs a repository; give --hub_model_id OWNER/NAME"]),
        (True, "name", 0, False, ["--hub_model_id 'name' is no name"]),
        (False, "owner/name", 5, True, ["--hub_model_id is of", "--hub_every is of", "--hub_private is of"]),
    ],
)
def test_flags_of_the_hub(push_to_hub, repository, every, private, expected):
    errors = check_hub(push_to_hub, repository=repository, every=every, private=private)
    assert len(errors) == len(expected) and all(map(str.startswith, errors, expected)), errors


COLD = """
import sys
from pathlib import Path
import timm, torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, ViTMAEForPreTraining
from modeling.export import export_autoencoder, export_encoder
from modeling.mae import MaskedAutoencoder
from modeling.vit import VisionTransformer
from training.publish import upload

encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
model = MaskedAutoencoder(encoder, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).eval()
folder, statistics = Path(sys.argv[1]), dict(mean=[0.5] * 3, std=[0.5] * 3)
export_encoder(encoder, folder, **statistics)
export_autoencoder(model, folder / "pretraining", **statistics)
print(upload(folder, "owner/name", private=True, revision="v1", create_pr=False, message="Weights"))
images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
with torch.inference_mode():
    tokens = encoder(images)
    for theirs in (
        AutoModel.from_pretrained("owner/name", revision="v1")(images).last_hidden_state,
        timm.create_model("hf-hub:owner/name@v1", pretrained=True).eval().forward_features(images),
    ):
        torch.testing.assert_close(theirs, tokens, rtol=0, atol=1e-5)
    options = dict(revision="v1", subfolder="pretraining")
    loss = ViTMAEForPreTraining.from_pretrained("owner/name", **options)(images, noise=noise).loss
    torch.testing.assert_close(loss, model(images, noise).loss, rtol=0, atol=1e-5)
snapshot = Path(snapshot_download("owner/name", revision="v1"))
assert (snapshot / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
"""


def test_a_process_that_is_told_of_the_hub_by_its_variables(hub, tmp_path):
    """Uploaded and loaded by the libraries, all in one process that nothing was patched in."""
    (tmp_path / "cold.py").write_text(COLD)
    done = run_cold(tmp_path / "cold.py", tmp_path / "folder", cwd=tmp_path, **hub.variables(tmp_path))
    repository = hub.repositories["owner/name"]
    assert done.stdout.strip().endswith(repository.names["v1"]) and repository.private
    assert hub.files("owner/name", "v1") == content_of(tmp_path / "folder")


# Beside the training

STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
told = {"argv": sys.argv[1:], "session": os.getsid(0), "variables": dict(os.environ)}
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(told) + "\\n")
while (folder / "wait").exists():
    time.sleep(0.01)
print("written")
if (folder / "fail").exists():
    sys.exit((folder / "fail").read_text())
print("uploaded: ADDRESS")
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return path


def calls(folder: Path) -> list[dict]:
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_is_published_beside_its_training(script, tmp_path, monkeypatch, capsys):
    """One at a time, as a process of its own; then at the end."""
    launch = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")
    launch |= dict(ACCELERATE_MIXED_PRECISION="bf16", TORCHELASTIC_RUN_ID="1", GROUP_RANK="0", ROLE_RANK="0")
    for name, value in {**launch, "CUDA_VISIBLE_DEVICES": "0,1", "HF_HOME": "kept"}.items():
        monkeypatch.setenv(name, value)
    publisher = Publisher(tmp_path, "owner/name", every=10, private=True, script=script)
    (tmp_path / "wait").touch()
    for step in range(31):
        publisher.after(step)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"publishing step 10; {tmp_path / 'hub.log'} tells how it goes",
        "step 20 is not published, as the upload of step 10 still goes on",
    ]
    (tmp_path / "wait").unlink()
    wait_for(lambda: publisher.process.poll() is not None)
    publisher.after(21)
    publisher.after(22)
    assert capsys.readouterr().out == "published step 10: uploaded: ADDRESS\n"
    publisher.finish()
    assert capsys.readouterr().out.splitlines()[1:] == ["published the finished run: uploaded: ADDRESS"]
    assert (tmp_path / "hub.log").read_text() == "written\nuploaded: ADDRESS\n"
    both = calls(tmp_path)
    assert len(both) == 2
    for call in both:
        assert call["argv"] == [str(tmp_path), "--repo_id", "owner/name", "--private"]
        assert call["session"] != os.getsid(0) and not launch.keys() & call["variables"].keys()
        assert call["variables"]["CUDA_VISIBLE_DEVICES"] == "" and call["variables"]["HF_HOME"] == "kept"


def test_the_end_waits_for_an_upload_that_goes_on(script, tmp_path, capsys):
    publisher = Publisher(tmp_path, "owner/name", every=10, script=script)
    publisher.after(10)
    publisher.finish()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("published")]
    assert lines == [f"published {what}: uploaded: ADDRESS" for what in ("step 10", "the finished run")]


def test_a_failed_upload_is_told_and_the_next_one_is_tried(script, tmp_path, capsys):
    publisher = Publisher(tmp_path, "owner/name", every=10, script=script)
    (tmp_path / "fail").write_text("error: not uploaded: no network; repeat with: python push_to_hub.py x")
    publisher.after(10)
    publisher.process.wait()
    publisher.after(11)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("warning: step 10 is not published: error: not uploaded: no network; repeat with: python")
    assert told.endswith(f"{tmp_path / 'hub.log'} has all of it") and told.count("repeat with") == 1
    (tmp_path / "fail").write_text("error: another\n")
    publisher.after(20)
    publisher.process.wait()
    publisher.after(21)
    told = capsys.readouterr().out.splitlines()[-1]
    assert "error: another" in told and told.endswith(f"repeat with: python {script} {tmp_path} --repo_id owner/name")
    (tmp_path / "fail").unlink()
    publisher.finish()
    assert capsys.readouterr().out.splitlines()[-1] == "published the finished run: uploaded: ADDRESS"


def test_what_cannot_even_start_is_told(tmp_path, capsys):
    """A script that is not there, and a folder that is gone."""
    publisher = Publisher(tmp_path, "owner/name", script=tmp_path / "none.py")
    publisher.finish()
    assert "warning: the finished run is not published: " in capsys.readouterr().out
    gone = Publisher(tmp_path / "gone", "owner/name", every=1)
    gone.after(1)
    gone.finish()
    assert capsys.readouterr().out.count("No such file or directory") == 2


def test_without_a_repository_nothing_is_published(script, tmp_path, capsys):
    """As on all processes but the main one, which saves at the same steps."""
    publisher = Publisher(tmp_path, None, every=10, script=script)
    assert publisher.every == 10
    publisher.after(10)
    publisher.finish()
    assert not capsys.readouterr().out and not calls(tmp_path)


def test_nobody_waits_where_the_run_is_asked_to_stop(script, tmp_path, capsys):
    (tmp_path / "wait").touch()
    publisher, asked = Publisher(tmp_path, "owner/name", every=10, script=script), []
    publisher.after(10)
    publisher.finish(stop=lambda: bool(asked) or asked.append(1))
    assert "not waiting for the upload of step 10, which goes on" in capsys.readouterr().out
    (tmp_path / "wait").unlink()
    assert publisher.process.wait() == 0 and len(calls(tmp_path)) == 1


def test_nobody_waits_after_an_interruption(script, tmp_path, capsys, monkeypatch):
    """Ctrl-C while the end waits: the training's process ends well, and the upload goes on."""

    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "wait").touch()
    publisher = Publisher(tmp_path, "owner/name", script=script)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    publisher.finish()
    signal.signal(signal.SIGALRM, before)
    assert "not waiting for the upload of the finished run, which goes on" in capsys.readouterr().out
    (tmp_path / "wait").unlink()
    assert publisher.process.wait() == 0 and "uploaded" in (tmp_path / "hub.log").read_text()
