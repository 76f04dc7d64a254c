"""What is counted is what tensors hold: the sheet, live bytes against torch's own tracker, the plan against both."""

import copy
import gc
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from tuning import simulate
from tuning.experiments import lomo_memory, record
from tuning.experiments.qlora_memory import build
from tuning.lomo import Lomo
from tuning.lora import add_lora
from tuning.memory import (
    ADAPTERS,
    CATEGORIES,
    LLAMA,
    METHODS,
    MODELS,
    LiveBytes,
    Setting,
    Shape,
    held_all_along,
    kept_for_backward,
    plan,
    qlora_sheet,
    shape_of,
)
from tuning.qlora import prepare_for_training


@pytest.mark.parametrize(("hidden", "inner", "layers", "rank"), [(128, 256, 2, 8), (256, 512, 1, 16)])
def test_the_sheet_is_the_bytes_of_a_model(hidden, inner, layers, rank):
    model = prepare_for_training(build(Shape(hidden, inner, layers), "ours", torch.device("cpu"), torch.bfloat16))
    held = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "scale" in name)]
    sheet = qlora_sheet(hidden, inner, layers, rank)
    frozen = sum(tensor.numel() * tensor.element_size() for tensor in held)
    expected = sheet["NF4 and scales"] + sheet["embedding, head, norms"]
    assert frozen == pytest.approx(expected, rel=1e-4)  # a mean and a last block of scales a matrix come on top
    add_lora(model, rank=rank, alpha=16)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert sheet["adapters and gradients"] == sheet["Adam, may be paged"] == 8 * trained


def test_the_sheet_gives_the_papers_figures():
    assert {name: round(qlora_sheet(*shape)["parameters"] / 1e9, 1) for name, shape in LLAMA.items()} == {
        "7B": 6.7,
        "13B": 13.0,
        "33B": 32.5,
        "65B": 65.3,
    }  # LLaMA's table 2 says the same
    sheet = qlora_sheet(*LLAMA["65B"])
    assert sheet["full"] > 780e9 and sheet["QLoRA"] < 48 * 2**30


def by_torch(setting):
    """Peak bytes of the second step by category, by torch's MemTracker."""
    with FakeTensorMode():
        model = simulate.untrained(setting.shape)
        if setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, inputs, _ = simulate.prepare(model, setting)
        ids = torch.zeros(setting.batch, setting.length, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                simulate.step(optimizer, simulate.loss_of(model, inputs(ids)))
                tracker.reset_mod_stats()
        found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(kind).rpartition(".")[2]: value for kind, value in found.items()}


@pytest.mark.parametrize(("method", "checkpointing"), [("SGD", True), ("SGD", False), ("AdamW", False)])
def test_live_bytes_are_those_of_torchs_tracker(method, checkpointing):
    setting = Setting(method, Shape(256, 512, 3), 4, 32, checkpointing)
    found, expected = simulate.simulate(setting).peak, by_torch(setting)
    assert sum(found.values()) == pytest.approx(expected["Total"], rel=0.005)
    assert found["parameters"] == pytest.approx(expected["PARAM"] + expected["BUFFER"], rel=1e-3)
    assert found["gradients"] == pytest.approx(expected["GRAD"], abs=0.01 * expected["Total"])


@pytest.mark.parametrize("shape", [Shape(128, 256, 2), Shape(128, 256, 2, 4, 2, 64, 1000, qk_norms=True)])
def test_live_bytes_of_a_step_that_is_computed_are_those_of_fake_tensors(shape):
    for method in ("SGD", "LOMO", "LoRA"):
        setting = Setting(method, shape, 2, 16, checkpointing=False)
        fake = simulate.simulate(setting).peak
        torch.manual_seed(0)
        model = simulate.untrained(shape)
        optimizer, inputs, _ = simulate.prepare(model, setting)
        ids = torch.zeros(2, 16, dtype=torch.long)
        simulate.step(optimizer, simulate.loss_of(model, inputs(ids)))
        with LiveBytes(model, optimizer) as live:
            simulate.step(optimizer, simulate.loss_of(model, inputs(ids)), live.note)
        assert sum(live.peak.values()) == pytest.approx(sum(fake.values()), rel=0.01)


def test_live_bytes_by_hand():
    layer = nn.Linear(100, 50, bias=False)
    x = torch.randn(7, 100)
    with LiveBytes(layer) as live:
        y = layer(x)
        assert live.live["activations"] == 4 * 7 * 50
        view = y[:3]
        del y
        assert live.live["activations"] == 4 * 7 * 50  # the view keeps it
        total = view.sum()
        del view
        gc.collect()
        live.note("backward")
        total.backward()
        assert live.live["gradients"] == 4 * 100 * 50
        layer.weight.grad = None
        assert live.live["gradients"] == 0
    assert live.live["parameters"] == 4 * 100 * 50
    assert not layer.weight._backward_hooks


def test_lomo_holds_one_gradient_and_sgd_all():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    held = {}
    for name in ("SGD", "LOMO"):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), 0.1, foreach=False) if name == "SGD" else Lomo(twin, 0.1)
        with LiveBytes(twin, optimizer) as live:
            loss = twin(torch.ones(3, 64)).sum()
            optimizer.backward(loss) if name == "LOMO" else loss.backward()
        held[name] = max(row[CATEGORIES.index("gradients")] for row in live.timeline)
    assert held["SGD"] == 6 * 4 * (64 * 64 + 64)
    assert held["LOMO"] <= 2 * 4 * 64 * 64


SHAPES = {
    "LLaMA": Shape(1024, 2816, 3),
    "grouped queries, q and k norms": Shape(1024, 3072, 3, heads=16, kv_heads=4, vocabulary=40_000, qk_norms=True),
    "tied": Shape(768, 2048, 3, heads=8, kv_heads=2, head_size=64, vocabulary=30_000, tied=True),
}


def off(setting, found=None):
    """How far the plan is from the simulation, as a fraction of the latter."""
    return sum(plan(setting).values()) / sum((found or simulate.simulate(setting)).peak.values()) - 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_is_within_two_percent_of_the_simulation(method, checkpointing, shape):
    setting = Setting(method, SHAPES[shape], 3, 200, checkpointing)
    live = simulate.simulate(setting)
    assert abs(off(setting, live)) < 0.02
    parameters, states, gradients = held_all_along(setting)
    assert parameters == pytest.approx(live.peak["parameters"], rel=2e-3)  # the encoder has biases
    assert states == pytest.approx(live.largest["optimizer states"], rel=5e-3, abs=1)
    if gradients:
        assert gradients == pytest.approx(live.largest["gradients"], rel=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_of_one_long_text_in_chunks(method):
    shape = SHAPES["grouped queries, q and k norms"]
    for checkpointing in (True, False):
        assert abs(off(Setting(method, shape, 1, 1500, checkpointing, chunk=300))) < 0.02


@pytest.mark.parametrize("method", ["LOMO", "LoRA", "P-tuning"])
def test_the_plan_of_a_deep_model_and_one_long_text(method):
    assert abs(off(Setting(method, Shape(512, 1408, 12), 1, 700))) < 0.02


@pytest.mark.parametrize("adapters", ["copies", "autocast", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_of_adapters_that_compute_in_sixteen_bits(adapters, checkpointing):
    assert abs(off(Setting("LoRA", SHAPES["LLaMA"], 3, 200, checkpointing, adapters=adapters))) < 0.02


def saved_by_autograd(setting, wrap=None):
    """Bytes of a forward pass that autograd saves, besides weights; `wrap` puts adapters in instead of the library."""
    torch.manual_seed(0)
    model = simulate.untrained(setting.shape)
    _, inputs, whole = simulate.prepare(model, setting) if wrap is None else (None, None, wrap(model))
    if wrap is not None:
        model.enable_input_require_grads()

        def inputs(ids):
            return {"input_ids": ids, "labels": ids}

    storages, weights = {}, {weight.untyped_storage().data_ptr() for weight in whole.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no other takes its place
        return tensor

    batch = inputs(torch.zeros(setting.batch, setting.length, dtype=torch.long))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast)
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    assert loss.requires_grad
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize(
    ("method", "adapters"),
    [("SGD", "float32"), ("P-tuning", "float32"), *(("LoRA", adapters) for adapters in ADAPTERS), ("QLoRA", "float32")],
)
@pytest.mark.parametrize("shape", [Shape(256, 512, 1), Shape(256, 640, 1, 4, 2, 64, 500, qk_norms=True)])
def test_what_a_layer_keeps_is_what_autograd_saves(method, adapters, shape):
    one, three = (Setting(method, replace(shape, layers=layers), 2, 40, rank=8, adapters=adapters) for layers in (1, 3))
    layer = (saved_by_autograd(three) - saved_by_autograd(one)) / 2
    if one.autocast:  # its copies of the adapters' weights
        layer -= 2 * 8 * shape.sides
    assert kept_for_backward(one) == pytest.approx(layer / one.tokens, rel=0.005)


def test_adapters_keep_more_or_less_than_full_training():
    """Dividing by what full fine-tuning of LLaMA-7B keeps."""
    full = kept_for_backward(Setting("AdamW", MODELS["7B"], 1, 1))
    found = [kept_for_backward(Setting("LoRA", MODELS["7B"], 1, 1, adapters=kind)) / full for kind in ADAPTERS]
    assert [round(ratio, 2) for ratio in found] == [0.92, 1.48, 1.09, 0.92]


def test_peft_keeps_the_copies():
    """A layer's bytes with peft's own adapters, beside this library's with copies."""
    kept = {}
    for layers in (1, 3):
        setting = Setting("LoRA", Shape(256, 512, layers), 2, 40, rank=8, adapters="copies")
        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        kept[layers] = saved_by_autograd(setting, lambda model, config=config: get_peft_model(model, config))
    assert kept_for_backward(setting) == pytest.approx((kept[3] - kept[1]) / 2 / setting.tokens, rel=0.005)


def test_the_shapes_are_the_models():
    numbers = {}
    for name, shape in MODELS.items():
        with FakeTensorMode():
            model = simulate.untrained(shape)
        numbers[name] = sum(weight.numel() for weight in model.parameters())
        assert held_all_along(Setting("LOMO", shape, 1, 1))[0] == 2 * numbers[name]
    assert numbers["7B"] == 6_738_415_616 and numbers["Llama-3-8B"] == 8_030_261_248
    assert numbers["Qwen3-8B"] == 8_190_735_360 and numbers["Llama-3.2-1B"] == 1_235_814_400


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_is_read_from_a_configuration(name):
    assert shape_of(simulate.config_of(MODELS[name])) == MODELS[name]


def test_the_shape_of_the_default_model(smollm2):
    model, _ = smollm2
    shape = shape_of(model.config)
    assert shape.layers * shape.weights + shape.head + shape.norms == model.num_parameters() and shape.tied


def test_a_kind_that_is_not_planned_is_named(gpt2):
    with pytest.raises(ValueError, match="no plan for models of the kind 'gpt2', only for llama, mistral, qwen2"):
        shape_of(gpt2[0].config)


def test_the_plan_of_table_1():
    sums = {
        (method, checkpointing): sum(plan(Setting(method, MODELS["7B"], 8, 512, checkpointing)).values()) / 2**30
        for method in ("AdamW", "SGD", "LOMO")
        for checkpointing in (True, False)
    }
    recorded = record.load_results("lomo_memory")["results"]
    for (method, checkpointing), size in sums.items():
        key = f"7B/{method}/{'with' if checkpointing else 'without'} checkpointing/8x512"
        assert size == pytest.approx(sum(recorded[key]["peak"].values()) / 2**30, rel=0.01)


def test_forward_minus_before_is_what_was_counted_by_hand():
    shape, kept = Shape(256, 512, 1), {}
    for layers in (1, 3):
        with lomo_memory.as_in_2023():
            setting = Setting("LOMO", replace(shape, layers=layers), 2, 100, checkpointing=False)
            kept[layers] = lomo_memory.forward_minus_before(simulate.simulate(setting, "eager"))
    by_hand = sum(lomo_memory.kept_in_2023(shape, 100).values())
    assert by_hand == pytest.approx((kept[3] - kept[1]) / 2 / 200, rel=0.005)
    setting = Setting("LOMO", shape, 2, 100, checkpointing=False)
    today = {how: lomo_memory.forward_minus_before(simulate.simulate(setting, how)) for how in ("sdpa", "eager")}
    assert today["sdpa"] < today["eager"] < kept[1]
    own = kept_for_backward(setting) + 8 * 256 + 4 * 32_000  # the last norm, the loss's log-softmax
    assert today["sdpa"] == pytest.approx(200 * own, rel=0.01)


def test_table_1s_activations_by_hand():
    """GiB of activations of LLaMA-7B, 8 x 512: 45.61 and 1.79 in the paper."""
    tokens, norm, loss = 8 * 512, 10 * 4096, (2 + 2) * 32_000  # logits and their log-softmax, in 16 bits
    layer = sum(lomo_memory.kept_in_2023(MODELS["7B"], 512).values())
    without, with_it = (tokens * (32 * each + norm + loss) / 2**30 for each in (layer, 2 * 4096))
    assert round(without, 1) == 43.4 and round(with_it, 2) == 1.64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "Adam"}, "unknown method 'Adam'; choose one of AdamW; AdamW, 16-bit; SGD"),
        ({"shape": (4096, 11008, 32)}, "give a Shape, e.g. MODELS['7B'] or Shape(4096, 11008, 32)"),
        ({"batch": 0}, "batch is 0; it must be a positive whole number"),
        ({"length": 51.2}, "length is 51.2"),
        ({"chunk": 0}, "chunk is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"adapters": "int8"}, "adapters are 'int8'; choose one of float32, copies, autocast, bfloat16"),
        ({"adapters": "bfloat16"}, "which is LoRA's choice; leave it out with LOMO"),
    ],
)
def test_a_setting_that_cannot_be(changes, message):
    right = {"method": "LOMO", "shape": MODELS["7B"], "batch": 8, "length": 512}
    with pytest.raises(ValueError, match=re.escape(message)):
        Setting(**right | changes)


def test_a_shape_that_cannot_be():
    with pytest.raises(ValueError, match="3 kv_heads cannot be shared by 8 heads; take a divisor"):
        Shape(1024, 2816, 2, heads=8, kv_heads=3)
    with pytest.raises(ValueError, match="layers is 0; it must be a positive whole number"):
        Shape(1024, 2816, 0)


def test_the_memory_runs_at_toy_size(tmp_path):
    size = ["--sizes", "toy", "--batch", "2", "--length", "8", "--out", str(tmp_path)]
    lomo_memory.main(size)
    results = record.load_results("lomo_memory", tmp_path)["results"]
    assert len(results) == 3 * len(METHODS) + 4  # 2023's ways and eager attention, with checkpointing and without
    assert (
        results["toy/LOMO/with checkpointing/2x8"]["largest"]["gradients"]
        < 0.5 * results["toy/SGD/with checkpointing/2x8"]["largest"]["gradients"]
    )
    pytest.importorskip("lomo_optim")
    lomo_memory.main([*size, "--device", "cpu"])
    measured = record.load_results("lomo_memory_measured", tmp_path)["results"]
    assert set(measured) == {f"toy/{method}" for method in (*lomo_memory.FULL, "lomo-optim")}
    assert all(found["step_seconds"] > 0 for found in measured.values())
