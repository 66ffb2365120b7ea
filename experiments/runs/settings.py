"""What settings must fulfil, said in one sentence with the flag and the value."""

from collections.abc import Iterable

from dinojax.errors import UserError


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raises a `UserError` unless `holds`; `wanted` ends the sentence "--name value is not …"."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value} is not {wanted}")


def require_positive(config: object, names: Iterable[str]) -> None:
    """Raises a `UserError` where one of these attributes is neither None nor above 0."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, name, value, "a positive number")
