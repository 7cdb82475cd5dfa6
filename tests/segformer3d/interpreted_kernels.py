"""The GPU's kernels by Triton's interpreter, and the network made of them.

No test file by itself: Triton must know that it is to interpret before it is first imported, and
others may have imported it in the same process. test_gpu.py runs this in a process of its own.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional

from segformer3d import gpu_blocks as blocks
from segformer3d import gpu_kernels as kernels
from segformer3d import gpu_network
from segformer3d.config import Preprocessing
from segformer3d.gpu_encoder import GpuEncoder
from segformer3d.gpu_launch import compile_together
from segformer3d.heads import FoldedHeads
from segformer3d.layers import resize_bilinear
from segformer3d.network import Input, Network
from tests.segformer3d.random_models import CONFIG, varied_model

SIZE = (32, 32)

# What is not finite makes numpy warn, which the interpreter computes with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def test_it_is_the_interpreter_that_runs():
    assert "Interpreted" in type(kernels._heads).__name__


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pixels_of(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


def norm_of(channels, eps=1e-5):
    return blocks.Norm(random(channels), 1 + random(channels), random(channels + 1)[1:], eps)


def normed_by_torch(x, norm):
    return functional.layer_norm(x + norm.shift, x.shape[-1:], norm.scale, norm.bias, norm.eps)


@pytest.mark.parametrize("channels", [6, 40, 130])
def test_norms_are_those_of_torch(channels):
    x, norm = random(3, 5, channels), norm_of(channels)
    torch.testing.assert_close(
        blocks.layer_norm(x, norm), normed_by_torch(x, norm), rtol=1e-4, atol=1e-4
    )


def test_what_is_only_compiled_does_not_run(monkeypatch):
    x, norm = random(3, 40), norm_of(40)
    monkeypatch.setattr(blocks.torch, "empty_like", torch.zeros_like)
    made = []
    compile_together(lambda: made.append(blocks.layer_norm(x, norm)))
    assert not made[0].any()
    torch.testing.assert_close(
        blocks.layer_norm(x, norm), normed_by_torch(x, norm), rtol=1e-4, atol=1e-4
    )


def test_a_norm_and_a_product_are_those_of_torch():
    x, norm, weight_cf, bias_f = random(3, 50, 40), norm_of(40), random(40, 70), random(70)
    expected = normed_by_torch(x, norm) @ weight_cf + bias_f
    actual = blocks.norm_linear(x, norm, weight_cf, bias_f)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height", [5, 8, 17])
def test_convolution_and_activation_are_those_of_torch(height):
    x_bhwc, weight_9c, bias_c = random(2, height, 37, 70), random(9, 70), random(70)
    weight = weight_9c.T.reshape(70, 1, 3, 3)
    convolved = functional.conv2d(x_bhwc.permute(0, 3, 1, 2), weight, bias_c, padding=1, groups=70)
    expected = functional.gelu(convolved, approximate="tanh").permute(0, 2, 3, 1)
    actual = blocks.depthwise_gelu(x_bhwc, weight_9c, bias_c)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_activation_is_that_of_torch_far_from_zero_too():
    x_bhwc = torch.linspace(-30, 30, 2001).reshape(1, 1, 1, 2001)
    weight_9c = torch.zeros(9, 2001)
    weight_9c[4] = 1
    actual = blocks.depthwise_gelu(x_bhwc, weight_9c, torch.zeros(2001))
    torch.testing.assert_close(actual, functional.gelu(x_bhwc), rtol=0, atol=5e-4)
    x_bhwc = torch.tensor([float("nan"), float("inf")]).reshape(2, 1, 1, 1)
    assert not blocks.depthwise_gelu(x_bhwc, weight_9c[:, :1], torch.zeros(1)).isfinite().any()


def parts_of_heads(channels=40, hidden=80, height=16, width=24):
    lows = [random(2, height // scale, width // scale, hidden) for scale in (2, 4, 8)]
    predict_no = torch.zeros(hidden, 32)
    predict_no[: hidden // 2, :19], predict_no[hidden // 2 :, 19] = (
        random(hidden // 2, 19),
        random(hidden - hidden // 2),
    )
    bias_o = torch.cat([random(20), torch.zeros(12)])
    return (
        random(2, height, width, channels),
        lows,
        random(channels, hidden),
        predict_no.T.contiguous(),
        bias_o,
    )


def heads_by_torch(finest, lows, weight_cn, predict_on, bias_o):
    hidden = (finest @ weight_cn).permute(0, 3, 1, 2)
    for low in lows:
        hidden = hidden + resize_bilinear(low.permute(0, 3, 1, 2), tuple(hidden.shape[2:]))
    outs = hidden.relu().permute(0, 2, 3, 1) @ predict_on.T + bias_o
    return outs[..., :20].permute(0, 3, 1, 2)


def test_heads_are_those_of_torch():
    parts = parts_of_heads()
    expected = heads_by_torch(*parts)
    outs, confidence, entropy, num_bad = kernels.fused_heads(*parts, outputs=20, classes=19)
    torch.testing.assert_close(outs, expected, rtol=1e-4, atol=1e-3)
    log_p = expected[:, :19].log_softmax(1)
    torch.testing.assert_close(confidence, log_p.exp().amax(1).mean((1, 2)), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        entropy, -(log_p.exp() * log_p).sum(1).mean((1, 2)), rtol=1e-3, atol=1e-5
    )
    assert num_bad.tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_heads_count_what_is_not_finite(value):
    finest, lows, *rest = parts_of_heads()
    finest[1, 3, 3, 2] = value
    *_, num_bad = kernels.fused_heads(finest, lows, *rest, outputs=20, classes=19)
    assert num_bad[0] == 0
    assert num_bad[1] > 0


def test_heads_refuse_what_their_kernel_cannot_hold():
    finest, lows, *rest = parts_of_heads()
    with pytest.raises(ValueError, match=r"maps of \[\(8, 12\), \(4, 6\), \(2, 3\)\] are needed"):
        kernels.fused_heads(finest, lows[:2], *rest, outputs=20, classes=19)
    with pytest.raises(ValueError, match="1 to 32 outputs are needed, not 33"):
        kernels.fused_heads(finest, lows, *rest, outputs=33, classes=19)


@pytest.mark.parametrize("size", [(24, 28), (13, 45), (3, 5), (25, 28)])
def test_class_ids_are_the_largest_of_the_resized_logits(size):
    logits = random(2, 20, 6, 7)[:, :19]
    expected = resize_bilinear(logits, size).topk(2, dim=1)
    clear = (expected.values[:, 0] - expected.values[:, 1]) > 1e-5
    ids = kernels.resolve_largest(logits, size)
    assert ids.dtype == torch.uint8
    assert (ids == expected.indices[:, 0])[clear].all()
    assert clear.float().mean() > 0.99


@pytest.mark.parametrize(
    ("variant", "size"),
    [("mit:8,16,40,64:1,2,1,1", (32, 96)), ("mit:24,36,40,64:1,2,1,1", (64, 96))],
)
@torch.inference_mode()
def test_maps_are_those_of_torch(variant, size, monkeypatch):
    monkeypatch.setattr(functional, "gelu", partial(functional.gelu, approximate="tanh"))
    model = varied_model(replace(CONFIG, variant=variant))
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.3)
    pixels = pixels_of(2, *size)
    expected = model.encoder(Input(Preprocessing(), torch.device("cpu")).from_pixels(pixels))
    actual = GpuEncoder(model.encoder, Preprocessing(), torch.float32)(pixels)
    for here, there in zip(actual, expected, strict=True):
        torch.testing.assert_close(here, there.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-3)


def model_of(config):
    model = varied_model(config)
    heads = [head for head in (model.segmentation_head, model.depth_head) if head is not None]
    return model, FoldedHeads(heads)


@pytest.mark.parametrize("parts", ["both heads", "classes", "depth"])
@torch.inference_mode()
def test_the_network_is_that_of_torch(parts, monkeypatch):
    # The interpreter takes bfloat16 for integers.
    monkeypatch.setattr(gpu_network, "DTYPE", torch.float32)
    config = replace(
        CONFIG,
        num_classes=None if parts == "depth" else 19,
        has_depth=parts != "classes",
    )
    model, heads = model_of(config)
    preprocessing = Preprocessing(channel_order="bgr" if parts == "classes" else "rgb")
    pixels = pixels_of(2, *SIZE)
    inputs = Input(preprocessing, torch.device("cpu"))
    expected = Network(model, heads)(inputs.from_pixels(pixels), SIZE)
    actual = gpu_network.GpuNetwork(model, heads, preprocessing)(pixels, SIZE)
    assert actual.finite_b.tolist() == [True, True]
    assert (actual.class_ids is None) == (expected.class_ids is None) == (parts == "depth")
    assert (actual.depth_bq is None) == (expected.depth_bq is None) == (parts == "classes")
    if expected.class_ids is not None:
        assert (actual.class_ids == expected.class_ids).float().mean() > 0.999
        torch.testing.assert_close(actual.confidence_b, expected.confidence_b, rtol=1e-3, atol=0)
        torch.testing.assert_close(actual.entropy_b, expected.entropy_b, rtol=1e-3, atol=1e-3)
    if expected.depth_bq is not None:
        torch.testing.assert_close(actual.depth_bq, expected.depth_bq, rtol=1e-2, atol=1e-2)


def test_the_network_leaves_the_model_as_it_is():
    model, heads = model_of(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append(1))
    gpu_network.GpuNetwork(model, heads, Preprocessing())(pixels_of(1, 32, 32), (32, 32))
    assert not seen
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all((after[name] == value).all() for name, value in before.items())
