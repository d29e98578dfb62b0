"""What only a GPU can show, in under ten minutes: python bench.py gpu [--peer=FOLDER_OF_NANOGPT]

Each part has seconds of its own; one that fails or has no time left is said so in the table, and
the others go on. torch and numpy are enough. `--device=cpu --tiny=True` tries the program itself.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from bench import generate as decoding
from bench import train as training
from bench.common import SCRATCH, medians, memory_bandwidth, product_rate, run_script
from glass import parallel
from glass.device import Processes, autocast, choose_device, peak_flops
from glass.files import write_text
from glass.generate import speed_up, stream
from glass.settings import configure
from model import GPT, PRESETS, GPTConfig, count_parameters

TINY = dict(vocab_size=96, block_size=64, n_layer=2, n_head=2, n_embd=32)


@dataclass
class Settings:
    device: str = "auto"  # auto | cuda | cuda:1 | cpu, which tries the program
    tiny: bool = False  # tiny models and few steps
    minutes: float = 10.0  # for all parts; those that are left then are skipped
    parts: list[str] = field(default_factory=list)  # only these; none: all of them
    peer: str | None = None  # also train the folder of a nanoGPT checkout
    out: str = "out/gpu"  # OUT.json and OUT.md get the figures


@dataclass
class Line:
    """A line of the table."""

    part: str
    what: str
    figure: str
    note: str = ""


class Bench:
    """The parts share these: the settings, the device, and the shapes to measure."""

    def __init__(self, settings):
        self.settings, self.device = settings, choose_device(settings.device)
        self.is_cuda = self.device.type == "cuda"
        self.small = GPTConfig(**TINY) if settings.tiny else PRESETS["modern-124m"]
        gpt2 = dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768)
        self.gpt2 = GPTConfig(**TINY) if settings.tiny else GPTConfig(**gpt2)
        self.llama = PRESETS["llama3.2-1b"]
        if settings.tiny:
            self.llama = GPTConfig(**TINY, norm="rmsnorm", mlp="swiglu", pos="rope", n_kv_head=1)
        self.llama = dataclasses.replace(self.llama, block_size=min(2048, self.llama.block_size))
        self.dtypes = (torch.float32, torch.bfloat16)

    def rows(self, config, n=2, T=256):
        """Random ids (n, T + 1), the same for every device."""
        generator = torch.Generator().manual_seed(1)
        T = min(T, config.block_size)
        return torch.randint(config.vocab_size, (n, T + 1), generator=generator)

    def model(self, config, device=None):
        torch.manual_seed(0)
        return GPT(config).to(device or self.device)

    def peak(self):
        """Peak memory since the last call, in words; nothing on a CPU."""
        if not self.is_cuda:
            return ""
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return f"peak {peak / 1e9:.2f} GB"


def loss_and_gradients(model, rows, context):
    """(loss, logits, all gradients as one vector), on the CPU in float32."""
    rows = rows.to(model.device)
    model.zero_grad(set_to_none=True)
    with context:
        logits, loss = model(rows[:, :-1], rows[:, 1:])
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters()]
    logits = None if logits is None else logits.detach().float().cpu()
    return loss.item(), logits, torch.cat(gradients).float().cpu()


def distance(a, b):
    """The length of a - b over that of b."""
    return ((a - b).norm() / b.norm()).item()


# Parts: each yields Lines.


def limits(bench):
    """What the machine can do."""
    n = 256 if bench.settings.tiny else 4096
    for dtype in bench.dtypes:
        rate = product_rate(n, dtype, bench.device)
        name = str(dtype).removeprefix("torch.")
        yield Line("limits", f"product {n} x {n}, {name}", f"{rate / 1e12:.2f} TFLOP/s")
    yield Line("limits", "reading memory", f"{memory_bandwidth(bench.device) / 1e9:,.0f} GB/s")


def parity(bench):
    """Logits and gradients of the CPU and of the device."""
    rows, on_cpu = bench.rows(bench.small), torch.device("cpu")
    plain = contextlib.nullcontext()
    _, logits, gradients = loss_and_gradients(bench.model(bench.small, on_cpu), rows, plain)
    for dtype in bench.dtypes:
        model = bench.model(bench.small)
        context = autocast(bench.device, dtype)
        _, theirs, their_gradients = loss_and_gradients(model, rows, context)
        name = str(dtype).removeprefix("torch.")
        largest = (theirs - logits).abs().max().item()
        yield Line(
            "parity", f"logits in {name}, from the CPU's in float32", f"{largest:.1e} at most"
        )
        yield Line("parity", f"gradient in {name}", f"{distance(their_gradients, gradients):.1e}")


def options(bench):
    """loss_chunk, recompute and one shard: the same loss and gradient, and their memory."""
    config = bench.gpt2
    rows = bench.rows(config, n=4, T=1024)
    context = autocast(bench.device, torch.bfloat16)
    loss, _, gradients = loss_and_gradients(bench.model(config), rows, context)
    bench.peak()
    for name, changes in (
        ("plain", {}),
        ("loss_chunk", dict(loss_chunk=max(1, rows[:, 1:].numel() // 4))),
        ("recompute", dict(recompute=True)),
    ):
        model = bench.model(dataclasses.replace(config, **changes))
        other, _, theirs = loss_and_gradients(model, rows, context)
        shown = f"loss {other - loss:+.1e}, gradient {distance(theirs, gradients):.1e} from plain"
        yield Line("options", name, shown, bench.peak())
        del model
    backend = "nccl" if bench.is_cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = bench.model(config)
        processes = Processes(device=bench.device)
        parallel.shard(model, "fsdp", processes, torch.bfloat16)
        ids = rows.to(bench.device)
        with context:
            shared_loss = model(ids[:, :-1], ids[:, 1:])[1]
        shared_loss.backward()
        norm = parallel.clip_gradients(model, 0)
        shown = f"loss {shared_loss.item() - loss:+.1e}, norm {norm / gradients.norm().item():.5f} of plain's"
        yield Line("options", "fsdp, one process", shown, bench.peak())
    finally:
        dist.destroy_process_group()


def texts(bench):
    """Greedy tokens, cached, compiled and not: all the same."""
    model = bench.model(bench.small).eval()
    prompt = bench.rows(bench.small, T=16)[:1, :16].to(bench.device)
    n = 16 if bench.settings.tiny else 64
    plain = model.generate(prompt, n, temperature=0)[0, 16:].tolist()
    compiles = bench.is_cuda or not bench.settings.tiny
    ways = {
        "cached": None,
        "with a static cache, compiled": dict(compile=compiles),
        "the same in int8": dict(quantize="int8", compile=compiles),
    }
    for name, words in ways.items():
        started_at, fast = time.perf_counter(), copy.deepcopy(model)
        decode = words and speed_up(fast, **words)
        made = torch.stack(list(stream(fast, prompt, n, temperature=0, compiled_decode=decode)))
        equal = sum(a == b for a, b in zip(made[:, 0].tolist(), plain, strict=True))
        seconds = time.perf_counter() - started_at
        yield Line("texts", name, f"{equal} of {n} tokens as without a cache", f"{seconds:.1f} s")


def run_train(*words):
    """Run train.py -> (lines, the last validation loss). Raises ValueError where it fails."""
    lines, _ = run_script(Path("train.py"), list(words))
    losses = [text.split("val loss ")[1] for _, text in lines if "val loss " in text]
    return lines, float(losses[-1].split(",")[0].split()[0])


def words_for_small(bench, out, *more):
    """Command-line words of a small run on random tokens."""
    folder = training.random_tokens(65)
    shape = dict(n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=8)
    shape |= dict(gradient_accumulation_steps=2, dropout=0.1, eval_iters=2, eval_interval=10)
    shape |= dict(log_interval=10, lr_decay_iters=20, warmup_iters=2, compile=False)
    shape |= dict(dataset=folder, out_dir=SCRATCH / out, device=bench.device, sample_tokens=None)
    words = [f"--{name}={value}" for name, value in shape.items()]
    return ["config/gpt2_124m.py", *words, "--optimizer=muon", "--overwrite=True", *more]


def resumption(bench):
    """A run of 20 steps, and one that was stopped after 10: the same bits?"""
    from glass import checkpoint

    for dtype in ("float32", "bfloat16"):
        weights = []
        for out, stops in (("straight", [20]), ("resumed", [10, 20])):
            words = words_for_small(bench, f"gpu_{out}", f"--dtype={dtype}")
            for steps in stops:
                run_train(*words, f"--max_iters={steps}")
                words = ["--init_from=resume", f"--out_dir={SCRATCH / f'gpu_{out}'}"]
                words.append(f"--device={bench.device}")
            weights.append(checkpoint.load(SCRATCH / f"gpu_{out}")["model"])
        pairs = [(tensor, weights[1][name]) for name, tensor in weights[0].items()]
        largest = max((a - b).abs().max().item() for a, b in pairs)
        same = all(torch.equal(a, b) for a, b in pairs)
        shown = "the same bits" if same else f"{largest:.1e} apart at most"
        yield Line("resumption", f"20 steps, in one and in two runs, {dtype}", shown)


def precisions(bench):
    """The loss after 20 steps in each dtype; float16 uses its scaler."""
    for dtype in ("float32", "bfloat16", "float16"):
        words = words_for_small(bench, "gpu_dtype", f"--dtype={dtype}", "--max_iters=20")
        _, loss = run_train(*words)
        yield Line("precisions", f"val loss after 20 steps in {dtype}", f"{loss:.4f}")


def steps(bench):
    """A training step of GPT-2 124M, eager and compiled, beside nanoGPT's."""
    s = training.Settings(model="tiny" if bench.settings.tiny else "gpt2", rounds=1)
    s.batch_size = 4 if bench.settings.tiny else 16
    s.steps = 6 if bench.settings.tiny else 24
    s.peer, folder = bench.settings.peer, training.random_tokens(training.VOCAB_SIZES[s.model])
    shared = [*training.shared_arguments(s, folder), f"--device={bench.device}"]
    contestants = {}
    for name in ("False", "True"):
        if bench.is_cuda or name == "False":
            words = [*training.our_arguments(s, shared), f"--compile={name}"]
            kind = "compiled" if name == "True" else "eager"
            contestants[f"glassGPT, {kind}"] = functools.partial(
                training.timed_run, Path("train.py"), words, s.steps
            )
    if s.peer:
        contestants |= training.peer_contestants(s, shared, bench.device, folder / "peer")
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=training.VOCAB_SIZES[s.model], **training.SHAPES[s.model]))
    tokens = s.batch_size * model.config.block_size
    peak = peak_flops(bench.device)
    for name, run in contestants.items():
        step_s, start_s, _ = medians([run()])
        mfu = f", mfu {model.flops_per_token() * tokens / step_s / peak:.1%}" if peak else ""
        shown = f"{1e3 * step_s:,.1f} ms, {tokens / step_s:,.0f} tokens/s{mfu}"
        yield Line("steps", f"{name}, {tokens:,} tokens", shown, f"first step at {start_s:.0f} s")


def recipe(bench):
    """python train.py, as a newcomer runs it."""
    words = [f"--out_dir={SCRATCH / 'gpu_recipe'}", "--overwrite=True", f"--device={bench.device}"]
    if bench.settings.tiny:
        words += ["--max_iters=4", "--eval_iters=1", "--n_embd=32", "--n_layer=1", "--batch_size=2"]
    lines, loss = run_train(*words)
    yield Line("recipe", "python train.py", f"val loss {loss:.4f}", f"{lines[-1][0]:.0f} s in all")


def rates(bench):
    """Tokens a second of decoding, beside what the memory's bandwidth allows."""
    bandwidth, tiny = memory_bandwidth(bench.device), bench.settings.tiny
    for shape, config in (("gpt2 124M", bench.gpt2), ("llama3.2-1b", bench.llama)):
        for quantize in (None, "int8"):
            for compile in (False, True) if bench.is_cuda else (False,):
                model = bench.model(config).bfloat16().eval()
                decode = speed_up(model, quantize, compile)
                for batch_size in (1,) if compile and quantize else (1, 8, 64):
                    s = decoding.Settings(quantize=quantize, new_tokens=8 if tiny else 64)
                    prompt = bench.rows(config, batch_size, 16)[:, :16].to(bench.device)
                    make = functools.partial(
                        stream, model, prompt, s.new_tokens, temperature=0.8, top_k=50
                    )
                    for _ in range(2):  # the first one warms up, or compiles
                        _, rest = decoding.timed_tokens(make(compiled_decode=decode))
                    rate = batch_size * (s.new_tokens - 1) / rest
                    needed = decoding.bytes_per_step(s, model, batch_size, torch.bfloat16)
                    share = rate / (batch_size * bandwidth / needed)
                    kind = "CUDA graph" if compile else "eager"
                    what = f"{shape}, {quantize or 'bfloat16'}, {kind}, batch {batch_size}"
                    shown = f"{rate:,.0f} tokens/s, {share:.0%} of the limit"
                    yield Line("rates", what, shown, bench.peak())


PARTS = {  # and the seconds that each should take on one GPU of 2024
    parity: 20,
    limits: 10,
    options: 20,
    texts: 90,
    resumption: 60,
    precisions: 40,
    steps: 120,
    recipe: 60,
    rates: 150,
}


def about(bench):
    """The machine, in words."""
    name = torch.cuda.get_device_name(bench.device) if bench.is_cuda else "CPU"
    n = count_parameters(bench.gpt2)
    return f"{name}, torch {torch.__version__}; the model of the parts below has {n:,} parameters"


def report(bench, lines):
    """Write the lines as JSON and as a table in Markdown."""
    path = Path(bench.settings.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about(bench), "lines": [dataclasses.asdict(line) for line in lines]}
    write_text(path.with_suffix(".json"), json.dumps(content, indent=1))
    table = [f"{about(bench)}\n", "| part | what | figure | note |", "|---|---|---|---|"]
    table += [f"| {line.part} | {line.what} | {line.figure} | {line.note} |" for line in lines]
    write_text(path.with_suffix(".md"), "\n".join(table) + "\n")


def main(argv):
    s = configure(Settings, argv)
    by_name = {part.__name__: part for part in PARTS}
    if unknown := " ".join(set(s.parts) - by_name.keys()):
        raise ValueError(f"parts={unknown} must be among {' '.join(by_name)}")
    bench, lines, started_at = Bench(s), [], time.perf_counter()
    print(about(bench))
    failed = 0
    for name in s.parts or by_name:
        part, began_at = by_name[name], time.perf_counter()
        left = 60 * s.minutes - (began_at - started_at)
        if PARTS[part] > left and not s.tiny:
            lines.append(Line(name, "skipped", f"{left:.0f} s were left", f"needs {PARTS[part]} s"))
            continue
        try:
            for line in part(bench):
                lines.append(line)
                print(f"{line.part:11} {line.what:52} {line.figure}  {line.note}", flush=True)
                report(bench, lines)
        except Exception as error:  # the other parts are worth their time all the same
            failed += 1
            traceback.print_exc()
            lines.append(Line(name, "failed", f"{type(error).__name__}: {error}"[:200]))
        seconds = time.perf_counter() - began_at
        lines.append(Line(name, "took", f"{seconds:.0f} s", f"planned {PARTS[part]} s"))
        report(bench, lines)
    minutes = math.ceil((time.perf_counter() - started_at) / 60)
    print(f"{len(lines)} lines in {s.out}.md and {s.out}.json after {minutes} minutes")
    if failed:
        raise ValueError(f"{failed} parts failed: see {s.out}.md and the errors above")
