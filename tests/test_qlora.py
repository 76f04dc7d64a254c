"""QLoRA: Linear4bit against bitsandbytes, a whole model against transformers' own, files, paged AdamW, bad input."""

import copy
import json
import logging
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D
from tuning.adapter_files import load_adapter, save_adapter
from tuning.four_bit_files import SETTINGS, TENSORS, load_lm_4bit, save_4bit
from tuning.lora import add_lora, merge
from tuning.nf4 import dequantize, quantize, quantize_scales
from tuning.qlora import Linear4bit, PagedAdamW, dequantize_model, four_bit, prepare_for_training, quantize_model
from tuning.training import Classifier
from tuning.wrappers import bare_modules

logging.disable(logging.WARNING)
import bitsandbytes as bnb  # noqa: E402

logging.disable(logging.NOTSET)

IDS = torch.tensor([[1, 2, 3, 4], [10, 4, 0, 7]])


def theirs_of(layer, double):
    """bitsandbytes' layer of the same weight, in training mode, for in evaluation another kernel may compute."""
    found = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4")
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": double}
    found.weight = bnb.nn.Params4bit(layer.weight.data.clone(), **options).to("cpu")
    found.bias = layer.bias
    return found.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 40), (50, 7), (33, 64)])  # not (96, 40): see `unpacked` in test_nf4.py
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_those_of_bitsandbytes(shape, dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(*shape, bias=bias).to(dtype).requires_grad_(False)
    ours, theirs = Linear4bit(quantize(layer.weight), layer.bias), theirs_of(layer, double=False)
    x = torch.randn(3, 5, shape[0], dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    found, expected = ours(x), theirs(twin)
    g = torch.randn_like(found)
    found.backward(g)
    expected.backward(g)
    assert found.dtype == dtype and torch.equal(found, expected) and torch.equal(x.grad, twin.grad)


def test_under_autocast_the_product_is_that_of_bitsandbytes():
    torch.manual_seed(0)
    layer = nn.Linear(64, 40).requires_grad_(False)
    ours, theirs = Linear4bit(quantize(layer.weight), layer.bias), theirs_of(layer, double=False)
    dtypes = []
    dequantized = ours.dequantized
    ours.dequantized = lambda dtype: dtypes.append(dtype) or dequantized(dtype)
    x = torch.randn(3, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x), theirs(twin)
    assert torch.equal(found, expected) and found.dtype == expected.dtype == torch.float32
    g = torch.randn_like(found)
    found.backward(g)
    expected.backward(g)
    assert torch.equal(x.grad, twin.grad) and x.grad.dtype == torch.float32
    assert dtypes == [torch.bfloat16, torch.bfloat16]  # never unpacked to 32 bits


def test_under_autocast_what_a_young_adapter_adds_is_not_rounded_away():
    """It is below the last place of 16 bits, and training starts slower where it is lost: seen on a GPU, at 7B."""
    torch.manual_seed(0)
    layer = Linear4bit(quantize(torch.randn(512, 512)))
    model = nn.Sequential(layer)
    add_lora(model, "all-linear", rank=8, alpha=16)
    nn.init.constant_(model[0].adapters["default"].B, 1e-4)  # one step of Adam
    x = torch.randn(16, 512)
    with torch.autocast("cpu", torch.bfloat16):
        added = model(x) - layer(x)
    expected = model[0].adapters["default"](x)
    assert (added - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("double", [True, False])
def test_a_cast_of_the_model_leaves_the_scales_alone(double):
    four = quantize(torch.randn(40, 64))
    layer = Linear4bit(quantize_scales(four) if double else four, torch.randn(40))
    expected = layer.dequantized(torch.float32)
    for cast in (layer.half, layer.bfloat16, layer.double, lambda: layer.to(torch.float16)):
        cast()
        assert torch.equal(layer.dequantized(torch.float32), expected)
    assert layer.bias.dtype == torch.float16
    assert all(buffer.is_meta for buffer in layer.to("meta").buffers())


def test_nothing_is_kept_for_backward_but_the_codes():
    layer, seen = Linear4bit(quantize(torch.randn(40, 64))), []
    dequantized = layer.dequantized
    x = torch.randn(3, 64, requires_grad=True)

    def watched(tensor):
        seen.append(weakref.ref(tensor))
        return tensor

    layer.dequantized = lambda dtype: watched(dequantized(dtype))
    y = layer(watched(x * 1))
    assert [tensor() for tensor in seen] == [None, None]  # neither the input nor the unpacked weight
    y.sum().backward()
    layer.dequantized = dequantized
    torch.testing.assert_close(x.grad, layer.dequantized(torch.float32).sum(dim=0).expand(3, -1))


def test_a_whole_model_is_transformers_own(tiny_llama):
    _, folder = tiny_llama
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.float32,
    )
    expected = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).train()
    model, _ = load_lm_4bit(folder, "cpu", torch.float32, double=False)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_while_reading_saving_and_loading(tiny_llama, tmp_path, double, dtype):
    _, folder = tiny_llama
    read, tokenizer = load_lm_4bit(folder, "cpu", dtype, double=double)
    whole = quantize_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), double=double)
    assert torch.equal(read(IDS).logits, whole(IDS).logits)
    save_4bit(tmp_path / "four", read, tokenizer)
    again, _ = load_lm_4bit(tmp_path / "four", "cpu", dtype)
    assert torch.equal(again(IDS).logits, read(IDS).logits)
    assert again.model.embed_tokens.weight is again.lm_head.weight
    assert not any(weight.requires_grad for weight in again.parameters())
    plain = dequantize_model(again)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(plain(IDS).logits, read(IDS).logits)


def test_a_bias_follows_the_input(tiny_llama):
    layer = Linear4bit(quantize(torch.randn(8, 64)), torch.randn(8))
    for dtype in (torch.float32, torch.bfloat16):
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_dequantized_after_preparing_a_model_runs(tiny_llama):
    model = prepare_for_training(quantize_model(tiny_llama[0].to(torch.bfloat16)), checkpointing=False)
    expected = model(IDS).logits
    plain = dequantize_model(model)
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    torch.testing.assert_close(plain(IDS).logits, expected)


def test_what_is_loaded_in_four_bits_is_named_as_by_load_lm(tiny_llama, tmp_path):
    _, folder = tiny_llama
    (folder / "consolidated.safetensors").write_bytes(b"another format's")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    model, tokenizer = load_lm_4bit(folder, "cpu")
    assert model.name_or_path == str(folder) and tokenizer.mask_token is None
    save_4bit(tmp_path / "four", model, tokenizer)
    again, _ = load_lm_4bit(tmp_path / "four", "cpu")
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id == [3, 7]
    with pytest.raises(ValueError, match="no model 'nobody/nothing'"):
        load_lm_4bit("nobody/nothing", "cpu")


def test_adapters_train_through_four_bits(tiny_llama):
    model = prepare_for_training(quantize_model(tiny_llama[0]), checkpointing=False)
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=8)
    before = [layer.weight.clone() for layer in model.modules() if isinstance(layer, Linear4bit)]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = PagedAdamW(trained, lr=0.02, weight_decay=0), []
    for _ in range(40):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    after = [layer.weight for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="dequantize_model"):
        merge(model)


def test_an_adapter_trained_in_four_bits_goes_to_the_16_bit_model_and_to_peft(tiny_llama, tmp_path):
    model, folder = tiny_llama
    four, _ = load_lm_4bit(folder, "cpu", torch.float32)
    add_lora(four, rank=4, alpha=8)
    with torch.no_grad():
        for weight in (w for w in four.parameters() if w.requires_grad):
            weight.normal_(std=0.1)
    save_adapter(tmp_path / "adapter", four)
    load_adapter(tmp_path / "adapter", model)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    again, _ = load_lm_4bit(folder, "cpu", torch.float32)
    load_adapter(tmp_path / "adapter", again)
    assert torch.equal(again(IDS).logits, four(IDS).logits)


def test_checkpointing_changes_no_gradient(tiny_llama):
    found = {}
    for checkpointing in (False, True):
        model = prepare_for_training(quantize_model(copy.deepcopy(tiny_llama[0])), checkpointing).train()
        torch.manual_seed(0)
        add_lora(model, rank=4, alpha=8)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found[checkpointing] = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert found[True] and any(grad.any() for grad in found[True])
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other)


def test_preparing_raises_what_is_in_16_bits(tiny_llama):
    model = quantize_model(tiny_llama[0].to(torch.bfloat16))
    prepare_for_training(model)
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    add_lora(model)
    with pytest.raises(ValueError, match="prepare it first"):
        prepare_for_training(model)


@pytest.mark.parametrize("shape", [(5, 3), (17,)])
def test_paged_adamw_is_adamw(shape):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(shape, dtype=torch.double).float()) for _ in range(2))
    theirs.data = ours.detach().clone()
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    one, other = PagedAdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(20):
        ours.grad, theirs.grad = (torch.randn(shape, generator=torch.Generator().manual_seed(step)) for _ in range(2))
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs)
    assert one.state[ours]["mean"].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_adamw_goes_on_where_it_was(dtype):
    torch.manual_seed(0)
    whole, stopped = (nn.Parameter(torch.ones(5, 3, dtype=dtype)) for _ in range(2))
    grads = torch.randn(6, 5, 3).to(dtype)
    one, other = PagedAdamW([whole], lr=0.03), PagedAdamW([stopped], lr=0.03)
    for step, grad in enumerate(grads):
        if step == 3:
            saved, other = other.state_dict(), PagedAdamW([stopped])
            other.load_state_dict(saved)
        whole.grad, stopped.grad = grad.clone(), grad.clone()
        one.step()
        other.step()
    assert torch.equal(whole, stopped)
    assert other.state[stopped]["mean"].dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_paged_adamw_on_a_gpu_keeps_its_averages_in_the_hosts_memory():
    weight = nn.Parameter(torch.ones(1000, device="cuda"))
    other = nn.Parameter(torch.ones(1000, device="cuda"))
    paged, plain = PagedAdamW([weight], lr=0.01), torch.optim.AdamW([other], lr=0.01)
    for step in range(4):
        weight.grad = torch.randn(1000, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        other.grad = weight.grad.clone()
        paged.step()
        plain.step()
        paged.load_state_dict(paged.state_dict())
        assert paged.state[weight]["mean"].is_pinned()
    torch.testing.assert_close(weight, other)


def test_a_quantized_weight_cannot_be_trained():
    layer = Linear4bit(quantize_scales(quantize(torch.randn(8, 64))))
    for try_it in (layer.requires_grad_, layer.weight.requires_grad_):
        with pytest.raises(RuntimeError, match="floating point"):
            try_it(True)


def test_bad_input(tiny_llama):
    model = quantize_model(tiny_llama[0])
    with pytest.raises(ValueError, match="four bits already"):
        quantize_model(model)
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_model(nn.Embedding(3, 2))
    adapted = nn.Sequential(nn.Linear(8, 8))
    add_lora(adapted, ["0"], rank=2)
    with pytest.raises(ValueError, match="0 has an adapter; quantize the model first"):
        quantize_model(adapted)


def state_of(model):
    """All that a refused call must leave as it was: modules, tensors, and which of them are trained."""
    tensors = model.state_dict(keep_vars=True)
    return (
        {path: id(module) for path, module in model.named_modules()},
        {key: (id(tensor), tensor.requires_grad, tensor.sum().item()) for key, tensor in tensors.items()},
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens"], "wrap": True},
    ],
)
def test_a_model_with_any_adapter_is_refused_and_left_as_it_was(options):
    options = dict(options)
    wrap = options.pop("wrap", False)
    model = tiny_llama_of(**EVEN, tie_word_embeddings=False)
    add_lora(model, options.pop("target_modules"), rank=4, alpha=6, **options)
    model = nn.DataParallel(model) if wrap else model
    before = state_of(model)
    with pytest.raises(ValueError, match="quantize the model first"):
        quantize_model(model)
    assert state_of(model) == before


def spoiled(model):
    model.model.layers[-1].mlp.down_proj.weight.data[3, 5] = torch.inf
    return model


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda model: model, {"kind": "nf5"}, "unknown kind 'nf5'"),
        (lambda model: model, {"block_size": 48}, "power of two"),
        (spoiled, {}, r"model\.layers\.1\.mlp\.down_proj has numbers that are not finite"),
        (spoiled, {"double": False}, r"model\.layers\.1\.mlp\.down_proj has numbers that are not finite"),
        (lambda model: model.double(), {}, r"model\.layers\.0\.self_attn\.q_proj has dtype torch\.float64"),
    ],
)
@pytest.mark.parametrize("hidden_size", [64, 60])
def test_a_refused_model_is_left_as_it_was(hidden_size, change, options, message):
    model = change(tiny_llama_of(**ODD | {"hidden_size": hidden_size}))
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, **options)
    assert state_of(model) == before


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), "nn.MultiheadAttention"),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2),
            "nn.MultiheadAttention",
        ),
        (lambda: nn.TransformerDecoderLayer(16, 2, 24), "nn.MultiheadAttention"),
        (lambda: nn.Sequential(nn.Linear(16, 16), torch.compile(WithAttention(), backend="eager")), "MultiheadAtt"),
    ],
)
def test_layers_whose_weight_torch_uses_without_calling_them_are_refused(build, message):
    model = build().eval()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        quantize_model(model)
    assert state_of(model) == before


def test_files_that_are_not_right(tiny_llama, tmp_path):
    model, folder = tiny_llama
    four, tokenizer = load_lm_4bit(folder, "cpu")
    with pytest.raises(ValueError, match="quantize_model first"):
        save_4bit(tmp_path / "none", model, tokenizer)
    save_4bit(tmp_path / "four", four, tokenizer)
    file, settings = tmp_path / "four" / TENSORS, tmp_path / "four" / SETTINGS
    whole = file.read_bytes()
    for broken in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="truncated or altered"):
            load_lm_4bit(tmp_path / "four", "cpu")
    file.write_bytes(whole)
    written = json.loads(settings.read_text())
    path, kept = next(iter(written["layers"].items()))
    for changed, message in (
        ({"layers": {path: kept | {"block_size": 32}}}, f"{path}: scales have shape"),
        ({"layers": {path: kept | {"kind": "nf3"}}}, "unknown kind 'nf3'"),
        ({"layers": {path: kept | {"block_size": 0}}}, f"{path}: block_size is 0; expected a power of two"),
        ({"layers": {path: kept | {"dtype": "int32"}}}, f"{path}: dtype is torch.int32; expected float32"),
        ({"layers": {path: kept | {"dtype": "load"}}}, f"{path}: dtype is .*; expected float32"),
        ({"layers": {path: kept | {"shape": [32, 128]}}}, rf"{path}: .*\(32, 128\).*not in this model"),
        ({"format": 3}, "newer version"),
    ):
        settings.write_text(json.dumps(written | changed))
        with pytest.raises(ValueError, match=message):
            load_lm_4bit(tmp_path / "four", "cpu")
    settings.write_text(json.dumps(written))
    file.unlink()
    with pytest.raises(ValueError, match=r"cannot be read.*No such file"):
        load_lm_4bit(tmp_path / "four", "cpu")
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of shape"):
        load_lm_4bit(folder, "cpu")
    add_lora(four)
    with pytest.raises(ValueError, match="save_adapter"):
        save_4bit(tmp_path / "five", four, tokenizer)


def test_dequantized_is_what_the_codes_stand_for():
    weight = torch.randn(8, 64).to(torch.bfloat16)
    layer = Linear4bit(quantize(weight))
    assert torch.equal(layer.dequantized(torch.float32), dequantize(quantize(weight)).float())
    assert "4.500 bits" in repr(layer)


# --- files of layers that are not alike


def tiny_llama_of(**sizes):
    torch.manual_seed(0)
    config = {"vocab_size": 50, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**config, **sizes)).eval()


ODD = {"hidden_size": 60, "intermediate_size": 75, "num_hidden_layers": 2}  # rows that fill no block
EVEN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def in_four_bits(model):
    return {path: layer for path, layer in bare_modules(model).items() if isinstance(layer, Linear4bit)}


@pytest.mark.parametrize("sizes", [ODD, EVEN])
def test_layers_that_are_not_alike_are_loaded_each_as_it_was(tiny_llama, tmp_path, sizes):
    model, tokenizer = tiny_llama_of(**sizes), load_lm_4bit(tiny_llama[1], "cpu")[1]
    ways = [("nf4", 64, True), ("fp4", 64, True), ("int4", 64, False), ("nf4", 32, True), ("nf4", 128, False)]
    linear = [path for path, layer in model.model.named_modules() if isinstance(layer, nn.Linear)]
    for place, path in enumerate(linear):
        layer = model.model.get_submodule(path)
        model.model.set_submodule(path, four_bit(layer, *ways[place % len(ways)]))
    save_4bit(tmp_path / "four", model, tokenizer)
    again, _ = load_lm_4bit(tmp_path / "four", "cpu", torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for place, path in enumerate(linear):
        record = again.model.get_submodule(path).record
        assert (record.kind, record.block_size) == ways[place % len(ways)][:2]


def test_files_of_the_first_format_are_read(tiny_llama, tmp_path):
    model, tokenizer = load_lm_4bit(tiny_llama[1], "cpu", kind="fp4", block_size=32)
    save_4bit(tmp_path / "four", model, tokenizer)
    settings = tmp_path / "four" / SETTINGS
    new = json.loads(settings.read_text())
    layers = {path: [*layer["shape"], layer["dtype"]] for path, layer in new["layers"].items()}
    settings.write_text(json.dumps({"kind": "fp4", "block_size": 32, "layers": layers, "sha256": new["sha256"]}))
    assert torch.equal(load_lm_4bit(tmp_path / "four", "cpu")[0](IDS).logits, model(IDS).logits)


def test_a_save_that_is_broken_off_is_noticed(tiny_llama, tmp_path, monkeypatch):
    _, tokenizer = load_lm_4bit(tiny_llama[1], "cpu")
    old, new = (quantize_model(tiny_llama_of(**EVEN, rms_norm_eps=eps)) for eps in (1e-6, 1e-1))
    rename, found = Path.replace, []
    for allowed in range(20):
        left, folder = [allowed], tmp_path / str(allowed)

        def replace(path, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return rename(path, target)

        save_4bit(folder, old, tokenizer)
        monkeypatch.setattr(Path, "replace", replace)
        try:
            save_4bit(folder, new, tokenizer)
        except KeyboardInterrupt:
            with pytest.raises(ValueError, match="broken off; save the model again"):
                load_lm_4bit(folder, "cpu", torch.float32)
        else:
            found.append(allowed)
        monkeypatch.setattr(Path, "replace", rename)
    assert found and found == list(range(found[0], 20)) and found[0] >= 4  # config, tensors, tokenizer, settings
    save_4bit(tmp_path / "1", new, tokenizer)
    assert torch.equal(load_lm_4bit(tmp_path / "1", "cpu", torch.float32)[0](IDS).logits, new(IDS).logits)


# --- which layers


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=0)), "score"),
        (lambda: BertForSequenceClassification(BertConfig(**SMALL)), "classifier"),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)), "classifier"),
    ],
)
def test_a_head_is_not_put_in_four_bits(build, head):
    torch.manual_seed(0)
    model = build().eval()
    kept = {name: weight.clone() for name, weight in model.get_submodule(head).named_parameters()}
    linear = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    quantize_model(model)
    assert set(in_four_bits(model)) == {path for path in linear if path.split(".")[0] != head}
    for name, weight in model.get_submodule(head).named_parameters():
        assert torch.equal(weight, kept[name])
    assert model(input_ids=IDS).logits.isfinite().all()


def test_the_head_of_the_books_classifier_is_not_put_in_four_bits(bert):
    torch.manual_seed(0)
    body = BertModel(BertConfig(**SMALL), add_pooling_layer=False)
    model = quantize_model(Classifier(body, bert[1], 3, lambda states, mask: states[:, 0]))
    assert type(model.head) is nn.Linear and len(in_four_bits(model)) == 6
    assert model(["paris is in france"]).shape == (1, 3)


def tiny_experts():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SMALL, num_key_value_heads=1, head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    return Qwen3MoeForCausalLM(config).eval()


def test_experts_that_are_left_out_are_named(tiny_llama, tmp_path):
    model = tiny_experts()
    reached = sum(layer.weight.numel() for path, layer in model.named_modules() if path.endswith("_proj"))
    experts = [weight.numel() for name, weight in model.named_parameters() if ".experts." in name]
    with pytest.warns(UserWarning, match=f"quantizes layers with {reached / (reached + sum(experts)):.1%}.*experts"):
        quantize_model(model)
    assert len(in_four_bits(model)) == 4 and model(IDS).logits.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(tiny_llama[0])


@pytest.mark.filterwarnings("ignore:this quantizes")
def test_files_that_transformers_converts_are_refused(tiny_llama, tmp_path):
    folder = tiny_llama[1]
    tiny_experts().save_pretrained(folder)  # a file of an expert each
    with pytest.raises(ValueError, match=r"experts\.0.*load_lm and then quantize_model"):
        load_lm_4bit(folder, "cpu")


# --- Conv1D: GPT-2's layers, which keep their weight as (in, out)


@pytest.mark.parametrize("shape", [(64, 40), (33, 7)])  # (in, out)
@pytest.mark.parametrize("double", [True, False])
def test_a_conv1d_in_four_bits_is_the_linear_layer_of_its_transpose(shape, double):
    torch.manual_seed(0)
    conv, linear = Conv1D(shape[1], shape[0]), nn.Linear(*shape)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data.normal_()
    x = torch.randn(2, 3, shape[0])
    ours, expected = (four_bit(layer, double=double) for layer in (conv, linear))
    assert ours.in_features == shape[0] and torch.equal(ours(x), expected(x))
    assert torch.equal(ours.dequantized(torch.float32), expected.dequantized(torch.float32))


def test_a_whole_gpt2_is_transformers_own(tiny_gpt2, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 16}  # 64: see `unpacked`
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_gpt2 / file).read_bytes())
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, **options).train()
    for part in expected.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    read, _ = load_lm_4bit(tmp_path, "cpu", torch.float32, double=False)
    whole = quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), double=False)
    for ours in (read, whole):
        assert len(in_four_bits(ours)) == 8
        assert torch.equal(ours(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("double", [True, False])
def test_a_gpt2_in_four_bits_is_saved_trained_and_dequantized(tiny_gpt2, tmp_path, double):
    model, tokenizer = load_lm_4bit(tiny_gpt2, "cpu", torch.float32, double=double)
    expected = model(IDS).logits
    save_4bit(tmp_path / "four", model, tokenizer)
    again, _ = load_lm_4bit(tmp_path / "four", "cpu", torch.float32)
    assert torch.equal(again(IDS).logits, expected)
    add_lora(again, rank=2, alpha=8)
    again(input_ids=IDS, labels=IDS).loss.backward()
    assert any(weight.grad.any() for weight in again.parameters() if weight.requires_grad)
    torch.testing.assert_close(dequantize_model(model)(IDS).logits, expected)
    assert type(model.transformer.h[0].attn.c_attn) is nn.Linear


def test_older_files_of_a_gpt2_are_read(tiny_gpt2, tiny_llama, tmp_path):
    """Without the name of the part that all heads share, and with the mask that the model computes."""
    folder = tmp_path / "old"
    model, tokenizer = load_lm_4bit(tiny_gpt2, "cpu")
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {
        key.removeprefix("transformer."): tensor for key, tensor in load_file(tiny_gpt2 / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_lm_4bit(folder, "cpu")[0](IDS).logits, model(IDS).logits)


def test_a_model_without_linear_layers_cannot_be_read(tiny_llama):
    folder = tiny_llama[1]
    model = tiny_llama_of(**EVEN | {"num_hidden_layers": 0})
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="no linear layer"):
        load_lm_4bit(folder, "cpu")


# --- wrappers


def compiled_inside(model):
    model.model.layers[0].mlp.up_proj.compile(backend="eager")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled in data parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "a layer compiled": compiled_inside,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_wrapped_model_is_quantized_as_the_bare_one(tiny_llama, tmp_path, wrap, tied):
    model, tokenizer = tiny_llama_of(**ODD, tie_word_embeddings=tied), load_lm_4bit(tiny_llama[1], "cpu")[1]
    bare = quantize_model(copy.deepcopy(model))
    expected = bare(IDS, use_cache=False).logits
    wrapped = wrap(model)
    wrapped(IDS, use_cache=False)  # a compiled model must not go on with what it was
    quantize_model(wrapped)
    assert set(in_four_bits(wrapped)) == set(in_four_bits(bare))
    assert torch.equal(wrapped(IDS, use_cache=False).logits, expected)
    save_4bit(tmp_path / "four", wrapped, tokenizer)
    again, _ = load_lm_4bit(tmp_path / "four", "cpu", torch.float32)
    assert torch.equal(again(IDS, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="four bits already"):
        quantize_model(wrapped)
    dequantize_model(wrapped)
    assert not in_four_bits(wrapped)
    torch.testing.assert_close(wrapped(IDS, use_cache=False).logits, expected)


def data_parallel_inside(model):
    model.model.layers[0].mlp = nn.DataParallel(model.model.layers[0].mlp)
    model.model.norm = nn.DataParallel(model.model.norm)
    return model


def checkpointed_inside(model):
    model.model.layers[1] = torch.compile(nn.DataParallel(model.model.layers[1]), backend="eager")
    model.model.layers[0].mlp = checkpoint_wrapper(model.model.layers[0].mlp)
    model.model.layers[0].self_attn.q_proj = checkpoint_wrapper(model.model.layers[0].self_attn.q_proj)
    model.lm_head = nn.DataParallel(model.lm_head)
    return model


@pytest.mark.parametrize("wrap", [data_parallel_inside, checkpointed_inside, lambda m: nn.DataParallel(m)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_the_file_has_the_names_of_the_bare_model(tiny_llama, tmp_path, wrap, tied, double):
    model, tokenizer = tiny_llama_of(**ODD, tie_word_embeddings=tied), load_lm_4bit(tiny_llama[1], "cpu")[1]
    bare = quantize_model(copy.deepcopy(model), double=double)
    save_4bit(tmp_path / "bare", bare, tokenizer)
    save_4bit(tmp_path / "wrapped", quantize_model(wrap(model), double=double), tokenizer)
    expected, found = (load_file(tmp_path / name / TENSORS) for name in ("bare", "wrapped"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    again, _ = load_lm_4bit(tmp_path / "wrapped", "cpu", torch.float32)
    assert torch.equal(again(IDS).logits, bare(IDS).logits)


def test_a_layer_that_is_compiled_alone_is_replaced_inside():
    torch.manual_seed(0)
    model = nn.Sequential(torch.compile(nn.Linear(40, 64), backend="eager"), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(3, 40)
    model(x)
    expected = nn.Sequential(four_bit(model[0]._orig_mod), nn.Tanh(), four_bit(model[2]))(x)
    quantize_model(model)
    assert torch.equal(model(x), expected)
    dequantize_model(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("double", [True, False])
def test_a_model_in_four_bits_is_compiled_in_one_graph(double):
    torch._dynamo.reset()
    model = quantize_model(tiny_llama_of(**ODD), double=double)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
