"""Which layers "all-linear" means, against peft; names of the bare model, whatever is wrapped around it."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuning.lora import add_lora, linear_layers, warn_of_experts
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
        ("BartForConditionalGeneration", BART, "SEQ_2_SEQ_LM", None, ["lm_head"]),
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
