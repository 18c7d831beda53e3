"""Expand recipe files and `~` in a command line, and suggest flags for unknown ones."""

import codecs
import difflib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# Quoted text, which stays, or a comment; shlex would also take a # inside a word for a comment
COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)#.*""")


WEIGHTS = ("path_to_pretrained_mae_weights", "path_to_backbone_checkpoint", "init_from")
# Flag of other projects -> flags of this one; the first that the script has is suggested
USUAL = {
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), ("learning_rate",)),
    **dict.fromkeys(("blr", "base_lr"), ("base_learning_rate", "learning_rate")),
    "min_lr": ("min_learning_rate",),
    **dict.fromkeys(("batch_size", "bs", "b"), ("global_batch_size",)),
    "accum_iter": ("gradient_accumulation_steps",),
    "wd": ("weight_decay",),
    "clip_grad": ("max_grad_norm",),
    **dict.fromkeys(("data", "data_path", "data_dir", "data_root", "dataset"), ("path_to_data",)),
    **dict.fromkeys(("output_dir", "output", "save_dir"), ("working_directory", "output")),
    "resume": ("resume_from_checkpoint",),
    **dict.fromkeys(("workers", "j"), ("num_workers",)),
    **dict.fromkeys(("input_size", "image_size", "imgsz"), ("img_size", "crop_size")),
    **dict.fromkeys(("finetune", "pretrained", "weights", "checkpoint"), WEIGHTS),
    "nb_classes": ("num_classes",),
    **dict.fromkeys(("name", "exp_name", "run_name"), ("experiment_name",)),
    "eval": ("eval_only",),
}


def suggest(word: str, known: Sequence[str]) -> str | None:
    """Return the `known` flag that an unknown one probably means, by USUAL or by its spelling; None without one."""
    name = word.strip("-").replace("-", "_")
    usual = [f"--{flag}" for flag in USUAL.get(name, ())]
    similar = [flag for flag in usual if flag in known]
    if name not in USUAL:
        similar = difflib.get_close_matches(word, known, n=1)
    return similar[0] if similar else None


def expand(words: list[str]) -> tuple[list[str], list[str]]:
    """Replace every `@FILE` by the words of that file, and `~` by the home folder; return errors, too.

    A word stays if a file has this name, including the @.
    """
    expanded, errors = [], []
    for word in words:
        if not word.startswith("@") or Path(word).exists():
            expanded.append(word)
            continue
        try:
            expanded += shlex.split(_read_recipe(Path(expand_home(word[1:]))))
        except OSError as error:
            remedy = "expected a file of flags; a value that begins with @ is written --FLAG=@VALUE, a path ./@NAME"
            errors.append(f"the recipe {word[1:]} cannot be read ({error.strerror}); {remedy}")
        except ValueError as error:
            errors.append(f"the recipe {word[1:]} cannot be read ({error}); expected flags as a shell would split them")
    return [expand_home(word) for word in expanded], errors


def expand_home(word: str) -> str:
    """Replace the `~` that begins a word, or the value behind `--flag=`, by the home folder, as a shell would."""
    flag, sign, value = word.partition("=") if re.match(r"--\w+=~", word) else ("", "", word)
    return f"{flag}{sign}{os.path.expanduser(value)}"


def _read_recipe(path: Path) -> str:
    """Return the text of a recipe, without byte order mark, comments, no-break spaces and backslashes at line ends."""
    data = path.read_bytes()
    text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    text = COMMENT.sub(lambda found: found[1] or "", "\n".join(text.splitlines()).replace("\u00a0", " "))
    return text.replace("\\\n", "\n")
