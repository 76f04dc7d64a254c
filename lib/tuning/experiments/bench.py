"""`make bench`: the budgets of the book, measured on this machine.

    python -m tuning.experiments.bench            # minutes
    python -m tuning.experiments.bench --bare     # also sets up and renders a bare clone
    python -m tuning.experiments.bench --only pages     # Lighthouse alone; the other rows stay as they were recorded
    python -m tuning.experiments.bench --device cuda    # on a GPU, without chapters and pages: bench_cuda.json

Times are wall-clock seconds on an otherwise idle machine. Each speed ratio is measured side by side: both ways
alternate in one run, and the median of the ratios is reported.
"""

import argparse
import functools
import gzip
import http.server
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from ..adapter_files import load_adapter, save_adapter
from ..data import TEMPLATES, load_facts
from ..files import write_json
from ..four_bit_files import load_lm_4bit
from ..lomo import Lomo
from ..lora import add_lora, merge, unmerge, use_adapter
from ..models import default_device, load_lm, model_source
from ..nf4 import dequantize, quantize, quantize_scales
from ..p_tuning import PromptEncoder, answer_loss, encode_pseudo, soften
from ..prompts import answer_id, answer_logits, encode, few_shot
from ..training import optimizer_for, take_step
from .record import RESULTS, Recorder, load_results, machine

ROOT = Path(__file__).parents[3]
BUDGETS = {  # from the design: the largest value allowed, or the smallest where `at_least`
    "second model load, s": (4, False),
    "zero-shot prompts, batches against one by one, times": (2.5, True),
    "few-shot prompts, batches against one by one, times": (2.5, True),
    "P-tuning step against forward and backward, times": (1.05, False),
    "LoRA step against peft, times": (1.1, False),
    "LoRA step against peft, peak memory, times": (1.1, False),
    "merged model against the bare one, times": (1.02, False),
    "loading an adapter against peft, times": (1.0, False),
    "switching adapters against peft, times": (1.0, False),
    "quantize to NF4 against bitsandbytes, times": (1.1, False),
    "dequantize against bitsandbytes, times": (2.5, False),
    "dequantize compiled against bitsandbytes, times": (1.3, False),
    "dequantize compiled, double, against bitsandbytes, times": (1.3, False),
    "QLoRA step against bitsandbytes, times": (1.1, False),
    "LOMO step against lomo-optim, times": (1.1, False),
    "LOMO step against lomo-optim, peak memory, times": (1.1, False),
    "make book when set up, s": (60, False),
    "make book from a bare clone, s": (360, False),
    "chapter, s": (150, False),
    "chapter, peak memory, GB": (6, False),
    "largest page, MB": (1.5, False),
    "index, performance": (90, True),
    "index, accessibility": (95, True),
    "index, best practices": (95, True),
    "index, SEO": (95, True),
    "chapter 6, performance": (90, True),
    "chapter 6, accessibility": (95, True),
    "chapter 6, best practices": (95, True),
    "chapter 6, SEO": (95, True),
}
LIGHTHOUSE = "lighthouse@12.8.2"  # the last one that runs on Node 18 and 20
PAGES = {"index": "book/index.html", "chapter 6": "book/2-lora/6-lora.html"}
SCORES = {  # of Lighthouse, of 100
    "performance": "performance",
    "accessibility": "accessibility",
    "best practices": "best-practices",
    "SEO": "seo",
}


def median_seconds(function, rounds=5):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def median_ratio(one, other, device, rounds=5):
    """The median over alternated rounds of the seconds that `one` takes to those of `other`; a first round warms up."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for function in (one, other):
            start = time.perf_counter()
            function()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def measure_load(device):
    load_lm(device=device)  # the conversion, if it has not been done
    return {"second model load, s": median_seconds(lambda: load_lm(device=device))}


def measure_scoring(model, tokenizer, rounds=5, n=48):
    """Prompts a second in batches, and how many times the rate of one forward pass a prompt; equal predictions."""
    facts = load_facts("P17")["dev"].select(range(n))
    template = TEMPLATES["P17"][7]
    shots = [(row["sub_label"], row["obj_label"]) for row in load_facts("P17")["train"].select(range(4))]
    measured = {}
    for name, shown in {"zero-shot": template, "few-shot": few_shot(template, shots)}.items():
        prompts = [encode(tokenizer, shown, subject) for subject in facts["sub_label"]]
        ratios, rates = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            with torch.no_grad():
                singles = [model(torch.tensor([ids], device=model.device)).logits[0, -1].argmax() for ids in prompts]
            middle = time.perf_counter()
            together = answer_logits(model, tokenizer, prompts).argmax(dim=1)
            end = time.perf_counter()
            ratios.append((middle - start) / (end - middle))
            rates.append(n / (end - middle))
            if not torch.equal(torch.stack(singles).cpu(), together):
                raise AssertionError(f"{name}: batches predict otherwise than single prompts")
        measured[f"{name} prompts, batches against one by one, times"] = statistics.median(ratios)
        measured[f"{name} prompts a second"] = statistics.median(rates)
        measured[f"{name} prompt length, tokens"] = sum(map(len, prompts)) / n
    return measured


def measure_p_tuning_step(model, tokenizer, rounds=5):
    """A whole step of P-tuning (encoder, loss, backward, AdamW) against the model's forward and backward to its inputs.

    Both on the same 16 prompts, alternating; the median of the ratios.
    """
    model.requires_grad_(False)
    template, start = soften(model, tokenizer, TEMPLATES["P17"][7])
    facts = [(row["sub_label"], answer_id(tokenizer, row["obj_label"])) for row in load_facts("P17")["train"]][:16]
    encoder = PromptEncoder(len(start), start.shape[1], start).to(model.device)
    weights = list(encoder.parameters())
    optimizer, schedule = optimizer_for(weights, 1e-4, 1000)
    prompts = [encode_pseudo(tokenizer, template, subject) for subject, _ in facts]
    shape = (len(prompts), max(map(len, prompts)), start.shape[1])
    inputs = torch.randn(shape, device=model.device, dtype=model.dtype).requires_grad_()
    answers = torch.tensor([answer for _, answer in facts], device=model.device)

    def bare():
        logits = model(inputs_embeds=inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        torch.nn.functional.cross_entropy(logits.float(), answers).backward(inputs=[inputs])

    def step():
        take_step(weights, optimizer, schedule, answer_loss(model, tokenizer, template, facts, encoder()))

    ratio = median_ratio(step, bare, model.device, rounds)
    return {"P-tuning step against forward and backward, times": ratio}


def lora_model(whose, device):
    """The default model with adapters of rank 8 beside all linear layers, ours or peft's, and what they train."""
    model, _ = load_lm(device=device, dtype=torch.float32)
    if whose == "ours":
        add_lora(model, "all-linear", rank=8, alpha=16)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def lora_step(model, weights):
    """A function that takes a training step on 8 rows of 32 random tokens."""
    ids = torch.randint(1000, 49_000, (8, 32), generator=torch.Generator().manual_seed(0)).to(model.device)
    optimizer, schedule = optimizer_for(weights, 1e-5, 1000)
    return lambda: take_step(weights, optimizer, schedule, model(input_ids=ids, labels=ids, use_cache=False).loss)


def peak_of(step, device, steps=3):
    """Peak memory, GB, of a process that takes a few steps, or of its GPU; `step` is an expression of this module."""
    code = f"from tuning.experiments.bench import *\ns = {step}\nfor _ in range({steps}): s()\n"
    if torch.device(device).type != "cuda":
        return run_timed([sys.executable, "-c", code])[1]
    code += "print(torch.cuda.max_memory_allocated() / 1e9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def lora_peak(whose, device):
    return peak_of(f"lora_step(*lora_model({whose!r}, {str(device)!r}))", device)


def measure_lora(device, rounds=7):
    """Our adapters against peft's, side by side: a step, its memory, merged inference, loading and switching."""
    ours, our_weights = lora_model("ours", device)
    theirs, their_weights = lora_model("peft", device)
    names = {"ours": itertools.count(), "peft": itertools.count()}
    ids = torch.arange(1000, 1256, device=device).view(8, 32)
    forward = torch.no_grad()(lambda model: model(input_ids=ids, use_cache=False))
    measured = {
        "LoRA step against peft, times": median_ratio(
            lora_step(ours, our_weights), lora_step(theirs, their_weights), device, rounds
        ),
        "LoRA step against peft, peak memory, times": lora_peak("ours", device) / lora_peak("peft", device),
    }
    merge(ours.eval())
    bare, _ = load_lm(device=device, dtype=torch.float32)
    measured["merged model against the bare one, times"] = median_ratio(
        lambda: forward(ours), lambda: forward(bare), device, 3 * rounds
    )
    unmerge(ours)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder, ours)
        measured["loading an adapter against peft, times"] = median_ratio(
            lambda: load_adapter(folder, ours, f"a{next(names['ours'])}"),
            lambda: theirs.load_adapter(folder, f"a{next(names['peft'])}"),
            device,
            rounds,
        )
    measured["switching adapters against peft, times"] = median_ratio(
        lambda: (use_adapter(ours, "a0"), use_adapter(ours, "default")),
        lambda: (theirs.set_adapter("a0"), theirs.set_adapter("default")),
        device,
        rounds,
    )
    return measured


def four_bit_model(whose, device):
    """The default model in NF4 with double quantization, ours or transformers' with bitsandbytes, with our adapters."""
    if whose == "ours":
        model, _ = load_lm_4bit(device=device, dtype=torch.float32)
    else:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_source("smollm2-135m"), quantization_config=config, dtype=torch.float32, device_map=str(device)
        )
    add_lora(model.train(), "all-linear", rank=8, alpha=16)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def measure_four_bits(device, rounds=7):
    """NF4 against bitsandbytes, side by side: quantize, dequantize (eager and compiled), a training step."""
    import bitsandbytes.functional as reference

    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(device)
    packed, (codes, state) = quantize(weight), reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    twice = quantize_scales(packed)
    _, their_twice = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    compiled = torch.compile(dequantize)
    theirs = lambda: reference.dequantize_4bit(codes, state)  # noqa: E731
    return {
        "quantize to NF4 against bitsandbytes, times": median_ratio(
            lambda: quantize(weight),
            lambda: reference.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
            device,
            rounds,
        ),
        "dequantize against bitsandbytes, times": median_ratio(lambda: dequantize(packed), theirs, device, rounds),
        "dequantize compiled against bitsandbytes, times": median_ratio(
            lambda: compiled(packed), theirs, device, rounds
        ),
        "dequantize compiled, double, against bitsandbytes, times": median_ratio(
            lambda: compiled(twice), lambda: reference.dequantize_4bit(codes, their_twice), device, rounds
        ),
        "QLoRA step against bitsandbytes, times": median_ratio(
            lora_step(*four_bit_model("ours", device)),
            lora_step(*four_bit_model("theirs", device)),
            device,
            2 * rounds,
        ),
    }


def full_step(whose, device):
    """A function that trains all weights of the default model, a copy of its own, on 4 rows of 64 random tokens."""
    model, _ = load_lm(device=device, dtype=torch.float32)
    model.train()
    ids = torch.randint(1000, 49_000, (4, 64), generator=torch.Generator().manual_seed(0)).to(model.device)
    loss = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
    if whose == "lomo-optim":
        from lomo_optim import Lomo as Theirs

        theirs = Theirs(model, lr=1e-5)
        return lambda: theirs.fused_backward(loss(), 1e-5)
    if whose == "LOMO":
        ours = Lomo(model, lr=1e-5)
        return lambda: ours.backward(loss())
    kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[whose]
    optimizer = kind(model.parameters(), lr=1e-5)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_lomo(device, rounds=7):
    """LOMO against lomo-optim, SGD and AdamW, side by side: a step's time and its peak memory."""
    steps = {whose: full_step(whose, device) for whose in ("LOMO", "lomo-optim", "SGD", "AdamW")}
    measured = {}
    peak = peak_of(f"full_step('LOMO', {str(device)!r})", device)
    for other in ("lomo-optim", "SGD", "AdamW"):
        measured[f"LOMO step against {other}, times"] = median_ratio(steps["LOMO"], steps[other], device, rounds)
        theirs = peak_of(f"full_step({other!r}, {str(device)!r})", device)
        measured[f"LOMO step against {other}, peak memory, times"] = peak / theirs
    return measured


def run_timed(command, cwd=ROOT):
    """Seconds and the peak memory (GB) of the largest process that `command` started; its failure is an error."""
    code = (
        "import json, resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6\n"
        "print(json.dumps([done.returncode, time.perf_counter() - start, peak, done.stdout[-3000:]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    returncode, seconds, peak, output = json.loads(done.stdout)
    if returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{output}")
    return seconds, peak


def measure_chapter(path):
    with tempfile.TemporaryDirectory() as out:
        nbconvert = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", out, path]
        seconds, peak = run_timed(nbconvert)
    return {"chapter, s": seconds, "chapter, peak memory, GB": peak}


def measure_book():
    run_timed(["make", "book"])
    again, _ = run_timed(["make", "book"])
    html = ROOT / "_build" / "html"
    sizes = {}
    for page in html.glob("book/**/*.html"):
        images = [html / "_images" / name for name in page_images(page)]
        sizes[page.stem] = (page.stat().st_size + sum(image.stat().st_size for image in images)) / 1e6
    return {"make book when set up, s": again, "largest page, MB": max(sizes.values()), "pages, MB": sizes}


def page_images(page):
    return set(re.findall(r'src="[./]*_images/([^"]+)"', page.read_text(encoding="utf-8")))


class CompressedFiles(http.server.SimpleHTTPRequestHandler):
    """Serves files as a real host does: text compressed, and kept by the browser for ten minutes."""

    protocol_version = "HTTP/1.1"

    @staticmethod
    @functools.cache
    def content(path, coding):
        data = Path(path).read_bytes()
        return gzip.compress(data, 6) if coding == "gzip" else data

    def do_GET(self):
        path = self.translate_path(self.path)
        if not Path(path).is_file():
            return self.send_error(404)
        kind, accepted = self.guess_type(path), self.headers.get("Accept-Encoding", "")
        text = kind.startswith("text/") or kind.endswith(("javascript", "json", "svg+xml"))
        coding = "gzip" if text and "gzip" in accepted else None
        data = self.content(path, coding)
        self.send_response(200)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(data),
            "Content-Encoding": coding,
            "Cache-Control": "max-age=600",
            "Vary": "Accept-Encoding",
        }.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    """The address of a folder's files on a server that compresses."""
    handler = functools.partial(CompressedFiles, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def measure_pages(rounds=3):
    """Lighthouse's scores of two pages, built afresh, on a simulated phone: medians of three runs; it needs npm."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (shutil.which("npm") and browser):
        return {"Lighthouse": f"not measured: there is no {'Chromium' if shutil.which('npm') else 'npm'} here"}
    with tempfile.TemporaryDirectory() as folder:
        jupyter_book = Path(sys.executable).with_name("jupyter-book")
        run_timed([jupyter_book, "build", ".", "--all", "--quiet", "--path-output", folder])
        run_timed(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, LIGHTHOUSE])
        command = [f"{folder}/node_modules/.bin/lighthouse", "--quiet", "--output=json", f"--output-path={folder}/out"]
        command += ["--no-enable-error-reporting", "--chrome-flags=--headless=new --no-sandbox"]
        measured = {}
        with served(f"{folder}/_build/html") as address:
            for name, page in PAGES.items():
                runs = []
                for _ in range(rounds):
                    run_timed(["env", f"CHROME_PATH={browser}", *command, f"{address}/{page}"])
                    runs.append(json.loads(Path(folder, "out").read_text()))
                for score, key in SCORES.items():
                    values = [100 * run["categories"][key]["score"] for run in runs]
                    measured[f"{name}, {score}"] = statistics.median(values)
                chrome = re.search(r"Chrome/\d+", runs[0]["environment"]["hostUserAgent"])[0]
                measured["by"] = f"Lighthouse {runs[0]['lighthouseVersion']}, {chrome}"
                sent = statistics.median(run["audits"]["total-byte-weight"]["numericValue"] for run in runs)
                measured[f"{name}, KB sent"] = sent / 1000
    return measured


def measure_bare():
    """Clone, set up and render in a new folder; the packages come from the network or pip's cache."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", str(ROOT), f"{folder}/book"], check=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        start = time.perf_counter()
        subprocess.run(["make", "book"], cwd=f"{folder}/book", env=environment, check=True)
        return {"make book from a bare clone, s": time.perf_counter() - start}


def table(pieces):
    """Lines of what was measured, with its budget where it has one."""
    lines = [f"{'what':62} {'measured':>9} {'budget':>9}"]
    for key, measured in pieces.items():
        for name, value in measured.items():
            if isinstance(value, dict):
                continue
            if isinstance(value, str):
                lines.append(f"{name[:62]:62} {value}")
                continue
            budget, at_least = BUDGETS.get(name, (None, False))
            sign = "" if budget is None else ("≥ " if at_least else "≤ ") + str(budget)
            missed = budget is not None and (value < budget if at_least else value > budget)
            label = f"{Path(key).name}: {name}" if key.startswith("chapter/") else name
            lines.append(f"{label[:62]:62} {value:9.2f} {sign:>9}{'  MISSED' if missed else ''}")
    return lines


def merged(earlier, new):
    """Recorded results of which a later run measured some rows anew; the others stay, each with where it came from."""
    place = {what: earlier["provenance"][what] for what in ("commit", "date", "machine", "versions")}
    together = [{"place": place, "seconds": {"all": earlier["provenance"]["seconds"]}}]  # before pieces had origins
    origins = []
    for group in earlier.get("origins", together):
        seconds = {key: value for key, value in group["seconds"].items() if key not in new["results"]}
        origins += [group | {"seconds": seconds}] if seconds else []
    return new | {"origins": origins + new["origins"], "results": earlier["results"] | new["results"]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--bare", action="store_true", help="also time `make book` from a bare clone")
    parser.add_argument("--only", choices=["pages"], help="measure this part alone, and keep the other recorded rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cpu" if options.only else default_device()))
    parts = {
        "load": lambda: measure_load(device),
        "scoring": lambda: measure_scoring(*load_lm(device=device, dtype=torch.float32)),
        "p_tuning": lambda: measure_p_tuning_step(*load_lm(device=device)),
        "lora": lambda: measure_lora(device),
        "four bits": lambda: measure_four_bits(device),
        "lomo": lambda: measure_lomo(device),
    }
    if device.type == "cpu":
        chapters = sorted(path for path in ROOT.glob("book/[0-9]*/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
        parts |= {f"chapter/{path.stem}": lambda path=path: measure_chapter(path) for path in chapters}
        parts |= {"book": measure_book, "pages": measure_pages} | ({"bare": measure_bare} if options.bare else {})
    if options.only:
        parts = {options.only: measure_pages}
    name = "bench" if device.type == "cpu" else f"bench_{device.type}"
    earlier = load_results(name, options.out) if options.only else None
    recorder = Recorder(name, options.out, device, len(parts), module="bench", machine=machine())
    for key, measure in parts.items():
        recorder.piece(key, measure)
    print("\n".join([f"\n{machine()}, torch {torch.__version__}", *table(recorder.pieces)]))
    path = recorder.finish()
    if earlier:
        write_json(path, merged(earlier, load_results(name, options.out)))


if __name__ == "__main__":
    main()
