"""What is told of a weights file without torch is what torch would say."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from segformer3d.config import METRIC_DEPTH, ModelConfig, WeightsInfo
from segformer3d.model import build_model
from segformer3d.tensor_shapes import tensor_shapes
from segformer3d.weights import model_from_bytes, untrained_weights
from segformer3d.weights_file import (
    METADATA_KEY,
    WeightsError,
    bundled_weights,
    check_weights,
    read_info,
)

TINY = "mit:16,32,80,128:1,2,2,1"


@pytest.mark.parametrize("variant", [*(f"mit_b{number}" for number in range(6)), TINY])
@pytest.mark.parametrize("heads", [(19, True), (19, False), (None, True)])
def test_shapes_are_those_of_the_model(variant, heads):
    num_classes, has_depth = heads
    config = ModelConfig(
        variant=variant, head_width=48, num_classes=num_classes, has_depth=has_depth
    )
    with torch.device("meta"):
        state = build_model(config).state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    assert tensor_shapes(config) == expected


def test_good_files_say_what_they_are():
    for data in (bundled_weights(), untrained_weights(TINY), untrained_weights("timm:resnet18")):
        assert check_weights(data) == model_from_bytes(data)[1]


def test_bad_files_are_refused_as_by_torch():
    whole = untrained_weights(TINY)
    state = load(whole)
    info = check_weights(whole)
    name = "encoder.stages.0.norm.bias"
    lacking = {key: value for key, value in state.items() if key != name}
    bad = [
        b"",
        b"nonsense",
        whole[:-10],
        whole + b"more",
        as_file(lacking, info),
        as_file(state | {"more": torch.zeros(1)}, info),
        as_file(state | {name: torch.zeros(17)}, info),
        as_file(state, replace(info, config=replace(info.config, head_width=128))),
        as_file(
            state, replace(info, config=replace(info.config, has_depth=False), depth_codec=None)
        ),
        with_header(whole, lambda header: header[name].update(dtype="F63")),
        with_header(whole, lambda header: header[name].update(dtype=["F32"])),
        with_header(whole, lambda header: header[name].update(dtype="F4", shape=[128])),
        with_header(whole, lambda header: header[name].update(data_offsets=[0, math.inf])),
        with_header(whole, lambda header: header[name].update(shape=[3])),
        with_header(whole, lambda header: header[name].update(data_offsets=[0, 64])),
        with_header(whole, lambda header: header[name].pop("dtype")),
    ]
    for data in bad:
        assert refusal(check_weights, data) == refusal(model_from_bytes, data)


def refusal(read, data):
    with pytest.raises(WeightsError) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_file(state, info):
    return save(state, {METADATA_KEY: json.dumps(info.to_dict())})


def with_header(data, change):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_only_timm_knows_its_own_layers():
    with pytest.raises(ValueError, match="timm alone"):
        tensor_shapes(ModelConfig(variant="timm:resnet18"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_no_numbers_are_refused(dtype, value):
    data = untrained_weights(TINY)
    state = {name: held.to(getattr(torch, dtype)) for name, held in load(data).items()}
    assert check_weights(as_file(state, read_info(data))) == read_info(data)
    name = sorted(state)[7]
    state[name].view(-1)[-1] = float(value)
    for reader in (check_weights, model_from_bytes):
        with pytest.raises(WeightsError, match=f"no finite numbers in {re.escape(name)}$"):
            reader(as_file(state, read_info(data)))


def test_a_driver_checks_weights_without_torch(tmp_path):
    """It would cost it two seconds and half a gigabyte."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(untrained_weights(TINY))
    program = (
        "import sys\n"
        "from jobs.claim import load_weights, make_record\n"
        "from jobs.spec import check_spec\n"
        "fields = {'input': {'url': '/in'}, 'output': {'url': '/out'}}\n"
        "for weights in (None, sys.argv[1]):\n"
        "    spec = check_spec(fields | {'model': {'weights': weights}}, 'the job')\n"
        "    assert len(make_record(spec, load_weights(spec)).labels) == 19\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_file_without_tensors_is_refused():
    info = WeightsInfo(config=ModelConfig(), depth_codec=METRIC_DEPTH, training_data="none")
    with pytest.raises(WeightsError, match="tensors are missing"):
        check_weights(as_file({}, info))
