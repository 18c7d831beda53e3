"""Words of a command line: recipe files, and `~` for the home folder."""

import codecs
import os
import re
import shlex
from pathlib import Path

# Quoted text, which stays, or a comment; shlex would cut words at their first #
COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)#.*""")


def expand(words: list[str]) -> tuple[list[str], list[str]]:
    """Replace every `@FILE` by the words of that file, and `~` by the home folder; return errors, too.

    A word that is the name of a file, with its @, stays.
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
    """Return the text of a recipe, without a byte order mark, comments, and backslashes at the ends of lines."""
    data = path.read_bytes()
    text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    text = COMMENT.sub(lambda found: found[1] or "", "\n".join(text.splitlines()).replace("\u00a0", " "))
    return text.replace("\\\n", "\n")
