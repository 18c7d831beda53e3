"""Upload a folder to the Hugging Face Hub, now or in the background of a training run."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of the library that huggingface_hub uses for requests: httpx or httpx2
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from training.files import MARKER, own_files
from training.launch import RunError
from training.schedule import is_due
from training.wording import in_one_line

SCRIPT = Path(__file__).parent.parent / "push_to_hub.py"
OWN_FILES = {"ema.safetensors", "transformers_model.safetensors", "preprocessor_config.json"}
OWN_FILES |= {f"{name}.png" for name in ("loss", "reconstructions", "confusion", "predictions")}
OWN_FOLDER = "pretraining/"
LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"


def check_repo_id(repo_id: str) -> list[str]:
    """Return an error message if this is not a valid repository name."""
    reason = "" if "/" in repo_id else "the owner is missing"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = in_one_line(error)
    return [f"{repo_id!r} is not a valid repository name ({reason}); expected OWNER/NAME"] if reason else []


def check_token() -> list[str]:
    """Return an error message if there is no token for the Hub, without asking the server whether it is valid."""
    return [] if get_token() else [f"no valid token for the Hugging Face Hub; {LOG_IN}"]


def check_hub(push_to_hub: bool, *, repository: str | None, every: int, private: bool) -> list[str]:
    """Return error messages for a training script's flags for the Hub."""
    if push_to_hub:
        if repository is None:
            return ["--push_to_hub needs a repository; give --hub_model_id OWNER/NAME"]
        return [f"--hub_model_id {error}" for error in check_repo_id(repository)]
    flags = {"hub_model_id": repository, "hub_every": every, "hub_private": private}
    return [f"--{name} needs --push_to_hub; add it, or leave --{name} out" for name in flags if flags[name]]


def upload(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str, repo_type: str = "model"
) -> str:
    """Upload a folder in one commit. Large files that arrived before an interruption are not sent again.

    Args:
        folder: Folder that `push_to_hub.py` wrote.
        repo_id: OWNER/NAME; created if missing.
        private: Create a private repository, and refuse an existing public one.
        revision: Branch, created if missing; None for main.
        message: Commit message.
        repo_type: "model" or "space".

    Returns:
        The address of the commit.

    Raises:
        RunError: The upload failed; the repository is public despite `private`, or holds another model type or app.
    """
    try:
        _check_repository(folder, repo_id, private, revision, repo_type)
        return _commit(folder, repo_id, private, revision, message, repo_type)
    except Exception as error:  # huggingface_hub, its HTTP client and Xet raise many types
        raise RunError(f"not uploaded: {_explain(error, repo_id, repo_type)}; {folder} is ready to upload") from error


def _check_repository(folder: Path, repo_id: str, private: bool, revision: str | None, repo_type: str) -> None:
    """Raise RunError if a repository that exists must not be written to."""
    api, place = HfApi(), dict(repo_id=repo_id, repo_type=repo_type)
    if not api.repo_exists(**place):
        return
    if revision and not api.revision_exists(**place, revision=revision):
        revision = None  # a new branch starts from main
    info = api.repo_info(**place, revision=revision)
    if private and not info.private:
        raise RunError(f"{repo_id} exists and is public; make it private in its settings, or leave out --private")
    names = {file.rfilename for file in info.siblings}
    if repo_type == "space":
        if names - {"README.md", ".gitattributes"} and not _is_own_space(repo_id, names, info.sha):
            raise RunError(f"{repo_id} holds another app; give another --space")
        return
    if "config.json" not in names:
        return
    theirs = _model_type(hf_hub_download(repo_id, "config.json", revision=info.sha))
    ours = _model_type(folder / "config.json")
    if theirs != ours:
        raise RunError(f"{repo_id} holds another type of model ({theirs}, expected {ours}); give another --repo_id")


def _is_own_space(repo_id: str, names: set[str], revision: str) -> bool:
    """Return True if the README among the files of a Space has the tag of this project."""
    if "README.md" not in names:
        return False
    readme = hf_hub_download(repo_id, "README.md", repo_type="space", revision=revision)
    return "\n- mae-accelerate\n" in Path(readme).read_text(errors="replace").partition("\n---\n")[0] + "\n"


def _model_type(path: str | Path) -> str:
    """Return the type and the class of the model that a config.json of transformers describes."""
    config = json.loads(Path(path).read_text())
    return " ".join([config.get("model_type", "unknown type"), *config.get("architectures", [])])


def _commit(folder: Path, repo_id: str, private: bool, revision: str | None, message: str, repo_type: str) -> str:
    """Create the repository and the branch if they are missing, and upload."""
    api, place = HfApi(), dict(repo_id=repo_id, repo_type=repo_type)
    sdk = "gradio" if repo_type == "space" else None
    api.create_repo(**place, private=private or None, exist_ok=True, space_sdk=sdk)  # None: the owner's default
    if revision is not None:
        api.create_branch(**place, branch=revision, exist_ok=True)
    own = own_files(folder)  # a folder may hold files of others too
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if own is None or name in own]
    if repo_type == "model":
        names = [name for name in names if Path(name).name != MARKER]
    files = [CommitOperationAdd(name, folder / name) for name in names]
    # Files of an earlier model that this one lacks would be read, or shown, as if they belonged to it
    present = {*api.list_repo_files(**place, revision=revision)}
    if repo_type == "model":
        earlier = {name for name in present if name in OWN_FILES or name.startswith(OWN_FOLDER)}
    elif MARKER in present:  # it lists what the earlier upload wrote; all else in a Space is the user's
        marker = hf_hub_download(**place, filename=MARKER, revision=revision)
        earlier = present & {*(own_files(Path(marker).parent) or [])}
    else:
        earlier = set()
    files += [CommitOperationDelete(name) for name in sorted(earlier - {*names})]
    # upload_folder may split a folder into several commits: the card of one model beside the weights of another
    return api.create_commit(**place, operations=files, commit_message=message, revision=revision).commit_url


def _explain(error: Exception, repo_id: str, repo_type: str) -> str:
    """Return one line on why the Hub could not be used and what to do, from the error or its causes."""
    if isinstance(error, RunError):
        return str(error)
    causes, flag = [error], "--space" if repo_type == "space" else "--repo_id"
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401:
            return f"no valid token for the Hugging Face Hub; {LOG_IN}"
        if status == 403:
            return f"the token has no write access to {repo_id}; {LOG_IN}, or give a {flag} of another owner"
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it"
        if status is None and isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            return f"{constants.ENDPOINT} cannot be reached ({in_one_line(cause)}); check the network and HF_ENDPOINT"
    return f"the Hub failed ({': '.join(map(in_one_line, causes))})"


class Uploader:
    """Run push_to_hub.py in the background of a training run; a failure prints a warning, and training goes on.

    Args:
        folder: The run folder; the output of push_to_hub.py goes to its hub.log.
        repository: OWNER/NAME; None to upload nothing, as on all processes but the main one.
        every: Optimizer steps between uploads of the newest checkpoint; 0 for the finished run alone. A checkpoint
            should be saved at these steps.
        private: Create a private repository.
    """

    def __init__(self, folder: Path, repository: str | None, *, every: int = 0, private: bool = False):
        self.every, self.repository, self.log = every, repository, folder / "hub.log"
        flags = ["--repo_id", str(repository), *(["--private"] if private else [])]
        self.command = [sys.executable, str(SCRIPT), str(folder), *flags]
        self.repeat = f"repeat with: {shlex.join(['python', *self.command[1:]])}"
        self.process, self.subject = None, ""

    def after(self, step: int) -> None:
        """Report a finished upload; start one if it is due and none is running."""
        self._report()
        if self.repository is None or not is_due(step, self.every):
            return
        if not self.process:
            self._start(f"step {step}")
        else:
            tqdm.write(f"step {step} is not uploaded: the upload of {self.subject} is still running")

    def finish(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for the running upload, then upload the finished run, until `stop` returns True or Ctrl-C.

        An upload that is still running then continues after the training process has ended.
        """
        if self.repository is None:
            return
        with contextlib.suppress(KeyboardInterrupt):
            self._wait(stop)
            if not self.process:
                self._start("the finished run")
                self._wait(stop)
        if self.process:
            tqdm.write(f"the upload of {self.subject} continues in the background; see {self.log}")

    def _wait(self, stop: Callable[[], bool]) -> None:
        while self.process and self.process.poll() is None and not stop():
            time.sleep(0.1)
        self._report()

    def _start(self, subject: str) -> None:
        # The upload must not join the training's process group, use its GPU, or receive the terminal's signals
        prefixes = ("ACCELERATE_", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "RANK", "WORLD_SIZE", "LOCAL_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
        env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}  # `_report` reads the last line of the log
        options = dict(env=env, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
        self.subject = subject
        try:
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(self.command, stdout=log, **options)
            tqdm.write(f"uploading {subject} in the background; see {self.log}")
        except OSError as error:
            tqdm.write(f"warning: {subject} is not uploaded: {in_one_line(error)}; {self.repeat}")

    def _report(self) -> None:
        """Print how an upload ended."""
        if self.process is None or self.process.poll() is None:
            return
        code, self.process = self.process.returncode, None
        lines = [f"exit code {code}"]
        with contextlib.suppress(OSError):  # nothing about an upload stops the training
            lines = self.log.read_text(errors="replace").strip().splitlines() or lines
        if code == 0:
            tqdm.write(f"uploaded {self.subject}: {lines[-1].removeprefix('uploaded: ')}")
        else:
            tqdm.write(f"warning: {self.subject} is not uploaded: {lines[-1]}; see {self.log}; {self.repeat}")
