"""Adapters in peft's file format: what `save_adapter` writes peft loads, and the reverse."""

import json
import re
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .files import replace, same_trace, trace
from .lora import (
    EmbeddingLoRA,
    LoRA,
    TrainedCopy,
    adapted_layers,
    check_finite,
    check_names,
    check_new,
    frozen_modules,
    insert,
    new_adapter,
    trained_copy,
)
from .targets import compiled, count_uses, find_targets, find_whole, matching, outside
from .wrappers import bare_state, unwrapped, whole

__all__ = ["pattern_value", "peft_tensors"]

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft puts before each name
READ = {"alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "lora_alpha", "lora_dropout"}
READ |= {"modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora"}
HARMLESS = {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core"}
HARMLESS |= {"peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
REFUSED = {"alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config"}
REFUSED |= {"kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config"}
REFUSED |= {"lora_bias", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters"}
REFUSED |= {"trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"}  # other mathematics
DEFAULTS = {"alpha_pattern": {}, "bias": "none", "exclude_modules": [], "init_lora_weights": True, "lora_dropout": 0.0}
DEFAULTS |= {"modules_to_save": [], "rank_pattern": {}, "use_rslora": False}


def peft_tensors(path, adapter):
    """{name in peft's files: tensor} of the adapter of the layer `path`; of a trained copy all that it is made of."""
    adapter = unwrapped(adapter)
    if isinstance(adapter, EmbeddingLoRA):
        parts = {"lora_embedding_A": adapter.A, "lora_embedding_B": adapter.B}
    elif isinstance(adapter, LoRA):
        parts = {"lora_A.weight": adapter.A, "lora_B.weight": adapter.B}
    else:
        parts = bare_state(adapter)
    return {f"{PREFIX}{path}.{part}": tensor.detach() for part, tensor in parts.items()}


def pattern_value(patterns, path, default):
    """The value of the first of peft's patterns that the name `path` ends on: a rank or an alpha of some layers."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def save_adapter(folder, model, name="default"):
    """Write an adapter as peft does: `adapter_model.safetensors` and `adapter_config.json`, both or neither.

    The model's name and the lengths of some of its embeddings go along, to tell another model apart (not a fine-tuned
    copy of the same one, whose lengths hardly differ). Where several processes train, all call it and the first writes;
    FSDP of the first kind has whole weights only in its `summon_full_params`.

    Raises:
        ValueError: no such adapter, the model is merged, or a weight is in pieces or not finite.
    """
    if not isinstance(name, str):
        raise ValueError(f"{name!r} names no adapter; give the name of the one to save")
    layers = adapted_layers(model)
    check_names(layers, [name])
    layers = {path: layer for path, layer in layers.items() if name in layer.adapters}
    tensors = {}
    for path, layer in layers.items():
        _check_in_one_piece(path, layer, name)
        for key, tensor in peft_tensors(path, layer.adapters[name]).items():
            tensors[key] = whole(tensor).cpu().contiguous()
    for path, module in _namesakes(model, layers).items():
        for key, tensor in peft_tensors(path, module).items():
            tensors[key] = whole(tensor).cpu().contiguous()
    check_finite(tensors)
    metadata = {"format": "pt", "trace": json.dumps(trace(model))}
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        _write(Path(folder), tensors, metadata, _settings(model, layers, name))


def load_adapter(folder, model, name="default"):
    """Read an adapter that `save_adapter` or peft wrote, put it into the model and make it the active one.

    Raises:
        FileNotFoundError: there is no adapter; ValueError: it is a pickle, it uses what this book does not build, or
            it does not fit this model (layers, shapes, embeddings, or a rank above what a matrix can have), or
            has a missing, extra or non-finite weight. The model is then as it was.
    """
    config, tensors, frozen, there = _read(Path(folder))
    modules = frozen_modules(model)
    copied = _copied(modules, config, tensors)
    adapters = {}
    for path, layer in _layers(modules, config, copied).items():
        rank = pattern_value(config["rank_pattern"], path, config["r"])
        alpha = pattern_value(config["alpha_pattern"], path, config["lora_alpha"])
        check_new({path: layer}, name, rank, alpha, config["lora_dropout"])
        adapters[path] = new_adapter(layer, rank, alpha, config["lora_dropout"], config["use_rslora"])
    adapters |= {path: trained_copy(modules[path]) for path in copied}
    expected = {}
    for path, adapter in adapters.items():
        expected |= peft_tensors(path, adapter)
    _check_fit(folder, expected, tensors)
    _check_frozen(folder, modules, frozen)
    here = trace(model) if there else []
    if here and not same_trace(there, here):
        raise ValueError(
            f"the adapter in {folder} was trained beside {config.get('base_model_name_or_path')}, and the weights here "
            f"are others; load that model, or train an adapter for this one"
        )
    for key, tensor in expected.items():
        tensor.copy_(tensors[key])
    insert(model, adapters, name)


# --- writing


def _check_in_one_piece(path, layer, name):
    """Refuse what FSDP's first kind leaves of a weight: a flat piece, or a view of what is gone, no parameter."""
    adapter = unwrapped(layer.adapters[name])
    if isinstance(adapter, LoRA):
        parameters = all(isinstance(weight, nn.Parameter) for weight in (adapter.A, adapter.B))
        there = (*adapter.A.shape[:-1], *adapter.B.shape[1:])
        here = parameters and there == (adapter.rank, adapter.rank)
    else:
        shapes = [{key: each.shape for key, each in bare_state(part).items()} for part in (adapter, layer.base)]
        here = shapes[0] and shapes[0] == shapes[1]
    if not here:
        raise ValueError(f"adapter {name!r} of {path} is in pieces here; save it inside FSDP's summon_full_params")


def _namesakes(model, layers):
    """Frozen modules whose names end like a trained copy's (`pre_classifier`): peft expects these whole in a file too.

    Those that our own `load_adapter` would refuse are left out: adapted ones, tied ones, and those in four bits.
    """
    modules, adapted = frozen_modules(model), adapted_layers(model)
    uses = count_uses(modules)
    copies = tuple(path for path, layer in layers.items() if isinstance(layer, TrainedCopy))
    found = {}
    for path in [path for path in outside(modules, copies) if path.endswith(copies)]:
        weights = list(modules[path].parameters())
        plain = weights and all(weight.is_floating_point() and uses[id(weight)] == 1 for weight in weights)
        if plain and not any(f"{each}.".startswith(f"{path}.") for each in adapted):
            found[path] = modules[path]
    return found


def _target_names(model, low):
    """The adapted layers' whole names; as one pattern if another layer's name ends on one, for peft takes ends too."""
    for other in frozen_modules(model).keys() - low.keys():
        parts = other.split(".")
        if any(".".join(parts[start:]) in low for start in range(1, len(parts))):
            return "|".join(map(re.escape, low))
    return list(low)


def _settings(model, layers, name):
    """What peft's `adapter_config.json` says of an adapter; ranks and alphas that differ, by the whole name."""
    adapters = {path: unwrapped(layer.adapters[name]) for path, layer in layers.items()}
    low = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, LoRA)}
    first = next(iter(low.values()))
    ranks = {f"^{re.escape(path)}": each.rank for path, each in low.items() if each.rank != first.rank}
    alphas = {f"^{re.escape(path)}": each.alpha for path, each in low.items() if each.alpha != first.alpha}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(unwrapped(model), "name_or_path", "") or type(unwrapped(model)).__name__,
        "r": first.rank,
        "rank_pattern": ranks,
        "lora_alpha": first.alpha,
        "alpha_pattern": alphas,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "target_modules": _target_names(model, low),
        "modules_to_save": [path for path in adapters if path not in low] or None,
        "fan_in_fan_out": any(isinstance(unwrapped(layer.base), Conv1D) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _write(folder, tensors, metadata, config):
    """Write both files, and rename them when both are whole. Without a config there is no adapter, so new tensors never
    stand beside an old one."""

    def write_tensors(temporary):
        save_file(tensors, temporary, metadata)
        (folder / CONFIG).unlink(missing_ok=True)

    def write_config(temporary):
        temporary.write_text(json.dumps(config, indent=1, default=float), encoding="utf-8")
        replace(folder / TENSORS, write_tensors)

    replace(folder / CONFIG, write_config)


# --- reading


def _read(folder):
    """An adapter's settings, tensors and trace, refused if they are not what this module builds."""
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles and not (folder / TENSORS).is_file():
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is opened; get the adapter as "
            f"{TENSORS}"
        )
    for file in (TENSORS, CONFIG):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no adapter in {folder}: it has no {file}")
    try:
        config = _checked(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        with safe_open(folder / TENSORS, framework="pt") as file:
            there = _trace_in(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{folder} is no adapter that peft or save_adapter wrote: {error!r}") from error
    other = sorted(key for key in REFUSED if config.get(key))
    other += ["bias"] * (config["bias"] != "none") + ["peft_type"] * (config["peft_type"] != "LORA")
    other += ["init_lora_weights"] * (config["init_lora_weights"] not in (True, False, "gaussian"))
    if other:
        raise ValueError(f"the adapter in {folder} uses {', '.join(other)}, which this book does not build; use peft")
    check_finite(tensors)
    frozen = {key: tensors.pop(key) for key in list(tensors) if ".base_layer." in key}  # of an embedding
    return config, tensors, frozen, there


def _trace_in(metadata):
    """The model's trace in a file; peft writes none, and what older versions of this library wrote is not read."""
    there = json.loads(metadata.get("trace", "[]"))
    numbers = isinstance(there, list) and all(isinstance(number, (int, float)) for number in there)
    return there if numbers else []


def _checked(config):
    """Settings with what peft leaves out; an error of any kind if they are not of the kind that peft writes."""
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    for pattern, _ in (*config["rank_pattern"].items(), *config["alpha_pattern"].items()):
        compiled(pattern)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = [config[key]] if isinstance(config[key], str) and key != "modules_to_save" else config[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{key} {config[key]!r} is no list of names")
    config["peft_type"], config["r"], config["lora_alpha"]  # must be there
    return config


def _layers(modules, config, copied):
    """The layers that a file's adapter stands beside. Names that this model has not are skipped, as peft does."""
    targets, excluded = config["target_modules"], config["exclude_modules"]
    if not isinstance(targets, str):
        targets = [name for name in targets if matching(outside(modules, copied), name)] or targets
    layers = find_targets(modules, targets, apart=copied)
    if isinstance(excluded, str):
        without = [path for path in layers if compiled(excluded).fullmatch(path)]
    else:
        without = [path for name in excluded for path in matching(layers, name)]
    return {path: layer for path, layer in layers.items() if path not in without}


def _copied(modules, config, tensors):
    """The modules of which a file holds a trained copy: peft's names end like the module's, and some are not there."""
    ends = tuple(config["modules_to_save"])
    in_file = {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if ".lora_" not in key}
    paths = [path for path in modules if path and path.endswith(ends)]
    return find_whole(modules, [path for path in paths if any(f"{key}.".startswith(f"{path}.") for key in in_file)])


def _check_fit(folder, expected, tensors):
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        kind, key = ("no", min(missing)) if missing else ("an unknown", min(extra))
        raise ValueError(f"the adapter in {folder} does not fit this model: it has {kind} {key}")
    for key, tensor in expected.items():
        if tensors[key].shape != tensor.shape:
            raise ValueError(
                f"the adapter in {folder} does not fit this model: {key} has shape {tuple(tensors[key].shape)}, "
                f"needed is {tuple(tensor.shape)}"
            )


def _check_frozen(folder, modules, frozen):
    """peft writes an adapted embedding's frozen weight too; here it must be the model's own."""
    for key, there in frozen.items():
        path, _, part = key.removeprefix(PREFIX).rpartition(".base_layer.")
        here = getattr(modules.get(path), part, None)
        same = here is not None and here.shape == there.shape
        if not same or not torch.allclose(whole(here.detach()).float().cpu(), there.float(), rtol=0.02, atol=1e-3):
            raise ValueError(
                f"the adapter in {folder} was trained beside another {path} (more tokens, or a trained one), which "
                f"comes with it as {key}; load that model, or use peft"
            )
