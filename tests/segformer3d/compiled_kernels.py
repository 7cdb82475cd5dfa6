"""Compile the GPU's kernels, for a Hopper above all, where there is none; look at what came out.

No test file by itself: test_gpu.py runs it in a process of its own, where nobody has told Triton
to interpret. Prints how many kernels use tensor cores.

Triton 3.6 and 3.7 bring ptxas 12.8, which now and then computes the upper half of the address of a
tensor core's operand from a register that holds something else: the kernel then reads beyond its
shared memory, and the process loses its GPU. Which kernels are hit hangs on their layouts; those
whose operands lie along the summed axis were not. What is compiled here is looked through for it.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from segformer3d import gpu_blocks as blocks
from segformer3d import gpu_kernels as kernels

HOPPER, ADA, BLACKWELL = 90, 89, 100
# Two blocks of a kernel fit into a multiprocessor of a Hopper; elsewhere one does.
SHARED_MAX = {HOPPER: 113 << 10, ADA: 99 << 10, BLACKWELL: 227 << 10}
BF16 = {"x_ptr", "weight_ptr", "query_ptr", "kv_ptr", "out_weight_ptr", "finest_ptr", "out_ptr"}
BF16 |= {"low1_ptr", "low2_ptr", "low3_ptr", "predict_ptr"}
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
WRITES = re.compile(r"\b(?:U[A-Z0-9_.]+|[A-Z0-9]+2UR[A-Z0-9.]*) UR(\d+)")
UPPER_HALF = re.compile(r"UIADD3\.X UR\d+, UR(\d+), -?0x[0-9a-f]+, URZ")


def compiled(kernel, types=None, *, odd=(), launch=None, arch=HOPPER, **constants):
    """Compile as at a launch; return whether tensor cores are used.

    Triton is told what 16 divides, as of most sizes it does, and then makes other code of it;
    `odd` names what it does not divide.
    """
    launch = dict(launch or {})
    options = {name: launch.pop(name) for name in list(launch) if name.startswith("num_")}
    constants |= launch
    types = {"eps": "fp32"} | (types or {})
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name) or ("*bf16" if name in BF16 else "*fp32" if "_ptr" in name else "i32")
        for name in kernel.arg_names
    }
    hints = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("outputs", "classes", "eps", *odd)
    }
    source = ASTSource(kernel, signature, constants, hints)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    name = f"{kernel.fn.__name__} {constants}"
    assert made.metadata.shared <= SHARED_MAX[arch], (name, made.metadata.shared)
    if arch != HOPPER:
        return False
    assert not (bad := wrong_addresses(made.asm["cubin"])), (name, bad)
    return "wgmma" in made.asm["ptx"]


def wrong_addresses(cubin):
    """The instructions that add to an upper half that was not set to zero before."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [NVDISASM, "-c", file.name], capture_output=True, text=True, check=True
        )
    last, wrong = {}, []
    for line in shown.stdout.splitlines():
        if (adds := UPPER_HALF.search(line)) and not re.search(
            rf"UMOV UR{adds[1]}, URZ", last.get(int(adds[1]), "")
        ):
            wrong.append(line.strip())
        if writes := WRITES.search(line):
            register = int(writes[1])
            last[register] = line
            if ".64" in writes[0] or ".WIDE" in writes[0]:
                last[register + 1] = line
    return wrong


def _heads(channels, **more):
    around = {f"AROUND{place}": kernels._around(2**place) for place in (1, 2, 3)}
    launch = kernels.HEADS | around | {"CHANNELS": channels, "OUTPUTS": 32}
    return compiled(kernels._heads, {"out_ptr": "*fp32"}, launch=launch, **more)


def _attend(channels, width, *, odd=()):
    launch = blocks.ATTENTION if width >= 64 else blocks.THIN_ATTENTION
    sizes = {"CHANNELS": channels, "WIDTH": width, "OWN": width}
    return compiled(
        blocks._attend,
        odd=odd,
        launch=launch,
        IS_ONLY=channels == width,
        IS_EVEN="keys" not in odd,
        **sizes,
    )


def main():
    """Compile all; the narrow widths are those of B0, then of the others."""
    plain = {"weight_ptr": "*fp32"}
    compiled(blocks._depthwise_gelu, plain, launch=blocks.CONVOLUTION)
    compiled(
        blocks._depthwise_gelu,
        plain,
        launch=blocks.CONVOLUTION,
        odd=("channels",),
        height=1,
        width=1,
    )
    for types in ({}, {"x_ptr": "*fp32"}):
        compiled(blocks._norm, types, ROWS=16, CHANNELS=256, SHARES=1 if not types else 8)
    ids = {"out_ptr": "*u8"}
    compiled(kernels._class_ids, ids, ROW=kernels._ROW)
    # Triton takes what is 1 for a constant, such as the sides of a small frame's last map.
    compiled(kernels._class_ids, ids, ROW=kernels._ROW, grid_h=1, grid_w=1, classes=1)
    compiled(kernels._class_ids_of_cells, ids, launch=kernels.IDS)
    on_tensor_cores = [
        *(_attend(*sizes) for sizes in ((32, 32), (64, 32), (64, 64), (128, 64))),
        _attend(16, 16, odd=("channels", "keys", "tokens")),
        *(_attend(*sizes, odd=("keys",)) for sizes in ((64, 32), (64, 64))),
        *(_heads(channels) for channels in (32, 64)),
        _heads(64, odd=("height", "width")),
        _heads(16, odd=("channels", "hidden"), outputs=1, classes=1),
    ]
    for channels in (32, 64, 128):
        launch = {"CHANNELS": channels}
        on_tensor_cores.append(compiled(blocks._norm_linear, launch=blocks.PRODUCT | launch))
    for channels in (32, 64):
        launch = blocks.STEM | {"CHANNELS": channels, "NUM_TAPS": blocks.TAPS}
        launch |= {"BYTES": blocks.TAP_BYTES, "STRIDE": blocks.STEM_STRIDE}
        on_tensor_cores.append(compiled(blocks._stem, {"pixels_ptr": "*u8"}, launch=launch))
    for stride, odd in ((8, ()), (4, ()), (8, ("grid_h", "grid_w", "count"))):
        launch = blocks.REDUCTION | {"STRIDE": stride}
        made = compiled(blocks._reduce, {"out_ptr": "*fp32"}, odd=odd, launch=launch)
        on_tensor_cores.append(made)
    # What needs most, for other GPUs.
    for arch in (ADA, BLACKWELL):
        _heads(64, arch=arch)
    print(f"{sum(on_tensor_cores)} of {len(on_tensor_cores)} use tensor cores")


if __name__ == "__main__":
    main()
