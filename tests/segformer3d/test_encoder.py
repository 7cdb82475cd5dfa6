import pytest
import torch
from torch import nn

from segformer3d.config import MIT_SIZES, ModelConfig
from segformer3d.encoder import DROP_PATH_MAX, build_encoder
from segformer3d.layers import DropPath

TINY = "mit:8,16,40,64:1,2,1,1"


@pytest.mark.parametrize("variant", [*MIT_SIZES, TINY])
def test_mix_transformer_gives_four_maps(variant):
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(variant=variant))
        maps = encoder(torch.zeros(2, 3, 64, 96))
    assert [tuple(map_.shape) for map_ in maps] == [
        (2, dim, 64 // reduction, 96 // reduction)
        for dim, reduction in zip(encoder.embed_dims, (4, 8, 16, 32), strict=True)
    ]


def test_drop_path_rises_linearly_over_all_blocks():
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(variant="mit_b2"))
    rates = [module.rate for module in encoder.modules() if isinstance(module, DropPath)]
    assert len(rates) == 16
    assert rates[0] == 0
    assert rates == pytest.approx([DROP_PATH_MAX * block / 15 for block in range(16)])


def test_epsilons_go_where_the_config_says():
    encoder = build_encoder(ModelConfig(variant=TINY, patch_norm_eps=0.5, block_norm_eps=0.25))
    eps = {
        name: module.eps
        for name, module in encoder.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    patch = {name for name in eps if name.endswith(("patch_embed.norm", "sr_norm"))}
    assert len(patch) == 4 + 4  # four embeddings; four blocks reduce
    assert {eps[name] for name in patch} == {0.5}
    assert {eps[name] for name in eps.keys() - patch} == {0.25}


def test_samples_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(variant=TINY)).eval()
    x = torch.randn(2, 3, 32, 64)
    together = encoder(x)
    alone = encoder(x[1:])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b)


@pytest.mark.parametrize(
    ("name", "dims"),
    [("test_resnet", (32, 48, 192, 96)), ("test_convnext", (24, 32, 48, 64))],
)
def test_timm_encoder_has_the_same_interface(name, dims):
    encoder = build_encoder(ModelConfig(variant=f"timm:{name}")).eval()
    maps = encoder(torch.randn(2, 3, 64, 96))
    assert encoder.embed_dims == dims
    assert [tuple(map_.shape) for map_ in maps] == [
        (2, dim, 64 // reduction, 96 // reduction)
        for dim, reduction in zip(dims, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit", r"reductions \[16, 16, 16\]; one with maps at \[4, 8, 16, 32\]"),
        ("no_such_model", "timm cannot build 'no_such_model'"),
    ],
)
def test_timm_encoder_without_the_maps_is_refused(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_encoder(ModelConfig(variant=f"timm:{name}"))
    assert "\n" not in str(caught.value)


class _Info:
    def reduction(self):
        return [4, 8, 16, 32]

    def channels(self):
        return [1, 2, 3, 4]


class _ChannelsLast(nn.Module):
    feature_info = _Info()
    output_fmt = "NHWC"

    def forward(self, x):
        b, _, h, w = x.shape
        return [
            x.new_zeros(b, h // r, w // r, c)
            for r, c in zip((4, 8, 16, 32), (1, 2, 3, 4), strict=True)
        ]


def test_timm_encoder_with_channels_last_maps(monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: _ChannelsLast())
    encoder = build_encoder(ModelConfig(variant="timm:some_swin"))
    assert [map_.shape[1] for map_ in encoder(torch.zeros(1, 3, 64, 64))] == [1, 2, 3, 4]
