"""The run-time checker behind jaxtyping's import hook: beartype, with an int accepted as a float (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
