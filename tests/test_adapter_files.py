"""Adapter files: both ways with peft, under any wrapper, whole or not there; bad files are refused."""

import copy
import dataclasses
import json
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import fill, logits, small, tiny_llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tuning import adapter_files
from tuning.adapter_files import load_adapter, pattern_value, save_adapter
from tuning.lora import adapted_layers, add_lora, linear_layers, merge, use_adapter
from tuning.qlora import quantize_model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, small], ids=["llama", "small"])
def test_peft_loads_what_we_save(tmp_path, make, rslora):
    targets = ["q_proj", "down_proj"] if make is tiny_llama else ["words", "wide"]
    model = make().eval()
    for seed, name in enumerate(add_lora(model, targets, rank=3, alpha=5, rslora=rslora)):
        fill(model.get_submodule(name).adapters["default"], seed)
    save_adapter(tmp_path, model)
    theirs = PeftModel.from_pretrained(make().eval(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_peft_loads_an_adapter_of_conv1d(tmp_path):
    model = small()
    add_lora(model, ["turned"], rank=2, alpha=5)
    fill(model.turned.adapters["default"], 0)
    save_adapter(tmp_path, model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(small(), tmp_path)), logits(model))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*\.1\..*(v|up)_proj"])
def test_we_load_what_peft_saves(tmp_path, targets):
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_rslora=True))
    torch.manual_seed(1)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight)
    theirs.eval().save_pretrained(tmp_path)
    ours = tiny_llama()
    load_adapter(tmp_path, ours, "read")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - logits(tiny_llama())).abs().max() > 0.1


def test_we_load_peft_adapters_of_an_embedding(tmp_path):
    theirs = get_peft_model(tiny_llama(tie=False), LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens"]))
    weight = theirs.base_model.model.model.embed_tokens.lora_embedding_A["default"]
    nn.init.normal_(weight)
    theirs.eval().save_pretrained(tmp_path)
    ours = tiny_llama(tie=False)
    load_adapter(tmp_path, ours)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_an_embedding_that_came_with_the_adapter_must_be_the_models_own(tmp_path):
    theirs = get_peft_model(tiny_llama(tie=False), LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama(tie=False)
    ours.model.embed_tokens.weight.data[7] += 1
    with pytest.raises(ValueError, match=r"trained beside another model.embed_tokens"):
        load_adapter(tmp_path, ours)


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    for seed, name in enumerate(add_lora(model, ["q_proj", "v_proj"], rank=2, alpha=5)):
        fill(model.get_submodule(name).adapters["default"], seed)
    save_adapter(tmp_path, model)
    return tmp_path


def test_a_round_trip_is_exact_and_leaves_no_other_file(saved):
    model = tiny_llama()
    load_adapter(saved, model)
    again = saved / "again"
    save_adapter(again, model)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (saved, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (again / "adapter_config.json").read_text() == (saved / "adapter_config.json").read_text()
    assert sorted(path.name for path in again.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HEAD = "base_model.model.model.norm.weight"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: change_tensors(f, lambda t: t.pop(FIRST)), "it has no base_model.model.model.layers.0"),
        (lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(1))), "it has an unknown extra"),
        (lambda f: change_tensors(f, lambda t: t.update({FIRST: torch.ones(3, 16)})), r"shape \(3, 16\), needed is"),
        (lambda f: change_tensors(f, lambda t: t[FIRST].fill_(torch.nan)), "not finite"),
        (lambda f: change_config(f, target_modules=["q_proj"]), "it has an unknown .*v_proj"),
        (lambda f: change_config(f, target_modules=["query"]), "target 'query' matches no layer"),
        (lambda f: change_config(f, r=0), "rank 0 is none"),
        (lambda f: change_config(f, lora_dropout=1.5), "dropout 1.5 is no probability"),
        (lambda f: change_config(f, target_modules=[]), "the targets match no layer"),
        (lambda f: change_config(f, target_modules=None), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_config(f, peft_type=None), "is no adapter that peft or save_adapter wrote"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_config(f, target_modules=7), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_config(f, target_modules="*q_proj"), r"'\*q_proj' is no pattern of names"),
        (
            lambda f: change_config(f, exclude_modules=["layers.0.self_attn.q_proj"]),
            "an unknown .*layers.0.self_attn.q_",
        ),
        (lambda f: change_config(f, rank_pattern={"v_proj": 3}), r"shape \(2, 16\), needed is \(3, 16\)"),
        (lambda f: change_config(f, rank_pattern={"v_proj": 0}), "rank 0 is none"),
        (lambda f: change_config(f, rank_pattern={"(": 2}), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_config(f, rank_pattern=[3]), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_config(f, alpha_pattern={"v_proj": -1}), "alpha -1 must be above 0"),
        (lambda f: change_config(f, modules_to_save=3), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_config(f, modules_to_save="norm"), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_config(f, rank_pattern=["q_proj"]), "is no adapter that peft or save_adapter wrote"),
        (lambda f: change_tensors(f, lambda t: t.update({HEAD: torch.ones(16)})), f"an unknown {HEAD}"),
        (lambda f: change_config(f, use_dora=True), "uses use_dora, which this book does not build"),
        (lambda f: change_config(f, init_lora_weights="pissa"), "uses init_lora_weights"),
        (lambda f: change_config(f, peft_type="IA3"), "uses peft_type"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is no adapter that peft or save_adapter wrote"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"no"), "is no adapter that peft or save_adapter"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "a pickle, which can run any"),
    ],
)
def test_a_bad_file_is_refused_and_the_model_is_as_it_was(saved, change, message):
    change(saved)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        load_adapter(saved, model)
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()


def test_the_adapter_of_another_model_is_refused(saved):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    with pytest.raises(ValueError, match="the weights here are others"):
        load_adapter(saved, model)
    load_adapter(saved, tiny_llama().bfloat16())  # the same weights in 16 bits are no other model


def change_trace(folder, text):
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors", {"trace": text})


@pytest.mark.parametrize("old", ['{"model.layers.0.self_attn.q_proj": 1.5}', "{}", "null", "3", '["1.5"]'])
def test_a_trace_of_another_kind_is_not_compared(saved, old):
    """The library's first files had the lengths of the adapted layers, by name."""
    expected = tiny_llama()
    load_adapter(saved, expected)
    change_trace(saved, old)
    model = tiny_llama()
    load_adapter(saved, model)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [7, 52, 90])
def test_more_or_fewer_tokens_make_no_other_model(saved, tokens):
    model = tiny_llama()
    model.resize_token_embeddings(tokens)
    load_adapter(saved, model)
    theirs = tiny_llama()
    theirs.resize_token_embeddings(tokens)
    theirs.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight)  # the new rows are random
    theirs = PeftModel.from_pretrained(theirs, saved).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_no_adapter_is_loaded_into_what_another_trains_whole(saved):
    model = tiny_llama()
    add_lora(model, ["down_proj"], rank=2, name="whole", modules_to_save=["layers.1.self_attn"])
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match="self_attn would be trained whole by one adapter and by low rank or in part"):
        load_adapter(saved, model)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before


def test_no_file_at_all(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"there is no adapter in .*: it has no adapter_model\.safetensors"):
        load_adapter(tmp_path / "other", small())
    (saved / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no adapter in .*: it has no adapter_config\.json"):
        load_adapter(saved, tiny_llama())


def test_weights_that_are_not_finite_are_neither_saved_nor_merged(tmp_path):
    model = small()
    add_lora(model, ["wide"], rank=2)
    model.wide.adapters["default"].B.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(tmp_path / "new", model)
    with pytest.raises(ValueError, match="not finite"):
        merge(model)
    assert not (tmp_path / "new").exists() and model.wide.merged is None
    with pytest.raises(ValueError, match="None names no adapter"):
        save_adapter(tmp_path / "new", model, None)


@pytest.mark.parametrize(("alpha", "written"), [(np.float32(16.5), 16.5), (np.int64(7), 7), (Fraction(5, 2), 2.5)])
def test_an_alpha_that_is_any_real_number_is_written(tmp_path, alpha, written):
    model = tiny_llama()
    add_lora(model, ["q_proj"], rank=2, alpha=3, name="other")
    add_lora(model, ["q_proj"], rank=2, alpha=alpha)
    save_adapter(tmp_path, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == written
    load_adapter(tmp_path, tiny_llama())


def test_a_trained_copy_is_not_loaded_into_pieces(tmp_path, one_process):
    save_adapter(tmp_path / "bare", filled())
    model = fully_shard(tiny_llama(), mesh=init_device_mesh("cpu", (1,)))
    for load in (
        lambda: load_adapter(tmp_path / "bare", model),
        lambda: add_lora(model, ["q_proj"], modules_to_save=["norm"]),
    ):
        with pytest.raises(ValueError, match=r"model\.norm is in pieces; .* before fully_shard"):
            load()
    assert not any("adapters" in name for name, _ in model.named_parameters())


# --- what peft's settings say


def test_every_setting_of_the_installed_peft_is_read_or_harmless_or_refused():
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    kinds = (adapter_files.READ, adapter_files.HARMLESS, adapter_files.REFUSED)
    assert names <= set().union(*kinds)  # an older peft has fewer
    assert len(set().union(*kinds)) == sum(map(len, kinds))


@pytest.mark.parametrize("key", sorted(adapter_files.REFUSED))
def test_a_setting_that_changes_the_mathematics_is_refused_by_name(saved, key):
    change_config(saved, **{key: {"some": 1}})
    with pytest.raises(ValueError, match=f"uses {key}, which this book does not build"):
        load_adapter(saved, tiny_llama())
    change_config(saved, **{key: None})
    load_adapter(saved, tiny_llama())


@pytest.mark.parametrize(
    ("key", "value"), [("bias", "lora_only"), ("peft_type", "VERA"), ("init_lora_weights", "olora")]
)
def test_a_setting_that_is_read_is_refused_where_it_asks_for_more(saved, key, value):
    change_config(saved, **{key: value})
    with pytest.raises(ValueError, match=f"uses {key}, which this book does not build"):
        load_adapter(saved, tiny_llama())


def test_settings_of_other_trainers_are_ignored(saved):
    auto = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    change_config(saved, unsloth_version="2026.1", auto_mapping=auto, task_type="CAUSAL_LM", trained_with={"a": 1})
    model, before = tiny_llama(), logits(tiny_llama())
    load_adapter(saved, model)
    assert (logits(model) - before).abs().max() > 0.1


def random_peft(make, **options):
    """A model with an adapter of peft's, all of its numbers drawn, and the model's name for its adapted layers."""
    theirs = get_peft_model(make(), LoraConfig(**options)).eval()
    torch.manual_seed(1)
    for name, weight in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(weight)
    return theirs


def test_names_that_this_model_has_not_are_skipped(tmp_path):
    """As in exports of models that see images: their files name the picture's layers too."""
    theirs = random_peft(tiny_llama, r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"])
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, target_modules=["qkv", "q_proj", "linear_fc1", "up_proj"])
    ours = tiny_llama()
    load_adapter(tmp_path, ours)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    change_config(tmp_path, target_modules=["qkv", "linear_fc1"])
    with pytest.raises(ValueError, match="target 'qkv' matches no layer"):
        load_adapter(tmp_path, tiny_llama())
    with pytest.raises(ValueError, match="target 'qkv' matches no layer"):
        add_lora(tiny_llama(), ["qkv", "q_proj"], rank=3)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    ],
)
def test_targets_as_peft_understands_them(tmp_path, options):
    theirs = random_peft(tiny_llama, r=3, lora_alpha=7, **options)
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, **options)  # as they were asked for; peft writes what it found
    ours = tiny_llama()
    load_adapter(tmp_path, ours)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}, {"up_proj": 11}),
        ({"^model.layers.0.self_attn.q_proj": 1, "q_proj": 4}, {}),
        ({}, {r"layers.1.*": 3}),
    ],
)
def test_ranks_and_alphas_by_pattern_go_both_ways(tmp_path, ranks, alphas, rslora):
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"], "use_rslora": rslora}
    theirs = random_peft(tiny_llama, rank_pattern=ranks, alpha_pattern=alphas, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_llama()
    load_adapter(tmp_path / "theirs", ours)
    for path, layer in adapted_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(path)
        assert (layer.adapters["default"].rank, layer.adapters["default"].alpha) == (
            twin.r["default"],
            twin.lora_alpha["default"],
        )
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(tmp_path / "ours", ours)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_pattern_that_is_written_means_one_layer_alone(tmp_path):
    """Also where another layer's name ends like its own."""
    assert pattern_value({r"^wide": 7}, "0.wide", 3) == 3 and pattern_value({r"^wide": 7}, "wide", 3) == 7
    assert pattern_value({"q": 2, "q_proj": 5}, "layers.0.q_proj", 8) == 5


# --- heads that are trained whole


def tiny_classifier(kind="LlamaForSequenceClassification"):
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
    config = getattr(transformers, kind).config_class(num_attention_heads=2, num_labels=3, **settings)
    return getattr(transformers, kind)(config).eval()


HEADED = pytest.mark.parametrize(
    ("kind", "head", "targets"),
    [
        ("LlamaForSequenceClassification", "score", ["q_proj", "up_proj"]),
        ("BertForSequenceClassification", "classifier", ["query", "value"]),
        ("RobertaForSequenceClassification", "classifier", "all-linear"),
    ],
)


@HEADED
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_we_load_the_head_that_peft_saved(tmp_path, kind, head, targets, task):
    named = [head] if task is None else None  # with its task peft finds the head itself
    theirs = random_peft(
        lambda: tiny_classifier(kind), r=3, lora_alpha=7, target_modules=targets, task_type=task, modules_to_save=named
    )
    theirs.save_pretrained(tmp_path)
    ours = tiny_classifier(kind)
    bare = logits(ours)
    load_adapter(tmp_path, ours, "read")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    use_adapter(ours, None)
    torch.testing.assert_close(logits(ours), bare, rtol=0, atol=0)


@HEADED
def test_peft_loads_the_head_that_we_saved(tmp_path, kind, head, targets):
    ours = tiny_classifier(kind)
    for seed, name in enumerate(add_lora(ours, targets, rank=3, alpha=7, modules_to_save=[head])):
        fill(ours.get_submodule(name).adapters["default"], seed)
    for weight in ours.get_submodule(head).adapters["default"].parameters():
        nn.init.normal_(weight.data)
    save_adapter(tmp_path, ours)
    heads = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in key}
    here = tiny_classifier(kind).get_submodule(head).state_dict()
    assert heads == {f"base_model.model.{head}.{part}" for part in here}
    theirs = PeftModel.from_pretrained(tiny_classifier(kind), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    again = tiny_classifier(kind)
    load_adapter(tmp_path, again)
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=0)


def test_trained_embeddings_go_both_ways(tmp_path):
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = random_peft(lambda: tiny_llama(tie=False), **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_llama(tie=False)
    load_adapter(tmp_path / "theirs", ours)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(tmp_path / "ours", ours)
    load_adapter(tmp_path / "ours", tiny_llama(tie=False))  # the trace is of the frozen embeddings
    again = PeftModel.from_pretrained(tiny_llama(tie=False), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"a weight of .*embed_tokens is tied"):
        load_adapter(tmp_path / "theirs", tiny_llama())


def test_a_head_whose_name_another_ends_on_goes_to_peft(tmp_path):
    """DistilBERT's `classifier` and `pre_classifier`: peft takes both, for it looks at the ends of names alone."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
    build = partial(copy.deepcopy, transformers.DistilBertForSequenceClassification(config).eval())
    ours = build()
    for seed, name in enumerate(add_lora(ours, ["q_lin"], rank=3, alpha=7, modules_to_save=["classifier"])):
        fill(ours.get_submodule(name).adapters["default"], seed)
    nn.init.normal_(ours.classifier.adapters["default"].weight.data)
    save_adapter(tmp_path, ours)
    theirs = PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    again = build()
    load_adapter(tmp_path, again)
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=0)


class Twice(nn.Module):
    """A layer whose whole name another's ends on."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, ids):
        return self.block["proj"](torch.tanh(self.proj(torch.cos(ids.float()))))


@pytest.mark.parametrize("targets", ["proj", r"block\.proj", r".*proj"])
def test_a_layer_whose_name_another_ends_on_is_found_again(tmp_path, targets):
    torch.manual_seed(0)
    build = partial(copy.deepcopy, Twice())
    model = build()
    names = add_lora(model, targets, rank=2, alpha=3)
    for seed, name in enumerate(names):
        fill(model.get_submodule(name).adapters["default"], seed)
    save_adapter(tmp_path, model)
    again, theirs = build(), PeftModel.from_pretrained(build(), tmp_path)
    load_adapter(tmp_path, again)
    assert list(adapted_layers(again)) == names
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


# --- wrappers


def filled(wrap=lambda model: model):
    """A model with an adapter that was put into it through a wrapper."""
    model = wrap(tiny_llama())
    add_lora(model, ["q_proj", "down_proj"], rank=3, alpha=5, modules_to_save=["norm"])
    for seed, layer in enumerate(adapted_layers(model).values()):
        adapter = layer.adapters["default"]
        if hasattr(adapter, "A"):
            fill(adapter, seed)
        else:
            adapter.weight.data.add_(1)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = checkpoint_wrapper(layer)
    return model


def compiled_linear(model):
    model.model.layers[0].self_attn.q_proj = compiled(model.model.layers[0].self_attn.q_proj)
    return model


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel, checkpointed, compiled_linear])
def test_a_file_has_the_bare_names_whatever_is_wrapped_around(tmp_path, wrap):
    """Wrapped before the adapters or after; and it is loaded into a bare model and a wrapped one, by peft and by us."""
    bare = filled()
    save_adapter(tmp_path / "bare", bare)
    expected, settings = load_file(tmp_path / "bare" / "adapter_model.safetensors"), read_config(tmp_path / "bare")
    after = wrap(filled())
    for folder, model in (("before", filled(wrap)), ("after", after)):
        save_adapter(tmp_path / folder, model)
        found = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        assert read_config(tmp_path / folder) == settings
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "before").eval()
    torch.testing.assert_close(logits(theirs), logits(bare), rtol=1e-5, atol=1e-5)
    wrapped = wrap(tiny_llama())
    logits(wrapped)
    load_adapter(tmp_path / "bare", wrapped)
    torch.testing.assert_close(logits(wrapped), logits(bare))


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, checkpoint_wrapper])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_wrapped_adapter_is_saved_as_a_bare_one(tmp_path, wrap, rslora):
    for make, targets in ((tiny_llama, ["q_proj", "down_proj"]), (small, ["words", "wide", "turned"])):
        model = make()
        names = add_lora(model, targets, rank=3, alpha=5, rslora=rslora)
        for seed, name in enumerate(names):
            fill(model.get_submodule(name).adapters["default"], seed)
        folders = tmp_path / make.__name__ / "bare", tmp_path / make.__name__ / "wrapped"
        save_adapter(folders[0], model)
        for name in names:
            for part in ("base", "adapters.default"):
                model.set_submodule(f"{name}.{part}", wrap(model.get_submodule(f"{name}.{part}")))
        save_adapter(folders[1], model)
        assert read_config(folders[0]) == read_config(folders[1])
        expected, found = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        load_adapter(folders[1], make())


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, checkpoint_wrapper])
def test_a_trained_copy_of_wrapped_layers_has_bare_names(tmp_path, wrap):
    kind = "RobertaForSequenceClassification"
    model = tiny_classifier(kind)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(path, wrap(layer))
    add_lora(model, ["query"], rank=3, alpha=5, modules_to_save=["classifier"])
    for weight in model.classifier.adapters["default"].parameters():
        nn.init.normal_(weight.data)
    save_adapter(tmp_path, model)
    for again in (tiny_classifier(kind), PeftModel.from_pretrained(tiny_classifier(kind), tmp_path).eval()):
        if not isinstance(again, PeftModel):
            load_adapter(tmp_path, again)
        torch.testing.assert_close(logits(again.eval()), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_a_copys_buffers_are_saved_as_in_its_state_dict():
    torch.manual_seed(0)
    copied = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    copied.register_buffer("unsaved", torch.ones(1), persistent=False)
    state, found = copied.state_dict(), adapter_files.peft_tensors("0", copied)
    assert found.keys() == {f"base_model.model.0.{key}" for key in state}
    assert all(torch.equal(found[f"base_model.model.0.{key}"], state[key]) for key in state)


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["fsdp2", "fsdp1", "ddp"])
def test_a_sharded_model_is_saved_whole(tmp_path, one_process, how):
    save_adapter(tmp_path / "bare", filled())
    expected = load_file(tmp_path / "bare" / "adapter_model.safetensors")
    model = filled()
    if how == "fsdp2":
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.model.layers[0].self_attn.q_proj.adapters["default"].A, DTensor)
    else:
        model = model.requires_grad_(True)  # FSDP's first kind wants the same of all that it joins
        first = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
        model = {"fsdp1": first, "ddp": DistributedDataParallel}[how](model)
    with FullyShardedDataParallel.summon_full_params(model) if how == "fsdp1" else nullcontext():
        save_adapter(tmp_path / "sharded", model)
    found = load_file(tmp_path / "sharded" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    again = tiny_llama()
    load_adapter(tmp_path / "sharded", again)
    torch.testing.assert_close(logits(again), logits(filled()), rtol=0, atol=0)


def save_in_pieces(rank, folder, orig, by_size):
    """What each of two processes does: the adapter is in pieces outside of `summon_full_params`, and whole in it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = filled().requires_grad_(True)
    options = {"use_orig_params": orig, "device_id": torch.device("cpu")}
    if by_size:  # adapters are wrapped too
        options["auto_wrap_policy"] = partial(size_based_auto_wrap_policy, min_num_params=40)
    model = FullyShardedDataParallel(model, **options)
    if by_size:
        wrapped = [layer.adapters["default"] for layer in adapted_layers(model).values()]
        assert any(isinstance(adapter, FullyShardedDataParallel) for adapter in wrapped)
    with pytest.raises(ValueError, match="is in pieces here; save it inside FSDP's summon_full_params"):
        save_adapter(folder / "pieces", model)
    with FullyShardedDataParallel.summon_full_params(model):
        save_adapter(folder / "whole", model)
    dist.destroy_process_group()


@pytest.mark.parametrize(("orig", "by_size"), [(True, False), (False, True), (True, True)])
def test_an_adapter_in_pieces_is_refused(tmp_path, orig, by_size):
    torch.multiprocessing.spawn(save_in_pieces, (tmp_path, orig, by_size), nprocs=2)
    assert not (tmp_path / "pieces").exists()
    save_adapter(tmp_path / "bare", filled())
    expected, found = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("bare", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("cut", ["low", "copy"])
def test_a_flat_piece_is_refused(tmp_path, cut):
    model = filled()
    weight = model.model.norm.adapters["default"].weight
    if cut == "low":
        weight = model.model.layers[1].self_attn.q_proj.adapters["default"].A
    weight.data = weight.data.flatten()[1:]
    with pytest.raises(ValueError, match="is in pieces here"):
        save_adapter(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


def test_of_several_processes_the_first_writes(tmp_path, one_process, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    save_adapter(tmp_path / "second", filled())
    assert not (tmp_path / "second").exists()


# --- four bits


def wide_llama():
    return tiny_llama(hidden_size=64, intermediate_size=128)  # bitsandbytes wants such multiples on a CPU


def bits_and_bytes(model):
    """The model with each linear layer but the output layer in bitsandbytes' four bits."""
    bnb = pytest.importorskip("bitsandbytes")
    for path, layer in linear_layers(model).items():
        quantized = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
        quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        model.set_submodule(path, quantized.to("cpu"))
    return model


@pytest.mark.parametrize("quantize", [bits_and_bytes, quantize_model], ids=["bitsandbytes", "ours"])
def test_an_adapter_trained_beside_four_bits_is_loaded_beside_the_same_model_whole(tmp_path, quantize):
    model = quantize(wide_llama())
    names = add_lora(model, "all-linear", rank=3, alpha=5)
    assert len(names) == 14 and model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    for seed, name in enumerate(names):
        fill(model.get_submodule(name).adapters["default"], seed)
    ids = torch.arange(6).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    assert model.get_submodule(names[0]).adapters["default"].A.grad.abs().sum() > 0
    save_adapter(tmp_path, model)
    for same in (wide_llama(), wide_llama().bfloat16(), quantize(wide_llama())):
        load_adapter(tmp_path, same)
        for name in names:
            found, expected = (lm.get_submodule(name).adapters["default"] for lm in (same, model))
            assert torch.equal(found.A, expected.A) and torch.equal(found.B, expected.B)
    torch.testing.assert_close(logits(same), logits(model))
    theirs = PeftModel.from_pretrained(quantize(wide_llama()), tmp_path).base_model.model.eval()
    x = torch.randn(1, 5, 64, requires_grad=True)  # without a gradient bitsandbytes computes in 16 bits
    for name in names:
        if "down_proj" not in name:
            found, expected = model.get_submodule(name)(x), theirs.get_submodule(name)(x)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = wide_llama()
    other.model.embed_tokens.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="the weights here are others"):
        load_adapter(tmp_path, other)


def test_a_model_without_a_matrix_to_trace_is_loaded_without_that_check(tmp_path):
    """All of it in four bits, and no embedding: what is left to look at are adapters."""
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)))
    add_lora(model, ["0", "1"], rank=2, alpha=3)
    save_adapter(tmp_path, model)
    torch.manual_seed(0)
    load_adapter(tmp_path, nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)))


def test_the_adapter_of_four_bits_is_loaded_beside_the_same_whole_layers(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), nn.Embedding(5, 3))

    model = quantize_model(build())
    add_lora(model, ["0"], rank=2, alpha=3)
    fill(model[0].adapters["default"], 0)
    save_adapter(tmp_path, model)
    same = build()
    load_adapter(tmp_path, same)
    assert torch.equal(same[0].adapters["default"].A, model[0].adapters["default"].A)


# --- killed while it writes


@pytest.mark.parametrize("killed", ["write", "rename"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["new", "over"])
def test_a_killed_save_leaves_the_old_adapter_or_none(tmp_path, monkeypatch, killed, at, first):
    """Never new tensors beside old settings: the two adapters fit the same layers, and differ in alpha alone."""
    if not first:
        add_and_save(tmp_path, alpha=5)
        old = read_files(tmp_path)
    count = 0

    def die(*args, **options):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return real(*args, **options)

    if killed == "rename":
        real = Path.replace
        monkeypatch.setattr(Path, "replace", lambda *args: die(*args))
    else:
        real = {1: Path.write_text, 2: adapter_files.save_file}[at]
        at = 1
        monkeypatch.setattr(*((Path, "write_text") if real is Path.write_text else (adapter_files, "save_file")), die)
    with pytest.raises(KeyboardInterrupt):
        add_and_save(tmp_path, alpha=50)
    monkeypatch.undo()
    if killed == "write" and not first:
        assert read_files(tmp_path) == old  # nothing has happened yet
    else:
        with pytest.raises(FileNotFoundError, match="there is no adapter in"):
            load_adapter(tmp_path, tiny_llama())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    add_and_save(tmp_path, alpha=50)
    model = tiny_llama()
    load_adapter(tmp_path, model)
    assert model.model.layers[0].self_attn.q_proj.adapters["default"].alpha == 50


def add_and_save(folder, alpha):
    model = tiny_llama()
    for seed, name in enumerate(add_lora(model, ["q_proj"], rank=2, alpha=alpha)):
        fill(model.get_submodule(name).adapters["default"], seed + alpha)
    save_adapter(folder, model)


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
