import gc
import weakref
from dataclasses import fields, replace
from threading import Thread

import numpy as np
import pytest
import torch
from torch.nn import functional

from segformer3d import predictor as predictor_module
from segformer3d.config import (
    METRIC_DEPTH,
    ORIGIN_DEPTH,
    ORIGIN_PREPROCESSING,
    ModelConfig,
    Preprocessing,
    WeightsInfo,
)
from segformer3d.predictor import Predictor
from tests.predictions import (
    assert_same_class_ids,
    assert_same_depth_codes,
    assert_same_predictions,
)
from tests.segformer3d.random_models import CONFIG, varied_model


def model_and_info(config=CONFIG, **info_fields):
    model = varied_model(config)
    info_fields = {"depth_codec": METRIC_DEPTH if config.has_depth else None} | info_fields
    return model, WeightsInfo(config=config, training_data="tests", **info_fields)


def frames_of(batch, height=64, width=96, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def assert_ids_are_the_largest(ids, logits_bkhw):
    """Equal the argmax wherever it is no tie within rounding."""
    top = logits_bkhw.topk(2, dim=1)
    clear = (top.values[:, 0] - top.values[:, 1]) > 1e-4 * logits_bkhw.abs().max()
    same = torch.as_tensor(ids) == top.indices[:, 0]
    assert same[clear].all()
    assert clear.float().mean() > 0.99


@pytest.mark.parametrize("preprocessing", [Preprocessing(), ORIGIN_PREPROCESSING])
@pytest.mark.parametrize("codec", [METRIC_DEPTH, ORIGIN_DEPTH])
def test_predictions_are_those_of_the_network(preprocessing, codec):
    model, info = model_and_info(preprocessing=preprocessing, depth_codec=codec)
    frames = frames_of(3)
    x = frames[..., ::-1] if preprocessing.channel_order == "bgr" else frames
    x = (x / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    with torch.inference_mode():
        outputs = model(torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2))
        logits = outputs.resized((64, 96)).logits
    predictions = Predictor(model, info, device="cpu").predict(frames)

    assert predictions.class_ids.dtype == np.uint8
    assert predictions.class_ids.shape == (3, 64, 96)
    assert len(np.unique(predictions.class_ids)) >= 5
    assert_ids_are_the_largest(predictions.class_ids, logits)

    assert predictions.depth.dtype == np.uint16
    expected = codec.encode(outputs.depth[:, 0].numpy())
    assert expected.any()
    assert predictions.depth.shape == (3, 16, 24)
    np.testing.assert_allclose(predictions.depth.astype(int), expected.astype(int), atol=2)

    p = outputs.logits.double().softmax(1)
    assert predictions.confidence_mean.dtype == predictions.entropy_mean.dtype == np.float32
    np.testing.assert_allclose(predictions.confidence_mean, p.amax(1).mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(
        predictions.entropy_mean, torch.special.entr(p).sum(1).mean((1, 2)), rtol=1e-4
    )
    assert predictions.finite.dtype == np.bool_
    assert predictions.finite.all()


def test_micro_batches_change_nothing():
    model, info = model_and_info()
    frames = frames_of(5)
    alone = Predictor(model, info, micro_batch=1).predict(frames)
    for micro_batch in (2, 5, 8):
        together = Predictor(model, info, micro_batch=micro_batch).predict(frames)
        assert_same_predictions(together, alone)


def test_read_only_and_strided_frames():
    predictor = Predictor(*model_and_info())
    frames = frames_of(2)
    expected = predictor.predict(frames)
    frames.flags.writeable = False
    assert_same_predictions(predictor.predict(frames), expected)
    twice = np.repeat(frames, 2, axis=0)
    assert_same_predictions(predictor.predict(twice[::2]), expected)


def test_no_frames():
    none = Predictor(*model_and_info()).predict(frames_of(0))
    some = Predictor(*model_and_info()).predict(frames_of(1))
    for field in fields(none):
        a, b = getattr(none, field.name), getattr(some, field.name)
        assert a.dtype == b.dtype
        assert a.shape == (0, *b.shape[1:])


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 60, 96, 3), np.uint8), "60 x 96, but both sides must be multiples of 32"),
        (np.zeros((1, 64, 0, 3), np.uint8), "multiples of 32"),
        (
            np.zeros((64, 96, 3), np.uint8),
            r"uint8 of shape \(B, H, W, 3\), not uint8 \(64, 96, 3\)",
        ),
        (np.zeros((1, 64, 96, 3), np.float32), "not float32"),
        (np.zeros((1, 3, 64, 96), np.uint8), "of shape"),
    ],
)
def test_other_frames_are_refused(frames, message):
    with pytest.raises(ValueError, match=message) as error:
        Predictor(*model_and_info()).predict(frames)
    assert "\n" not in str(error.value)


def test_micro_batch_must_be_positive():
    with pytest.raises(ValueError, match="micro_batch"):
        Predictor(*model_and_info(), micro_batch=0)


def test_info_must_belong_to_the_model():
    model, info = model_and_info()
    other = replace(info, config=replace(info.config, head_width=8))
    with pytest.raises(ValueError, match="info describes"):
        Predictor(model, other)


class OutOfMemoryAbove:
    """Stands before an encoder and runs out of memory above a number of frames."""

    def __init__(self, encoder, limit):
        self.encoder = encoder
        self.limit = limit
        self.batches = []

    def __call__(self, x):
        self.batches.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("injected")
        return self.encoder(x)


@pytest.mark.parametrize(
    ("limit", "batches", "kept"),
    [
        (8, [8, 3], 8),
        (4, [8, 4, 4, 3], 4),
        (3, [8, 4, 2, 2, 2, 2, 2, 1], 2),
        (1, [8, 4, 2] + [1] * 11, 1),
    ],
)
def test_micro_batches_halve_when_memory_runs_out(limit, batches, kept):
    model, info = model_and_info()
    frames = frames_of(11, 32, 32)
    expected = Predictor(model, info).predict(frames)
    predictor = Predictor(model, info, micro_batch=8)
    predictor._network._encode = OutOfMemoryAbove(predictor._network._encode, limit)
    predictions = predictor.predict(frames)
    assert predictor._network._encode.batches == batches
    assert predictor.micro_batch == kept
    np.testing.assert_allclose(predictions.entropy_mean, expected.entropy_mean, rtol=1e-4)


def test_one_frame_that_does_not_fit_raises():
    predictor = Predictor(*model_and_info(), micro_batch=4)
    predictor._network._encode = OutOfMemoryAbove(predictor._network._encode, 0)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        predictor.predict(frames_of(3, 32, 32))
    assert predictor._network._encode.batches == [3, 1]


class NanInFrame:
    def __init__(self, encoder, frame, value):
        self.encoder, self.frame, self.value = encoder, frame, value

    def __call__(self, x):
        maps = [map_.clone() for map_ in self.encoder(x)]
        maps[0][self.frame, 0, 1, 1] = self.value
        return maps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_frames_that_are_not_finite_are_marked(value):
    predictor = Predictor(*model_and_info(), micro_batch=3)
    frames = frames_of(3)
    expected = predictor.predict(frames)
    predictor._network._encode = NanInFrame(predictor._network._encode, 1, value)
    predictions = predictor.predict(frames)
    assert predictions.finite.tolist() == [True, False, True]
    assert (predictions.class_ids[1] == 255).all()
    assert not predictions.depth[1].any()
    for frame in (0, 2):
        assert_same_class_ids(predictions.class_ids[frame], expected.class_ids[frame])
        assert_same_depth_codes(predictions.depth[frame], expected.depth[frame])


@pytest.mark.parametrize(("num_classes", "has_depth"), [(None, True), (19, False)])
def test_a_lacking_head_gives_none(num_classes, has_depth):
    config = replace(CONFIG, num_classes=num_classes, has_depth=has_depth)
    predictor = Predictor(*model_and_info(config))
    for batch in (0, 2):
        predictions = predictor.predict(frames_of(batch))
        has_classes = num_classes is not None
        assert (predictions.class_ids is not None) == has_classes
        assert (predictions.confidence_mean is not None) == has_classes
        assert (predictions.entropy_mean is not None) == has_classes
        assert (predictions.depth is not None) == has_depth
        assert predictions.finite.shape == (batch,)


def test_class_ids_at_the_asset_size_come_from_the_logits():
    model, info = model_and_info()
    frames = frames_of(2)
    small = Predictor(model, info).predict(frames)
    large = Predictor(model, info).predict(frames, class_ids_size=(108, 190))
    assert large.class_ids.shape == (2, 108, 190)
    assert_same_depth_codes(large.depth, small.depth)
    nearest = functional.interpolate(
        torch.from_numpy(small.class_ids)[:, None].float(), size=(108, 190)
    )
    agreement = (nearest[:, 0].numpy() == large.class_ids).mean()
    assert 0.6 < agreement < 1


def test_depth_codes_on_the_device_are_those_of_the_codec():
    depth = torch.cat(
        [
            torch.tensor([0.0, -0.0, -1.0, 1e-9, 1e9, torch.nan, torch.inf, -torch.inf, 255.999]),
            torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 50,
        ]
    )
    for codec in (METRIC_DEPTH, ORIGIN_DEPTH):
        codes = predictor_module._encode_depth(depth, codec)
        np.testing.assert_array_equal(codes.numpy(), codec.encode(depth.numpy()))


@pytest.mark.parametrize("threads", [2, 3])
def test_a_frame_a_thread_changes_nothing(threads):
    before = torch.get_num_threads()
    model, info = model_and_info()
    frames = frames_of(5)
    try:
        alone = Predictor(model, info, device="cpu", threads=1)
        expected = alone.predict(frames)
        together = Predictor(model, info, device="cpu", threads=threads)
        assert (alone.batch, together.batch) == (1, threads)
        predictions = together.predict(frames)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same_predictions(predictions, expected)  # in order
    assert len(np.unique(predictions.entropy_mean)) == len(frames)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        Predictor(*model_and_info(), threads=1, device="cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("variant", "size", "pixels"),
    [
        (CONFIG.variant, None, (64, 96)),
        (CONFIG.variant, (50, 77), (64, 96)),
        # As wide at the finest map as B0, and as all others.
        ("mit:32,64,160,256:1,1,1,1", None, (512, 1024)),
        ("mit:64,128,320,512:1,1,1,1", None, (256, 512)),
    ],
)
def test_gpu_agrees_with_cpu(variant, size, pixels, caplog):
    model, info = model_and_info(ModelConfig(**vars(CONFIG) | {"variant": variant}))
    frames = frames_of(30, *pixels)
    expected = Predictor(model, info, device="cpu").predict(frames, class_ids_size=size)
    predictor = Predictor(model, info, device="cuda")
    assert predictor._lanes is not None
    # The first time without recorded graphs, then with them; not in whole micro-batches.
    for count in (30, 30, 30, 5, 2, 1):
        actual = predictor.predict(frames[:count], class_ids_size=size)
        assert (actual.class_ids == expected.class_ids[:count]).mean() > 0.9
        np.testing.assert_allclose(actual.entropy_mean, expected.entropy_mean[:count], rtol=0.05)
        depth = expected.depth[:count].astype(float)
        # Of random weights: around zero, where bfloat16's share of the summands is much.
        assert np.mean(np.abs(actual.depth - depth)) < 0.1 * np.mean(depth)
    assert predictor._lanes._lanes
    assert not caplog.records


def test_depth_as_a_logarithm_is_always_valid():
    model, info = model_and_info(ModelConfig(**vars(CONFIG) | {"depth_activation": "exp"}))
    frames = frames_of(2)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (info.preprocessing.mean, info.preprocessing.std)
    )
    with torch.no_grad():
        maps = model.forward_features((x - mean) / std)
        expected_m = model.depth_head(maps)[:, 0].exp().numpy()
    assert (model.forward_heads(maps).depth > 0).all()
    codes = Predictor(model, info, device="cpu").predict(frames).depth
    assert (codes > 0).all()
    in_range = (expected_m > 0.5) & (expected_m < 200)
    np.testing.assert_allclose(
        METRIC_DEPTH.decode(codes)[in_range], expected_m[in_range], rtol=1e-4, atol=1 / 256
    )


@pytest.mark.parametrize(("height", "factor"), [(64, 2.0), (32, 1.0)])
def test_metric_depth_follows_the_frames_size(height, factor):
    model, info = model_and_info(ModelConfig(**vars(CONFIG) | {"depth_activation": "exp"}))
    frames = frames_of(1, height, 96)
    plain = Predictor(model, info, device="cpu").predict(frames).depth.astype(float)
    sized = replace(info, short_side_px=32)
    scaled = Predictor(model, sized, device="cpu").predict(frames).depth.astype(float)
    low = plain < 30000
    np.testing.assert_allclose(scaled[low], factor * plain[low], atol=1.5)


def test_relative_depth_knows_no_frame_size():
    model, info = model_and_info(depth_codec=ORIGIN_DEPTH)
    frames = frames_of(1)
    plain = Predictor(model, info, device="cpu").predict(frames)
    sized = replace(info, short_side_px=32)
    assert_same_predictions(Predictor(model, sized, device="cpu").predict(frames), plain)


def test_a_watched_model_runs_its_own_modules_and_one_nobody_holds_is_let_go():
    model, info = model_and_info()
    predictor = Predictor(model, info, device="cpu")
    frames = frames_of(1)
    ran = []
    attention = model.encoder.stages[0].blocks[0].attn
    hook = attention.register_forward_hook(lambda *_: ran.append(True))
    watched = predictor.predict(frames)
    hook.remove()
    unwatched = predictor.predict(frames)
    assert len(ran) == 1
    np.testing.assert_allclose(watched.entropy_mean, unwatched.entropy_mean, rtol=1e-4)
    gone = weakref.ref(model.encoder)
    del model, attention
    gc.collect()
    assert gone() is None
    assert_same_predictions(predictor.predict(frames), unwatched)


def test_equal_frames_have_equal_outputs_whatever_thread_and_memory():
    """A resume, a retry and another worker must say the same of a frame, to the last bit."""
    predictor = Predictor(*model_and_info(), threads=1, device="cpu")
    frames = frames_of(1, 256, 384)
    expected = predictor.predict(frames)
    found = []

    def run():
        found.extend(predictor.predict(frames) for _ in range(3))

    for _ in range(40):
        thread = Thread(target=run)
        thread.start()
        thread.join()
    for said in found:
        for field in fields(said):
            assert np.array_equal(getattr(said, field.name), getattr(expected, field.name))
