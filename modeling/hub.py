"""Find weights: a file, a folder, a run, or a repository on the Hugging Face Hub, which is downloaded."""

import re
from pathlib import Path, PurePosixPath

from modeling.files import WEIGHT_FILES, WeightsError

PREFIX = "hf:"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def is_on_hub(path: str | Path) -> bool:
    """Return whether `path` is a name on the Hub."""
    return str(path).startswith(PREFIX)


def find_weights(path: str | Path, *, whole: bool) -> Path:
    """Return the file or folder that `read_state_dict` is to read for a path, which may also be a run.

    Args:
        path: a file or folder with weights, which is returned as it is; the folder of a run or its `encoder/`; or
            hf:OWNER/NAME[@revision], which is downloaded.
        whole: prefer the autoencoder, `encoder/pretraining/`, to the encoder, `encoder/`. A fine-tuned model is in
            `model/`. A run that has none of these yet has its newest whole checkpoint.

    Raises:
        WeightsError: if there is no such path, or no weights there.
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
    for folder in [*exported, *sorted(path.glob("checkpoints/step_*"), reverse=True)]:
        # A run writes these files last: without one, the folder is half written or half removed.
        finished = folder == path or (folder / "config.json").is_file() or (folder / "state.json").is_file()
        if finished and any((folder / name).is_file() for name in WEIGHT_FILES):
            return folder
    raise WeightsError(
        f"{path}: a folder without weights; expected {' or '.join(WEIGHT_FILES)}, or a run's encoder/, model/ or whole "
        "checkpoint; give one of these or the file itself, or wait for the first checkpoint of the run"
    )


def download(name: str, *, whole: bool) -> Path:
    """Download weights and the configurations beside them; offline, the cache is used.

    Args:
        name: hf:OWNER/NAME[@revision].
        whole: prefer the autoencoder in `pretraining/`.

    Returns:
        The local folder of the weights, or the file if it is the only one with weights and has another name.

    Raises:
        WeightsError: if there is no such repository or revision, no weights in it, or no access.
    """
    from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    options = dict(repo_id=repository, revision=revision or None)
    folders = ["pretraining", ""] if whole else [""]
    choices = [PurePosixPath(folder, file) for folder in folders for file in WEIGHT_FILES]
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise WeightsError(f"{name}: no name of a repository; expected {PREFIX}OWNER/NAME[@revision]; correct it")
    try:
        try:
            paths = [PurePosixPath(file.rfilename) for file in HfApi().model_info(**options).siblings]
        except errors.HfHubHTTPError:  # an answer of the Hub, such as an unknown name
            raise
        except (errors.HTTPError, OSError) as error:
            for weights in choices:
                file = try_to_load_from_cache(filename=str(weights), **options)
                if isinstance(file, str):
                    return Path(file).parents[len(weights.parts) - 1]
            raise WeightsError(
                f"{name}: the Hub cannot be reached, and no weights of it are in the cache; connect, or give a path"
            ) from error
        candidates = [path for path in choices if path in paths]
        others = [path for path in paths if path.suffix in SUFFIXES]
        if not candidates and len(others) != 1:
            raise WeightsError(
                f"{name}: a repository without weights that can be read here; expected {' or '.join(WEIGHT_FILES)}; "
                "give another one, or download the file and give its path"
            )
        weights = (candidates or others)[0]
        configurations = [path for path in paths if path.parent == weights.parent and path.suffix == ".json"]
        folder = Path(snapshot_download(**options, allow_patterns=[str(weights), *map(str, configurations)]))
        return folder if candidates else folder / weights
    except errors.GatedRepoError as error:
        raise WeightsError(f"{name}: a gated repository; ask for access on its page, then run hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(
            f"{name}: has no revision {revision}; expected a branch, tag or commit; correct it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{name}: no such model repository, or a private one; correct the name, or log in with hf auth login (and "
            "make sure that your token has not expired)"
        ) from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{name}: could not be downloaded ({reason}); try again, or give a local path") from error
