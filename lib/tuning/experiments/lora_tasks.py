"""Chapter 7's second recorded run: LoRA on the tasks of the four-way experiment.

    python -m tuning.experiments.lora_tasks

Rank 8 beside all linear layers, α 16, with the manual prompt: the same tasks, steps, seeds, choices and measures as
`four_way` has, so its rows stand beside these. The rate is swept on P17 and on the reviews.
"""

from ..data import load_reviews, load_wic
from ..models import load_lm
from .four_way import LORA, PROBES, RATES, SEEDS, SWEPT_ON, UNDERSTANDING, probing_task, run, understanding_task
from .record import Recorder, option_parser


def main(arguments=None):
    options = option_parser(__doc__).parse_args(arguments)
    model, tokenizer = load_lm(options.model, options.device)
    plain = [row["sentence1"] for row in load_wic()["test"]][:100]
    film = [row["sentence"] for row in load_reviews()["test"]][-100:]

    def task(name, seed):
        if name in PROBES:
            return probing_task(tokenizer, name, seed, plain, limit=options.limit)
        return understanding_task(tokenizer, name, seed, plain if name == "reviews" else film, limit=options.limit)

    total = len(SWEPT_ON) * len(RATES[LORA]) + (len(PROBES) + len(UNDERSTANDING)) * len(SEEDS)
    settings = {"model": options.model, "steps": options.steps, "limit": options.limit}
    recorder = Recorder("lora_tasks", options.out, model.device, total, save=options.save, **settings)
    best = {}
    for swept in SWEPT_ON:
        keys = {lr: f"sweep/{swept}/{LORA}/{lr:g}" for lr in RATES[LORA]}
        for lr, key in keys.items():
            recorder.piece(
                key, lambda n=swept, lr=lr: run(LORA, model, tokenizer, task(n, 0), lr, options.steps, test=False)
            )
        best[swept] = max(keys, key=lambda lr, keys=keys: recorder.pieces[keys[lr]]["dev"])
    for name in [*PROBES, *UNDERSTANDING]:
        lr = best[SWEPT_ON[0] if name in PROBES else SWEPT_ON[1]]
        for seed in SEEDS:
            recorder.piece(
                f"run/{name}/{LORA}/{seed}",
                lambda n=name, s=seed, lr=lr: run(LORA, model, tokenizer, task(n, s), lr, options.steps),
            )
    recorder.finish()


if __name__ == "__main__":
    main()
