"""Models in four bits: quantized while they are read, one tensor at a time, and saved in safetensors."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from .files import sha256, write_json
from .lora import AdaptedLayer, linear_layers
from .models import HUB_IDS, _from_pretrained, default_device, default_dtype, model_source
from .nf4 import Quantized, check_quantized
from .qlora import Linear4bit, four_bit, layers_to_quantize
from .targets import sizes, warn_of_experts
from .wrappers import bare_modules, bare_state, put_module, unwrapped

__all__ = ["quantize_while_reading"]

TENSORS, SETTINGS = "model_4bit.safetensors", "four_bits.json"
FORMAT = 2  # of the settings; in 1, which has no number, all layers were of one kind and block size
PARTS = ("weight", "scales", "scale_scales", "scale_mean")


def load_lm_4bit(name="smollm2-135m", device=None, dtype=None, kind="nf4", block_size=64, double=True):
    """Load a causal model, all linear layers but the output layer quantized as it is read: never whole in 16 bits.

    Args:
        name, device, dtype: as in `tuning.models.load_lm`; what is not quantized has the dtype. A folder that
            `save_4bit` wrote is loaded as it is; kind, block_size and double are then its own.

    Returns:
        `(model, tokenizer)`, frozen, in evaluation mode.

    Raises:
        ValueError: no safetensors there, tensors that are not this architecture's, or a truncated or altered file.
    """
    device = torch.device(device) if device is not None else default_device()
    folder = _folder(name)
    config = _from_pretrained(AutoConfig, folder, name)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or default_dtype(device))
    model.requires_grad_(False)
    if (folder / SETTINGS).is_file():
        _read_4bit(folder, model, device)
    elif (folder / TENSORS).is_file():
        raise ValueError(f"{folder} has {TENSORS} but no {SETTINGS}: its writing was broken off; save the model again")
    else:
        warn_of_experts(model, linear_layers(model), "quantizes")
        quantize_while_reading(model, _weight_files(folder), device, kind, block_size, double)
    model.tie_weights()
    missing = [path for path, weight in model.named_parameters() if weight.is_meta]
    if missing:
        raise ValueError(f"the files in {folder} have no {missing[0]}; are they of this architecture, and all there?")
    model.name_or_path = model.config.name_or_path = HUB_IDS.get(name, str(name))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = _from_pretrained(AutoTokenizer, folder, name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.mask_token = None  # as in load_lm
    return model.to(device).eval(), tokenizer


def quantize_while_reading(model, files, device, kind="nf4", block_size=64, double=True):
    """Fill a model that has no weights yet, tensor by tensor; each linear layer is quantized once it is whole.

    Args:
        files: safetensors files.

    Raises:
        ValueError: no linear layer, or one that cannot be replaced, or a tensor that does not fit the model.
    """
    layers = layers_to_quantize(model)
    for path, name, tensor in read_tensors(model, files, device):
        layer = model.get_submodule(path)
        set_tensor(layer, name, tensor)
        if path in layers and not any(weight.is_meta for weight in layer.parameters()):
            put_module(model, path, four_bit(layer, kind, block_size, double))


def save_4bit(folder, model, tokenizer):
    """Write a model in four bits and its tokenizer into a folder that `load_lm_4bit` reads.

    Raises:
        ValueError: no layer of the model is in four bits, or it has adapters (save those with `save_adapter`).
    """
    model, modules = unwrapped(model), bare_modules(model)
    layers = {path: layer for path, layer in modules.items() if isinstance(layer, Linear4bit)}
    if not layers:
        raise ValueError("no layer of this model is in four bits; call quantize_model first")
    if any(isinstance(layer, AdaptedLayer) for layer in modules.values()):
        raise ValueError("this model has adapters: save them with save_adapter, and unload the model before this")
    settings = {"format": FORMAT, "layers": {path: _settings_of(layer.record) for path, layer in layers.items()}}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("writing-*"):  # left by a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="writing-", dir=folder) as temporary:
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_file(_tensors(model), f"{temporary}/{TENSORS}", {"format": "pt"})
        settings["sha256"] = sha256(f"{temporary}/{TENSORS}")
        written = sorted(Path(temporary).iterdir())
        (folder / SETTINGS).unlink(missing_ok=True)  # so that what is broken off from here on is not taken for whole
        for file in written:
            file.replace(folder / file.name)
    write_json(folder / SETTINGS, settings)


def _settings_of(record):
    """What the files keep of a weight besides its tensors."""
    dtype = str(record.dtype).removeprefix("torch.")
    return {"shape": list(record.shape), "dtype": dtype, "kind": record.kind, "block_size": record.block_size}


def _layer_settings(settings):
    """{path: settings} of the layers, of either format."""
    if settings.get("format", 1) == 1:
        shared = {"kind": settings["kind"], "block_size": settings["block_size"]}
        layers = settings["layers"].items()
        return {path: {"shape": shape, "dtype": dtype} | shared for path, (*shape, dtype) in layers}
    if settings["format"] != FORMAT:
        raise ValueError(f"format {settings['format']!r} is of a newer version of this library")
    return settings["layers"]


def _tensors(model):
    """{name in the bare model: tensor}; of tied weights the first."""
    tensors, seen = {}, set()
    for name, tensor in bare_state(model).items():
        if tensor not in seen:
            seen.add(tensor)
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _read_4bit(folder, model, device):
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if sha256(folder / TENSORS) != settings["sha256"]:
            raise ValueError("its checksum is not the one that was noted when it was written")
        with safe_open(folder / TENSORS, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for path, layer in _layer_settings(settings).items():
            codes, scales, largest, mean = (tensors.pop(f"{path}.{part}", None) for part in PARTS)
            second = None if largest is None else (largest, mean)
            shape, dtype = torch.Size(layer["shape"]), getattr(torch, layer["dtype"])
            quantized = Quantized(codes, scales, second, shape, dtype, layer["kind"], layer["block_size"])
            check_quantized(quantized, path)
            _check_place(model, path, shape)
            put_module(model, path, Linear4bit(quantized, tensors.pop(f"{path}.bias", None)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"{folder / TENSORS} cannot be read: {error}; if it is truncated or altered, get it again"
        ) from error
    shapes = _shapes(model)
    for key, tensor in tensors.items():
        place = _place(model, shapes, key, tensor.shape, folder)
        if place:
            set_tensor(model.get_submodule(place[0]), place[1], tensor)


def _check_place(model, path, shape):
    """Refuse the settings of a layer that is no linear one in this model, or one of another shape."""
    layer = model.get_submodule(path)
    if not isinstance(layer, (nn.Linear, Conv1D)) or sizes(layer)[::-1] != tuple(shape):
        raise ValueError(f"{path}: a linear layer of shape {tuple(shape)} in the settings, but not in this model")


def read_tensors(model, files, device):
    """Read safetensors: the path of a layer of the model, the name of a tensor there, and the tensor, one by one."""
    shapes = _shapes(model)
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                place = _place(model, shapes, key, tuple(tensors.get_slice(key).get_shape()), file)
                if place:
                    yield *place, tensors.get_tensor(key)


def set_tensor(layer, name, tensor):
    """Set a weight or a buffer of a layer, in the dtype that the layer has for it."""
    old = getattr(layer, name)
    new = tensor.to(old.dtype)
    setattr(layer, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)


def _shapes(model):
    """{name: shape} of what files hold of a model: weights, and buffers that it does not compute itself."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _place(model, shapes, key, shape, file):
    """The layer's path, and the name there, of a file's tensor; None if it is not needed: the model computes it."""
    prefixed = f"{model.base_model_prefix}.{key}"  # older files leave the prefix out
    key = prefixed if prefixed in shapes else key
    if key not in shapes:
        ignored = model._keys_to_ignore_on_load_unexpected or ()  # what older files have of this architecture
        if any(re.search(pattern, key) for pattern in (*ignored, "inv_freq$")):
            return None
        raise ValueError(
            f"{file} has {key}, which {type(model).__name__} does not have; if transformers converts such files, "
            f"call load_lm and then quantize_model"
        )
    if tuple(shape) != shapes[key]:
        raise ValueError(f"{file} has {key} of shape {tuple(shape)}; in this model it is {tuple(shapes[key])}")
    path, _, name = key.rpartition(".")
    return path, name


def _weight_files(folder):
    """The files of a model's weights: those that its index names, or the one."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    missing = [name for name in sorted(names) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"there is no {missing[0]} in {folder}; save the model with save_pretrained first")
    return [folder / name for name in sorted(names)]


def _folder(name):
    """The folder of a model's files, fetched from the hub if it is not one."""
    source = Path(model_source(name))
    if source.is_dir():
        return source
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "model*.safetensors", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"no model {name!r}: not a folder here, and the hub says: {error}") from error
