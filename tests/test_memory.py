"""The sheet of chapter 10 counts what tensors of a real model hold."""

import pytest
import torch
from tuning.experiments.qlora_memory import build
from tuning.lora import add_lora
from tuning.memory import LLAMA, qlora_sheet
from tuning.qlora import prepare_for_training


@pytest.mark.parametrize(("hidden", "inner", "layers", "heads", "rank"), [(128, 256, 2, 4, 8), (256, 512, 1, 2, 16)])
def test_the_sheet_is_the_bytes_of_a_model(hidden, inner, layers, heads, rank):
    model = prepare_for_training(build((hidden, inner, layers, heads), "ours", torch.device("cpu"), torch.bfloat16))
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
