"""Small models for the tests of adapters."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


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


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return Small().to(dtype)


def tiny_llama(tie=True, **changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tie}
    config = LlamaConfig(**(settings | changes))
    return LlamaForCausalLM(config).eval()


def fill(adapter, seed):
    """Numbers that are no zeros, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (adapter.A, adapter.B):
            weight.copy_(torch.randn(weight.shape, generator=generator))


def logits(model):
    with torch.no_grad():
        out = model(torch.arange(6).unsqueeze(0))
    return out.logits if hasattr(out, "logits") else out
