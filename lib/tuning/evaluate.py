"""What measures: P@1, losses and perplexity of texts, and intervals."""

import torch

__all__ = ["bootstrap_interval", "hits_at_1", "paired_interval"]


def hits_at_1(logits, answer_ids, candidates=None):
    """Which prompts give their answer the highest score; their mean is P@1 (precision at 1).

    Args:
        logits: (n, vocab_size); answer_ids: n token ids.
        candidates: token ids to choose among; the whole vocabulary if None.

    Returns:
        (n,) bool.
    """
    if candidates is not None:
        others = torch.ones(logits.shape[1], dtype=torch.bool)
        others[list(candidates)] = False
        logits = logits.masked_fill(others, -torch.inf)
    return logits.argmax(dim=1) == torch.as_tensor(answer_ids)


def bootstrap_interval(hits, rounds=2000, level=0.95, seed=0):
    """The percentile bootstrap interval of a mean, over items.

    Args:
        hits: (n,) bool or float; for a difference of two methods on the same items, the n differences.

    Returns:
        `(low, high)` floats.
    """
    values = torch.as_tensor(hits).double()
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(len(values), (rounds, len(values)), generator=generator)
    tail = (1 - level) / 2
    low, high = values[samples].mean(dim=1).quantile(torch.tensor([tail, 1 - tail]).double())
    return low.item(), high.item()


def paired_interval(gains, same_items, rounds=2000, level=0.95, seed=0):
    """The percentile bootstrap interval of a mean gain over seeds and items: both are drawn anew in each round.

    Args:
        gains: one (n,) tensor a seed: for each item, how much better one method did than another.
        same_items: whether an item stands at the same place in every seed. It is then drawn for all seeds at once;
            else (repeated splits) each seed draws from its own items.

    Returns:
        `(low, high)` floats. Few seeds say little about seeds: with three, the interval is too narrow on that side.

    Raises:
        ValueError: the same items, but not as many of them in every seed.
    """
    if same_items and len({len(gain) for gain in gains}) > 1:
        counts = [len(gain) for gain in gains]
        raise ValueError(f"seeds with {counts} items cannot share them; pass same_items=False")
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(n, (n,), generator=generator)

    means = []
    for _ in range(rounds):
        shared = draw(len(gains[0]))
        drawn = [gains[k][shared if same_items else draw(len(gains[k]))] for k in draw(len(gains))]
        means.append(torch.cat(drawn).double().mean())
    tail = (1 - level) / 2
    low, high = torch.stack(means).quantile(torch.tensor([tail, 1 - tail]).double())
    return low.item(), high.item()
