"""Adapters in peft's file format: what `save_adapter` writes peft loads, and the reverse."""

import json
import math
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .lora import (
    _base,
    _check_finite,
    _check_names,
    _check_new,
    _new_adapter,
    _targets,
    adapted_layers,
    add_lora,
)

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "peft_type", "init_lora_weights"}
HARMLESS = {"base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version"}
HARMLESS |= {"qalora_group_size", "revision", "task_type", "auto_mapping"}


def save_adapter(folder, model, name="default"):
    """Write an adapter as peft does: `adapter_model.safetensors` and `adapter_config.json`.

    The model's name and the lengths of some of its weights go along, to tell another model apart (not a fine-tuned copy
    of the same one, whose lengths hardly differ).

    Raises:
        ValueError: no such adapter, the model is merged, or a weight is not finite.
    """
    if not isinstance(name, str):
        raise ValueError(f"{name!r} names no adapter; give the name of the one to save")
    _check_names(adapted_layers(model), [name])
    layers = {path: layer for path, layer in adapted_layers(model).items() if name in layer.adapters}
    tensors = {}
    for path, layer in layers.items():
        for part, key in _keys(path, layer.base).items():
            tensors[key] = getattr(layer.adapters[name], part).detach().cpu().contiguous()
    _check_finite(tensors)
    first = next(iter(layers.values()))
    adapter = first.adapters[name]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": _name(model),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout.p,
        "use_rslora": adapter.rslora,
        "target_modules": list(layers),
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trace = json.dumps(_trace(layers))
    _replace(folder / TENSORS, lambda path: save_file(tensors, path, {"format": "pt", "trace": trace}))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1)))


def load_adapter(folder, model, name="default"):
    """Read an adapter that `save_adapter` or peft wrote, put it into the model and make it the active one.

    Raises:
        FileNotFoundError: there is no adapter; ValueError: it is a pickle, it uses what this book does not build, or
            it does not fit this model (layers, shapes, lengths of weights, or a rank above what a matrix can have), or
            has a missing, extra or non-finite weight. The model is then as it was.
    """
    config, tensors, frozen, trace = _read(Path(folder))
    layers = _targets(model, config["target_modules"])
    _check_new(layers, name, config["r"], config["lora_alpha"], config["lora_dropout"])
    bases = {path: _base(layer) for path, layer in layers.items()}
    expected = {}
    for path, base in bases.items():
        with torch.device("meta"):
            adapter = _new_adapter(base, rank=config["r"], alpha=config["lora_alpha"])
        expected |= {key: getattr(adapter, part).shape for part, key in _keys(path, base).items()}
    _check_fit(folder, expected, tensors)
    _check_frozen(folder, bases, frozen)
    if trace and not _same_trace(trace, _trace(layers)):
        raise ValueError(
            f"the adapter in {folder} was trained beside {config.get('base_model_name_or_path')}, and the weights here "
            f"are others; load that model, or train an adapter for this one"
        )
    settings = {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": config["lora_dropout"]}
    add_lora(model, list(layers), **settings, rslora=config["use_rslora"], name=name)
    with torch.no_grad():
        for path, base in bases.items():
            for part, key in _keys(path, base).items():
                getattr(model.get_submodule(path).adapters[name], part).copy_(tensors[key])


def _replace(path, write):
    """Write to a temporary name and rename, so that a killed run leaves no half file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)


def _keys(path, base):
    """What peft calls an adapter's A and B in its files."""
    parts = ("lora_embedding_A", "lora_embedding_B")
    if not isinstance(base, nn.Embedding):
        parts = ("lora_A.weight", "lora_B.weight")
    return {part: f"base_model.model.{path}.{key}" for part, key in zip("AB", parts, strict=True)}


def _read(folder):
    """An adapter's settings, tensors and trace, refused if they are not what this module builds."""
    if not (folder / TENSORS).is_file():
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is opened; get the adapter as "
                f"{TENSORS}"
            )
        raise FileNotFoundError(f"there is no adapter in {folder}: it has no {TENSORS}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, framework="pt") as file:
            trace = json.loads((file.metadata() or {}).get("trace", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        frozen = {key: tensors.pop(key) for key in list(tensors) if ".base_layer." in key}  # of an embedding
        config = {"lora_dropout": 0.0, "use_rslora": False} | config
        asked = {key: value for key, value in config.items() if key not in READ | HARMLESS}
        other = [key for key, value in asked.items() if value and value != "none"]
        if config["peft_type"] != "LORA" or config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            other.append("peft_type" if config["peft_type"] != "LORA" else "init_lora_weights")
        config["r"], config["lora_alpha"], config["target_modules"]  # must be there
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{folder} is no adapter that peft or save_adapter wrote: {error!r}") from error
    if other:
        raise ValueError(f"the adapter in {folder} uses {', '.join(other)}, which this book does not build; use peft")
    _check_finite(tensors)
    return config, tensors, frozen, trace


def _check_fit(folder, expected, tensors):
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        kind, key = ("no", min(missing)) if missing else ("an unknown", min(extra))
        raise ValueError(f"the adapter in {folder} does not fit this model: it has {kind} {key}")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"the adapter in {folder} does not fit this model: {key} has shape {tuple(tensors[key].shape)}, "
                f"needed is {tuple(shape)}"
            )


def _check_frozen(folder, bases, frozen):
    """peft writes an adapted embedding's frozen weight too; here it must be the model's own."""
    for key, there in frozen.items():
        path, _, part = key.removeprefix("base_model.model.").rpartition(".base_layer.")
        here = getattr(bases.get(path), part, None)
        same = here is not None and here.shape == there.shape
        if not same or not torch.allclose(here.detach().float().cpu(), there.float(), rtol=0.02, atol=1e-3):
            raise ValueError(
                f"the adapter in {folder} was trained beside another {path} (more tokens, or a trained one), which "
                f"comes with it as {key}; load that model, or use peft"
            )


def _trace(layers):
    """Lengths of the frozen weights of the first and last few layers: nearly the same in every dtype."""
    paths = sorted(layers)
    return {path: _numbers(layers[path]).float().norm().item() for path in paths[:4] + paths[-4:]}


def _numbers(layer):
    """A frozen weight; one in four bits as what its codes stand for."""
    base = _base(layer)
    return base.dequantized(torch.float32) if hasattr(base, "dequantized") else base.weight.detach()


def _same_trace(there, here):
    return there.keys() == here.keys() and all(math.isclose(there[path], here[path], rel_tol=0.02) for path in here)


def _name(model):
    return getattr(model, "name_or_path", "") or type(model).__name__
