"""A small random model whose predictions vary over a picture."""

import torch

from segformer3d.config import ModelConfig
from segformer3d.model import build_model

CONFIG = ModelConfig(variant="mit:8,16,40,64:1,1,1,1", head_width=16)


def varied_model(config=CONFIG):
    torch.manual_seed(0)
    model = build_model(config).eval()
    for value in model.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=1.5 / value[0].numel() ** 0.5)
    return model
