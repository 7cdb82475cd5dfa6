"""The origin's reference tensors."""

from pathlib import Path

from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden" / "origin-golden.safetensors"
PREFIX = "state."


def read_golden():
    """All tensors of the file, and of these the state dict under the origin's own names."""
    tensors = load_file(GOLDEN)
    state = {
        name.removeprefix(PREFIX): value
        for name, value in tensors.items()
        if name.startswith(PREFIX)
    }
    return tensors, state
