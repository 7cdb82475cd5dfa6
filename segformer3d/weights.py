"""Weights: our safetensors files, and the import of other projects' by pure renaming.

`segformer3d.weights_file` says what a file of ours is. Importing maps a foreign state dict to ours,
name by name, and is strict both ways. Known are the origin project's `.pt`, the `.pth` of the
SegFormer authors (NVlabs; Xie et al. 2021, arXiv 2105.15203) and SegFormer directories of Hugging
Face `transformers`. Pickles are only read with `weights_only=True`.
"""

from __future__ import annotations

import json
import math
import operator
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from segformer3d.config import (
    IMAGENET_PREPROCESSING,
    METRIC_DEPTH,
    ORIGIN_DEPTH,
    ORIGIN_PREPROCESSING,
    ModelConfig,
    Preprocessing,
    WeightsInfo,
    mit_variant,
)
from segformer3d.files import replaced_whole
from segformer3d.labels import CLASS_NAMES
from segformer3d.model import Segformer3D, build_model
from segformer3d.weights_file import (
    METADATA_KEY,
    WeightsError,
    check_fit,
    check_weights,
    first_names,
    local_path,
)

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

NUM_CITYSCAPES_CLASSES = 19
UNTRAINED_DEPTH_M = 10.0

State = Mapping[str, Tensor]


def weights_to_bytes(model: Segformer3D, info: WeightsInfo, *, half: bool = False) -> bytes:
    """Serialise a model and what there is to know about it; the same input, the same bytes.

    Args:
        model: The network.
        info: What belongs to its weights.
        half: Store floats as float16, half the size; they are computed with as float32.
    """
    if model.config != info.config:
        raise WeightsError(f"info describes {info.config}, but the model is {model.config}")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = {
            name: value.half() if value.is_floating_point() else value
            for name, value in state.items()
        }
    return save_safetensors(state, {METADATA_KEY: json.dumps(info.to_dict(), sort_keys=True)})


def save_weights(
    path: str | PathLike[str], model: Segformer3D, info: WeightsInfo, *, half: bool = False
) -> None:
    """Write a weights file; it appears under its name whole or not at all."""
    data = weights_to_bytes(model, info, half=half)
    with replaced_whole(local_path(path)) as file:
        file.write(data)


def load_weights(source: bytes | str | PathLike[str]) -> Segformer3D:
    """Load a weights file, strictly, as a float32 model in eval mode.

    Raises:
        WeightsError: It is no weights file of this project, or its tensors do not fit.
        OSError: The file cannot be read.
    """
    data = source if isinstance(source, bytes) else local_path(source).read_bytes()
    return model_from_bytes(data)[0]


def model_from_bytes(data: bytes) -> tuple[Segformer3D, WeightsInfo]:
    """Build the model of a weights file's bytes, strictly, in float32 and eval mode.

    Raises:
        WeightsError: They are no weights file of this project, or the tensors do not fit.
    """
    info = check_weights(data)
    return _fitted_model(info.config, _load_safetensors(data)), info


def untrained_weights(variant: str = "mit_b0", seed: int = 0) -> bytes:
    """Return a weights file of random parameters, for trying things out; one seed, one file."""
    config = ModelConfig(variant=variant)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config)
    if model.depth_head is not None and model.depth_head.predict.bias is not None:
        # Around zero, half of all depths would be invalid.
        torch.nn.init.constant_(model.depth_head.predict.bias, UNTRAINED_DEPTH_M)
    info = WeightsInfo(
        config=config,
        depth_codec=METRIC_DEPTH,
        training_data=f"none: untrained, random parameters of seed {seed}",
        trained=False,
    )
    return weights_to_bytes(model, info)


def import_weights(
    source: str | PathLike[str], *, preprocessing: Preprocessing | None = None
) -> tuple[Segformer3D, WeightsInfo]:
    """Import weights of another project; which one is told by the names inside.

    Args:
        source: The origin's `.pt`, an NVlabs `.pth`, a Hugging Face SegFormer directory, or a
            weights file of this project.
        preprocessing: What the weights expect, where better known than by the source. The
            origin's weights default to the RGB they were trained on, although its own
            command line feeds them BGR.

    Returns:
        The model, float32 and in eval mode, and what is known about it.

    Raises:
        WeightsError: The source is unknown, is another architecture, or does not fit.
        OSError: A file cannot be read.
    """
    path = local_path(source)
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise WeightsError(f"{path}: neither a file nor a folder")
    try:
        if path.is_dir():
            model, info = _import_huggingface(path)
        elif path.suffix == ".safetensors":
            model, info = model_from_bytes(path.read_bytes())
        else:
            model, info = _import_pickle(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return model, info if preprocessing is None else replace(info, preprocessing=preprocessing)


def _import_pickle(path: Path) -> tuple[Segformer3D, WeightsInfo]:
    state = _load_pickle(path)
    if any(_OPENMMLAB.match(name) for name in state):
        raise WeightsError(
            "this is OpenMMLab's SegFormer, whose head is another architecture (norm and "
            "activation per stage): use the NVlabs .pth or the Hugging Face directory instead"
        )
    if any(name.startswith("patch_embed1.") for name in state):
        raise WeightsError("an encoder without a head: give the weights of a whole SegFormer")
    if any(name.startswith("backbone.stages.") for name in state):
        renamed = remap_origin(state)
        preprocessing = ORIGIN_PREPROCESSING
        training_data = "a Cityscapes subset, by adithyagaurav/Segformer3D"
    elif any(name.startswith("backbone.patch_embed1.") for name in state):
        renamed = remap_nvlabs(state)
        preprocessing = IMAGENET_PREPROCESSING
        training_data = f"as published by NVlabs SegFormer under {path.name}"
    else:
        raise WeightsError(
            f"unknown names ({first_names(state)}): known are the origin's .pt, NVlabs .pth and "
            "Hugging Face SegFormer directories (give the directory, not the file in it)"
        )
    config = _infer_config(renamed, patch_norm_eps=1e-5, block_norm_eps=1e-6)
    info = WeightsInfo(
        config=config,
        preprocessing=preprocessing,
        depth_codec=ORIGIN_DEPTH if config.has_depth else None,
        training_data=training_data,
    )
    return _fitted_model(config, renamed), info


def read_pickle(source: BinaryIO | Path, device: torch.device | str = "cpu") -> Any:
    """Read what `torch.save` wrote, if it is tensors and plain values: nothing else is unpickled.

    Raises:
        UnpicklingError: It holds more, or is damaged; torch raises other kinds for damage too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles that torch would not have written
        return torch.load(source, map_location=device, weights_only=True)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    data = BytesIO(path.read_bytes())
    try:
        content = read_pickle(data)
    except UnpicklingError as error:
        raise WeightsError(
            "refused, it is damaged or holds more than tensors and plain values, which could run "
            "code: save only its state dict with torch.save"
        ) from error
    except _UNREADABLE as error:
        raise WeightsError("damaged, or not written by torch.save: fetch it again") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise WeightsError("holds no state dict: save model.state_dict() with torch.save")
    return dict(content)


def _import_huggingface(folder: Path) -> tuple[Segformer3D, WeightsInfo]:
    _check_huggingface_config(_read_json(folder / "config.json"))
    renamed = remap_huggingface(_load_huggingface_state(folder))
    # The layer norms of transformers take torch's default; its layer_norm_eps is never read.
    config = _infer_config(renamed, patch_norm_eps=1e-5, block_norm_eps=1e-5)
    info = WeightsInfo(
        config=config,
        preprocessing=_huggingface_preprocessing(folder / "preprocessor_config.json"),
        depth_codec=None,
        training_data=f"as published in the Hugging Face directory {folder.name}",
    )
    return _fitted_model(config, renamed), info


def _load_huggingface_state(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").exists():
        return _load_safetensors((folder / "model.safetensors").read_bytes())
    if (folder / "pytorch_model.bin").exists():
        return _load_pickle(folder / "pytorch_model.bin")
    raise WeightsError("holds neither model.safetensors nor pytorch_model.bin")


def _check_huggingface_config(config: Mapping[str, Any]) -> None:
    """Refuse other models, and layer settings that shapes do not show."""
    architectures = config.get("architectures")
    if architectures != ["SegformerForSemanticSegmentation"]:
        raise WeightsError(
            f"config.json names {architectures}: only SegformerForSemanticSegmentation has the "
            "head that is needed"
        )
    for key, value in _HUGGINGFACE_CONFIG.items():
        if config.get(key, value) != value:
            raise WeightsError(f"config.json has {key} {config[key]}, but SegFormer has {value}")
    _check_huggingface_labels(config.get("id2label"))


def _check_huggingface_labels(names: object) -> None:
    """Refuse as many classes of another meaning; how many there are, the tensors say."""
    if not isinstance(names, Mapping) or len(names) != NUM_CITYSCAPES_CLASSES:
        return
    given = [str(names.get(str(index), "")) for index in range(NUM_CITYSCAPES_CLASSES)]
    if given == [f"LABEL_{index}" for index in range(NUM_CITYSCAPES_CLASSES)]:
        return
    plain = [re.sub("[_-]", " ", name.strip().lower()) for name in given]
    num_same = sum(map(operator.eq, plain, CLASS_NAMES))
    # A few may be spelled in another way.
    if num_same < NUM_CITYSCAPES_CLASSES / 2:
        raise WeightsError(
            f"config.json calls class 0 {given[0]!r} and class 1 {given[1]!r}: only the 19 classes "
            f"of Cityscapes are supported, {CLASS_NAMES[0]}, {CLASS_NAMES[1]} and so on"
        )


def _huggingface_preprocessing(path: Path) -> Preprocessing:
    if not path.exists():
        return IMAGENET_PREPROCESSING
    data = _read_json(path)
    try:
        factor = data.get("rescale_factor", 1 / 255) if data.get("do_rescale", True) else 1.0
        if not math.isclose(factor * 255, 1.0, rel_tol=1e-6):
            raise ValueError("frames are rescaled by 1/255 here")
        if not data.get("do_normalize", True):
            return Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return Preprocessing(
            mean=tuple(data.get("image_mean", IMAGENET_PREPROCESSING.mean)),
            std=tuple(data.get("image_std", IMAGENET_PREPROCESSING.std)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path.name} does not fit: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(f"no {path.name}: a Hugging Face SegFormer directory has one") from error
    except ValueError as error:
        raise WeightsError(f"{path.name} is not JSON: fetch it again") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path.name} is not a JSON object: fetch it again")
    return data


# What torch.load raises over damaged bytes, found by flipping and cutting them.
_UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
    struct.error,
)

_OPENMMLAB = re.compile(r"decode_head\.(convs|fusion_conv)\.|backbone\.layers\.")

_HUGGINGFACE_CONFIG = {
    "num_attention_heads": [1, 2, 5, 8],
    "sr_ratios": [8, 4, 2, 1],
    "patch_sizes": [7, 3, 3, 3],
    "strides": [4, 2, 2, 2],
    "mlp_ratios": [4, 4, 4, 4],
    "hidden_act": "gelu",
}

Renaming = tuple[tuple[str, str], ...]

_ORIGIN: Renaming = (
    (r"^backbone\.", "encoder."),
    (r"\.attn\.norm\.", ".attn.sr_norm."),
    (r"^decoder_head\.", "segmentation_head."),
    *((rf"_head\.layers\.{3 - stage}\.", f"_head.project.{stage}.") for stage in range(4)),
    (r"_head\.linear_fuse\.", "_head.fuse."),
    (r"_head\.bn\.", "_head.norm."),
    (r"_head\.linear_pred\.", "_head.predict."),
)

_NVLABS: Renaming = (
    *((rf"^backbone\.patch_embed{s + 1}\.", f"encoder.stages.{s}.patch_embed.") for s in range(4)),
    *((rf"^backbone\.block{s + 1}\.", f"encoder.stages.{s}.blocks.") for s in range(4)),
    *((rf"^backbone\.norm{s + 1}\.", f"encoder.stages.{s}.norm.") for s in range(4)),
    (r"\.attn\.norm\.", ".attn.sr_norm."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.conv."),
    (r"\.mlp\.(fc[12])\.", r".ffn.\1."),
    (r"^decode_head\.", "segmentation_head."),
    *((rf"_head\.linear_c{s + 1}\.proj\.", f"_head.project.{s}.") for s in range(4)),
    (r"_head\.linear_fuse\.conv\.", "_head.fuse."),
    (r"_head\.linear_fuse\.bn\.", "_head.norm."),
    (r"_head\.linear_pred\.", "_head.predict."),
)
_NVLABS_UNUSED = ("decode_head.conv_seg.", "auxiliary_head.")

_HUGGINGFACE: Renaming = (
    (
        r"^segformer\.encoder\.patch_embeddings\.(\d)\.layer_norm\.",
        r"encoder.stages.\1.patch_embed.norm.",
    ),
    (
        r"^segformer\.encoder\.patch_embeddings\.(\d)\.proj\.",
        r"encoder.stages.\1.patch_embed.proj.",
    ),
    (r"^segformer\.encoder\.block\.(\d)\.(\d+)\.", r"encoder.stages.\1.blocks.\2."),
    (r"^segformer\.encoder\.layer_norm\.(\d)\.", r"encoder.stages.\1.norm."),
    (r"\.layer_norm_([12])\.", r".norm\1."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.key\.", ".attn.k."),
    (r"\.attention\.self\.value\.", ".attn.v."),
    (r"\.attention\.self\.sr\.", ".attn.sr."),
    (r"\.attention\.self\.layer_norm\.", ".attn.sr_norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.mlp\.dense([12])\.", r".ffn.fc\1."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.conv."),
    (r"^decode_head\.", "segmentation_head."),
    (r"_head\.linear_c\.(\d)\.proj\.", r"_head.project.\1."),
    (r"_head\.linear_fuse\.", "_head.fuse."),
    (r"_head\.batch_norm\.", "_head.norm."),
    (r"_head\.classifier\.", "_head.predict."),
)


def remap_origin(state: State) -> dict[str, Tensor]:
    """Rename the origin project's state dict to ours; its head layers start at the deepest."""
    return _rename(state, _ORIGIN)


def remap_nvlabs(state: State) -> dict[str, Tensor]:
    """Rename an NVlabs SegFormer state dict to ours, without the layers it never uses."""
    used = {name: value for name, value in state.items() if not name.startswith(_NVLABS_UNUSED)}
    return _linear_to_convolution(_rename(used, _NVLABS))


def remap_huggingface(state: State) -> dict[str, Tensor]:
    """Rename a Hugging Face SegFormer state dict to ours and join its keys with its values."""
    renamed = _linear_to_convolution(_rename(state, _HUGGINGFACE))
    for key in [name for name in renamed if ".attn.k." in name]:
        value = key.replace(".attn.k.", ".attn.v.")
        if value in renamed:
            joined = torch.cat([renamed.pop(key), renamed.pop(value)])
            renamed[key.replace(".attn.k.", ".attn.kv.")] = joined
    return renamed


def _rename(state: State, renaming: Renaming) -> dict[str, Tensor]:
    """Apply every rule to every name; unknown names stay and are refused when loading."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = name
        for pattern, replacement in renaming:
            ours = re.sub(pattern, replacement, ours)
        if ours in renamed:
            raise WeightsError(f"two tensors both stand for {ours}: remove one of them")
        renamed[ours] = value
    return renamed


def _linear_to_convolution(state: State) -> dict[str, Tensor]:
    """Turn the heads' linear projections (out, in) into 1x1 convolutions (out, in, 1, 1)."""
    return {
        name: value[:, :, None, None] if "_head.project." in name and value.ndim == 2 else value
        for name, value in state.items()
    }


def _infer_config(state: State, *, patch_norm_eps: float, block_norm_eps: float) -> ModelConfig:
    """Read a Mix Transformer's sizes and heads from the shapes under our names."""
    blocks = [re.match(r"encoder\.stages\.(\d)\.blocks\.(\d+)\.", name) for name in state]
    found = [(int(match[1]), int(match[2])) for match in blocks if match]
    depths = tuple(1 + max((b for s, b in found if s == stage), default=-1) for stage in range(4))
    embeddings = [f"encoder.stages.{stage}.patch_embed.proj.weight" for stage in range(4)]
    heads = [
        head for head in ("segmentation_head", "depth_head") if f"{head}.predict.weight" in state
    ]
    fuse = [f"{head}.fuse.weight" for head in heads]
    if missing := [name for name in (*embeddings, *fuse) if name not in state]:
        raise WeightsError(f"tensors are missing (named as here): {first_names(missing)}")
    num_classes = (
        len(state["segmentation_head.predict.weight"]) if "segmentation_head" in heads else None
    )
    if num_classes not in (None, NUM_CITYSCAPES_CLASSES):
        raise WeightsError(
            f"it has {num_classes} classes, but only the {NUM_CITYSCAPES_CLASSES} of Cityscapes "
            "are supported: take weights trained on Cityscapes"
        )
    try:
        return ModelConfig(
            variant=mit_variant(tuple(len(state[name]) for name in embeddings), depths),
            head_width=len(state[fuse[0]]) if fuse else 256,
            num_classes=num_classes,
            has_depth="depth_head" in heads,
            patch_norm_eps=patch_norm_eps,
            block_norm_eps=block_norm_eps,
        )
    except ValueError as error:
        raise WeightsError(f"its sizes are no SegFormer's: {error}") from error


def _fitted_model(config: ModelConfig, state: State) -> Segformer3D:
    """Build the model in eval mode with exactly these tensors, as float32."""
    try:
        # On the meta device nothing is initialised in vain (3 s for B5); not so with timm.
        with torch.device("cpu" if config.timm_name else "meta"):
            model = build_model(config)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    expected = model.state_dict()
    check_fit(_shapes(state), _shapes(expected))
    cast = {name: value.to(expected[name].dtype) for name, value in state.items()}
    model.load_state_dict(cast, assign=True)
    return model.eval()


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _load_safetensors(data: bytes) -> dict[str, Tensor]:
    try:
        return load_safetensors(data)
    except SafetensorError as error:
        raise WeightsError(f"damaged ({error}): fetch it again") from error
    except KeyError as error:
        raise WeightsError(f"tensors of type {error}, which torch cannot read") from error
