import sys,json; sys.path.insert(0,'lib')
import torch
from tuning.data import TEMPLATES
from tuning.experiments import ledger
found=json.load(open(sys.argv[1]))['results']
assert len(found) == 1 + 6 * (2 + 1) + 2 * (3 + 1) + 4 * (1 + 2), len(found)
trained = {key: piece for key, piece in found.items() if key != "words" and "by hand" not in key}
for key, run in trained.items():
    longer = 4 if "long" in key else 1
    assert len(run["losses"]) == run["steps"] == 5 * longer
    assert len(run["looks"]) == len(run["scores"]) == 6
    assert len(run["hits"]) == 20 and set(run["hits"]) <= set("01") and run["stopped"] is None
    assert run["kept"] == (6 * 2 * 2 * 32 if key.startswith("deep") else 6 * 32)
    assert set(run["looks"][0]) == ({"keys", "values"} if key.startswith("deep") else {"length", "apart"})
for number, wording in enumerate(TEMPLATES["P17"][:4]):
    run, alone = found[f"wording/{number}/1"], found[f"wording/{number}/by hand"]
    assert run["template"].replace("[P]", "").strip() == wording and run["template"].count("[P]") == 6
    for piece in (run, alone):
        shares = [ledger.share(piece[name]) for name in ("hits", "among words", "among countries")]
        assert shares == sorted(shares)
        print(shares, piece['said'])
print(found['words'], sum(len(json.dumps(v)) for v in found.values()))
for k,v in trained.items(): print(k, v['looks'][0], v['looks'][-1], v['trained'])
