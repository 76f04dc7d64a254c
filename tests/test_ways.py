"""Chapter 5's recorder: small runs of it, two rates in one step, the search for them, its scores; what is recorded."""

import copy
import json
from functools import cache

import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn.utils import clip_grad_norm_
from tuning.evaluate import elsewhere
from tuning.experiments import ways
from tuning.experiments.record import load_results
from tuning.methods import fit
from tuning.models import load_lm
from tuning.p_tuning import answer_loss
from tuning.prompts import answer_id
from tuning.training import batch_rows, rate_factor

CAPITAL = "The capital of [X] is [Y]."
NOWHERE = {"model": None, "device": "cpu", "limit": None, "lama": None, "superglue": None, "reviews": None}


@pytest.fixture
def small(monkeypatch):
    """One seed, two rates or pairs of them, few examples and wordings; models and data are loaded once."""
    for loader in ("load_reviews", "load_wic", "load_facts", "load_superglue"):
        monkeypatch.setattr(ways, loader, cache(getattr(ways, loader)))
    monkeypatch.setattr(ways, "RATES", {way: rates[2:4] for way, rates in ways.RATES.items()})
    monkeypatch.setattr(ways, "sweep", lambda rates, run: max(rates, key=lambda lr: run(lr)["dev"]))
    monkeypatch.setattr(ways, "climb", lambda start, run: max([[*start], [1e-3, 1e-2]], key=lambda lr: run(lr)["dev"]))
    monkeypatch.setattr(ways, "SEEDS", (0,))
    monkeypatch.setattr(ways, "SHOTS", 4)
    monkeypatch.setattr(ways, "SHOWN", (1, 4))
    monkeypatch.setattr(ways, "SMALL", ("P1376",))
    monkeypatch.setattr(ways, "TEMPLATES", {task: some[-2:] for task, some in ways.TEMPLATES.items()})
    for task, wordings in ways.UNDERSTANDING.items():
        monkeypatch.setitem(ways.WORDINGS, task, wordings[:2])
    loaded = {}

    def load(given):
        name = given["model"]
        loaded[name] = loaded.get(name) or load_lm(name, "cpu", torch.float32)
        return copy.deepcopy(loaded[name][0]), loaded[name][1]

    monkeypatch.setattr(ways, "load", load)


def recorded(folder, model, *more):
    ways.main(["--model", str(model), "--device", "cpu", "--steps", "1", "--out", str(folder), *more])
    return load_results("ways", folder)["results"]


def test_a_small_run_on_a_causal_model(tmp_path, tiny_gpt2, small, monkeypatch):
    monkeypatch.setattr(ways, "UNDERSTANDING", {"reviews": ways.UNDERSTANDING["reviews"]})
    pieces = recorded(tmp_path, tiny_gpt2, "--limit", "20")
    hidden, model = 32, sum(weight.numel() for weight in load_lm(tiny_gpt2)[0].parameters())
    rows = {(row["task"], row["way"]): row for row in pieces["rows"]}
    everywhere = {"most frequent answer", "manual prompt", "examples in context", *ways.WAYS}
    for task in ("P17", "P1376", "reviews"):
        told = everywhere - ({ways.ALONE} if task == "reviews" else set())
        assert {way for which, way in rows if which == task} == told
        for way in told:
            row = rows[task, way]
            assert row["items"] == [20] and len(row["hits"][0]) == 20
            mean, low, high = row["right"]
            assert 0 <= low <= mean <= high <= 1 and mean == row["hits"][0].count("1") / 20
        assert rows[task, "manual prompt"]["over manual"] == [0, 0, 0] and rows[task, "manual prompt"]["trained"] == 0
        assert rows[task, ways.PROMPT]["kept_bytes"] == 4 * 6 * hidden
        assert rows[task, ways.WEIGHTS]["kept_bytes"] == 4 * model
        assert rows[task, ways.BOTH]["kept_bytes"] == 4 * (model + 6 * hidden)
        assert rows[task, ways.BOTH]["trained"] == model + rows[task, ways.PROMPT]["trained"]
        head = 2 * hidden + 2 if task == "reviews" else 0
        assert rows[task, ways.HEAD]["trained"] == model + head
        # What leaves the weights alone does so bit for bit, and the untrained model's answers elsewhere are its own.
        for way in ways.WAYS[:4]:
            run = pieces[f"run/{way}/{task}/0"]
            assert run["as before"] == (way == ways.PROMPT) == ("elsewhere" not in run)
        assert rows[task, ways.PROMPT]["perplexity"] == [1] != rows[task, ways.WEIGHTS]["perplexity"]
    assert pieces["run/fine-tuning/P1376/0"]["template"] == "<|endoftext|> [X] [Y]."
    assert "macro_f1" in rows["reviews", ways.HEAD] and "macro_f1" not in rows["P17", ways.HEAD]
    assert pieces["untaught/P-tuning/P17"]["as before"] and len(pieces["twice/fine-tuning/reviews"]["losses"]) == 2
    untrained = elsewhere(*load_lm(tiny_gpt2), limit=20)
    assert pieces["untouched"]["others"]["perplexity"] == pytest.approx(untrained["perplexity"])
    assert pieces["untouched"]["others"]["continents"].count("1") == untrained["continents"].sum()
    assert pieces["untouched"]["wic"]["perplexity"] != pieces["untouched"]["others"]["perplexity"]
    for way in ways.WAYS:
        swept = [piece for key, piece in pieces.items() if key.startswith(f"sweep/{way}/P1376/")]
        assert len(swept) == 2
        assert pieces[f"run/{way}/P1376/0"]["lr"] == max(swept, key=lambda one: one["dev"])["lr"]
    alone = [pieces[f"run/{way}/P17/0"]["lr"] for way in (ways.WEIGHTS, ways.PROMPT)]
    pairs = [piece["lr"] for key, piece in pieces.items() if key.startswith(f"sweep/{ways.BOTH}/P17/")]
    assert pairs[0] == alone, "the search begins where each part is best alone"
    for way, task in ((ways.BOTH, "P1376"), (ways.HEAD, "reviews")):
        one, other = pieces[f"one rate/{way}/{task}"]["lr"]
        assert one == other == pieces[f"run/{way}/{task}/0"]["lr"][0]


def test_the_ledger_stands_for_the_first_task(tmp_path, tiny_gpt2, small, monkeypatch):
    """With the ledger's pieces, only what it lacks is run, with its prompt, and its hits are in the table."""
    template, hits = "The city of [X] is in the country of [Y].", "01" * 4
    run = {"hits": hits, "lr": 1e-3, "step": 1, "kept_bytes": 5, "trained": 7, "template": template}
    pieces = {
        "asked": {"hits": hits, "template": template},
        "most frequent": {"hits": "0" * 8},
        "shown/0": {"hits": "1" * 8, "prompt": "abc"},
    }
    pieces |= {f"run/{method}/0": run for method in ways.IN_LEDGER.values()}
    monkeypatch.setattr(ways, "ledger_of", lambda given, steps: pieces)
    monkeypatch.setattr(ways, "SMALL", ("P1376",))
    monkeypatch.setattr(ways, "UNDERSTANDING", {"reviews": ways.UNDERSTANDING["reviews"]})
    monkeypatch.setattr(ways, "WAYS", (ways.PROMPT, ways.WEIGHTS, ways.BOTH))
    found = recorded(tmp_path, tiny_gpt2, "--limit", "8")
    mine = {key for key in found if "P17" in key}
    assert {key.split("/")[1] for key in mine} == {ways.BOTH, ways.PROMPT, ways.WEIGHTS}
    assert not [key for key in mine if key.startswith(("asked", "run/P-tuning/", "sweep/P-tuning/"))]
    assert f"twice/{ways.PROMPT}/P17" in mine, "its best state was its last one"
    rows = {row["way"]: row for row in found["rows"] if row["task"] == "P17"}
    assert rows["examples in context"]["right"] == [1, 1, 1] and rows["examples in context"]["kept_bytes"] == 3
    assert rows["manual prompt"]["hits"] == [hits] and rows["manual prompt"]["kept_bytes"] == len(template)
    assert rows["most frequent answer"]["kept_bytes"] is None
    assert found[f"run/{ways.BOTH}/P17/0"]["template"].replace("[P]", "").strip() == template


def test_the_ledger_stands_only_for_its_own_model():
    given = NOWHERE | {"model": "smollm2-135m"}
    assert "asked" in ways.ledger_of(given, None)
    for other, steps in ((given | {"model": "a"}, None), (given | {"limit": 5}, None), (given, 3)):
        assert ways.ledger_of(other, steps) == {}
    assert ways.ledger_of(given | {"lama": "folder"}, None) == {}


def write_rows(folder, **splits):
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_real_data_and_a_masked_model(tmp_path, tiny_bert, small, monkeypatch):
    """The command for a hub's BERT, on local files in the formats of LAMA, SuperGLUE and SST-2."""
    tasks = {"UNDERSTANDING": ("reviews", "wic"), "WITH_SUPERGLUE": ("boolq", "cb", "rte")}
    few = {task: [("[X] is [Y].", ("is", "of", "a")[: 3 if task == "cb" else 2])] for t in tasks.values() for task in t}
    monkeypatch.setattr(ways, "WORDINGS", few)
    for name, some in tasks.items():
        monkeypatch.setattr(ways, name, {task: few[task] for task in some})
    facts = [{"sub_label": "london", "obj_label": "britain"}, {"sub_label": "paris", "obj_label": "france"}] * 2
    unknown = {"sub_label": "oslo", "obj_label": "norway"}
    for relation in ("P17", "P1376"):
        write_rows(tmp_path / "lama" / relation, train=facts, dev=facts[:2], test=[*facts[:2], unknown])
    entails = {"premise": "paris is", "hypothesis": "south"}
    for folder, row, labels in [
        ("WiC", {"word": "a", "sentence1": "a", "sentence2": "a is"}, [False, True]),
        ("BoolQ", {"question": "is a", "passage": "paris is a"}, [False, True]),
        ("CB", entails, ["entailment", "contradiction", "neutral"]),
        ("RTE", entails, ["entailment", "not_entailment"]),
    ]:
        places = {"start1": 0, "end1": 1, "start2": 0, "end2": 1} if folder == "WiC" else {}
        labelled = [{**row, **places, "label": labels[i % len(labels)], "idx": i} for i in range(16)]
        write_rows(tmp_path / "superglue" / folder, train=labelled, val=labelled[:6], test=[row | places])
    reviews = [{"sentence": "paris is" if i % 2 else "south", "label": i % 2} for i in range(16)]
    write_rows(tmp_path / "sst2", train=reviews, val=reviews[:8], test=[{"sentence": "a", "label": -1}])
    folders = ["--lama", "lama", "--superglue", "superglue", "--reviews", "sst2"]
    folders[1::2] = [str(tmp_path / folder) for folder in folders[1::2]]
    found = recorded(tmp_path / "out", tiny_bert, *folders)["rows"]
    rows = {(row["task"], row["way"]): row for row in found}
    assert rows["P17", ways.ALONE]["items"] == [2], "the answer that this model does not know is left out"
    assert rows["reviews", ways.HEAD]["items"] == [8]
    for task in ("wic", "boolq", "cb", "rte"):
        assert rows[task, ways.PROMPT]["items"] == [6]
        assert all(0 <= value <= 1 for value in rows[task, ways.HEAD]["macro_f1"])
    assert rows["cb", ways.HEAD]["trained"] - rows["rte", ways.HEAD]["trained"] == 32 + 1
    assert rows["wic", "manual prompt"]["continents"] == [0] and "perplexity" not in rows["wic", "manual prompt"]


def test_what_the_data_lack_is_named(tmp_path, gpt2):
    write_rows(tmp_path / "P17", test=[{"sub_label": "Paris", "obj_label": "France"}])
    with pytest.raises(ValueError, match=r"P17: no train rows; expected the files train\.jsonl"):
        ways.rows_of(gpt2[1], "P17", 0, NOWHERE | {"lama": str(tmp_path)})


def test_examples_are_drawn_by_the_seed(gpt2):
    first, again, other = (ways.rows_of(gpt2[1], "wic", seed, NOWHERE) for seed in (0, 0, 1))
    assert first == again and first["train"] != other["train"] and first["test"] == other["test"]
    for split in ("train", "dev"):
        assert [label for _, label in first[split]].count(1) == len(first[split]) / 2 == 16
    assert not set(first["train"]) & set(first["dev"] + first["test"]) and len(first["test"]) == 400
    folds = [ways.rows_of(gpt2[1], "P37", seed, NOWHERE)["test"] for seed in range(3)]
    assert not set(folds[0]) & set(folds[1]) and sum(map(len, folds)) > 130
    assert ways.rows_of(gpt2[1], "P17", 0, NOWHERE) == ways.rows_of(gpt2[1], "P17", 1, NOWHERE)


@pytest.fixture
def capitals(gpt2):
    model, tokenizer = gpt2
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    pairs = [("Britain", "London"), ("France", "Paris"), ("Japan", "Tokyo"), ("Spain", "Madrid")]
    return model, tokenizer, [(place, answer_id(tokenizer, capital)) for place, capital in pairs]


@pytest.mark.parametrize("rates", [[1e-3, 1e-1], [3e-2, 1e-4]])
def test_two_groups_step_as_two_optimizers_of_torch(capitals, rates):
    model, tokenizer, rows = capitals
    ready = ways.prepare(ways.BOTH, model, tokenizer, CAPITAL, seed=5)
    other, encoder = copy.deepcopy(ready.trained)
    steps, loss_of = 3, ways.loss_of
    fit(ready, rows, None, rates, steps, seed=1, batch_size=2, loss=loss_of)
    weights = [*other.parameters(), *encoder.parameters()]
    parts = [torch.optim.AdamW(part.parameters(), weight_decay=0.0) for part in (other, encoder)]
    for step in range(steps):
        chosen = [rows[index] for index in batch_rows(step, len(rows), 2, 1)]
        answer_loss(other, tokenizer, ready.template, chosen, encoder()).backward()
        clip_grad_norm_(weights, 1.0)
        for part, rate in zip(parts, rates, strict=True):
            part.param_groups[0]["lr"] = rate * rate_factor(step, steps)
            part.step()
            part.zero_grad()
    for (name, mine), theirs in zip(ready.trained.named_parameters(), weights, strict=True):
        if not name.endswith("c_attn.bias"):  # a key's bias has no gradient, and Adam makes steps of its rounding
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5), name
    assert not torch.equal(encoder.embedding.weight, model.get_input_embeddings().weight[:6])


@pytest.mark.parametrize("moves", [0, 1])
@pytest.mark.parametrize("lm", ["gpt2", "bert"], indirect=True)
def test_body_and_head_have_rates_of_their_own(lm, moves):
    model, tokenizer = copy.deepcopy(lm[0]), lm[1]
    rows = [("london is", 0), ("paris", 1), ("the capital of korea", 2), ("a", 1)]
    ready = ways.prepare(ways.HEAD, model, tokenizer, "[X] [Y].", words=[5, 6, 7])
    before = copy.deepcopy(ready.trained)
    rates = [0.0, 0.0]
    rates[moves] = 1e-2
    done = fit(ready, rows, None, rates, 3, batch_size=4, loss=ways.loss_of)
    assert len(done.losses) == 3
    for part in (0, 1):
        pairs = zip(before[part].parameters(), ready.trained[part].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) == (part != moves)
    assert ready.logits(rows).shape == (4, 3)
    loss = torch.nn.functional.cross_entropy(ready.logits(rows), ways.answers_of(rows))
    model.eval()
    assert ways.loss_of(ready, rows).item() == pytest.approx(loss.item(), abs=1e-5)
    assert ready.kept() == sum(weight.numel() for part in ready.trained for weight in part.parameters())


def test_the_bare_subject_stands_behind_a_first_token(gpt2, bert, tiny_llama):
    assert ways.after_a_first_token(gpt2[1]) == "<|endoftext|> [X] [Y]."
    assert ways.after_a_first_token(bert[1]) == "[X] [Y]."  # BERT's own [CLS] stands first
    ready = ways.prepare(ways.HEAD, copy.deepcopy(gpt2[0]), gpt2[1], CAPITAL)
    assert ways.prepare("manual prompt", *gpt2, CAPITAL).template == CAPITAL
    end = gpt2[1].convert_tokens_to_ids("<|endoftext|>")
    from tuning.prompts import encode

    assert encode(gpt2[1], ready.template, "Osaka") == [end, *gpt2[1](" Osaka").input_ids]


def test_examples_that_do_not_fit_are_not_tried(tiny_gpt2):
    """This model's context holds 256 tokens: 16 examples of a relation, and few of the pairs of sentences."""
    given = NOWHERE | {"model": str(tiny_gpt2), "limit": 8}
    found = ways.shown(given, "wic", 0, "[X] Answer: [Y].", ("no", "yes"))
    counts = [count for _, count in found["tried"]]
    assert counts == list(ways.SHOWN[: len(counts)]) and 1 < len(counts) < len(ways.SHOWN)
    assert found["prompt"].count("Answer: ") == found["count"] + 1 and found["prompt"].endswith("[X] Answer: [Y].")
    rows = ways.rows_of(load_lm(tiny_gpt2)[1], "wic", 0, given)
    solved = {f"{text} Answer: {('no', 'yes')[label]}." for text, label in rows["train"]}
    assert set(found["prompt"].split("\n\n")[:-1]) <= solved
    best = max(found["tried"])
    assert found["count"] == best[1] and found["dev"] == best[0]
    capital = ways.shown(given, "P1376", 0, "The city of [X] is the capital of [Y].", None)
    assert capital["prompt"].count("\n") == capital["count"] and "macro_f1" not in capital


@pytest.mark.parametrize(
    ("peak", "start", "tried"),
    [
        ((3e-5, 1e-2), (3e-5, 1e-2), 5),  # at once
        ((1e-4, 1e-2), (3e-5, 1e-2), 8),  # one step up
        ((3e-5, 1e-1), (3.1e-5, 9e-3), 8),  # begins on the ladder
    ],
)
def test_a_search_for_two_rates_ends_where_no_neighbour_is_better(peak, start, tried):
    asked = []

    def run(pair):
        asked.append(tuple(pair))
        steps = [ways.on_ladder(rate) - ways.on_ladder(at) for rate, at in zip(pair, peak, strict=True)]
        return {"dev": -abs(steps[0]) - abs(steps[1]) / 2}

    assert ways.climb(start, run, most=20) == pytest.approx(list(peak))
    assert len(asked) == len(set(asked)) == tried


def test_a_search_stays_among_equals_and_ends_in_time():
    asked = []
    assert ways.climb((1e-4, 1e-2), lambda pair: asked.append(pair) or {"dev": 0.5}) == [1e-4, 1e-2]
    assert len(asked) == 5
    asked.clear()
    found = ways.climb((1e-4, 1e-2), lambda pair: asked.append(pair) or {"dev": pair[0]}, most=8)
    assert found == [max(pair[0] for pair in asked), 1e-2] and 8 <= len(asked) <= 11
    assert ways.climb((30.0, 10.0), lambda pair: {"dev": sum(pair)}) == [30.0, 10.0]  # the ladder's end


def test_the_lower_loss_decides_between_equal_shares_and_nothing_else():
    rows = [("a", 0), ("b", 1), ("c", 1)]
    sure = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    unsure = torch.tensor([[0.1, 0.0], [0.0, 0.1], [0.1, 0.0]])
    wrong = torch.tensor([[0.0, 0.1], [0.0, 0.1], [0.1, 0.0]])
    scores = [ways.score_of(logits, rows) for logits in (unsure, sure, wrong)]
    assert scores[0] > scores[1] > scores[2], "of two of three right, the third is less wrong in the first"
    assert [round(3 * score) for score in scores] == [2, 2, 1]
    many = [("a", 0)] * ways.DEV
    assert ways.score_of(torch.tensor([[1.0, 0.0]] * len(many)), many) == 1.0


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_macro_f1_as_sklearn_has_it(classes):
    generator = torch.Generator().manual_seed(classes)
    wanted = torch.randint(classes, (40,), generator=generator)
    given = torch.where(torch.rand(40, generator=generator) < 0.6, wanted, torch.randint(classes, (40,)))
    theirs = f1_score(wanted, given, average="macro", labels=wanted.unique())
    assert ways.macro_f1(given, wanted) == pytest.approx(theirs)
    assert ways.macro_f1(wanted, wanted) == 1
    constant = torch.zeros(40, dtype=torch.long)
    theirs = f1_score(wanted, constant, average="macro", labels=wanted.unique(), zero_division=0)
    assert ways.macro_f1(constant, wanted) == pytest.approx(theirs)


def test_a_checksum_sees_one_bit(gpt2):
    model = copy.deepcopy(gpt2[0])
    before = ways.checksum(model)
    assert ways.checksum(gpt2[0]) == before
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 2] ^= 1
    assert ways.checksum(model) != before


def test_intervals_pair_items_and_folds_do_not_share_them():
    hits, base = ["1110", "1100"], ["1000", "0100"]
    assert ways.interval(hits, "reviews")[0] == 5 / 8
    mean, low, high = ways.interval(hits, "reviews", base)
    assert mean == 3 / 8 and low <= mean <= high
    assert ways.interval(["111", "0000"], "P37")[0] == 3 / 7  # folds of different sizes
    once, thrice = (ways.interval(hits, "P17", ["1000"]) for hits in (["1110"], ["1110"] * 3))
    assert once[0] == thrice[0] == 1 / 2 and once[1] >= 0  # one run of what draws nothing stands beside each
    with pytest.raises(ValueError, match="cannot share them"):
        ways.interval(["111", "0000"], "reviews")


RECORDED = load_results("ways")


@pytest.mark.skipif(RECORDED is None, reason="the four ways are not yet recorded")
def test_what_is_recorded_holds_together():
    pieces = RECORDED["results"]
    rows = {(row["task"], row["way"]): row for row in pieces["rows"]}
    items = {"P17": {1064}, "reviews": {400}, "wic": {400}}
    for (task, way), row in rows.items():
        assert {*row["items"]} == items.get(task, {*row["items"]}) and torch.tensor(row["right"]).isfinite().all()
        frozen = way in ("manual prompt", "examples in context", ways.PROMPT, ways.ALONE)
        if way != "most frequent answer":
            assert ({*row["perplexity"]} == {1} and len({*row["continents"]}) == 1) == frozen
    for key, piece in pieces.items():
        if key.startswith("run/"):
            assert piece["stopped"] is None
            assert piece["as before"] == any(key.startswith(f"run/{way}/") for way in (ways.PROMPT, ways.ALONE))
