"""What is counted is what tensors hold: the sheet, live bytes against torch's own tracker, the plan against both."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from tuning import simulate
from tuning.experiments import lomo_memory, record
from tuning.experiments.qlora_memory import build
from tuning.lomo import Lomo
from tuning.lora import add_lora
from tuning.memory import CATEGORIES, LLAMA, METHODS, LiveBytes, kept_for_backward, plan, qlora_sheet
from tuning.qlora import prepare_for_training


@pytest.mark.parametrize(("hidden", "inner", "layers", "rank"), [(128, 256, 2, 8), (256, 512, 1, 16)])
def test_the_sheet_is_the_bytes_of_a_model(hidden, inner, layers, rank):
    model = prepare_for_training(build((hidden, inner, layers), "ours", torch.device("cpu"), torch.bfloat16))
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


def by_torch(shape, method, checkpointing, batch, length):
    """Peak bytes of the second step by category, by torch's MemTracker."""
    with FakeTensorMode():
        model = simulate.llama(shape)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, inputs, _ = simulate.prepare(model, method)
        ids = torch.zeros(batch, length, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                simulate.step(model, optimizer, inputs(ids))
                tracker.reset_mod_stats()
        found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(kind).rpartition(".")[2]: value for kind, value in found.items()}


@pytest.mark.parametrize(("method", "checkpointing"), [("SGD", True), ("SGD", False), ("AdamW", False)])
def test_live_bytes_are_those_of_torchs_tracker(method, checkpointing):
    size = ((256, 512, 3), method, checkpointing)
    found = simulate.simulate(*size, batch=4, length=32).peak
    expected = by_torch(*size, batch=4, length=32)
    assert sum(found.values()) == pytest.approx(expected["Total"], rel=0.005)
    assert found["parameters"] == pytest.approx(expected["PARAM"] + expected["BUFFER"], rel=1e-3)
    assert found["gradients"] == pytest.approx(expected["GRAD"], abs=0.01 * expected["Total"])


def test_live_bytes_of_a_step_that_is_computed_are_those_of_fake_tensors():
    size = {"batch": 2, "length": 16}
    for method in ("SGD", "LOMO", "LoRA"):
        fake = simulate.simulate((128, 256, 2), method, False, **size).peak
        torch.manual_seed(0)
        model = simulate.llama((128, 256, 2))
        optimizer, inputs, _ = simulate.prepare(model, method)
        ids = torch.zeros(2, 16, dtype=torch.long)
        simulate.step(model, optimizer, inputs(ids))
        with LiveBytes(model, optimizer) as live:
            simulate.step(model, optimizer, inputs(ids), live.note)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_is_within_five_percent_of_the_simulation(method, checkpointing):
    shape, size = (1024, 2816, 6), {"batch": 3, "length": 200}
    found = sum(simulate.simulate(shape, method, checkpointing, **size).peak.values())
    assert sum(plan(method, shape, **size, checkpointing=checkpointing).values()) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("method", ["LOMO", "LoRA", "P-tuning"])
def test_the_plan_of_a_deep_model_and_one_long_text(method):
    shape, size = (512, 1408, 24), {"batch": 1, "length": 700}
    found = sum(simulate.simulate(shape, method, True, **size).peak.values())
    assert sum(plan(method, shape, **size).values()) == pytest.approx(found, rel=0.05)


def test_what_a_layer_keeps_is_what_autograd_saves():
    shape, tokens = (256, 512, 2), 2 * 16
    kept = {}
    for layers in (1, 3):
        torch.manual_seed(0)
        model = simulate.llama((*shape[:2], layers))
        storages = {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def note(tensor, storages=storages, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=torch.zeros(2, 16, dtype=torch.long), use_cache=False).logits.sum()
        kept[layers] = sum(storages.values())
        del loss
    layer = (kept[3] - kept[1]) / 2
    assert kept_for_backward("SGD", *shape[:2], heads=2) == pytest.approx(layer / tokens, rel=0.02)


def test_a_plan_that_cannot_be():
    with pytest.raises(ValueError, match="AdamW, SGD"):
        plan("Adam", LLAMA["7B"], 1, 1)
    with pytest.raises(ValueError, match="positive"):
        plan("LOMO", LLAMA["7B"], 0, 512)


def test_the_memory_runs_at_toy_size(tmp_path):
    size = ["--sizes", "toy", "--batch", "2", "--length", "8", "--out", str(tmp_path)]
    lomo_memory.main(size)
    results = record.load_results("lomo_memory", tmp_path)["results"]
    assert len(results) == 3 * len(METHODS) + 1
    assert (
        results["toy/LOMO/with checkpointing/2x8"]["largest"]["gradients"]
        < 0.5 * results["toy/SGD/with checkpointing/2x8"]["largest"]["gradients"]
    )
    pytest.importorskip("lomo_optim")
    lomo_memory.main([*size, "--device", "cpu"])
    measured = record.load_results("lomo_memory_measured", tmp_path)["results"]
    assert set(measured) == {f"toy/{method}" for method in (*lomo_memory.FULL, "lomo-optim")}
    assert all(found["step_seconds"] > 0 for found in measured.values())
