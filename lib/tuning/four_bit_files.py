"""Models in four bits: quantized while they are read, one tensor at a time, and saved in safetensors."""

import json
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

from .models import HUB_IDS, _digest, _from_pretrained, default_device, default_dtype, model_source
from .nf4 import Quantized, check_quantized
from .qlora import Linear4bit, four_bit

TENSORS, SETTINGS = "model_4bit.safetensors", "four_bits.json"
PARTS = ("weight", "scales", "scale_scales", "scale_mean")


def load_lm_4bit(name="smollm2-135m", device=None, dtype=None, kind="nf4", block_size=64, double=True):
    """Load a causal model, each linear layer but the output layer quantized as it is read: never whole in 16 bits.

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
    else:
        _read_and_quantize(folder, model, device, kind, block_size, double)
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


def save_4bit(folder, model, tokenizer):
    """Write a model in four bits and its tokenizer into a folder that `load_lm_4bit` reads.

    Raises:
        ValueError: no layer of the model is in four bits, or it has adapters (save those with `save_adapter`).
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    if not layers:
        raise ValueError("no layer of this model is in four bits; call quantize_model first")
    if any(".adapters." in name for name, _ in model.named_parameters()):
        raise ValueError("this model has adapters: save them with save_adapter, and unload the model before this")
    first = next(iter(layers.values()))
    settings = {"kind": first.record.kind, "block_size": first.record.block_size}
    settings["layers"] = {
        path: [layer.out_features, layer.in_features, str(layer.record.dtype).removeprefix("torch.")]
        for path, layer in layers.items()
    }
    tied = {id(weight) for weight in model.parameters()}
    tensors = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in tied or not isinstance(tensor, nn.Parameter):  # of tied weights the first
            tied.discard(id(tensor))
            tensors[key] = tensor.detach().cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("writing-*"):  # left by a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="writing-", dir=folder) as temporary:
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_file(tensors, f"{temporary}/{TENSORS}", {"format": "pt"})
        settings["sha256"] = _digest(f"{temporary}/{TENSORS}")
        Path(temporary, SETTINGS).write_text(json.dumps(settings, indent=1))
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == SETTINGS):  # settings last
            file.replace(folder / file.name)


def _read_4bit(folder, model, device):
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if _digest(folder / TENSORS) != settings["sha256"]:
            raise ValueError("its checksum is not the one that was noted when it was written")
        with safe_open(folder / TENSORS, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for path, (rows, columns, dtype) in settings["layers"].items():
            codes, scales, largest, mean = (tensors.pop(f"{path}.{part}", None) for part in PARTS)
            quantized = Quantized(
                codes,
                scales,
                None if largest is None else (largest, mean),
                torch.Size((rows, columns)),
                getattr(torch, dtype),
                settings["kind"],
                settings["block_size"],
            )
            check_quantized(quantized, path)
            model.set_submodule(path, Linear4bit(quantized, tensors.pop(f"{path}.bias", None)))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder / TENSORS} is truncated or altered: {error}; get it again") from error
    for key, tensor in tensors.items():
        path, _, part = key.rpartition(".")
        layer = _submodule(model, path, key, folder)
        _check_shape(layer, part, tensor, key, folder)
        setattr(layer, part, nn.Parameter(tensor.to(getattr(layer, part).dtype), requires_grad=False))


def _read_and_quantize(folder, model, device, kind, block_size, double):
    files = _weight_files(folder)
    output = model.get_output_embeddings()
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                path, _, part = key.rpartition(".")
                if part == "inv_freq":  # computed, but in files of older versions
                    continue
                layer = _submodule(model, path, key, file)
                tensor = tensors.get_tensor(key)
                _check_shape(layer, part, tensor, key, file)
                dtype = getattr(layer, part).dtype
                setattr(layer, part, nn.Parameter(tensor.to(dtype), requires_grad=False))
                if (
                    isinstance(layer, nn.Linear)
                    and layer is not output
                    and not any(w.is_meta for w in layer.parameters())
                ):
                    model.set_submodule(path, four_bit(layer, kind, block_size, double))


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


def _submodule(model, path, key, file):
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{file} has {key}, which {type(model).__name__} does not have") from error


def _check_shape(layer, part, tensor, key, file):
    expected = getattr(layer, part, None)
    if expected is None or expected.shape != tensor.shape:
        needed = "not there" if expected is None else tuple(expected.shape)
        raise ValueError(f"{file} has {key} of shape {tuple(tensor.shape)}; in this model it is {needed}")
