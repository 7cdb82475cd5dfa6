"""Every exception of the pipeline and the jobs, and the kinds of failure that become rows.

Segformer3dError
|- UserError              the user's mistake: one line, exit code 2
|  `- ConflictError       the output holds another job, or this one with other settings
|- StorageError           an object or a file could not be read or written
|  |- ObjectNotFoundError
|  |- ObjectForbiddenError
|  |  `- CredentialsError   ours are expired or unknown: no object's fault
|  `- StoreUnavailableError   transient: worth another try
|- InputError             one frame or asset is bad: becomes a typed row, never ends a job
`- JobError               the run cannot go on; nothing committed is lost
"""

from typing import Literal, get_args

ErrorKind = Literal[
    "fetch",
    "not_found",
    "forbidden",
    "too_large",
    "truncated",
    "corrupt",
    "unsupported",
    "timeout",
    "crash",
    "out_of_memory",
    "non_finite",
    "count_mismatch",
]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)

# What a damaged object makes its reader raise, pyarrow's own exceptions aside.
DAMAGE: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    OSError,
)


class Segformer3dError(Exception):
    """Base of all errors that this project raises on purpose."""


class UserError(Segformer3dError):
    """The user's mistake; the message says what is wrong and how to mend it, in one line."""


class ConflictError(UserError):
    """The output already holds another job, or this job with other settings."""


class StorageError(Segformer3dError):
    """An object or a file could not be read or written."""


class ObjectNotFoundError(StorageError):
    """No object at that key."""


class ObjectForbiddenError(StorageError):
    """The store refuses access."""


class CredentialsError(ObjectForbiddenError):
    """The store does not know us, or no longer; says nothing of the object."""


class ObjectExistsError(StorageError):
    """A create-only write found an object in place; it may be the writer's own."""


class StoreUnavailableError(StorageError):
    """A transient fault of the store; another try may pass."""


class InputError(Segformer3dError):
    """One frame or one asset cannot be read; it becomes a row with this kind and message.

    Args:
        kind: One of ``ERROR_KINDS``.
        message: One line for the ``error`` column.
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message


class JobError(Segformer3dError):
    """The run cannot go on; what is committed stays, and the job can be resumed."""


def one_line(message: str) -> str:
    """A message as a terminal may show it, whatever file it came from: no breaks, no controls."""
    return without_controls(" ".join(message.split()))


def without_controls(line: str) -> str:
    """A line of ours in which a stranger's words stand, with the spaces that it has."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line)
