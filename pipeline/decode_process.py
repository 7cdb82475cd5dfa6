"""One decoding child: how it is started, heard, found dead and ended."""

import os
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

from pipeline.decode_messages import Event, Request, receive_event, send_request
from pipeline.errors import ErrorKind, JobError
from pipeline.sources.assets import DecodeLimits

_START_DEADLINE_S = 120.0
_EXIT_S = 5.0
# Of glibc; larger buffers go back to the kernel at once, and so does what is free beyond.
_KEEP_BUFFERS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}

_children: "weakref.WeakSet[DecodeProcess]" = weakref.WeakSet()


class DecodeProcess:
    """One process of ``pipeline.decode_child`` and the socket to it."""

    def __init__(self, limits: DecodeLimits) -> None:
        self.channel, theirs = socket.socketpair()
        self._stderr = os.memfd_create("decode-stderr")
        arguments = [str(theirs.fileno()), str(limits.memory_bytes)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.decode_child", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                env=_environment(limits),
            )
        self._finalizer = weakref.finalize(
            self, _end, self.process, self.channel, self._stderr, os.getpid()
        )
        self._await_ready()
        _children.add(self)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def send(self, request: Request, fd: int | None) -> None:
        """Hand over a request."""
        send_request(self.channel, request, fd)

    def receive(self, timeout_s: float) -> Event:
        """The next event.

        Raises:
            TimeoutError: The child is silent.
            EOFError: It is gone.
            ValueError: It talks nonsense.
        """
        self.channel.settimeout(timeout_s)
        return receive_event(self.channel)

    def autopsy(self) -> tuple[str, ErrorKind]:
        """What it died of."""
        try:
            code = self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return "the decoder stopped making sense", "crash"
        if code == -signal.SIGALRM:
            return "the decoder made no progress", "timeout"
        if code < 0:
            return f"the decoder was ended by {_signal_name(-code)}", "crash"
        return f"the decoder ended with exit code {code}", "crash"

    def end(self) -> None:
        """Kill it and release what it held."""
        self._finalizer()

    def abandon(self) -> None:
        """After a fork: it is the parent's child, and this is only a copy of the handle."""
        self._finalizer.detach()
        self.channel.close()
        os.close(self._stderr)
        self.process.returncode = 0

    def _await_ready(self) -> None:
        try:
            if self.receive(_START_DEADLINE_S) == ["ready"]:
                return
            reason = "it does not say that it is ready"
        except (EOFError, OSError, ValueError) as error:
            lines = os.pread(self._stderr, 1 << 16, 0).decode(errors="replace").splitlines()
            reason = lines[-1] if lines else f"{type(error).__name__} {error}"
        self.end()
        raise JobError(f"the decoding child does not start: {reason}")


def _end(
    process: subprocess.Popen[bytes], channel: socket.socket, stderr: int, owner_pid: int
) -> None:
    channel.close()
    os.close(stderr)
    if os.getpid() != owner_pid:
        return
    process.kill()
    process.wait()


def _environment(limits: DecodeLimits) -> dict[str, str]:
    """The parent's environment, its import path, and one thread for every library.

    The allocator keeps freed buffers of a picture's size, unless told otherwise: new ones are
    cleared by the kernel page by page, which costs as much as decoding into them.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return (
        _KEEP_BUFFERS
        | inherited
        | {
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
            "OPENCV_IO_MAX_IMAGE_PIXELS": str(limits.max_pixels),
            "OPENCV_LOG_LEVEL": "OFF",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def abandon_all() -> None:
    """After a fork: the parent's children are none of ours."""
    for child in list(_children):
        child.abandon()
    _children.clear()
