"""The training loop: against torch's own pieces, killed and resumed, stopped early, and on bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tuning.training import (
    Classifier,
    batch_rows,
    checkpoint_activations,
    last_token,
    mean_of_tokens,
    rate_factor,
    train,
)

ROWS = [(torch.randn(4, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(20)]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def loss_of(net):
    def loss_on(rows):
        return F.cross_entropy(net(torch.stack([x for x, _ in rows])), torch.tensor([y for _, y in rows]))

    return loss_on


def state(net):
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


@pytest.mark.parametrize(("steps", "batch_size"), [(7, 5), (23, 3)])
def test_it_is_adamw_with_warmup_decay_and_clipping(steps, batch_size):
    """The reference: the same steps written out, with the rate of each worked out by hand."""
    ours, reference = network(), network()
    history = train(ours, loss_of(ours), ROWS, 0.05, steps, batch_size=batch_size, seed=3)
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.0)
    warmup = {7: 1, 23: 2}[steps]
    losses = []
    torch.manual_seed(3)
    for step in range(steps):
        up, down = (step + 1) / warmup, 1 - (step - warmup) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = 0.05 * (up if step + 1 < warmup else min(1.0, down))
        loss = loss_of(reference)([ROWS[i] for i in batch_rows(step, len(ROWS), batch_size, 3)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(state(ours), state(reference))
    assert history.best_step == steps and history.stopped is None and history.seconds > 0


def test_the_rate_climbs_and_falls_to_zero():
    factors = [rate_factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[100] == 0
    assert rate_factor(0, 1) == 1


@pytest.mark.parametrize(("n", "batch_size"), [(20, 4), (11, 3), (5, 5)])
def test_an_epoch_takes_each_row_once_at_most_and_seeds_differ(n, batch_size):
    per_epoch = n // batch_size
    epochs = [[batch_rows(e * per_epoch + i, n, batch_size, 0) for i in range(per_epoch)] for e in range(3)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == len(rows) == per_epoch * batch_size and set(rows) <= set(range(n))
    assert epochs[0] != epochs[1]
    assert [batch_rows(0, n, batch_size, seed) for seed in range(9)] != [batch_rows(0, n, batch_size, 0)] * 9


def test_only_what_requires_gradients_is_trained():
    net = network()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    train(net, loss_of(net), ROWS, 0.05, 3)
    assert torch.equal(net[0].weight, before) and net[0].weight.grad is None
    assert not torch.equal(net[3].weight, network()[3].weight)


def test_the_best_state_is_kept_and_the_start_competes():
    scores, states = [0.5, 0.2, 0.9, 0.9, 0.1], []
    net = network()

    def score():
        assert not net.training
        states.append(state(net))
        return scores[len(states) - 1]

    history = train(net, loss_of(net), ROWS, 0.05, 8, score=score, every=2, batch_size=4)
    assert history.scores == [[0, 0.5], [2, 0.2], [4, 0.9], [6, 0.9], [8, 0.1]]
    assert (history.best_step, history.best_score) == (4, 0.9)
    assert torch.equal(state(net), states[2]) and not torch.equal(states[2], states[3])
    assert not net.training
    untrained = network()
    falling = iter([3, 2, 1])
    assert train(untrained, loss_of(untrained), ROWS, 0.05, 4, score=lambda: next(falling), every=2).best_step == 0
    assert torch.equal(state(untrained), state(network()))


def test_the_last_step_is_scored_even_between_two_scores():
    net = network()
    history = train(net, loss_of(net), ROWS, 0.05, 5, score=lambda: 1.0, every=3)
    assert [step for step, _ in history.scores] == [0, 3, 5]


def test_patience_ends_a_run_that_gets_no_better():
    net = network()
    history = train(net, loss_of(net), ROWS, 0.05, 50, score=lambda: 0.0, every=2, patience=3)
    assert len(history.losses) == 6 and history.stopped == "no better score in 3 scores"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(bad):
    net, calls, states = network(), [], []

    def loss_on(rows):
        calls.append(len(rows))
        return loss_of(net)(rows) * (bad if len(calls) == 4 else 1)

    def score():
        states.append(state(net))
        return len(states)

    with pytest.warns(UserWarning, match=rf"the loss was {bad} at step 4; lower the rate of 0\.05"):
        history = train(net, loss_on, ROWS, 0.05, 9, score=score, every=2)
    assert len(history.losses) == 3 and "at step 4" in history.stopped
    assert torch.equal(state(net), states[1]) and history.best_step == 2


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Dropout, moments, schedule and batches included: the result is that of the run that was left alone."""
    path = tmp_path / "run.pt"
    options = {"lr": 0.05, "steps": 12, "every": 4, "batch_size": 4}
    whole = network()
    expected = train(whole, loss_of(whole), ROWS, score=lambda: -state(whole).norm().item(), **options)

    killed, calls = network(), []

    def dies(rows):
        calls.append(rows)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return loss_of(killed)(rows)

    with pytest.raises(KeyboardInterrupt):
        train(killed, dies, ROWS, score=lambda: -state(killed).norm().item(), checkpoint=path, **options)
    assert path.is_file() and len(list(tmp_path.iterdir())) == 1
    resumed = network(seed=9)  # whatever it starts from, the checkpoint decides
    history = train(
        resumed, loss_of(resumed), ROWS, score=lambda: -state(resumed).norm().item(), checkpoint=path, **options
    )
    assert torch.equal(state(resumed), state(whole))
    assert (history.losses, history.scores) == (expected.losses, expected.scores)
    assert not path.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    net, path = network(), tmp_path / "run.pt"

    def dies(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(net, dies, ROWS, 0.05, 8, score=lambda: 0.0, checkpoint=path)
    with pytest.raises(ValueError, match="is of a run with other settings; delete it or name another file"):
        train(net, dies, ROWS, 0.01, 8, score=lambda: 0.0, checkpoint=path)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    net = network()
    torch.manual_seed(5)
    train(net, loss_of(net), ROWS, 0.05, 2)
    assert torch.equal(torch.rand(1), expected)


def test_fewer_rows_than_a_batch_are_refused():
    net = network()
    with pytest.raises(ValueError, match="5 rows, fewer than one batch of 16; pass a smaller batch_size"):
        train(net, loss_of(net), ROWS[:5], 0.05, 2)


def test_a_frozen_module_is_refused():
    net = network().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this module requires gradients"):
        train(net, loss_of(net), ROWS, 0.05, 2)


# --- the head


def test_the_pools_read_real_tokens_only():
    states = torch.arange(24.0).view(2, 3, 4)
    right, left = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(mean_of_tokens(states, right), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
    assert torch.equal(last_token(states, right), torch.stack([states[0, 1], states[1, 2]]))
    assert torch.equal(last_token(states, left), states[:, 2])


@pytest.mark.parametrize("pool", [mean_of_tokens, last_token])
def test_a_classifier_says_the_same_in_any_batch(pool, smollm2):
    """SmolLM2's body with its last token, MiniLM with its mean, in batches of unlike length and one by one."""
    from tuning.models import load_encoder

    body, tokenizer = load_encoder(device="cpu") if pool is mean_of_tokens else (smollm2[0].model, smollm2[1])
    torch.manual_seed(0)
    classifier = Classifier(body, tokenizer, 3, pool).eval()
    texts = ["good", "a much longer sentence than the other one", "so so"]
    with torch.no_grad():
        together, alone = classifier(texts), torch.cat([classifier([text]) for text in texts])
        ids = tokenizer(texts[1], return_tensors="pt").input_ids
        states = body(ids).last_hidden_state[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    pooled = states.mean(dim=0) if pool is mean_of_tokens else states[-1]
    torch.testing.assert_close(together[1], classifier.head(pooled), atol=1e-4, rtol=1e-4)
    assert together.shape == (3, 3)


def test_a_text_longer_than_the_context_is_cut(bert):
    model, tokenizer = bert
    tokenizer.model_max_length = 40
    classifier = Classifier(model.bert, tokenizer, 2, mean_of_tokens).eval()
    assert classifier(["the capital " * 60]).shape == (1, 2)


def test_checkpointing_on_and_off(tiny_llama):
    model, _ = tiny_llama
    ids = torch.arange(24).view(2, 12)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(input_ids=ids, labels=ids)
        return sum(sizes)

    model.train()
    before, all_kept = gradients(), kept()
    checkpoint_activations(model)
    assert kept() < 0.7 * all_kept
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other)
    checkpoint_activations(model, on=False)
    assert kept() == all_kept
    model.requires_grad_(False)
    assert not model.get_input_embeddings()(ids).requires_grad
