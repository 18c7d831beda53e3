"""Find weights in a file, a folder, a run, or a repository on the Hugging Face Hub, which is downloaded."""

import re
from pathlib import Path

from modeling.files import INDEX, WEIGHT_FILES, WeightsError

PREFIX = "hf:"


def is_on_hub(path: str | Path) -> bool:
    """Return whether `path` names a repository on the Hub."""
    return str(path).startswith(PREFIX)


def find_weights(path: str | Path, *, whole: bool) -> Path:
    """Return the file or folder that `read_state_dict` reads for a path, which may also be a run.

    Args:
        path: a file or folder with weights, which is returned unchanged; the folder of a run or its `encoder/`; or
            hf:OWNER/NAME[@revision], which is downloaded.
        whole: prefer the autoencoder in `pretraining/` to the encoder beside it. A run without exported folders, which
            are `encoder/` and `model/`, gives its newest complete checkpoint.

    Raises:
        WeightsError: if the path does not exist or has no weights.
    """
    path = download(str(path), whole=whole) if is_on_hub(path) else Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        hint = f", or {PREFIX}{path} for the Hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        raise WeightsError(
            f"{path}: no such file or folder; expected weights or a run folder; correct the path{hint}, or download "
            "them first"
        )
    encoder = path / "encoder"
    exported = [path / "pretraining", path, encoder / "pretraining"] if whole else [path, encoder]
    exported.append(path / "model")
    for folder in [*exported, *sorted(path.glob("checkpoints/step_" + 8 * "[0-9]"), reverse=True)]:
        # A run writes these files last: without one, the folder is half written or half removed.
        finished = folder == path or (folder / "config.json").is_file() or (folder / "state.json").is_file()
        if finished and any((folder / name).is_file() for name in WEIGHT_FILES):
            return folder
    if (path / "checkpoints").is_dir():
        raise WeightsError(f"{path} is a run without a checkpoint yet; wait for its first one, or give other weights")
    raise WeightsError(
        f"{path}: a folder without weights; expected {' or '.join(WEIGHT_FILES)}, or a run's encoder/, model/ or whole "
        "checkpoint; give one of these or the file itself"
    )


def download(name: str, *, whole: bool) -> Path:
    """Download weights and the configurations beside them, and return their folder; offline, use the cache.

    Args:
        name: hf:OWNER/NAME[@revision].
        whole: prefer the autoencoder in `pretraining/`.

    Raises:
        WeightsError: if the repository or revision does not exist, cannot be accessed, or has no weights.
    """
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise WeightsError(f"{name}: not a repository name; expected {PREFIX}OWNER/NAME[@revision]")
    try:
        for part in ("pretraining/", "") if whole else ("",):
            for file in WEIGHT_FILES:
                shards = [f"{Path(file.removesuffix(INDEX)).stem}-*-of-*"] if file.endswith(INDEX) else []
                patterns = [f"{part}{each}" for each in (file, *shards, "config.json", "preprocessor_config.json")]
                folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns), part)
                if (folder / file).is_file():
                    return folder
    except errors.RevisionNotFoundError as error:
        message = f"{name}: has no revision {revision}; expected a branch, tag or commit; correct it"
        raise WeightsError(message) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{name}: no such model repository, or a private or gated one; correct the name, or ask for access on its "
            "page and log in with hf auth login (make sure that your token has not expired)"
        ) from error
    except (errors.HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{name}: could not be downloaded ({reason}); try again, or give a local path") from error
    raise WeightsError(
        f"{name}: a repository without weights that can be read here; expected {' or '.join(WEIGHT_FILES)}; give "
        "another one, or download the file and give its path"
    )
