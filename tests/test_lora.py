"""LoRA: against peft in forward, gradients, delta and merged weights; bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from notebook_rules import ROOT, defined, read
from peft import LoraConfig, get_peft_model
from small_models import IDS, fill, logits, small, tiny_llama
from torch import nn
from tuning.lora import AdaptedLayer, LoRA, TrainedCopy, add_lora, merge, unload, unmerge, use_adapter

# We scale A x and peft B A x, so the two round otherwise; float64 shows that rounding is all the difference.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


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


def filled(seed, **options):
    adapter = LoRA(48, 32, rank=4, alpha=12, **options)
    fill(adapter, seed)
    return adapter


def kept_for_backward(compute):
    """{address of a storage: its bytes} of what a computation keeps, and what it gives."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return kept, compute()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48), (48,)])
@pytest.mark.parametrize("needs", [True, False])
def test_of_an_input_in_16_bits_no_wider_copy_is_kept_and_no_bit_differs(dtype, shape, needs):
    torch.manual_seed(0)
    adapter, x = filled(1), torch.randn(shape, dtype=dtype).requires_grad_(needs)
    kept, found = kept_for_backward(lambda: adapter(x))
    small_ones = sum(weight.nbytes for weight in adapter.parameters()) + 2 * 4 * 4 * (x.numel() // 48)
    assert sum(kept.values()) <= small_ones + x.nbytes and x.untyped_storage().data_ptr() in kept
    found.square().sum().backward()
    gradients = [adapter.A.grad, adapter.B.grad] + ([x.grad] if needs else [])
    A, B = adapter.A.detach().clone().requires_grad_(), adapter.B.detach().clone().requires_grad_()
    plain = x.detach().clone().requires_grad_(needs)
    expected = F.linear(F.linear(plain.float(), A) * 3.0, B)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    for gradient, other in zip(gradients, [A.grad, B.grad, plain.grad], strict=False):
        assert torch.equal(gradient, other) and gradient.dtype == other.dtype


def test_two_adapters_keep_one_input_between_them():
    x = torch.randn(50, 48, dtype=torch.bfloat16, requires_grad=True)
    one, two = (filled(seed) for seed in (1, 2))
    alone, together = (sum(kept_for_backward(call)[0].values()) for call in (lambda: one(x), lambda: one(x) + two(x)))
    assert together < 2 * alone - x.nbytes + 1


def test_with_dropout_and_under_autocast_as_before():
    x = torch.randn(50, 48, dtype=torch.bfloat16)
    adapter = filled(1, dropout=0.5).train()
    torch.manual_seed(0)
    found = adapter(x)
    torch.manual_seed(0)
    expected = F.linear(F.linear(F.dropout(x.float(), 0.5), adapter.A) * 3.0, adapter.B)
    assert torch.equal(found, expected) and not torch.equal(found, adapter.eval()(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(x).dtype == torch.bfloat16


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


# --- modules that are trained whole


def with_copies(modules_to_save, dtype=torch.float32):
    """The same model with our trained copies and with peft's, all weights equal, and drawn anew in the copies."""
    ours, base = small(dtype), small(dtype)
    add_lora(ours, ["wide"], rank=3, alpha=5, modules_to_save=modules_to_save)
    theirs = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=5, target_modules=["wide"], modules_to_save=modules_to_save)
    )
    fill(ours.wide.adapters["default"], 0)
    for part, weight in zip("AB", their_weights(theirs, "wide"), strict=True):
        weight.data.copy_(getattr(ours.wide.adapters["default"], part))
    for name in modules_to_save:
        mine, twin = ours.get_submodule(name).adapters["default"], their_layer(theirs, name).modules_to_save["default"]
        for one, other in zip(mine.parameters(), twin.parameters(), strict=True):
            other.data.add_(torch.randn_like(other))
            one.data.copy_(other)
    return ours, theirs


@pytest.mark.parametrize("modules_to_save", [["narrow"], ["turned", "words"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_copies_equal_peft(modules_to_save, dtype):
    ours, theirs = with_copies(modules_to_save, dtype)
    found, expected = ours(IDS), theirs(IDS)
    assert found.dtype == dtype
    near = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]  # peft's copy is in 16 bits too, ours in 32
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    for out in (found, expected):
        out.float().square().sum().backward()
    for name in modules_to_save:
        mine, twin = ours.get_submodule(name).adapters["default"], their_layer(theirs, name).modules_to_save["default"]
        for one, other in zip(mine.parameters(), twin.parameters(), strict=True):
            assert one.dtype == torch.float32 and one.requires_grad
            assert (one.grad - other.grad).norm() <= 2 * near * other.grad.norm()
    trained = [name for name, weight in ours.named_parameters() if weight.requires_grad]
    assert all(".adapters.default." in name for name in trained)


def test_a_trained_copy_is_switched_with_its_adapter():
    model = small()
    bare = model(IDS)
    add_lora(model, ["wide"], rank=2, name="one", modules_to_save=["narrow"])
    torch.testing.assert_close(model(IDS), bare, rtol=0, atol=0)  # it starts as a copy
    add_lora(model, ["wide"], rank=3, name="two", modules_to_save=["narrow"])
    add_lora(model, ["wide"], rank=2, name="three")
    assert type(model.narrow) is TrainedCopy
    alone = {}
    for seed, name in enumerate(["one", "two"]):
        fill(model.wide.adapters[name], seed)
        model.narrow.adapters[name].weight.data.mul_(2 + seed)
    for name in ("one", "two", "three", None):
        use_adapter(model, name)
        alone[name] = model(IDS)
        trained = [path for path, weight in model.named_parameters() if weight.requires_grad]
        assert all(f".{name}." in path for path in trained)
        assert len(trained) == {"one": 3, "two": 3, "three": 2, None: 0}[name]
    assert torch.equal(alone[None], bare) and torch.equal(alone["three"], bare)
    assert not torch.allclose(alone["one"], alone["two"])
    for names in (["two", "one"], [None, "two"]):
        use_adapter(model, names)
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(model(IDS), expected)
    with pytest.raises(ValueError, match="2 rows were given an adapter and the batch has 1"):
        model.narrow(torch.zeros(1, 20))


def test_a_trained_copy_is_merged_and_unloaded():
    model, theirs = with_copies(["narrow", "turned"])
    expected = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    unmerge(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    merge(model)
    unload(model)
    assert type(model.narrow) is nn.Linear and model.state_dict().keys() == small().state_dict().keys()
    torch.testing.assert_close(model(IDS), theirs.merge_and_unload()(IDS), rtol=1e-5, atol=1e-5)
    assert not any(weight.requires_grad for weight in model.parameters())
    model, _ = with_copies(["narrow"])
    torch.testing.assert_close(unload(model)(IDS), small()(IDS), rtol=0, atol=0)  # not merged: as it was


def test_a_module_in_a_module_that_is_trained_whole_is_trained_once():
    model = nn.Sequential(small(), nn.Linear(7, 3))
    assert add_lora(model, ["1"], rank=2, modules_to_save=["0", "wide", "0.narrow"]) == ["1"]
    assert [path for path, layer in model.named_modules() if type(layer) is TrainedCopy] == ["0"]
    with pytest.raises(ValueError, match="'' of modules_to_save matches no module"):
        add_lora(model, ["1"], rank=2, name="whole", modules_to_save=[""])


class Odd(nn.Module):
    """Two modules that a copy cannot stand for: one called by keyword alone, one that answers with two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.keyword, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)

    def forward(self, x):
        return self.pair(self.keyword(input=self.first(x)))


@pytest.mark.parametrize("part", ["keyword", "pair"])
@pytest.mark.parametrize("active", ["default", ["default", None]])
def test_a_copy_answers_with_one_tensor_to_one(part, active):
    model = Odd()
    add_lora(model, ["first"], rank=2, modules_to_save=[part])
    use_adapter(model, active)
    with pytest.raises(ValueError, match="modules_to_save can hold modules that map one tensor, given by position, to"):
        model(torch.ones(2, 4))


def test_no_modules_to_save_may_be_none():
    model = small()
    assert add_lora(model, ["wide"], rank=2, modules_to_save=None) == ["wide"]
    assert not any(isinstance(layer, TrainedCopy) for layer in model.modules())


def test_what_cannot_be_trained_whole_is_refused():
    model = tiny_llama()
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=f"a weight of .*{name} is tied"):
            add_lora(model, ["q_proj"], rank=2, modules_to_save=[name])
    with pytest.raises(ValueError, match=r"model\.layers of modules_to_save is a list of modules"):
        add_lora(model, ["q_proj"], rank=2, modules_to_save=["layers"])
    with pytest.raises(ValueError, match="act_fn of modules_to_save has no weights"):
        add_lora(model, ["q_proj"], rank=2, modules_to_save=["act_fn"])
    packed = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    model.model.norm.weight = packed
    with pytest.raises(ValueError, match="norm of modules_to_save has no weights to train, or some are in few bits"):
        add_lora(model, ["q_proj"], rank=2, modules_to_save=["model.norm"])
    assert not any("adapters" in name for name, _ in model.named_parameters())
    model = tiny_llama()
    add_lora(model, ["q_proj"], rank=2, name="one", modules_to_save=["down_proj"])
    before = list(model.state_dict())
    for targets, modules_to_save in ((["down_proj"], []), (["k_proj"], ["q_proj"]), (["up_proj"], ["self_attn"])):
        with pytest.raises(ValueError, match="would be trained whole by one adapter and by low rank or in part by"):
            add_lora(model, targets, rank=2, modules_to_save=modules_to_save, name="two")
    assert list(model.state_dict()) == before


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
        ({"dropout": "0.1"}, "dropout '0.1' is no probability"),
        ({"alpha": float("inf")}, "alpha inf must be above 0"),
        ({"alpha": "16"}, "alpha '16' must be above 0"),
        ({"targets": "*wide"}, r"'\*wide' is no pattern of names"),
        ({"modules_to_save": "narrow"}, "modules_to_save is a text, 'narrow'; put names in a list"),
        ({"modules_to_save": ["score"]}, "'score' of modules_to_save matches no module"),
        ({"modules_to_save": ["wide"]}, "target 'wide' matches no layer"),
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


@pytest.mark.parametrize(("sizes", "rank", "alpha"), [((12, 20), 4, 12), ((7, 5), 1, 3), ((16, 16), 8, 8)])
def test_chapter_6s_small_class_is_the_librarys_adapter_beside_a_layer(sizes, rank, alpha):
    WithLoRA = defined(read(ROOT / "book/2-lora/6-lora.ipynb"), "WithLoRA", {"nn": nn, "torch": torch})
    base, adapter = nn.Linear(*sizes).double(), LoRA(*sizes, rank, alpha).double()
    small_one = WithLoRA(base, rank, alpha).double()
    assert small_one.A.abs().max() <= sizes[0] ** -0.5 and not small_one.B.any()
    fill(adapter, seed=1)
    for name in "AB":
        getattr(small_one, name).data.copy_(getattr(adapter, name))
    x = torch.randn(2, 3, sizes[0]).double()  # both sum in another order, which float32 would show
    torch.testing.assert_close(small_one(x), base(x) + adapter(x))
    small_one(x).square().sum().backward()
    (base(x) + adapter(x)).square().sum().backward()
    for name in "AB":
        torch.testing.assert_close(getattr(small_one, name).grad, getattr(adapter, name).grad)
