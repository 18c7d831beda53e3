"""Weights on the Hugging Face Hub: hf:OWNER/NAME[@revision] -> those of its files that are read here, in the cache."""

import contextlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

PREFIX = "hf:"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class HubError(ValueError):
    """A name on the Hub that leads to no weights; the message has the name, what was expected, the remedy."""


def is_on_hub(path: str | Path) -> bool:
    """Whether `path` is a name on the Hub and not a local one."""
    return str(path).startswith(PREFIX)


def download(name: str, *, weight_files: Sequence[str], subfolders: Sequence[str]) -> Path:
    """The local folder of a repository, hf:OWNER/NAME[@revision], with the first of `weight_files` that is in the first
    of `subfolders` ("" is the repository itself) with any of them, and the configurations beside it; or the only
    file of weights that there is, under another name.

    Nothing is downloaded twice; without a network, what is in the cache is used. Raises HubError.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    options = dict(repo_id=repository, revision=revision or None)
    choices = [PurePosixPath(subfolder, weights) for subfolder in subfolders for weights in weight_files]
    expected = f"expected {PREFIX}OWNER/NAME[@revision]"
    if repository.count("/") != 1:  # the Hub also has names without an owner, but none of a ViT
        raise HubError(f"{name}: no name of a repository; {expected}; correct it")
    try:
        try:
            files = [file.rfilename for file in HfApi().model_info(**options).siblings]
        except errors.HfHubHTTPError:  # the Hub's own answer
            raise
        except (errors.HTTPError, OSError):
            return _cached(name, options, choices)
        wanted = _wanted(files, choices)
        if not wanted:
            raise HubError(
                f"{name}: a repository without weights that can be read here; expected {' or '.join(weight_files)}; "
                "give another one, or download the file and give its path"
            )
        folder = Path(snapshot_download(**options, allow_patterns=wanted))
        weights = PurePosixPath(wanted[0])
        return folder if weights.name in weight_files else folder / weights
    except errors.HFValidationError as error:
        raise HubError(f"{name}: no name that the Hub has ({_line(error)}); {expected}; correct it") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name}: its owner has to let you in first; ask on its page on the Hub, then log in with hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name}: has no revision {revision}; expected a branch, tag or commit; correct it") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: no such repository of models, or a private one; correct the name, or log in with hf auth login "
            "(and make sure that your token has not expired)"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise HubError(f"{name}: could not be downloaded ({_line(error)}); try again, or give a local path") from error


def _cached(name: str, options: dict, choices: list[PurePosixPath]) -> Path:
    """The folder of the cache with the first of `choices` that it holds, or the only file of weights that the
    repository has. Raises HubError."""
    from huggingface_hub import errors, snapshot_download, try_to_load_from_cache

    for weights in choices:
        found = try_to_load_from_cache(filename=str(weights), **options)
        if isinstance(found, str):
            return Path(found).parents[len(weights.parts) - 1]
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        folder = Path(snapshot_download(**options, allow_patterns=patterns, local_files_only=True))
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
        if len(files) == 1:
            return files[0]
    raise HubError(
        f"{name}: the Hub cannot be reached, and no weights of it are in the cache; connect, or give a local path"
    )


def _wanted(files: list[str], choices: list[PurePosixPath]) -> list[str]:
    """The file of weights among the `files` of a repository, one of `choices` or the only one, and the configurations
    that lie beside it; [] for none."""
    paths = [PurePosixPath(file) for file in files]
    weights = next((path for path in choices if path in paths), None)
    if weights is None:
        others = [path for path in paths if path.suffix in SUFFIXES]
        weights = others[0] if len(others) == 1 else None
    if weights is None:
        return []
    beside = [path for path in paths if path.parent == weights.parent and path.suffix == ".json"]
    return [str(weights), *map(str, beside)]


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
