"""The run-time type checker of the tests: beartype, where an int also serves as a float (as type checkers agree)."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
