"""Tests of uploads over HTTP to a Hub on this machine, and of uploads in the background of a run."""

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from hub import EXPIRED, READ_ONLY, UNKNOWN, VALID
from huggingface_hub import ModelCard, constants, list_repo_files, snapshot_download

from training.files import MARKER, replace_folder
from training.launch import RunError
from training.upload import Uploader, check_hub, check_repo_id, check_token, upload

WEIGHTS = ["model.safetensors", "pretraining/model.safetensors", "reconstructions.png"]  # uploaded through LFS


def write_folder(folder: Path, *, model_type: str = "vit", architecture: str = "ViTModel", content: str = "1") -> Path:
    """Write an exported folder with small files in place of the weights."""
    (folder / "pretraining").mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, "architectures": [architecture]}
    for place in (folder, folder / "pretraining"):
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").write_bytes(f"{place.name} {content}".encode() * 1000)
    (folder / "reconstructions.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" + content.encode())
    (folder / "README.md").write_text(f"---\nlicense: mit\ntags:\n- mae-accelerate\n---\n# {content}\n")
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "folder")


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """Return the Hub on this machine, which this process uses instead of the real one."""
    hub.enter(monkeypatch, tmp_path)
    return hub


def push(folder: Path, repo_id: str = "owner/name", **options) -> str:
    defaults = dict(private=False, revision=None, message="Weights of step 5")
    return upload(folder, repo_id, **defaults | options)


def changes(hub) -> list[tuple[str, str]]:
    """Return the requests that would change something on the Hub."""
    return [(method, path) for method, path in hub.requests if method not in ("GET", "HEAD")]


def commits(hub) -> list[str]:
    return [path for _, path in hub.requests if "/commit/" in path]


def test_files_of_others_in_the_folder_stay_here(here, tmp_path):
    target = tmp_path / "hub"
    replace_folder(target, write_folder)
    own = content_of(target)
    (target / "notes.txt").write_text("mine")
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("mine")
    replace_folder(target, write_folder)
    push(target)
    assert here.files("owner/name").keys() == own.keys() - {MARKER}


@pytest.mark.parametrize("private", [False, True])
def test_new_repository_in_one_commit(private, here, folder):
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


def test_new_branch_leaves_main(here, folder):
    push(folder)
    before = here.files("owner/name")
    write_folder(folder, content="2")
    for _ in range(2):  # the second time, the branch exists
        address = push(folder, revision="v2")
    assert here.files("owner/name", "v2") == content_of(folder) and here.files("owner/name") == before
    assert address.endswith(here.repositories["owner/name"].names["v2"])


def test_repeated_upload_sends_changes_only(here, folder):
    first = push(folder)
    assert len(here.uploads) == len(WEIGHTS)
    assert push(folder) == first and len(commits(here)) == 1  # nothing changed
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert push(folder) != first
    assert len(here.uploads) == len(WEIGHTS) + 1 and here.files("owner/name") == content_of(folder)


def test_files_of_an_earlier_model_are_removed(here, folder):
    """Our files that the new model does not have are removed; files that others added stay."""
    for name in ("ema.safetensors", "loss.png", "pytorch_model.bin", "notes.md"):
        (folder / name).write_bytes(b"earlier\0")
    push(folder)
    for path in ("ema.safetensors", "loss.png", "pytorch_model.bin", "notes.md", "reconstructions.png"):
        (folder / path).unlink()
    shutil.rmtree(folder / "pretraining")
    push(folder)
    kept = {name: b"earlier\0" for name in ("pytorch_model.bin", "notes.md")}
    assert here.files("owner/name") == content_of(folder) | kept


def test_interrupted_upload_continues(here, folder):
    """Large files that arrived are not sent again, and no file is visible before all have arrived."""
    here.fail_uploads_after = 1
    with pytest.raises(RunError) as error:
        push(folder)
    told = rf"not uploaded: the Hub failed \(.*RequestTimeout.*\); {folder} is ready to upload"
    assert re.fullmatch(told, str(error.value))
    assert len(here.uploads) == 1 and here.files("owner/name") == {}
    here.fail_uploads_after = None
    push(folder)
    assert sorted(here.uploads) == sorted({*here.uploads}) and len(here.uploads) == len(WEIGHTS)
    assert here.files("owner/name") == content_of(folder)


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        *((token, "owner/name", "no valid token for the Hugging Face Hub; run") for token in (None, EXPIRED, UNKNOWN)),
        (READ_ONLY, "owner/name", "the token has no write access to owner/name; run `hf auth login`"),
        (VALID, "others/name", "the token has no write access to others/name; .* give a --repo_id of another owner"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_missing_permissions(token, repo_id, words, exists, hub, folder, monkeypatch, tmp_path):
    hub.enter(monkeypatch, tmp_path, token=token)
    if exists:
        hub.add(repo_id, folder)
    before = hub.files(repo_id)
    with pytest.raises(RunError, match=f"^not uploaded: {words}.*; {folder} is ready to upload$"):
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
    ],
)
@pytest.mark.parametrize("options", [{}, dict(revision="new")])
def test_repository_of_another_model_is_refused(theirs, words, options, here, folder, tmp_path):
    here.add("owner/name", write_folder(tmp_path / "other", **theirs))
    error = rf"owner/name holds another type of model \({words}, expected vit ViTModel\); give another --repo_id"
    with pytest.raises(RunError, match=error):
        push(folder, **options)
    assert not changes(here)


def test_repository_without_a_model_or_of_another_size(here, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("soon")
    here.add("owner/name", empty)
    push(folder)
    here.add("owner/name", write_folder(tmp_path / "larger", content="22"), revision="large")
    push(folder, revision="large")
    assert here.files("owner/name", "large") == here.files("owner/name") == content_of(folder)


def test_private_refuses_a_public_repository(here, folder, tmp_path):
    here.add("owner/name", folder)
    with pytest.raises(RunError, match="owner/name exists and is public; make it private in its settings, or leave"):
        push(folder, private=True)
    assert not changes(here)
    here.add("owner/hidden", folder, private=True)
    push(write_folder(tmp_path / "new", content="3"), "owner/hidden", private=True)
    assert here.files("owner/hidden")["README.md"].endswith(b"# 3\n")


def test_invalid_metadata(here, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(RunError, match=r"^not uploaded: the Hub failed \(Invalid metadata in README.md"):
        push(folder)
    assert not here.uploads and not commits(here)


@pytest.mark.parametrize(
    "repo_id", ["", "name", "owner/", "/name", "a/b/c", "o/a b", "o/a--b", "o/.a", "o/" + 97 * "a"]
)
def test_invalid_names(repo_id, hub):
    (error,) = check_repo_id(repo_id)
    assert error.startswith(repr(repo_id)) and error.endswith("; expected OWNER/NAME") and "\n" not in error


def test_valid_names_and_tokens(hub, monkeypatch, tmp_path):
    for repo_id in ("owner/name", "Owner-1/a_b.C-2"):
        assert not check_repo_id(repo_id)
    for token, count in ((VALID, 0), (None, 1)):
        hub.enter(monkeypatch, tmp_path, token=token)
        assert len(check_token()) == count
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "token").write_text(VALID)  # as `hf auth login` writes it
    assert not check_token() and not hub.requests


@pytest.mark.parametrize(
    ("push_to_hub", "repository", "every", "private", "expected"),
    [
        (False, None, 0, False, []),
        (True, "owner/name", 5, True, []),
        (True, None, 0, False, ["--push_to_hub needs a repository; give --hub_model_id OWNER/NAME"]),
        (True, "name", 0, False, ["--hub_model_id 'name' is not a valid repository name"]),
        (False, "owner/name", 5, True, ["--hub_model_id needs", "--hub_every needs", "--hub_private needs"]),
    ],
)
def test_check_hub(push_to_hub, repository, every, private, expected):
    errors = check_hub(push_to_hub, repository=repository, every=every, private=private)
    assert len(errors) == len(expected) and all(map(str.startswith, errors, expected)), errors


# Uploads in the background of a run

STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
with open(folder / "calls.jsonl", "a") as file:
    call = {"argv": sys.argv[1:], "session": os.getsid(0), "environment": dict(os.environ)}
    file.write(json.dumps(call) + "\\n")
while (folder / "wait").exists():
    time.sleep(0.01)
print("written")
if (folder / "fail").exists():
    sys.exit((folder / "fail").read_text())
print("uploaded: ADDRESS")
"""


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch) -> Path:
    """Replace push_to_hub.py by a stand-in that can wait and fail."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr("training.upload.SCRIPT", path)
    return path


def calls(folder: Path) -> list[dict]:
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_upload_during_and_after_training(tmp_path, monkeypatch, capsys):
    """Only one upload runs at a time, in a process that does not belong to the launch."""
    launch = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")
    launch |= dict(ACCELERATE_MIXED_PRECISION="bf16", TORCHELASTIC_RUN_ID="1", GROUP_RANK="0", ROLE_RANK="0")
    for name, value in {**launch, "CUDA_VISIBLE_DEVICES": "0,1", "HF_HOME": "home"}.items():
        monkeypatch.setenv(name, value)
    uploader = Uploader(tmp_path, "owner/name", every=10, private=True)
    (tmp_path / "wait").touch()
    for step in range(21):
        uploader.after(step)
    assert capsys.readouterr().out.splitlines() == [
        f"uploading step 10 in the background; see {tmp_path / 'hub.log'}",
        "step 20 is not uploaded: the upload of step 10 is still running",
    ]
    (tmp_path / "wait").unlink()
    uploader.process.wait()
    uploader.after(21)
    uploader.after(22)
    assert capsys.readouterr().out == "uploaded step 10: ADDRESS\n"
    uploader.finish()
    assert capsys.readouterr().out.splitlines()[1:] == ["uploaded the finished run: ADDRESS"]
    assert (tmp_path / "hub.log").read_text() == "written\nuploaded: ADDRESS\n"
    assert len(calls(tmp_path)) == 2
    for call in calls(tmp_path):
        assert call["argv"] == [str(tmp_path), "--repo_id", "owner/name", "--private"]
        assert call["session"] != os.getsid(0) and not launch.keys() & call["environment"].keys()
        assert call["environment"]["CUDA_VISIBLE_DEVICES"] == "" and call["environment"]["HF_HOME"] == "home"


def test_finish_waits_for_a_running_upload(tmp_path, capsys):
    uploader = Uploader(tmp_path, "owner/name", every=10)
    uploader.after(10)
    uploader.finish()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("uploaded")]
    assert lines == ["uploaded step 10: ADDRESS", "uploaded the finished run: ADDRESS"]


def test_failed_uploads_are_reported_and_the_next_one_starts(script, tmp_path, capsys):
    uploader = Uploader(tmp_path, "owner/name", every=10)
    repeat = f"repeat with: python {script} {tmp_path} --repo_id owner/name"
    for step, error in ((10, "error: not uploaded: no network"), (20, "error: another\n")):
        (tmp_path / "fail").write_text(error)
        uploader.after(step)
        uploader.process.wait()
        uploader.after(step + 1)
        line = capsys.readouterr().out.splitlines()[-1]
        log = tmp_path / "hub.log"
        assert line == f"warning: step {step} is not uploaded: {error.strip()}; see {log}; {repeat}"
    uploader.after(30)
    uploader.process.wait()
    log.unlink()
    uploader.after(31)
    assert "step 30 is not uploaded: exit code 1" in capsys.readouterr().out
    (tmp_path / "fail").unlink()
    uploader.finish()
    assert capsys.readouterr().out.splitlines()[-1] == "uploaded the finished run: ADDRESS"


def test_uploads_that_cannot_start(script, tmp_path, capsys):
    """A missing script and a removed run folder cause warnings only."""
    script.unlink()
    Uploader(tmp_path, "owner/name").finish()
    assert "warning: the finished run is not uploaded: " in capsys.readouterr().out
    uploader = Uploader(tmp_path / "removed", "owner/name", every=1)
    uploader.after(1)
    uploader.finish()
    assert capsys.readouterr().out.count("No such file or directory") == 2


def test_no_repository_uploads_nothing(tmp_path, capsys):
    """Processes other than the main one have no repository and save at the same steps."""
    uploader = Uploader(tmp_path, None, every=10)
    uploader.after(10)
    uploader.finish()
    assert not capsys.readouterr().out and not calls(tmp_path)


def test_finish_stops_waiting_on_request(tmp_path, capsys):
    (tmp_path / "wait").touch()
    uploader, questions = Uploader(tmp_path, "owner/name", every=10), []
    uploader.after(10)
    uploader.finish(stop=lambda: bool(questions) or questions.append(1))
    assert "the upload of step 10 continues in the background" in capsys.readouterr().out
    (tmp_path / "wait").unlink()
    assert uploader.process.wait() == 0 and len(calls(tmp_path)) == 1


def test_finish_stops_waiting_after_ctrl_c(tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "wait").touch()
    uploader = Uploader(tmp_path, "owner/name")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    uploader.finish()
    signal.signal(signal.SIGALRM, before)
    assert "the upload of the finished run continues in the background" in capsys.readouterr().out
    (tmp_path / "wait").unlink()
    assert uploader.process.wait() == 0 and "uploaded" in (tmp_path / "hub.log").read_text()
