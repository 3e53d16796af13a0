"""Checks that several sections of the config share."""


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse a value below `low` or above `high`."""
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")
