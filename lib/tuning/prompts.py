"""Prompts: templates, batched scoring, label words, calibration, and the search for better words.

A template is text with two slots, `[X]` for the subject and `[Y]` for the answer, as in LAMA (Petroni et al., 2019). A
causal model reads everything before `[Y]` and predicts the next token; a masked model reads its mask token at `[Y]`.
"""

import copy
import inspect
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F

__all__ = [
    "answer_id",
    "answer_logits",
    "calibrate",
    "class_log_probs",
    "encode",
    "few_shot",
    "hotflip",
    "search_triggers",
    "trigger_gradient",
]


def encode(tokenizer, template, subject, triggers=()):
    """Token ids of `template` with `subject` at `[X]`, ready for `answer_logits`.

    Args:
        template: text with one `[X]` and one `[Y]`. `[T]` slots take the trigger tokens, in order.
        triggers: one token id for each `[T]`.

    Returns:
        A list of ids. For a causal model it ends before `[Y]`; for a masked one `[Y]` is the mask token.

    Raises:
        ValueError: the template's slots are wrong for this tokenizer; the message shows a right one.
    """
    check_template(tokenizer, template, triggers)
    before, after = template.split("[Y]")
    text = before + tokenizer.mask_token + after if tokenizer.mask_token else before
    ids = []
    for index, piece in enumerate(text.split("[T]")):
        ids += [triggers[index - 1]] if index else []
        ids += tokens_of(tokenizer, piece.rstrip(" ").replace("[X]", subject))  # a space belongs to the word after it
    return _add_special_tokens(tokenizer, ids)


def few_shot(template, examples, separator="\n"):
    """A template that shows solved examples before its own question.

    Args:
        examples: (subject, answer) pairs, shown in this order.
    """
    solved = [template.replace("[X]", subject).replace("[Y]", answer) for subject, answer in examples]
    return separator.join([*solved, template])


def answer_id(tokenizer, answer):
    """The one token id of `answer` as it follows a space.

    Raises:
        ValueError: the answer is more than one token (or none), or the vocabulary does not know it.
    """
    ids = tokens_of(tokenizer, " " + answer)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"answer {answer!r} is {len(ids)} tokens here ({pieces}); use one-token answers")
    return ids[0]


@torch.no_grad()
def answer_logits(model, tokenizer, prompts, batch_size=32, vectors=None):
    """Logits of the token at `[Y]` for each prompt, whatever batch it lands in and whatever mode the model is in.

    Three things make it fast: a prefix that all prompts share is read once, prompts of like length share a batch, and
    only the answer's position goes through the output layer.

    Args:
        prompts: lists of token ids, from `encode`.
        vectors: (length, hidden); a negative id -1 - i in the prompts stands for `vectors[i]`.

    Returns:
        (len(prompts), vocab_size) float32, on the CPU, in the order of `prompts`.

    Raises:
        ValueError: no prompts, an empty one or one longer than the model's context, or vectors that do not fit.
    """
    check_prompts(model, tokenizer, prompts, vectors)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    logits = None
    with evaluating(model):
        prefix = _read_shared_prefix(model, tokenizer, prompts, vectors)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prompts[index] for index in rows]
            found = forward_at_answer(model, tokenizer, batch, prefix, vectors)
            if logits is None:
                logits = torch.empty(len(prompts), found.shape[1])
            logits[rows] = found.float().cpu()
    return logits


def class_log_probs(logits, words):
    """Log-probability of each class, from the logits of its label words (the verbalizer).

    Args:
        logits: (n, vocab_size); words: for each class its label words' token ids.

    Returns:
        (n, classes), normalized over the classes.

    Raises:
        ValueError: no classes, or one without label words.
    """
    _check_words(words)
    per_class = [logits[:, ids].logsumexp(dim=1) for ids in words]
    return torch.stack(per_class, dim=1).log_softmax(dim=1)


def calibrate(log_probs, reference):
    """Take out a prompt's preference for a class: what it says of the reference inputs on average.

    With content-free inputs as reference this is contextual calibration (Zhao et al., 2021, with a difference of
    log-probabilities); with unlabelled inputs of the task, batch calibration (Zhou et al., 2023).

    Args:
        log_probs: (n, classes); reference: (m, classes).

    Raises:
        ValueError: no reference inputs.
    """
    _check_reference(reference)
    return (log_probs - reference.mean(dim=0)).log_softmax(dim=1)


def trigger_gradient(model, tokenizer, template, triggers, facts):
    """The gradient of the mean loss with respect to the embedding of each trigger token.

    Args:
        template: text with `[X]`, `[Y]` and a `[T]` for each trigger.
        triggers: token ids; facts: (subject, answer token id) pairs.

    Returns:
        (len(triggers), hidden).

    Raises:
        ValueError: no triggers or no facts, or a prompt is longer than the model's context.
    """
    vectors = embeddings_of(model, triggers).requires_grad_()  # (triggers, hidden)
    slots = [-1 - index for index in range(len(triggers))]  # a negative id stands for a vector of ours
    prompts = [encode(tokenizer, template, subject, slots) for subject, _ in facts]
    check_prompts(model, tokenizer, prompts, vectors)
    answers = torch.tensor([answer for _, answer in facts], device=model.device)
    with evaluating(model), torch.enable_grad():
        logits = forward_at_answer(model, tokenizer, prompts, vectors=vectors).float()
        loss = F.cross_entropy(logits, answers)
    return torch.autograd.grad(loss, vectors)[0]


def hotflip(gradient, embeddings, allowed, k):
    """The `k` tokens that would lower the loss most, judged by its slope (Ebrahimi et al., 2018).

    To first order, replacing a token's embedding by another's, `e`, changes the loss by `(e - current) . gradient`; the
    second part is the same for all candidates.

    Args:
        gradient: (hidden,) at the token's place; embeddings: (vocab, hidden), from `embeddings_of`.
        allowed: (vocab,) bool, the tokens that may be used.

    Returns:
        k token ids, the most promising first; fewer if fewer are allowed.

    Raises:
        ValueError: no token is allowed, or `allowed` is of another vocabulary.
    """
    _check_allowed(allowed, embeddings)
    k = min(k, int(allowed.sum()))
    change = embeddings @ gradient  # (vocab,)
    return change.masked_fill(~allowed, torch.inf).topk(k, largest=False).indices.tolist()


def search_triggers(model, tokenizer, template, triggers, facts, allowed, steps, k=8, batch_size=16, seed=0):
    """Discrete prompt search along the gradient, as in AutoPrompt (Shin et al., 2020).

    Each step takes one trigger's place in turn, asks `hotflip` for `k` candidates on one batch of facts, scores them on
    another, and keeps the best of them and the present token.

    Args:
        triggers: the token ids to start from; facts: (subject, answer token id) pairs to learn from.
        allowed: (vocab,) bool, the tokens that may be used.

    Yields:
        `(triggers, loss)` after each step: the token ids, and their mean loss on that step's scoring batch.

    Raises:
        ValueError: no triggers, no facts, or no token is allowed.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = embeddings_of(model)
    triggers = list(triggers)
    for step in range(steps):
        drawn = torch.randperm(len(facts), generator=generator)[: 2 * batch_size].tolist()
        guiding = [facts[index] for index in drawn[:batch_size]]
        scoring = [facts[index] for index in drawn[batch_size:]] or guiding
        gradients = trigger_gradient(model, tokenizer, template, triggers, guiding)
        place = step % len(triggers)
        tokens = [triggers[place], *hotflip(gradients[place], embeddings, allowed, k)]
        tried = [[*triggers[:place], token, *triggers[place + 1 :]] for token in tokens]
        losses = _losses(model, tokenizer, template, tried, scoring)
        triggers = tried[losses.argmin()]
        yield triggers, losses.min().item()


def allowed_tokens(model, tokenizer, answers):
    """The tokens a trigger may be: no special token, no piece of a character, no capitalized word, none of `answers`.

    Without the last two the search writes the frequent answers into the prompt (AutoPrompt filters likewise).

    Returns:
        (vocab,) bool, on the model's device.
    """
    size = model.get_input_embeddings().num_embeddings
    texts = tokenizer.batch_decode([[token] for token in range(size)])
    allowed = [text == text.lower() and "\ufffd" not in text and bool(text.strip()) for text in texts]
    allowed = torch.tensor(allowed)
    allowed[[*tokenizer.all_special_ids, *answers]] = False
    return allowed.to(model.device)


def _losses(model, tokenizer, template, tried, facts):
    """The mean loss of each list of triggers over `facts`, (len(tried),)."""
    prompts = [encode(tokenizer, template, subject, triggers) for triggers in tried for subject, _ in facts]
    answers = torch.tensor([answer for _, answer in facts] * len(tried))
    losses = F.cross_entropy(answer_logits(model, tokenizer, prompts), answers, reduction="none")
    return losses.view(len(tried), len(facts)).mean(dim=1)


def forward_at_answer(model, tokenizer, prompts, prefix=None, vectors=None):
    """Logits at the answer, (len(prompts), vocab), on the model's device.

    Causal prompts are padded on the left, so that the answer's place is last in each row, and positions count from each
    prompt's first real token; masked prompts are padded on the right. `prefix` is what `_read_shared_prefix` made.
    A negative id -1 - i stands for `vectors[i]`.
    """
    if tokenizer.mask_token is None:
        return forward_at_end(model, tokenizer, prompts, 1, prefix, vectors)[:, -1]
    ids, mask = _padded(model, tokenizer, prompts, "right")
    inputs = inputs_with_vectors(model, ids, vectors)
    answer = (ids == tokenizer.mask_token_id).int().argmax(dim=1)
    return model(**inputs, attention_mask=mask).logits[torch.arange(len(ids), device=ids.device), answer]


def forward_at_end(model, tokenizer, prompts, places, prefix=None, vectors=None):
    """A causal model's logits after the last `places` tokens of each prompt, (len(prompts), places, vocab).

    The other arguments are those of `forward_at_answer`.
    """
    cache, skip = prefix or (None, 0)
    ids, mask = _padded(model, tokenizer, [prompt[skip:] for prompt in prompts], "left")
    inputs = inputs_with_vectors(model, ids, vectors)
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(ids))
        mask = torch.cat([mask.new_ones(len(ids), skip), mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, skip:]
    options = {"position_ids": positions, "logits_to_keep": places, "past_key_values": cache}
    options |= {"use_cache": cache is not None}
    options = {name: value for name, value in options.items() if _takes(model, name)}
    return model(**inputs, attention_mask=mask, **options).logits[:, -places:]


def _padded(model, tokenizer, prompts, side):
    """Lists of ids as `(ids, mask)`, (len(prompts), longest) each, on the model's device."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side=side)
    return ids.to(model.device), mask.to(model.device)


def embeddings_of(model, tokens=None):
    """What tokens become where they enter the model: vectors of the space that `inputs_embeds` takes.

    The model's module is asked, not its matrix: some models scale the rows (Gemma does), and in some a row is narrower
    than the hidden states (ALBERT, the OPT of 350M).

    Args:
        tokens: token ids; None for the whole vocabulary.

    Returns:
        (len(tokens), hidden) in the model's dtype, without a gradient; `embedding_size` says how wide.
    """
    embed = model.get_input_embeddings()
    tokens = range(len(embed.weight)) if tokens is None else list(tokens)
    if not tokens:
        raise ValueError("there are no tokens to take embeddings of; are there words, or [T] slots, in the template?")
    with torch.no_grad():
        return embed(torch.tensor(tokens, device=embed.weight.device))


def embedding_size(model):
    """How many numbers a vector has that stands for a token: the hidden size, in most models."""
    return embeddings_of(model, [0]).shape[1]


@contextmanager
def evaluating(model):
    """The model in evaluation mode, and each of its modules as it was afterwards, also after an error.

    In training mode dropout makes what is measured random, and activation checkpoints leave no cache to go on from.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def inputs_with_vectors(model, ids, vectors):
    """What the model's forward takes: the ids, or embeddings in which `vectors` stand at the negative ids."""
    if vectors is None:
        return {"input_ids": ids}
    embedded = model.get_input_embeddings()(ids.clamp(min=0))  # (batch, seq, hidden)
    ours = vectors.to(embedded.device, embedded.dtype)[(-1 - ids).clamp(min=0)]
    return {"inputs_embeds": torch.where((ids < 0).unsqueeze(-1), ours, embedded)}


def _takes(model, option):
    """Whether the model's forward takes `option`; a wrapper such as peft's takes anything and passes it on."""
    parameters = inspect.signature(model.forward).parameters
    return option in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _read_shared_prefix(model, tokenizer, prompts, vectors=None):
    """The keys and values of the tokens that all prompts begin with, and their number; None if there are none."""
    first, last = min(prompts), max(prompts)  # in sorted order these two differ the earliest
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(map(len, prompts)))
    shared = min(shared, min(map(len, prompts)) - 1)  # each prompt keeps at least one token of its own
    if tokenizer.mask_token is not None or len(prompts) == 1 or shared < 1 or not _takes(model, "past_key_values"):
        return None
    if not _may_stand_apart(model, prompts):
        return None
    ids = torch.tensor([first[:shared]], device=model.device)
    cache = getattr(model(**inputs_with_vectors(model, ids, vectors), use_cache=True), "past_key_values", None)
    return (cache, shared) if _repeats(cache) else None


def _may_stand_apart(model, prompts):
    """Whether the model reads the same where padding stands between a shared prefix and a prompt shorter than others.

    It does if it counts by the positions that it is told, and not by places in the row as MPT's ALiBi does: so its own
    forward must name them, and padding must not push the prefix out of a window (Gemma's, GPT-Neo's).
    """
    config, longest = model.config.get_text_config(), max(map(len, prompts))
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    if any(isinstance(window, int) and longest > window > 0 for window in windows):
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's forward takes anything
    told = "position_ids" in inspect.signature(base.forward).parameters
    return told or len(set(map(len, prompts))) == 1


def _repeats(cache):
    """Whether a cache can be repeated for each row of a batch; the states of convolutions (LFM2's) cannot."""
    return all(hasattr(part, "batch_repeat_interleave") for part in (cache, *getattr(cache, "layers", ())))


def tokens_of(tokenizer, text):
    """The token ids of a text alone, without what a tokenizer puts around it."""
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def _add_special_tokens(tokenizer, ids):
    """`ids` between what the tokenizer puts around a text; a causal prompt stays open at its end."""
    plain = tokens_of(tokenizer, "a")
    framed = tokenizer("a").input_ids
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    return framed[:start] + ids + (framed[start + len(plain) :] if tokenizer.mask_token else [])


def check_template(tokenizer, template, triggers=(), pseudo=0):
    """Refuse a template whose slots do not fit: one `[X]`, one `[Y]`, a `[T]` a trigger, `pseudo` times `[P]`."""
    for slot in ("[X]", "[Y]"):
        count = template.count(slot)
        if count != 1:
            fault = f"has no {slot} slot" if count == 0 else f"has {count} {slot} slots"
            raise ValueError(f"template {template!r} {fault}; write one, e.g. 'The capital of [X] is [Y].'")
    if template.count("[T]") != len(triggers):
        raise ValueError(f"template {template!r} has {template.count('[T]')} [T] slots for {len(triggers)} triggers")
    count = template.count("[P]")
    if count != pseudo:
        raise ValueError(
            f"template {template!r} has {count} [P] slots and no vectors for them; pass `vectors` ({count}, hidden) to "
            "`prompt_logits` or `answer_loss`, or write words there"
        )
    before, after = template.split("[Y]")
    if tokenizer.mask_token is None and (not before.endswith(" ") or "[X]" in after or re.search(r"\w", after)):
        raise ValueError(
            f"template {template!r} does not suit a causal model, which reads only what stands before [Y] and answers "
            "with a word after a space; end it on ' [Y]' or ' [Y].', e.g. 'The capital of [X] is [Y].'"
        )


def check_prompts(model, tokenizer, prompts, vectors=None):
    """Refuse what cannot be scored: no prompts, an empty or a too long one, vectors that are missing or do not fit."""
    if not prompts:
        raise ValueError("there are no prompts to score; is the data set empty?")
    if not all(prompts):
        raise ValueError(f"prompt {list(map(len, prompts)).index(0)} has no token; write words before [X] or [Y]")
    # The tokenizer's limit too: RoBERTa's configuration counts two positions that no token can have.
    limit = min(context_of(model) or 10**9, tokenizer.model_max_length)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if len(prompts[longest]) > limit:
        raise ValueError(
            f"prompt {longest} is {len(prompts[longest])} tokens long and the model's context holds {limit}; "
            "shorten the template or show fewer examples"
        )
    wanted = -min(map(min, prompts))  # the i-th vector stands at the id -1 - i
    if wanted > (0 if vectors is None else len(vectors)):
        raise ValueError(f"the prompts have places for {wanted} vectors; pass `vectors` ({wanted}, hidden)")
    if vectors is not None:
        check_vectors(model, vectors)


def check_vectors(model, vectors):
    """Refuse vectors that the model's `inputs_embeds` has no room for."""
    size = embedding_size(model)
    if len(vectors) == 0:
        raise ValueError("there are no vectors; give at least one, or None to do without")
    if vectors.dim() != 2 or vectors.shape[1] != size:
        raise ValueError(
            f"vectors of the shape {tuple(vectors.shape)} do not fit this model, whose tokens enter it as {size} "
            f"numbers; give (length, {size})"
        )


def context_of(model):
    """How many tokens the model's context holds; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _check_words(words):
    if min(map(len, words), default=0) == 0:
        raise ValueError(f"label words {words} leave a class without a word; give each class at least one token id")


def _check_reference(reference):
    if len(reference) == 0:
        raise ValueError("there are no reference inputs to calibrate on; give the log-probabilities of at least one")


def _check_allowed(allowed, embeddings):
    if len(allowed) != len(embeddings):
        raise ValueError(
            f"`allowed` has {len(allowed)} tokens and the embeddings {len(embeddings)}; give a bool for each embedding"
        )
    if not allowed.any():
        raise ValueError("no token is allowed; set at least one of `allowed` to True")
