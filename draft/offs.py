import sys
from tuning.memory import *
from tuning.memory import Setting, MODELS, Shape, plan, moments, LLAMA
from tuning.simulate import simulate
from dataclasses import replace

for adapters in ("float32", "copies"):
    for ck in (True, False):
        for shape in (replace(MODELS["7B"], layers=4),):
            for b, l in ((8, 512), (1, 2048)):
                s = Setting("LoRA", shape, b, l, ck, adapters=adapters)
                live = simulate(s)
                p = plan(s)
                tot = sum(live.peak.values())
                print(
                    adapters,
                    ck,
                    b,
                    l,
                    round(tot / 2**30, 3),
                    round((sum(p.values()) - tot) / tot * 100, 2),
                    {k: round(v / 2**30, 2) for k, v in live.peak.items()},
                    max(moments(s), key=lambda m: sum(moments(s)[m])),
                    {k: round(v / 2**30, 2) for k, v in p.items()},
                )
