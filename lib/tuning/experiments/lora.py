"""Chapter 7's recorded run: LoRA on the movie reviews, which matrices, which rank, which rate, how much data.

    python -m tuning.experiments.lora

MiniLM with a new head, in the shape of the paper's tables 5 and 6 (which matrices at one budget of parameters; which
rank), figure 3 (do two ranks learn the same directions?) and table 7 (which directions of the weight are amplified?).
Rates are swept for full fine-tuning, ranks 1, 8 and 64 beside all linear layers, and attention alone at the
parameters of rank 8, on one seed; every table then has three. The head is trained at the same rate. α is 16 throughout.
Each run chooses its step on 200 dev sentences and is scored on all test sentences.
"""

import torch

from ..data import labelled_reviews
from ..lora import adapted_layers, add_lora
from .learning_curve import new_classifier, train_classifier
from .record import Recorder, option_parser

Q, K, V, O = (f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense"))  # noqa: E741
ATTENTION = [Q, K, V, O]
MLP = ["intermediate.dense", *(f"encoder.layer.{layer}.output.dense" for layer in range(6))]
ALL = [*ATTENTION, *MLP]
ALPHA = 16
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SWEPT = {
    "full": (None, 0),
    "r = 1": (ALL, 1),
    "r = 8": (ALL, 8),
    "r = 64": (ALL, 64),
    "attention, r = 18": (ATTENTION, 18),
}
BUDGET = {  # which matrices at 27,648 trained numbers a layer, the MLP's at 26,880
    "q": ([Q], 36),
    "k": ([K], 36),
    "v": ([V], 36),
    "o": ([O], 36),
    "q, v": ([Q, V], 18),
    "q, k, v, o": (ATTENTION, 9),
    "MLP": (MLP, 7),
    "all": (ALL, 4),
}
BY_RANK = {"q": [Q], "q, v": [Q, V], "q, k, v, o": ATTENTION, "all": ALL}
RANKS = (1, 2, 8, 64)
SIZES = (64, 256, 1024)  # training sentences
SEEDS = (0, 1, 2)
COUNT, STEPS, DEV = 1024, 64, 200


def train_adapters(data, targets, rank, lr, seed, count, steps, device):
    """Train adapters beside the targets and the head, or with targets None everything; the classifier, and a row."""
    classifier = new_classifier(seed, device)
    if targets is not None:
        add_lora(classifier.body, targets, rank, ALPHA)
    trained = sum(weight.numel() for weight in classifier.body.parameters() if weight.requires_grad)
    found = train_classifier(classifier, data, count, seed, lr, steps, min(DEV, len(data["dev"]) // 4), scores=4)
    return classifier, {"targets": targets, "rank": rank, "trained": trained, **found}


def directions(classifier):
    """Of the adapters beside q and v of the third layer: A, and what they amplify (section 7.3)."""
    found = {}
    for path, layer in adapted_layers(classifier.body).items():
        if ".2." in path:
            adapter = layer.adapters["default"]
            found[path] = {"A": adapter.A.detach().cpu(), "amplified": amplification(layer.weight, adapter.delta())}
    return found


@torch.no_grad()
def amplification(weight, delta, r=4):
    """Table 7: how long ΔW is, and how long W is within the first r directions of ΔW, of W, and of a random matrix."""
    torch.manual_seed(0)
    norms = {"delta": delta.norm().item(), "weight": weight.norm().item()}
    for name, source in {"delta": delta, "weight": weight, "random": torch.randn_like(weight)}.items():
        U, _, Vt = torch.linalg.svd(source.float(), full_matrices=False)
        norms[f"weight within {name}"] = (U[:, :r].T @ weight.float() @ Vt[:r].T).norm().item()
    return norms | {"factor": norms["delta"] / norms["weight within delta"]}


@torch.no_grad()
def similarity(one, other):
    """Equation 4: φ(i, j) between the first i right-singular directions of one A and the first j of another, (i, j)."""
    first, second = (torch.linalg.svd(A.float(), full_matrices=False)[2] for A in (one, other))
    overlap = (first @ second.T).square().cumsum(dim=0).cumsum(dim=1)  # ||U_i^T U_j||^2
    i = torch.arange(1, len(first) + 1).unsqueeze(1)
    return overlap / torch.minimum(i, torch.arange(1, len(second) + 1))


def compare_directions(data, lr, steps, device):
    """Figure 3 for two ranks, two seeds and a random matrix, and table 7, of layer 3's q and v."""
    wanted = {"8": (8, 0), "64": (64, 0), "64'": (64, 1)}  # rank and seed
    runs = {
        name: directions(train_adapters(data, [Q, V], rank, lr, seed, COUNT, steps, device)[0])
        for name, (rank, seed) in wanted.items()
    }
    found = {}
    for path in runs["8"]:
        A = {name: run[path]["A"] for name, run in runs.items()}
        random = torch.randn(A["64"].shape, generator=torch.Generator().manual_seed(0))
        found[path] = {
            "8 and 64": similarity(A["8"], A["64"]).round(decimals=4).tolist(),
            "64 and 64, two seeds": similarity(A["64"], A["64'"])[:8].round(decimals=4).tolist(),
            "8 and random": similarity(A["8"], random).round(decimals=4).tolist(),
            "amplified, r = 8": runs["8"][path]["amplified"],
        }
    return found


def main(arguments=None):
    options = option_parser(__doc__, STEPS, model=None).parse_args(arguments)
    data = labelled_reviews(options.limit)
    rates = sum(len(FULL_RATES if name == "full" else RATES) for name in SWEPT)
    tables = len(BUDGET) + len(BY_RANK) * len(RANKS) + 2 * len(SIZES)
    device = torch.device(options.device or "cpu")
    recorder = Recorder(
        "lora",
        options.out,
        device,
        rates + tables * len(SEEDS) + 1,
        save=options.save,
        limit=options.limit,
        steps=options.steps,
    )

    def run(targets, rank, lr, seed, count=COUNT):
        return train_adapters(data, targets, rank, lr, seed, count, options.steps, device)[1]

    best = {}
    for name, (targets, rank) in SWEPT.items():
        keys = {lr: f"sweep/{name}/{lr:g}" for lr in (FULL_RATES if name == "full" else RATES)}
        for lr, key in keys.items():
            recorder.piece(key, lambda t=targets, r=rank, lr=lr: run(t, r, lr, 0))
        best[name] = max(keys, key=lambda lr, keys=keys: recorder.pieces[keys[lr]]["dev"])

    def rate(targets):
        """Of attention alone where nothing else is adapted; the rate was swept for the middle rank."""
        return best["attention, r = 18"] if set(targets) <= set(ATTENTION) else best["r = 8"]

    for seed in SEEDS:
        for name, (targets, rank) in BUDGET.items():
            recorder.piece(f"budget/{name}/{seed}", lambda t=targets, r=rank, s=seed: run(t, r, rate(t), s))
        for name, targets in BY_RANK.items():
            for rank in RANKS:
                recorder.piece(f"rank/{name}/{rank}/{seed}", lambda t=targets, r=rank, s=seed: run(t, r, rate(t), s))
        for size in SIZES:
            for name in ("full", "r = 1"):
                swept = (*SWEPT[name], best[name])
                recorder.piece(f"data/{name}/{size}/{seed}", lambda w=swept, s=seed, n=size: run(*w, s, n))
    recorder.piece("directions", lambda: compare_directions(data, rate([Q, V]), options.steps, device))
    recorder.finish()


if __name__ == "__main__":
    main()
