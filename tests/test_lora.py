"""LoRA: against peft in forward, gradients, delta and merged weights; files both ways; bad input."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from tuning.adapter_files import load_adapter, save_adapter
from tuning.lora import AdaptedLayer, LoRA, add_lora, merge, unload, unmerge, use_adapter


class Small(nn.Module):
    """An embedding and three kinds of linear layer, of unlike shapes."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.wide = nn.Linear(12, 20)
        self.narrow = nn.Linear(20, 6, bias=False)
        self.turned = Conv1D(7, 6)  # 6 -> 7, with a bias

    def forward(self, ids):
        return self.turned(torch.tanh(self.narrow(torch.tanh(self.wide(self.words(ids))))))


LAYERS = ["words", "wide", "narrow", "turned"]
IDS = torch.tensor([[1, 2, 3], [4, 10, 0]])
# We scale A x and peft B A x, so the two round otherwise; float64 shows that rounding is all the difference.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return Small().to(dtype)


def tiny_llama(tie=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


def fill(adapter, seed):
    """Numbers that are no zeros, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (adapter.A, adapter.B):
            weight.copy_(torch.randn(weight.shape, generator=generator))


def both(targets, rank, alpha, dtype=torch.float32, rslora=False):
    """The same model with our adapters and with peft's, all weights equal."""
    ours, base = small(dtype), small(dtype)
    names = add_lora(ours, targets, rank, alpha, rslora=rslora)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_rslora=rslora)
    config.fan_in_fan_out = targets == ["turned"]
    theirs = get_peft_model(base, config)
    for seed, name in enumerate(names):
        layer = ours.get_submodule(name)
        fill(layer.adapters["default"], seed)
        for part, weight in zip("AB", their_weights(theirs, name), strict=True):
            weight.data.copy_(getattr(layer.adapters["default"], part))
    if dtype == torch.float64:  # else adapters are float32
        return ours.double(), theirs.double(), names
    return ours, theirs, names


def their_layer(theirs, name):
    return theirs.base_model.model.get_submodule(name)


def their_weights(theirs, name):
    layer = their_layer(theirs, name)
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


SETTINGS = pytest.mark.parametrize(
    ("targets", "rank", "alpha", "rslora"),
    [
        (["wide"], 4, 16, False),
        (["narrow"], 3, 5, False),
        (["turned"], 2, 7, False),
        (["words"], 5, 2, False),
        (["wide", "narrow"], 6, 3, True),
        (["words"], 4, 9, True),
    ],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


@SETTINGS
@DTYPES
def test_forward_and_gradients_equal_peft(targets, rank, alpha, rslora, dtype):
    ours, theirs, names = both(targets, rank, alpha, dtype, rslora)
    found, expected = ours(IDS), theirs(IDS)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    bare = small(dtype)(IDS)
    assert (found - bare).abs().max() > 0.1 * bare.abs().max()  # the adapter matters
    for out in (found, expected):
        out.float().square().sum().backward()
    for name in names:
        adapter = ours.get_submodule(name).adapters["default"]
        for part, weight in zip("AB", their_weights(theirs, name), strict=True):
            gradient = getattr(adapter, part).grad
            wide = torch.float64 if dtype == torch.float64 else torch.float32  # over a base of 16 bits too
            assert gradient.dtype == weight.dtype == wide
            assert (gradient - weight.grad).norm() <= 2 * TOLERANCE[dtype] * weight.grad.norm()
    frozen = [name for name, weight in ours.named_parameters() if weight.grad is None]
    assert not [name for name in frozen if "adapters" in name]
    assert len(frozen) == len(list(small().parameters()))


@SETTINGS
@DTYPES
def test_delta_and_merged_weights_equal_peft(targets, rank, alpha, rslora, dtype):
    ours, theirs, names = both(targets, rank, alpha, dtype, rslora)
    for name in names:
        delta = their_layer(theirs, name).get_delta_weight("default")
        torch.testing.assert_close(ours.get_submodule(name).delta(), delta)
    unmerged = ours(IDS)
    merge(ours)
    theirs.merge_adapter()
    compare_weights(ours, theirs, names)
    # bfloat16 rounds the merged weight to 8 bits: up to 2^-9 of it, through three layers
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype] * unmerged.abs().max().item()
    assert (ours(IDS) - unmerged).abs().max() < near
    unmerge(ours)
    theirs.unmerge_adapter()
    compare_weights(ours, theirs, names)


def compare_weights(ours, theirs, names):
    """Bit for bit, but for an embedding in 16 bits: there peft rounds delta once more before it adds it."""
    for name in names:
        found, expected = ours.get_submodule(name).weight, their_layer(theirs, name).base_layer.weight
        if name == "words" and found.dtype == torch.bfloat16:
            rounding = 2**-7 * ours.get_submodule(name).delta().abs().max().item()
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=rounding)
        else:
            assert torch.equal(found, expected)


def test_all_linear_is_what_peft_takes(smollm2):
    model = copy.deepcopy(smollm2[0])
    names = add_lora(model, "all-linear", rank=8)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == 2_442_240
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(unload(model), config)
    adapted = [name for name, layer in theirs.base_model.model.named_modules() if hasattr(layer, "lora_A")]
    assert names == adapted and len(names) == 210


def test_a_fresh_adapter_changes_nothing_and_only_b_has_a_gradient():
    model = small()
    before = model(IDS)
    add_lora(model, ["wide", "words"], rank=3)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)
    model(IDS).sum().backward()
    wide, words = model.wide.adapters["default"], model.words.adapters["default"]
    assert wide.A.grad.abs().sum() == 0 < wide.B.grad.abs().sum()
    assert words.B.grad.abs().sum() == 0 < words.A.grad.abs().sum()  # an embedding's zero one is A


def test_gradients_equal_those_written_by_hand():
    """Of y = s B A x: dL/dB = s (dL/dy) (A x)^T, dL/dA = s B^T (dL/dy) x^T, in float64."""
    torch.manual_seed(0)
    adapter = LoRA(7, 5, rank=3, alpha=4).double()
    nn.init.normal_(adapter.B)
    x, g = torch.randn(7, dtype=torch.double), torch.randn(5, dtype=torch.double)
    adapter(x).backward(g)
    s = 4 / 3
    torch.testing.assert_close(adapter.B.grad, s * torch.outer(g, adapter.A @ x))
    torch.testing.assert_close(adapter.A.grad, s * torch.outer(adapter.B.T @ g, x))


def test_dropout_acts_in_training_only_and_on_the_adapter_alone():
    model = small()
    add_lora(model, ["wide"], rank=4, dropout=0.5)
    fill(model.wide.adapters["default"], 0)
    x = torch.ones(1, 12)
    model.eval()
    assert torch.equal(model.wide(x), model.wide(x))
    model.train()
    torch.manual_seed(0)
    update = torch.stack([model.wide(x) - model.wide.base(x) for _ in range(2000)]).mean(dim=0)
    expected = model.wide.adapters["default"].eval()(x)
    assert (update - expected).norm() < 0.1 * expected.norm()  # kept numbers are doubled


def test_switching_and_rows_of_one_batch():
    model = small()
    add_lora(model, ["wide", "words"], rank=2, alpha=3, name="one")
    add_lora(model, ["wide"], rank=4, alpha=6, name="two")
    for seed, adapter in enumerate([*model.wide.adapters.values(), *model.words.adapters.values()]):
        fill(adapter, seed)
    alone = {}
    for name in ("one", "two", None):
        use_adapter(model, name)
        alone[name] = model(IDS)
        trained = [path for path, weight in model.named_parameters() if weight.requires_grad]
        assert all(f".{name}." in path for path in trained) and bool(trained) == (name is not None)
    assert torch.equal(alone[None], small()(IDS))
    assert not torch.allclose(alone["one"], alone["two"])
    use_adapter(model, ["two", "one"])
    mixed = model(IDS)
    torch.testing.assert_close(mixed, torch.stack([alone["two"][0], alone["one"][1]]))
    use_adapter(model, [None, "two"])
    torch.testing.assert_close(model(IDS), torch.stack([alone[None][0], alone["two"][1]]))
    with pytest.raises(ValueError, match="2 rows were given an adapter and the batch has 1"):
        model(IDS[:1])


def test_a_mixed_batch_equals_peft():
    names = ["one", "two"]
    ours, base = small(), small()
    theirs = None
    for seed, name in enumerate(names):
        add_lora(ours, ["wide", "narrow"], rank=3 + seed, alpha=5, name=name)
        config = LoraConfig(r=3 + seed, lora_alpha=5, target_modules=["wide", "narrow"])
        theirs = get_peft_model(base, config, name) if theirs is None else theirs
        if seed:
            theirs.add_adapter(name, config)
        for path in ("wide", "narrow"):
            fill(ours.get_submodule(path).adapters[name], seed)
            layer = their_layer(theirs, path)
            layer.lora_A[name].weight.data.copy_(ours.get_submodule(path).adapters[name].A)
            layer.lora_B[name].weight.data.copy_(ours.get_submodule(path).adapters[name].B)
    theirs.eval()
    use_adapter(ours, ["two", None])
    torch.testing.assert_close(ours(IDS), theirs(IDS, adapter_names=["two", "__base__"]))


def test_unload_gives_the_plain_model_back():
    model = small()
    before = model.state_dict()
    add_lora(model, ["wide"], rank=2)
    assert type(model.wide) is AdaptedLayer
    unload(model)
    assert type(model.wide) is nn.Linear and model.state_dict().keys() == before.keys()
    add_lora(model, ["wide"], rank=2)
    fill(model.wide.adapters["default"], 0)
    expected = model(IDS)
    merge(model)
    unload(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


# --- files


def logits(model):
    with torch.no_grad():
        out = model(torch.arange(6).unsqueeze(0))
    return out.logits if hasattr(out, "logits") else out


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


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no adapter in"):
        load_adapter(tmp_path, small())


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


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0 is none"),
        ({"rank": -2}, "rank -2 is none"),
        ({"rank": 2.5}, "rank 2.5 is none"),
        ({"rank": 13}, r"rank 13 is above what a 12 x 20 matrix can have \(wide\)"),
        ({"alpha": 0}, "alpha 0 must be above 0"),
        ({"targets": ["q_proj"]}, r"target 'q_proj' matches no layer; .*\['narrow', 'turned', 'wide', 'words'\]"),
        ({"targets": []}, "the targets match no layer"),
        ({"targets": "wid"}, r"'wid \(a pattern of whole names; put names in a list\)' matches no layer"),
        ({"name": "a.b"}, "'a.b' cannot name an adapter"),
        ({"name": "train"}, "'train' cannot name an adapter"),
        ({"dropout": 1.5}, "dropout 1.5 is no probability"),
    ],
)
def test_bad_settings_are_refused_before_anything_changes(options, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **({"targets": ["wide"]} | options))
    assert type(model.wide) is nn.Linear and model.wide.weight.requires_grad


def test_what_is_no_linear_layer_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="1 is a LayerNorm; adapters stand beside"):
        add_lora(model, ["1"], rank=1)
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="without calling the layer"):
        add_lora(attention, ["out_proj"], rank=1)
    encoder = nn.TransformerEncoderLayer(16, 2)  # in eval it hands its weights to one kernel
    with pytest.raises(ValueError, match=r"linear1 belongs to nn\.TransformerEncoderLayer"):
        add_lora(encoder, ["linear1"], rank=1)


def test_a_second_adapter_is_not_put_into_the_first():
    """Neither by a pattern that matches the first one's inside, nor by a name that the first one has."""
    model = tiny_llama()
    first = add_lora(model, r".*q_proj.*", rank=2, name="down_proj")
    assert add_lora(model, r".*q_proj.*", rank=2, name="second") == first
    assert len(add_lora(model, ["down_proj"], rank=2, name="third")) == 2


def test_all_linear_leaves_out_the_head_of_a_classifier():
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(**(tiny_llama().config.to_dict() | {"num_labels": 2, "pad_token_id": 0}))
    model = AutoModelForSequenceClassification.from_config(config)
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
    expected = [name for name, layer in theirs.base_model.model.named_modules() if hasattr(layer, "lora_A")]
    assert add_lora(model, "all-linear", rank=2) == expected


def test_a_tied_weight_is_refused_with_the_way_out():
    model = tiny_llama()
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=f"{target} is tied"):
            add_lora(model, [target], rank=2)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    add_lora(model, ["embed_tokens", "lm_head"], rank=2)
    assert (logits(model) - logits(tiny_llama())).abs().max() == 0


def test_adapters_added_twice_merged_twice_and_unmerged_too_early():
    model = small()
    with pytest.raises(ValueError, match="this model has no adapter; call add_lora"):
        merge(model)
    add_lora(model, ["wide"], rank=2)
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        add_lora(model, ["narrow", "wide"], rank=2)
    with pytest.raises(ValueError, match="nothing is merged here"):
        unmerge(model)
    with pytest.raises(ValueError, match="there is no adapter 'other'"):
        use_adapter(model, "other")
    use_adapter(model, None)
    with pytest.raises(ValueError, match="choose it with use_adapter"):
        merge(model)
    use_adapter(model, "default")
    merge(model)
    for forbidden in (
        lambda: merge(model),
        lambda: add_lora(model, ["narrow"], rank=2, name="second"),
        lambda: use_adapter(model, None),
    ):
        with pytest.raises(ValueError, match="is merged into the weights; call unmerge first"):
            forbidden()
    unmerge(model)
    add_lora(model, ["narrow"], rank=2, name="second")


def test_a_merged_layer_is_the_bare_one():
    x = torch.randn(2, 12)
    model = small()
    add_lora(model, ["wide"], rank=2, alpha=5)
    fill(model.wide.adapters["default"], 0)
    merge(model)
    assert torch.equal(model.wide(x), F.linear(x, model.wide.weight, model.wide.bias))
