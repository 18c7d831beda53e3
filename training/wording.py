"""Numbers and errors in words."""

TRUE_STATISTICS = "with each patch's true mean and variance"  # for the PSNR of predicted normalized patches


def in_bytes(count: float) -> str:
    """Return a number of bytes in words: "1.79 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def in_time(seconds: float) -> str:
    """Return a time in words: "41.3 hours"."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def several(count: int, noun: str) -> str:
    """Return a number of things in words: "1 process", "2 processes"."""
    plural = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count} {noun}{'' if count == 1 else plural}"


def count_targets(count: int, target: str) -> str:
    """Return a number of classes, labels or numbers in words: "10 classes", "1 label"."""
    return several(count, {"classes": "class", "labels": "label", "numbers": "number"}[target])


def in_one_line(error: BaseException) -> str:
    """Return the message of an exception in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def as_typed(value) -> str:
    """Return a flag's value, or its values, as they are typed: "0.9 0.95"."""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{v:g}" if isinstance(v, float) and float(f"{v:g}") == v else str(v) for v in values)


def as_flags(settings: dict) -> str:
    """Return settings as the flags to give: {"model": "base", "tf32": False} -> "--model base --no-tf32"."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name} {as_typed(0 if value is None else value)}")
    return " ".join(flags)
