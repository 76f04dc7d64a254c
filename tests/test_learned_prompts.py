"""Chapter 3's recorded run, on a few rows."""

import pytest
import torch
from tuning.experiments import learned_prompts, record


def test_runs_small_and_agrees_with_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(learned_prompts, "SEEDS", (0, 1))
    monkeypatch.setattr(learned_prompts, "RATES", (0.3,))
    monkeypatch.setattr(learned_prompts, "PLACES", 3)
    learned_prompts.main(["--limit", "16", "--steps", "2", "--lengths", "1", "--out", str(tmp_path)])
    found = record.load_results("learned_prompts", tmp_path)["results"]
    run = found["from the prompt/0"]
    vectors = torch.tensor(run["vectors"])
    assert vectors.shape == (8, 576) and found["random words/1"]["template"].count("[P]") == 6
    assert torch.allclose(vectors.norm(dim=1), torch.tensor(run["norms"]), rtol=1e-4)
    assert "".join(run["start words"]) == "The city of is in the country of"
    assert len(run["learned"]["hits"]) == len(run["snapped"]["hits"]) == 16
    assert run["untrained"]["dev"] == run["scores"][0][1]  # the start is the handcrafted prompt
    first = found["line/start/from the prompt/0"]
    distance = torch.tensor(run["moved"]).norm().item()
    assert first["distance"] == pytest.approx(distance, rel=1e-3, abs=1e-3) and len(first["losses"]) == 3
    assert found["length/1"]["template"] == " [X][P] [Y]." and len(found["length/1"]["hits"]) == 16
