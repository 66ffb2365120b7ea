"""The one exception for mistakes that the user can correct."""


class UserError(ValueError):
    """A mistake outside the program (a file, a flag, a missing package), told in one sentence with the value and a fix.

    Everything else that is raised is a bug and keeps its traceback.
    """


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Refuses the value of a setting unless `holds`: "name=value is not wanted".

    Raises:
        UserError: that sentence.
    """
    if not holds:
        raise UserError(f"{name}={value!r} is not {wanted}")
