"""The upload of a folder to the Hugging Face Hub, and uploads beside the training."""

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
    HTTPError,  # of the library that huggingface_hub talks by: httpx or httpx2
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from training.launch import RunError
from training.schedule import is_due

SCRIPT = Path(__file__).parent.parent / "push_to_hub.py"
OURS = {"ema.safetensors", "transformers_model.safetensors", "preprocessor_config.json"}
OURS |= {f"{name}.png" for name in ("loss", "reconstructions", "confusion", "predictions")}
TOKENS = "run `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"


def check_repo_id(repo_id: str) -> list[str]:
    """What is wrong with the name of a repository, in a list."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") == 1 and all(repo_id.split("/")):
            return []
        reason = "it has no owner"
    except HFValidationError as error:
        reason = str(error).partition(f": '{repo_id}'")[0].rstrip(".")
    return [f"{repo_id!r} is no name of a repository on the Hub ({reason}); expected OWNER/NAME"]


def check_token() -> list[str]:
    """What is wrong where nobody is logged in to the Hub, in a list; asks no server."""
    return [] if get_token() else [f"there is no token of the Hugging Face Hub; {TOKENS}"]


def check_hub(push_to_hub: bool, *, repository: str | None, every: int, private: bool) -> list[str]:
    """What is wrong with the flags of a training script for the Hub, a line each."""
    if push_to_hub:
        if repository is None:
            return ["--push_to_hub needs a repository; give --hub_model_id OWNER/NAME"]
        return [f"--hub_model_id {error}" for error in check_repo_id(repository)]
    given = {"hub_model_id": repository, "hub_every": every, "hub_private": private}
    return [
        f"--{name} is of --push_to_hub, which is missing; give it or leave this out" for name in given if given[name]
    ]


def upload(folder: Path, repo_id: str, *, private: bool, revision: str | None, create_pr: bool, message: str) -> str:
    """Puts a folder on the Hub in one commit, and returns the address of the commit or pull request.

    The repository and the branch `revision` are made where they do not exist, the repository `private` or as its owner
    has them by default. Large files that arrived before an interruption are not sent again. Raises RunError, without
    having sent anything where the name is refused, or the repository is public in spite of `private` or holds a model
    of another type.
    """
    try:
        problems = check_repo_id(repo_id) or check_token() or _misfits(folder, repo_id, private, revision, create_pr)
        if not problems:
            return _send(folder, repo_id, private, revision, create_pr, message)
        reason, cause = problems[0], None
    except Exception as error:  # huggingface_hub, its transports and Xet have many
        reason, cause = _reason(error, repo_id), error
    again = shlex.join(["python", *sys.argv])
    raise RunError(f"not uploaded: {reason}; {folder} is ready, repeat with: {again}") from cause


def _misfits(folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool) -> list[str]:
    """Why the folder does not belong into a repository that exists, in a list."""
    if create_pr and revision not in (None, "main"):
        return [f"a pull request is made to main; leave out --create_pr or --revision {revision}"]
    try:
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except RevisionNotFoundError:  # a new branch begins as main is
            info = HfApi().model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # the Hub's answer to a token that has expired, too
            raise
        return []
    if private and not info.private:
        return [f"{repo_id} exists and is public; make it private in its settings, or leave out --private"]
    if all(file.rfilename != "config.json" for file in info.siblings or []):
        return []
    ours = json.loads((folder / "config.json").read_text())
    try:
        theirs = json.loads(Path(hf_hub_download(repo_id, "config.json", revision=info.sha)).read_text())
        types = [(config.get("model_type"), *(config.get("architectures") or [])) for config in (ours, theirs)]
    except (ValueError, AttributeError):
        types = [("ours",), ("no configuration of transformers",)]
    if types[0] == types[1]:
        return []
    return [
        f"{repo_id} holds a model of another type ({' '.join(filter(None, types[1])) or 'unknown'}, and this is "
        f"{ours['model_type']} {' '.join(ours['architectures'])}); give another --repo_id"
    ]


def _send(folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, message: str) -> str:
    """Makes what does not exist yet, and uploads."""
    api = HfApi()
    if not api.repo_exists(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    files = [CommitOperationAdd(path.as_posix(), folder / path) for path in paths]
    # What an earlier model left there and this one does not have would be read, or shown, as if it were of this one
    stale = {*api.list_repo_files(repo_id, revision=revision)} - {path.as_posix() for path in paths}
    stale = [path for path in sorted(stale) if path in OURS or path.startswith("pretraining/")]
    files += [CommitOperationDelete(path) for path in stale]
    # Not upload_folder, which may make several commits of one folder, the card of one model beside another's weights
    commit = api.create_commit(repo_id, files, commit_message=message, revision=revision, create_pr=create_pr)
    return commit.pr_url or commit.commit_url


def _reason(error: Exception, repo_id: str) -> str:
    """Why the Hub could not be used and what to do, in a line; looks for the cause where errors wrap one."""
    causes, told = [error], _in_line(error)
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401:
            return f"the token is not valid or has expired; {TOKENS}"
        if status == 403:
            return f"the token may not write to {repo_id}; {TOKENS}, or give a --repo_id of an owner who may"
        if status is not None:
            told += "" if cause is error else f": {_in_line(cause)}"
            break
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it"
        if isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            return f"{constants.ENDPOINT} cannot be reached ({_in_line(cause)}); check the network and HF_ENDPOINT"
    return f"the Hub failed ({told})"


def _in_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


# Beside the training


class Publisher:
    """Runs push_to_hub.py for a run beside its training, which no failure of it stops. Before the end of the run, that
    publishes its newest whole checkpoint.

    `repository` is None where nothing is to be published, or on another than the main process. `every` is in optimizer
    steps, 0 for the end alone; a checkpoint should be saved at these, on all processes alike. What the process says
    goes to hub.log of the run folder.
    """

    def __init__(
        self, folder: Path, repository: str | None, *, every: int = 0, private: bool = False, script: Path = SCRIPT
    ):
        self.every, self.wanted, self.log = every, repository is not None, folder / "hub.log"
        options = ["--repo_id", str(repository), *(["--private"] if private else [])]
        self.command = [sys.executable, str(script), str(folder), *options]
        self.process, self.what, self.waiting = None, "", False

    def after(self, step: int) -> None:
        """Says how an upload went that has ended, and starts one where it is due, unless one is still going on."""
        self._report()
        if self.wanted and is_due(step, self.every):
            if self.process:
                if not self.waiting:
                    _say(f"step {step} is not published, as the upload of {self.what} still goes on")
                self.waiting = True
            else:
                self._start(f"step {step}")

    def finish(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits for an upload that goes on, publishes the finished run, and waits for that; no longer than until `stop`
        is true, or Ctrl-C. The upload goes on then."""
        if not self.wanted:
            return
        with contextlib.suppress(KeyboardInterrupt):
            self._wait(stop)
            if not self.process:
                self._start("the finished run")
                self._wait(stop)
        if self.process:
            _say(f"not waiting for the upload of {self.what}, which goes on; see {self.log}")

    def _wait(self, stop: Callable[[], bool]) -> None:
        while self.process and self.process.poll() is None and not stop():
            time.sleep(0.1)
        self._report()

    def _start(self, what: str) -> None:
        # Not a part of this launch, which has the device, the ranks and the terminal's signals to itself
        prefixes = ("ACCELERATE_", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        kept = {n: v for n, v in os.environ.items() if not n.startswith(prefixes) and n not in names}
        kept |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}  # the log's last line tells how it went
        options = dict(env=kept, stdin=subprocess.DEVNULL, start_new_session=True)
        self.what, self.waiting = what, False
        try:
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, **options)
            _say(f"publishing {what}; {self.log} tells how it goes")
        except OSError as error:
            _say(f"{what} is not published ({error}); repeat with: {self._repeat()}")

    def _report(self) -> None:
        """Says how an upload that has ended went."""
        if self.process is None or self.process.poll() is None:
            return
        code, self.process = self.process.returncode, None
        lines = []
        with contextlib.suppress(OSError):
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit code {code}"
        if code == 0:
            _say(f"published {self.what}: {last}")
        else:
            again = "" if "repeat with" in last else f"; repeat with: {self._repeat()}"
            _say(f"warning: {self.what} is not published: {last}; {self.log} has all of it{again}")

    def _repeat(self) -> str:
        return shlex.join(["python", *self.command[1:]])


def _say(text: str) -> None:
    tqdm.write(text)  # above the bar, where there is one
