"""Prompts of free vectors: prompt tuning (Lester et al., 2021) and P-tuning (Liu et al., 2021); and deep ones.

A template of this module has, besides `[X]` and `[Y]`, slots `[P]` for pseudo tokens, among words or alone. A pseudo
token has no row in the embedding matrix: its vector comes from a prompt encoder. In the lists of token ids the i-th
pseudo token has the id -1 - i.

Its vector stands where a word's embedding would, in the space of the model's `inputs_embeds`. In most models this is as
wide as the hidden states; `prompts.embedding_size` tells.

A deep prompt, or prefix, does not stand among the words: it is keys and values for every layer, in front of the text's.
"""

import json
import re

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache

from . import files
from .prompts import (
    answer_logits,
    check_prompts,
    check_template,
    embeddings_of,
    encode,
    forward_at_answer,
    tokens_of,
)

__all__ = ["PromptEncoder", "PromptVectors", "answer_loss", "encode_pseudo", "nearest_tokens", "soften"]


class PromptVectors(nn.Module):
    """Prompt tuning: the vectors themselves are the parameters.

    Args:
        start: (length, hidden), where they begin.
    """

    def __init__(self, start):
        super().__init__()
        self.vectors = nn.Parameter(start.detach().clone().float())

    def forward(self):
        return self.vectors  # (length, hidden)


class PromptEncoder(nn.Module):
    """P-tuning's prompt encoder h: an embedding, a bidirectional LSTM of two layers and a two-layer MLP (section 3.2).

    With `start` the vectors are `start` plus what the network says, whose last layer begins at zero: training then
    begins exactly at `start`, e.g. at a handcrafted prompt. That part is this book's, not the paper's.

    Args:
        length: the number of pseudo tokens.
        hidden_size: of the language model, or where its tokens enter it narrower, `embedding_size(model)`; even.
        start: None or (length, hidden).
        lstm_layers: 2 as in the paper; 0 leaves the LSTM out.
    """

    def __init__(self, length, hidden_size, start=None, lstm_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(length, hidden_size)
        self.lstm = None
        if lstm_layers and hidden_size % 2:
            raise ValueError(f"a hidden size of {hidden_size} cannot be halved for two directions")
        if lstm_layers:
            half = hidden_size // 2  # each direction gives half of the output
            self.lstm = nn.LSTM(hidden_size, half, lstm_layers, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size))
        self.register_buffer("start", None if start is None else start.detach().clone().float())
        if start is not None:
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self):
        states = self.embedding.weight  # (length, hidden)
        if self.lstm is not None:
            states = self.lstm(states.unsqueeze(0))[0].squeeze(0)  # (length, hidden)
        vectors = self.mlp(states)
        return vectors if self.start is None else self.start + vectors


class PrefixEncoder(nn.Module):
    """Prefix tuning's encoder: an embedding and an MLP make a deep prompt (Li and Liang, 2021).

    Args:
        shape: of what is made, from `prefix_shape`; hidden: of the MLP, None for as many as a token's keys, as in peft.
    """

    def __init__(self, shape, hidden=None):
        super().__init__()
        self.shape = tuple(shape)
        length, layers, _, heads, size = self.shape
        self.embedding = nn.Embedding(length, heads * size)
        hidden = hidden or heads * size
        last = nn.Linear(hidden, layers * 2 * heads * size)
        self.mlp = nn.Sequential(nn.Linear(heads * size, hidden), nn.Tanh(), last)

    def forward(self):
        return self.mlp(self.embedding.weight).view(self.shape)  # (length, layers, 2, heads, size)


class Prefixed(nn.Module):
    """A causal model that finds keys and values in front of every text, in each of its layers.

    Args:
        prefix: a module without arguments that makes them, (length, layers, 2, heads, size): a `PrefixEncoder`, or as
            in P-tuning v2 plain numbers, `PromptVectors`.
    """

    def __init__(self, model, prefix):
        super().__init__()
        self.model, self.prefix, self.config = model, prefix, model.config
        self.device = model.device
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep=0):
        prefix = self.prefix().to(self.model.dtype)
        length, rows = len(prefix), len(input_ids)
        layers = prefix.permute(1, 2, 3, 0, 4).unsqueeze(2)
        layers = layers.expand(-1, -1, rows, -1, -1, -1)  # (layers, 2, rows, heads, length, size)
        ones = attention_mask.new_ones(rows, length)  # the text may look at the prefix
        return self.model(
            input_ids,
            attention_mask=torch.cat([ones, attention_mask], dim=1),
            position_ids=position_ids + length,
            past_key_values=DynamicCache(layers),  # a new one: the model adds the text's own
            logits_to_keep=logits_to_keep,
        )


def prefix_shape(model, length):
    """(length, layers, 2, heads, size): how many numbers a deep prompt has, for keys and for values."""
    config = model.config.get_text_config()
    asking = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or asking
    size = getattr(config, "head_dim", None) or config.hidden_size // asking
    return length, config.num_hidden_layers, 2, heads, size


def encode_pseudo(tokenizer, template, subject):
    """Token ids of a template with `[P]` slots; the i-th pseudo token has the id -1 - i.

    Raises:
        ValueError: no `[P]`, or the other slots are wrong for this tokenizer.
    """
    length = template.count("[P]")
    if not length:
        right = "[P][P][P] [X] [P][P][P] [Y]."
        raise ValueError(f"template {template!r} has no [P] slot; write e.g. {right!r}")
    check_template(tokenizer, template, pseudo=length)
    slots = [-1 - index for index in range(length)]
    return encode(tokenizer, template.replace("[P]", "[T]"), subject, slots)


def soften(model, tokenizer, template):
    """Turn a handcrafted template into one of pseudo tokens, with the vectors that make it say the same.

    Returns:
        `(template, start)`: each token of the words became a `[P]`; `start` (length, hidden) holds their embeddings.

    Raises:
        ValueError: the template's slots are wrong for this tokenizer, or it has no words.
    """
    check_template(tokenizer, template)
    read = template if tokenizer.mask_token else template[: template.index("[Y]") + 3]
    soft, ids = "", []
    for piece in re.split(r"(\[X\]|\[Y\])", read):
        if piece in ("[X]", "[Y]"):
            soft += piece
        else:
            new = tokens_of(tokenizer, piece.rstrip(" "))  # a space belongs to the word after it
            soft += "[P]" * len(new) + " " * piece.endswith(" ")
            ids += new
    return soft, embeddings_of(model, ids).float()


def answer_loss(model, tokenizer, template, facts, vectors=None, words=None):
    """The mean of -log p(answer | template, subject) over `facts`: what prompt tuning and fine-tuning both lower.

    Args:
        template: with `[P]` slots if there are `vectors` (length, hidden) for them.
        facts: (subject, answer) pairs; the answer is a token id, or its index in `words`.
        words: token ids of the label words that alone compete; None for the whole vocabulary.

    Raises:
        ValueError: no facts; the template, the vectors or an answer do not fit; a prompt is longer than the context.
    """
    prompts = _prompts(tokenizer, template, [subject for subject, _ in facts], vectors)
    check_prompts(model, tokenizer, prompts, vectors)
    logits = forward_at_answer(model, tokenizer, prompts, vectors=vectors).float()  # (facts, vocab)
    logits = logits if words is None else logits[:, words]
    answers = torch.tensor([answer for _, answer in facts], device=logits.device)
    _check_answers(answers, logits.shape[1])
    return F.cross_entropy(logits, answers)


def nearest_tokens(vectors, embeddings):
    """For each vector the token whose embedding is nearest (Euclidean).

    Args:
        vectors: (length, hidden); embeddings: (vocab, hidden), from `prompts.embeddings_of`.

    Returns:
        `(tokens, distances)`: a list of ids, and a float32 tensor (length,), exactly 0 where a vector is an embedding.
    """
    # Not as |a|² - 2ab + |b|², which is off by more than some tokens lie from each other.
    exact = "donot_use_mm_for_euclid_dist"
    distances, tokens = torch.cdist(vectors.float(), embeddings.float(), compute_mode=exact).min(dim=1)
    return tokens.tolist(), distances


def prompt_logits(model, tokenizer, template, subjects, vectors=None, batch_size=32):
    """`answer_logits` of a template, with `vectors` (length, hidden) at its `[P]` slots if it has any.

    Args:
        subjects: texts, or (subject, answer) pairs, whose answers are not looked at.
    """
    texts = [row if isinstance(row, str) else row[0] for row in subjects]
    return answer_logits(model, tokenizer, _prompts(tokenizer, template, texts, vectors), batch_size, vectors)


def save_prompt(path, model, template, vectors):
    """Write a learned prompt as safetensors: the vectors, the template, and what tells the model it belongs to.

    The prompt encoder is not kept: its vectors are all that is needed.
    """
    tensors = {"vectors": vectors.detach().float().cpu().contiguous()}
    metadata = {"template": template, "model": _name(model), "trace": files.trace(model)}
    files.replace(path, lambda temporary: save_file(tensors, temporary, {"prompt": json.dumps(metadata)}))


def load_prompt(path, model):
    """Read a prompt that `save_prompt` wrote for this model.

    Returns:
        `(template, vectors)`, the vectors (length, hidden) in float32 on the model's device.

    Raises:
        ValueError: the file is no prompt, or the prompt was trained on another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["prompt"])
            vectors, trace = file.get_tensor("vectors"), metadata["trace"]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no prompt that `save_prompt` wrote, or an older version of it did ({error!r}); save it anew"
        ) from error
    if not files.same_trace(trace, files.trace(model)):
        raise ValueError(
            f"the prompt in {path} was trained on {metadata['model']} and means nothing to {_name(model)}, whose "
            "embeddings are others; load that model, or train a prompt for this one"
        )
    return metadata["template"], vectors.to(model.device)


def _prompts(tokenizer, template, subjects, vectors):
    """The ids of each subject's prompt, with pseudo tokens where there are vectors for them."""
    slots = template.count("[P]")
    if vectors is None:
        return [encode(tokenizer, template, subject) for subject in subjects]
    if slots and len(vectors) != slots:
        raise ValueError(f"template {template!r} has {slots} [P] slots and there are {len(vectors)} vectors")
    return [encode_pseudo(tokenizer, template, subject) for subject in subjects]


def _name(model):
    return model.name_or_path or type(model).__name__


def _check_answers(answers, size):
    if size == 0:
        raise ValueError("there are no `words` to choose among; give their token ids, or None for the vocabulary")
    if answers.min() < 0 or answers.max() >= size:
        wrong = answers[(answers < 0) | (answers >= size)][0].item()
        raise ValueError(f"answer {wrong} is outside the {size} that the model chooses among (0 to {size - 1})")
