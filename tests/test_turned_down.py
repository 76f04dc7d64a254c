"""The run that turns an adapter down: no scale is the untrained model, the whole scale the trained one."""

from tuning.experiments import turned_down as run
from tuning.methods import fit, prepare
from tuning.models import load_lm

ASK = "The city of [X] is in the country of [Y]."


def test_at_no_scale_the_model_is_untrained_and_at_the_whole_it_is_trained():
    found = run.turned_down("smollm2-135m", ASK, 3e-3, 0, 2, (0, 0.5, 1), limit=20)
    model, tokenizer = load_lm()
    rows = run.rows_of(tokenizer, run.TASK, 20)
    ready = prepare("LoRA", model, tokenizer, ASK, 0)
    untrained = run.hits_and_away(ready, rows, 20)
    assert fit(ready, rows["train"], rows["dev"], 3e-3, 2, 0).step == found["step"]
    assert found["0"] == untrained and found["1"] == run.hits_and_away(ready, rows, 20)
    perplexities = [found[factor]["perplexity"] for factor in ("0", "0.5", "1")]
    assert len(set(perplexities)) == 3 or found["step"] == 0
