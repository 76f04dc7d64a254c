"""The values of chapter 2's chart: the likeliest next words after eight wordings that ask for the country of one city.

    python -m tuning.experiments.wordings

The wordings are the first eight templates of P17. The city is the first of its dev set (fold 0) whose country at least
one of them makes the likeliest word: of a city that the model does not know no wording could bring out anything.
"""

from ..data import TEMPLATES, load_facts
from ..models import load_lm
from ..prompts import answer_id, answer_logits, encode
from .record import Recorder, option_parser

WORDINGS = TEMPLATES["P17"][:8]
WORDS = 5  # the likeliest that are kept, for each wording


def first_known_city(model, tokenizer, limit=None):
    """The first dev city whose country one of the wordings brings out, and what the model says after each of them.

    Raises:
        ValueError: there is none among the first `limit` cities.
    """
    for passed_over, fact in enumerate(load_facts("P17")["dev"].to_list()[:limit]):
        city, country = fact["sub_label"], fact["obj_label"]
        prompts = [encode(tokenizer, wording, city) for wording in WORDINGS]
        probabilities = answer_logits(model, tokenizer, prompts).softmax(-1)  # (wordings, vocab)
        right = answer_id(tokenizer, country)
        if right in probabilities.argmax(-1):
            said = [likeliest_words(tokenizer, row, right) for row in probabilities]
            prompts = [wording.partition(" [Y]")[0].replace("[X]", city) for wording in WORDINGS]
            wordings = [{"prompt": prompt, "words": words} for prompt, words in zip(prompts, said, strict=True)]
            return {"city": city, "country": country, "passed_over": passed_over, "wordings": wordings}
    raise ValueError("no wording brings out the country of any of these cities; try more of them, or another model")


def likeliest_words(tokenizer, probabilities, right):
    """The tokens with the largest of these probabilities, (vocab,), the likeliest first; is it the token `right`?"""
    likeliest = probabilities.topk(WORDS)
    return [
        {"token": tokenizer.decode(token), "probability": probability, "right": token == right}
        for probability, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
    ]


def main(arguments=None):
    options = option_parser(__doc__).parse_args(arguments)
    model, tokenizer = load_lm(options.model, options.device)
    settings = {"model": options.model, "limit": options.limit}
    recorder = Recorder("wordings", options.out, model.device, 1, save=options.save, **settings)
    recorder.piece("P17", first_known_city, model, tokenizer, options.limit)
    recorder.finish()


if __name__ == "__main__":
    main()
