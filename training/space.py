"""Write a Hugging Face Space: a folder with demo.py, the packages it imports, and a README; it runs on its own."""

import re
import shutil
from pathlib import Path

from huggingface_hub import SpaceCardData

from training.card import TAG

ROOT = Path(__file__).parent.parent
MODEL = "model"  # the folder of the weights
PACKAGES = {"modeling": ["*.py"], "data": ["*.py", "ade20k.txt"], "training": ["*.py", "card.md.jinja"]}
PYTHON = "3.12"  # the default of Spaces is older than what pyproject.toml requires
APP = f'''"""Show what the model in {MODEL}/ does with an image; see demo.py."""

from pathlib import Path

from demo import main

if __name__ == "__main__":
    main([str(Path(__file__).parent / "{MODEL}")])
'''
TEXT = """
# {title}

{description}

Written by `push_to_hub.py` of mae-accelerate from {origin}. `pip install -r requirements.txt && python app.py` shows
the same page on your own machine. Uploads are deleted after about ten minutes.
"""


def write_space(folder: Path, *, title: str, description: str, origin: str, license: str, datasets: list[str]) -> None:
    """Write all files of a Space but the weights, which belong in `folder`/model.

    Args:
        folder: an existing folder.
        title: the title of the Space.
        description: one line on the model.
        origin: the run or the weights that it comes from.
        license: as the Hub spells it.
        datasets: names of the training data on the Hub.
    """
    (folder / "app.py").write_text(APP)
    for name in ("demo.py", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    for package, patterns in PACKAGES.items():
        (folder / package).mkdir()
        for path in sorted(path for pattern in patterns for path in (ROOT / package).glob(pattern)):
            shutil.copyfile(path, folder / package / path.name)
    needed = (ROOT / "requirements.txt").read_text().partition("\n# ")[0]  # without the optional packages
    gradio = re.search(r"^gradio>=(.*)$", (ROOT / "requirements-demo.txt").read_text(), re.MULTILINE)
    (folder / "requirements.txt").write_text(f"{needed}\n{gradio[0]}\n")
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=gradio[1],
        python_version=PYTHON,
        app_file="app.py",
        license=license,
        datasets=datasets or None,
        tags=[TAG, "masked-autoencoder"],
    )
    text = TEXT.format(title=title, description=description, origin=origin)
    (folder / "README.md").write_bytes(f"---\n{data.to_yaml()}\n---\n{text}".encode(errors="backslashreplace"))
