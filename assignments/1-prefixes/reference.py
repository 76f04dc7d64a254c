"""The functions that the assignment *Prefixes* asks for."""

import torch
import torch.nn.functional as F
from transformers import DynamicCache


def make_prefix(places, W1, b1, W2, b2, layers, heads):
    flat = F.linear(torch.tanh(F.linear(places, W1, b1)), W2, b2)  # (length, layers × 2 × heads × size)
    pairs = flat.view(len(places), layers, 2, heads, -1).permute(2, 1, 3, 0, 4)
    return pairs[0], pairs[1]


def prefix_logits(model, keys, values, input_ids, attention_mask):
    rows, length = len(input_ids), keys.shape[2]
    cache = DynamicCache()
    for layer in range(len(keys)):
        cache.update(keys[layer].expand(rows, -1, -1, -1), values[layer].expand(rows, -1, -1, -1), layer)
    mask = torch.cat([attention_mask.new_ones(rows, length), attention_mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1)[:, length:]
    found = model(input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    return found.logits[:, -1]


def verbalize(logits, groups):
    log_probs = logits.log_softmax(dim=1)
    classes = [log_probs[:, words].logsumexp(dim=1) - torch.tensor(len(words)).log() for words in groups]
    return torch.stack(classes, dim=1).log_softmax(dim=1)


def balance(log_probs, rounds=200):
    for _ in range(rounds):
        share = log_probs.logsumexp(dim=0) - torch.tensor(len(log_probs)).log()  # of each class
        log_probs = (log_probs - share).log_softmax(dim=1)
    return log_probs


def train_prefix(model, keys, values, batch, lr, steps):
    input_ids, attention_mask, answers = batch
    prefix = [part.clone().requires_grad_() for part in (keys, values)]
    optimizer = torch.optim.Adam(prefix, lr=lr)
    for _ in range(steps):
        loss = F.cross_entropy(prefix_logits(model, *prefix, input_ids, attention_mask), answers)
        optimizer.zero_grad()
        loss.backward(inputs=prefix)  # no gradients for the model's weights
        optimizer.step()
    return tuple(part.detach() for part in prefix)
