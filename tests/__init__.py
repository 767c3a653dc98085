"""The tests, which mirror the packages; here the checker of every annotation while they run."""

from beartype import BeartypeConf, beartype

# int is accepted where float is asked for (PEP 484).
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
