"""The user's mistakes. No torch here: the server's parent process and the command line read it."""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class UserError(ValueError):
    """A mistake of the caller's: the message names the field, its value and what is allowed. The CLI exits with 2."""

    told: ClassVar[bool] = False  # whether another process of the same command tells the user


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a registry: says which names are near and which exist."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")
