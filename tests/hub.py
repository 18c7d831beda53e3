"""A Hugging Face Hub on the loopback interface, which keeps everything in memory.

It answers the requests with which huggingface_hub 1.33 to 2.4 uploads and downloads models, and datasets 4.4 to 5.2
downloads data sets. A data set is named datasets/OWNER/NAME and a Space spaces/OWNER/NAME, as in web addresses. Large
files go by git LFS ("basic"); `variables` and `enter` switch Xet off, which huggingface_hub would use by default.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# The tokens VALID and READ_ONLY belong to the user "owner", who may write only to owner/...
VALID, READ_ONLY, EXPIRED, UNKNOWN = "hf_valid", "hf_read_only", "hf_expired", "hf_unknown"
USER = "owner"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class File(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Return the git hash of the content, or of the LFS pointer to it."""
        content = self.content
        if self.lfs:
            size = len(content)
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def described(self, path: str) -> dict:
        described = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return described | ({"lfs": lfs} if self.lfs else {})


class Repository:
    """A repository: commits by hash, and branches that point to them."""

    def __init__(self, private: bool = False, gated: bool = False):
        self.private, self.gated, self.commits, self.names, self.messages = private, gated, {}, {}, {}
        self.commit("main", {".gitattributes": File(ATTRIBUTES, False)}, "initial commit")

    def commit(self, name: str, files: dict[str, File], message: str) -> str:
        content = [len(self.commits), message, sorted((path, file.etag) for path, file in files.items())]
        commit = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[commit], self.messages[commit], self.names[name] = files, message, commit
        return commit

    def find(self, revision: str) -> str | None:
        """Return the commit hash of a branch or hash, None if there is none."""
        return self.names.get(revision, revision if revision in self.commits else None)


class Answer(Exception):
    """The response to a request, raised by its handler."""

    def __init__(self, status: int, content: dict | list | bytes = b"", **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()
        if not isinstance(content, bytes):
            self.headers["Content-Type"] = "application/json"
        if isinstance(content, dict) and "error" in content:
            self.headers["X-Error-Message"] = content["error"]


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # snapshot_download asks for several files at once


class Hub:
    """A server that runs from its construction to `close`.

    Attributes:
        requests: (method, path without query) of each request.
        uploads: sha256 of each large file that arrived.
        fail_uploads_after: number of large files to accept before uploads fail; None: accept all.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.clear()
        self.server = Server(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        """Remove repositories, requests and failures."""
        with self.lock:
            self.repositories: dict[str, Repository] = {}
            self.large: dict[str, bytes] = {}  # by sha256
            self.requests: list[tuple[str, str]] = []
            self.uploads: list[str] = []
            self.fail_uploads_after: int | None = None

    def add(
        self, repo_id: str, folder: str | Path, *, revision: str = "main", private: bool = False, gated: bool = False
    ) -> str:
        """Replace the content of a branch by a folder's files, without a client; return the commit.

        A gated repository is visible to everybody, but nobody can read its files.
        """
        folder = Path(folder)
        files = {".gitattributes": File(ATTRIBUTES, False)}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = File(content, is_large(path.name, content))
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository(private, gated))
            return repository.commit(revision, files, "Add files")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository by path; {} if the repository or the revision is missing."""
        repository = self.repositories.get(repo_id)
        commit = repository and repository.find(revision)
        files = repository.commits[commit] if commit else {}
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def variables(self, folder: Path, *, token: str | None = VALID) -> dict[str, str]:
        """Return the environment of a process that uses this Hub, with its cache and login in `folder`."""
        home = Path(folder) / "hf_home"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def enter(self, monkeypatch, folder: Path, *, token: str | None = VALID) -> None:
        """Make this process use this Hub, although it has already imported huggingface_hub."""
        variables = self.variables(folder, token=token)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        heed(variables, monkeypatch.setattr)


def heed(variables: dict[str, str], change=setattr) -> None:
    """Apply `Hub.variables` to an imported huggingface_hub, as its import does."""
    from huggingface_hub import constants, hf_api

    endpoint = variables["HF_ENDPOINT"]
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        **{name: variables[name] for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH")},
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        change(constants, name, value)
    change(hf_api.api, "endpoint", endpoint)  # behind huggingface_hub.model_info and the like
    if "datasets" in sys.modules:  # its import has read the variables
        from datasets import config

        change(config, "HF_ENDPOINT", endpoint)
        change(config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
        change(config, "HF_DATASETS_CACHE", Path(variables["HF_HOME"], "datasets"))
        change(config, "HF_HUB_OFFLINE", False)


def is_large(path: str, content: bytes) -> bool:
    """Return True if a file goes by LFS, as weights and other binary files do."""
    return path.endswith(".safetensors") or b"\0" in content[:512]


def without_type(repo_id: str) -> str:
    """Return the OWNER/NAME of a repository of any type."""
    return repo_id.removeprefix("datasets/").removeprefix("spaces/")


def metadata_errors(card: str) -> list[str]:
    """Return the errors that the Hub reports for the metadata of a model card."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"bad indentation or syntax: {error}"]
    if not isinstance(metadata, dict):
        return ["metadata is not a mapping"]
    kinds = dict(license=str, pipeline_tag=str, library_name=str, tags=list, datasets=list, base_model=(str, list))
    errors = []
    for name, kind in kinds.items():
        if name in metadata and not isinstance(metadata[name], kind):
            errors.append(f'"{name}" is not valid')
    for model in metadata.get("model-index", []):
        results = [("name", model), *(("task.type", result) for result in model.get("results", []))]
        for result in model.get("results", []):
            results += [("dataset.type", result), ("dataset.name", result), ("metrics", result)]
            results += [(name, metric) for metric in result.get("metrics", []) for name in ("type", "value")]
        for name, value in results:
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is None or value != value:
                errors.append(f'"model-index[].{name}" is required')
    return errors


class Handler(BaseHTTPRequestHandler):
    """A handler that answers each request by the method in ROUTES, which raises the Answer."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *args) -> None:
        pass

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            try:
                for methods, pattern, act in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in methods.split():
                        act(self, *(unquote(group or "") for group in match.groups()))
                raise Answer(404, {"error": f"{self.command} {url.path} is unknown"})
            except Answer as error:
                answer = error
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    # Permissions

    @property
    def token(self) -> str | None:
        """The token of the request, None without one; an invalid token is answered by 401."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if given == EXPIRED:  # the real Hub answers as if the repository were missing
            raise Answer(401, {"error": 'User Access Token "test" is expired'}, X_Error_Code="RepoNotFound")
        if given not in ("", VALID, READ_ONLY):
            raise Answer(401, {"error": "Invalid credentials in Authorization header"})
        return given or None

    def may_write(self, repo_id: str) -> None:
        if self.token is None:
            raise Answer(401, {"error": "Invalid username or password."})
        if self.token != VALID or not without_type(repo_id).startswith(f"{USER}/"):
            raise Answer(403, {"error": f"You don't have the rights to write to {repo_id}"})

    def find(self, repo_id: str, revision: str = "main") -> tuple[Repository, str]:
        """Return a visible repository and a commit in it; answer 401 or 404 if there is none."""
        repository, token = self.hub.repositories.get(repo_id), self.token
        own = without_type(repo_id).startswith(f"{USER}/")
        if repository is None or (repository.private and (token is None or not own)):
            status = 404 if token else 401
            raise Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commit = repository.find(revision)
        if commit is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return repository, commit

    def may_read(self, repo_id: str) -> None:
        if self.find(repo_id)[0].gated:
            error = {"error": f"Access to dataset {repo_id} is restricted"}
            raise Answer(403 if self.token else 401, error, X_Error_Code="GatedRepo")

    # Reading

    def auth_check(self, repo_id: str) -> None:
        self.may_read(repo_id)
        raise Answer(200, b"OK")

    def info(self, repo_id: str, revision: str = "main") -> None:
        repository, commit = self.find(repo_id, revision or "main")
        files = repository.commits[commit]
        repo_id = without_type(repo_id)
        content = {"_id": "0" * 24, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit}
        content |= {"private": repository.private, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        content["siblings"] = [{"rfilename": path} for path in sorted(files)]
        raise Answer(200, content)

    def tree(self, repo_id: str, revision: str, below: str) -> None:
        repository, commit = self.find(repo_id, revision)
        files, below = repository.commits[commit], below.strip("/")
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        listed = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        listed += [file.described(path) for path, file in sorted(files.items())]
        if below:
            listed = [entry for entry in listed if entry["path"].startswith(f"{below}/")]
        if not listed:
            raise Answer(404, {"error": f"{below} does not exist on {revision}"}, X_Error_Code="EntryNotFound")
        raise Answer(200, listed)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository, commit = self.find(repo_id, revision)
        self.may_read(repo_id)
        file = repository.commits[commit].get(path)
        if file is None:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content, size = file.content, len(file.content)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{file.etag}"'}
        headers |= {"Content_Type": "application/octet-stream", "Content_Length": str(size)}
        if file.lfs:
            headers |= {"X_Linked_ETag": f'"{file.etag}"', "X_Linked_Size": str(size)}
        raise Answer(200, content, **headers)

    # Writing

    def create(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        if request.get("type") == "space":
            repo_id = f"spaces/{repo_id}"
            if request.get("sdk") != "gradio":
                raise Answer(400, {"error": f"a Space needs an SDK, not {request.get('sdk')}"})
        self.may_write(repo_id)
        content = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": "0" * 24}
        if repo_id in self.hub.repositories:
            raise Answer(409, {"error": "You already created this model repo", **content})
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(bool(private))
        raise Answer(200, content)

    def branch(self, repo_id: str, name: str) -> None:
        self.may_write(repo_id)
        repository, commit = self.find(repo_id, json.loads(self.body or b"{}").get("startingPoint") or "main")
        if name in repository.names:
            raise Answer(409, {"error": f"Reference already exists: refs/heads/{name}"})
        repository.names[name] = commit
        raise Answer(200, b"OK")

    def validate(self) -> None:
        errors = metadata_errors(json.loads(self.body)["content"])
        raise Answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.may_write(repo_id)
        repository, commit = self.find(repo_id, revision)
        files, answers = repository.commits[commit], []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            large = is_large(path, base64.b64decode(file["sample"]))
            known = {"oid": files[path].etag} if path in files else {}
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
        raise Answer(200, {"files": answers, "commitOid": commit})

    def batch(self, repo_id: str) -> None:
        self.find(repo_id)
        if self.token is None:
            raise Answer(401, {"error": "Invalid username or password."})
        objects = []
        for item in json.loads(self.body)["objects"]:
            place = f"{self.hub.endpoint}/lfs/{item['oid']}"
            actions = {"upload": {"href": place, "header": {}}, "verify": {"href": f"{place}/verify", "header": {}}}
            objects.append({**item, **({} if item["oid"] in self.hub.large else {"actions": actions})})
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, sha256: str) -> None:
        left = self.hub.fail_uploads_after
        if left is not None and left <= 0:  # an S3 error after which the client does not retry
            raise Answer(400, b"<Error><Code>RequestTimeout</Code></Error>", Content_Type="application/xml")
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Answer(400, b"<Error><Code>BadDigest</Code></Error>", Content_Type="application/xml")
        self.hub.fail_uploads_after = None if left is None else left - 1
        self.hub.large[sha256] = self.body
        self.hub.uploads.append(sha256)
        raise Answer(200, b"", ETag=f'"{sha256}"')

    def verify(self, sha256: str) -> None:
        raise Answer(200 if sha256 in self.hub.large else 404, {})

    def commit(self, repo_id: str, revision: str) -> None:
        self.may_write(repo_id)
        repository, parent = self.find(repo_id, revision)
        files, message = dict(repository.commits[parent]), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Answer(400, {"error": f"LFS pointer {value['path']} points to a file that is not there"})
                files[value["path"]] = File(self.hub.large[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"])
        commit = repository.commit(revision, files, message)
        address = f"{self.hub.endpoint}/{repo_id}/commit/{commit}"
        raise Answer(200, {"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})


NAME = r"((?:datasets/|spaces/)?[^/]+/[^/]+)"
REPOSITORY = rf"/api/(?:models/|(?=datasets/|spaces/)){NAME}"
ROUTES = [  # methods, pattern of the path, handler that takes the groups of the pattern
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", REPOSITORY, Handler.info),
    ("GET", rf"{REPOSITORY}/auth-check", Handler.auth_check),
    ("GET", rf"{REPOSITORY}/revision/([^/]+)", Handler.info),
    ("GET", rf"{REPOSITORY}/tree/([^/]+)(/.*)?", Handler.tree),
    ("POST", rf"{REPOSITORY}/branch/([^/]+)", Handler.branch),
    ("POST", rf"{REPOSITORY}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"{REPOSITORY}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.put),
    ("POST", "/lfs/([0-9a-f]{64})/verify", Handler.verify),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
