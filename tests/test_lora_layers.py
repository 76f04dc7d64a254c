"""Which layers "all-linear" means, against peft; names of the bare model, whatever is wrapped around it."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_models import IDS, LAYERS, fill, logits, small, tiny_llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from transformers.pytorch_utils import Conv1D
from tuning.lora import (
    adapted_layers,
    add_lora,
    linear_layers,
    merge,
    unload,
    unmerge,
    use_adapter,
    warn_of_experts,
)
from tuning.targets import stacked_weights
from tuning.training import Classifier, mean_of_tokens

BERT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
LLAMA = BERT | {"num_key_value_heads": 1, "pad_token_id": 0}
BART = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}


def tiny(kind, settings):
    """A random model of a class of transformers."""
    torch.manual_seed(0)
    config = getattr(transformers, kind).config_class(**settings)
    return getattr(transformers, kind)(config)


def linear_names(model):
    return [path for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]


# Of token classification and question answering peft learns too late that it has a head; named, it is left out.
@pytest.mark.parametrize(
    ("kind", "settings", "task", "head", "left_out"),
    [
        ("LlamaForSequenceClassification", LLAMA, "SEQ_CLS", None, ["score"]),
        ("BertForSequenceClassification", BERT, "SEQ_CLS", None, ["classifier"]),
        ("RobertaForSequenceClassification", BERT, "SEQ_CLS", None, ["classifier.dense", "classifier.out_proj"]),
        ("BertForTokenClassification", BERT, "TOKEN_CLS", ["classifier"], ["classifier"]),
        ("LlamaForTokenClassification", LLAMA, "TOKEN_CLS", ["score"], ["score"]),
        ("BertForQuestionAnswering", BERT, "QUESTION_ANS", ["qa_outputs"], ["qa_outputs"]),
        ("LlamaForQuestionAnswering", LLAMA, "QUESTION_ANS", ["qa_outputs"], ["qa_outputs"]),
        ("BertForMaskedLM", BERT, None, None, ["cls.predictions.decoder"]),
        ("RobertaForMaskedLM", BERT, None, None, ["lm_head.decoder"]),
        ("LlamaForCausalLM", LLAMA, "CAUSAL_LM", None, ["lm_head"]),
        (
            "GPT2LMHeadModel",
            {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2},
            "CAUSAL_LM",
            None,
            ["lm_head"],
        ),
        ("BartForConditionalGeneration", BART, None, None, ["lm_head"]),
        ("BertModel", BERT, "FEATURE_EXTRACTION", None, []),
    ],
)
def test_all_linear_is_peft_s(kind, settings, task, head, left_out):
    model = tiny(kind, settings)
    names = linear_names(model)
    config = LoraConfig(r=2, target_modules="all-linear", task_type=task, modules_to_save=head)
    theirs = get_peft_model(copy.deepcopy(model), config).base_model.model
    expected = [path for path, layer in theirs.named_modules() if hasattr(layer, "lora_A")]
    assert list(linear_layers(model)) == expected
    assert add_lora(model, "all-linear", rank=2, name="one") == expected
    assert add_lora(model, "all-linear", rank=3, name="two") == expected
    assert sorted(set(names) - set(expected)) == left_out


def test_all_linear_leaves_out_other_heads():
    """BART's, which peft's list of names has not, and this book's own."""
    model = tiny("BartForSequenceClassification", BART)
    heads = {path for path in linear_names(model) if path.startswith("classification_head.")}
    assert set(linear_names(model)) - set(linear_layers(model)) == heads and len(heads) == 2
    tokenizer = SimpleNamespace(model_max_length=64)
    classifier = Classifier(tiny("BertModel", BERT), tokenizer, 3, mean_of_tokens)
    assert [path for path in linear_names(classifier) if path not in linear_layers(classifier)] == ["head"]
    inner = nn.Sequential(nn.ModuleDict({"head": nn.Linear(4, 4)}))  # only what is a part of the model itself is a head
    assert list(linear_layers(inner)) == ["0.head"]


# --- a mixture of experts

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "settings", "verb"),
    [
        ("Qwen3MoeForCausalLM", LLAMA | EXPERTS, "adapts"),
        ("MixtralForCausalLM", LLAMA | {"num_local_experts": 3}, "quantizes"),
    ],
)
def test_experts_that_are_left_out_are_named(kind, settings, verb):
    model = tiny(kind, settings)
    stacked = stacked_weights(model)
    expected = {path: weight.numel() for path, weight in model.named_parameters() if "experts" in path}
    assert stacked == expected and len(stacked) == 4
    layers = linear_layers(model)
    reached = sum(layer.weight.numel() for layer in layers.values())
    share = f"{reached / (reached + sum(expected.values())):.1%}"
    message = f"this {verb} layers with {share} of the weights.*model.layers.0.mlp.experts.gate_up_proj and 3 more"
    with pytest.warns(UserWarning, match=message):
        warn_of_experts(model, layers, verb)
    with pytest.warns(UserWarning, match=message.replace(verb, "adapts")) as caught:
        add_lora(model, "all-linear", rank=2)
    assert [warning.filename for warning in caught] == [__file__]  # where the reader called it


def test_without_experts_nothing_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    model.register_parameter("places", nn.Parameter(torch.zeros(1, 5, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(model, "all-linear", rank=2)
        add_lora(tiny("GPT2LMHeadModel", GPT2), rank=2)
    moe = tiny("Qwen3MoeForCausalLM", LLAMA | EXPERTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(moe, ["q_proj"], rank=2)  # a choice by name is the reader's own


# --- names under wrappers


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_layer(model):
    model.model.layers[0] = compiled(model.model.layers[0])
    return model


def compiled_linear(model):
    """Compiled one by one, and run once: what was compiled must not be what answers later."""
    attention = model.model.layers[1].self_attn
    attention.q_proj = compiled(attention.q_proj)
    logits(model)
    return model


def checkpointed_layers(model):
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = checkpoint_wrapper(layer)
    return model


def checkpointed_linear(model):
    model.model.layers[1].self_attn.q_proj = checkpoint_wrapper(model.model.layers[1].self_attn.q_proj)
    return model


def compiled_and_run(model):
    model = compiled(model)
    logits(model)
    return model


WRAPPINGS = [
    compiled_and_run,
    nn.DataParallel,
    AveragedModel,
    checkpoint_wrapper,
    compiled_layer,
    compiled_linear,
    checkpointed_layers,
    checkpointed_linear,
    lambda model: nn.DataParallel(compiled(checkpointed_layers(model))),
]
NAMES = ["compiled", "parallel", "averaged", "checkpointed", "layer", "linear", "each", "inner", "three"]


@pytest.mark.parametrize("wrap", WRAPPINGS, ids=NAMES)
@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "layers.1.mlp.up_proj"], r"model\.layers\.\d\..*(q|down)_proj"]
)
def test_names_are_the_bare_model_s(wrap, targets):
    """An adapter put into a wrapped model has the names and gives the numbers that it has and gives in the bare one."""
    bare, wrapped = tiny_llama(), wrap(tiny_llama())
    before = logits(wrapped)
    expected = add_lora(bare, targets, rank=3, alpha=5)
    assert add_lora(wrapped, targets, rank=3, alpha=5) == expected == list(adapted_layers(wrapped))
    torch.testing.assert_close(logits(wrapped), before, rtol=0, atol=0)
    for model in (bare, wrapped):
        for seed, layer in enumerate(adapted_layers(model).values()):
            fill(layer.adapters["default"], seed)
    torch.testing.assert_close(logits(wrapped), logits(bare))
    assert (logits(wrapped) - before).abs().max() > 0.1
    use_adapter(wrapped, None)
    torch.testing.assert_close(logits(wrapped), before)
    use_adapter(wrapped, "default")
    for model in (bare, wrapped):
        merge(model)
    torch.testing.assert_close(logits(wrapped), logits(bare))
    unload(wrapped)
    torch.testing.assert_close(logits(wrapped), logits(bare))
    assert not [name for name, _ in wrapped.named_parameters() if "adapters" in name or ".base." in name]


def test_a_part_that_is_called_module_keeps_its_name():
    model = nn.DataParallel(nn.ModuleDict({"module": small(), "other": nn.Linear(3, 3)}))
    assert add_lora(model, ["wide", "other"], rank=2) == ["module.wide", "other"]
    assert linear_layers(model).keys() == {"module.wide", "module.narrow", "module.turned", "other"}


def test_a_copy_in_a_compiled_model_is_what_answers():
    model = compiled(small())
    model(IDS)
    add_lora(model, ["wide"], rank=2, modules_to_save=["narrow"])
    bare, before = small(), model(IDS)
    torch.testing.assert_close(before, bare(IDS))
    model.narrow.adapters["default"].weight.data.mul_(3)
    bare.narrow.weight.data.mul_(3)
    torch.testing.assert_close(model(IDS), bare(IDS))
    assert not torch.allclose(model(IDS), before)


def test_an_error_names_layers_of_the_bare_model():
    model = compiled_linear(tiny_llama())
    with pytest.raises(
        ValueError, match=r"target 'query' matches no layer; .*\['down_proj', 'embed_tokens', 'gate_proj'"
    ):
        add_lora(model, ["query"])
    with pytest.raises(ValueError, match="matches no layer"):
        add_lora(nn.DataParallel(tiny_llama()), ["_orig_mod"])


# --- layers that are wrapped after their adapter came


WRAPPERS = pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper, nn.DataParallel])


@WRAPPERS
@pytest.mark.parametrize("part", ["base", "adapters.default"])
def test_a_wrapped_layer_or_adapter_is_merged_as_a_bare_one(wrap, part):
    """The bare model's arithmetic is that of peft's (tests/test_lora.py)."""
    bare, model = small(), small()
    for each in (bare, model):
        for seed, name in enumerate(add_lora(each, LAYERS, rank=3, alpha=5)):
            fill(each.get_submodule(name).adapters["default"], seed)
    for name in LAYERS:
        path = f"{name}.{part}"
        model.set_submodule(path, wrap(model.get_submodule(path)))
    expected = bare(IDS)
    torch.testing.assert_close(model(IDS), expected)
    for change in (merge, unmerge, merge):
        change(bare)
        change(model)
        for name in LAYERS:
            assert torch.equal(model.get_submodule(name).weight, bare.get_submodule(name).weight)
        assert torch.equal(model.wide.bias, bare.wide.bias)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    assert unload(model)(IDS).shape == expected.shape


@pytest.mark.parametrize(
    ("targets", "modules_to_save"), [(["words", "narrow"], []), (["words"], ["narrow"]), (["1"], ["0.narrow"])]
)
def test_no_adapter_is_put_into_what_another_trains_whole(targets, modules_to_save):
    model = nn.Sequential(small(), nn.Linear(7, 3))
    add_lora(model, ["1"], rank=2, name="one", modules_to_save=["0"])
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match="0 would be trained whole by one adapter and by low rank or in part by"):
        add_lora(model, targets, rank=2, name="two", modules_to_save=modules_to_save)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before


def test_a_convolution_that_is_parametrized_is_no_stack_of_experts():
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": (16,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embedding_groups": 2}
    assert stacked_weights(tiny("Wav2Vec2Model", settings | convolutions)) == {}
    linear = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    assert stacked_weights(nn.Sequential(linear)) == {}
