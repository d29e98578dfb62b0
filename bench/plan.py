"""Before the bill: memory, bytes sent and time of training, by each way to share a model.

    python bench.py plan --model=llama3-8b --devices=64 --memory_gb=80 --tokens=15e12

Memory is counted part by part. Times are estimates: FLOPs over the device's published rate times
`utilisation`, bytes over the links' rate, and the longer of the two, since sending overlaps with
computing. Failures are taken from Llama 3's report: 419 unexpected stops in 54 days on 16,384 GPUs
(arXiv:2407.21783, section 3.3.4).
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from glass.settings import configure
from model import GPT, PRESETS, count_parameters

GB = 1e9
# published: dense bfloat16 FLOPs a second (NVIDIA's H100 SXM data sheet), bytes a second of NVLink
# within a machine (900 GB/s both ways together) and of one 400 Gb/s InfiniBand port to others
H100_FLOPS, NVLINK, INFINIBAND = 989e12, 450e9, 50e9
STOPS_PER_DEVICE_DAY = 419 / 54 / 16384
COUNTS = (8, 64, 1024, 16384)  # devices of the table
LARGEST_BATCH = 16e6  # tokens of a step; Llama 3 405B ended at that (arXiv:2407.21783, 3.4.1)


@dataclass
class Settings:
    model: str = "llama3-8b"  # a preset
    devices: int = 64  # GPUs
    per_machine: int = 8  # of them in one machine
    memory_gb: float = 80.0  # of a device
    tokens: float = 15e12  # to train on
    block_size: int = 8192  # tokens of a sequence
    batch_tokens: float = 4e6  # of a step, over all devices
    flops: float = H100_FLOPS  # of a device, a second, in bfloat16
    utilisation: float = 0.45  # share of it that products reach
    machine_link: float = NVLINK  # bytes a second to devices of the same machine
    network_link: float = INFINIBAND  # bytes a second to other machines
    disk: float = 2e9  # bytes a second that checkpoints are written at, by each machine
    muon: bool = False  # one moment for the blocks' matrices, instead of AdamW's two
    table: bool = True  # also for 8 to 16,384 devices

    def __post_init__(self):
        if self.model not in PRESETS:
            raise ValueError(f"model={self.model} must be one of {' '.join(PRESETS)}")
        for name in ("devices", "per_machine", "memory_gb", "tokens", "block_size", "batch_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


@dataclass
class Plan:
    """One way to train, and what it costs on each device. Bytes, and seconds of one step."""

    way: str  # ddp | fsdp | hsdp
    micro_batch: int  # sequences
    recompute: bool
    accumulation: int  # micro-steps
    memory: dict  # part: bytes
    sent: float  # bytes a step
    compute_s: float
    link_s: float

    @property
    def step_s(self):
        return max(self.compute_s, self.link_s)

    @property
    def total(self):
        return sum(self.memory.values())


# Counting one model.


def group_sizes(config):
    """(parameters outside of the blocks, parameters of a block): FSDP gathers these at once."""
    c = dataclasses.replace(config, n_layer=1)
    block = count_parameters(c) - count_parameters(dataclasses.replace(config, n_layer=0))
    return count_parameters(config) - config.n_layer * block, block


def matrix_parameters(config):
    """Parameters of the blocks' matrices, which Muon updates."""
    C, c = config.n_embd, config
    attention = C * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    return c.n_layer * (attention + C * c.n_inner * (3 if c.mlp == "swiglu" else 2))


def state_memory(config, n_shards, muon=False):
    """Bytes of weights, gradients and moments in float32, of which a device has 1 / n_shards."""
    n = count_parameters(config)
    moments = 2 * n - (matrix_parameters(config) if muon else 0)
    parts = {"weights": 4 * n, "gradients": 4 * n, "moments": 4 * moments}
    return {name: value / n_shards for name, value in parts.items()}


def gathered_memory(config, itemsize):
    """Bytes that FSDP gathers at once: what is outside of the blocks, and two blocks.

    The gradients of one group are whole too, and once more in float32 in the buffer that is sent.
    """
    outside, block = group_sizes(config)
    return itemsize * (outside + 2 * block) + (itemsize + 4) * max(outside, block)


def activation_memory(config, B, T, itemsize, recompute):
    """Bytes that a forward pass of B sequences keeps for the backward pass, without dropout.

    itemsize: 2 where products run in bfloat16, whose inputs are kept in it, one copy for each
    product; the residual stream and the norms are in float32. Attention keeps what a fused kernel
    does: q, k, v, its result, and a number for each row; no T x T matrix.
    """
    c, C, tokens = config, config.n_embd, B * T
    q, kv, inner = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_inner
    in_half = itemsize == 2
    norm = 8 * C + 4 if c.norm == "rmsnorm" else 4 * C + 8  # its input, or also that normalised
    norms = 2 * norm + itemsize * C * (4 if in_half else 2)
    attention = itemsize * (2 * q + 2 * kv + q * in_half) + 4 * c.n_head
    # gate, its silu, up and the product; or before and after
    mlp = itemsize * inner * (4 if c.mlp == "swiglu" else 2)
    block = tokens * (norms + attention + mlp)
    kept = c.n_layer * tokens * 4 * C + block if recompute else c.n_layer * block
    return {"blocks": kept, "last norm": tokens * (norm + itemsize * C)}


def logits_memory(config, B, T, loss_chunk=None):
    """Bytes of the logits: in float32, their log-probabilities, and their gradient."""
    tokens = min(B * T, loss_chunk or math.inf)
    return {"logits": 3 * 4 * tokens * config.vocab_size}


def bytes_sent(config, way, n_shards, n_copies, accumulation, itemsize):
    """Bytes that a device sends in one step, by rings, as NCCL does.

    ddp: one all-reduce of the gradients in float32, 2 (n - 1) / n of them. fsdp: in each micro-step
    the blocks are gathered twice, the rest once; in the last one the gradients in float32 are
    reduce-scattered. hsdp: then the shards are all-reduced between the copies.
    """
    n = count_parameters(config)
    if way == "ddp":
        return 2 * (n_copies - 1) / n_copies * 4 * n
    outside, block = group_sizes(config)
    gathered = itemsize * (outside + 2 * config.n_layer * block) * accumulation
    sent = (n_shards - 1) / n_shards * (gathered + 4 * n)
    if n_copies > 1:
        sent += 2 * (n_copies - 1) / n_copies * 4 * n / n_shards
    return sent


# Plans.


def plans(s, devices):
    """Every Plan for so many devices that fits, the fastest first; and the reasons of the others."""
    config = dataclasses.replace(PRESETS[s.model], block_size=s.block_size)
    found, refused = [], {}
    rows = max(1, round(s.batch_tokens / s.block_size / devices))  # of a device in a step
    for way, n_shards in (("ddp", 1), ("fsdp", devices), ("hsdp", min(devices, s.per_machine))):
        if way == "hsdp" and devices <= s.per_machine:
            continue
        smallest = None
        for recompute in (False, True):
            for micro_batch in (size for size in (16, 8, 4, 2, 1) if size <= rows):
                plan = make_plan(s, config, devices, way, n_shards, rows, micro_batch, recompute)
                smallest = min(filter(None, (smallest, plan)), key=lambda each: each.total)
                if plan.total <= s.memory_gb * GB:
                    found.append(plan)
        if not any(plan.way == way for plan in found):
            refused[way] = f"needs {smallest.total / GB:,.0f} GB at least"
    return sorted(found, key=lambda plan: (plan.step_s, -plan.micro_batch)), refused


def make_plan(s, config, devices, way, n_shards, rows, micro_batch, recompute):
    accumulation = math.ceil(rows / micro_batch)
    B, T = micro_batch, s.block_size
    memory = state_memory(config, n_shards, s.muon)
    if way != "ddp":
        memory["gathered"] = gathered_memory(config, 2)
        if accumulation > 1:  # gradients stay whole until the last micro-step
            memory["whole gradients"] = 2 * count_parameters(config)
    memory |= activation_memory(config, B, T, 2, recompute)
    memory |= logits_memory(config, B, T, loss_chunk=T)
    tokens = rows * T
    flops = flops_per_token(config, T) * (4 / 3 if recompute else 1)
    compute_s = flops * tokens / (s.flops * s.utilisation)
    n_copies = devices // n_shards
    sent = bytes_sent(config, way, n_shards, n_copies, accumulation, 2)
    link_s = sent / (s.machine_link if devices <= s.per_machine else s.network_link)
    if way == "hsdp":  # gathers stay within the machine
        within = bytes_sent(config, way, n_shards, 1, accumulation, 2)
        link_s = within / s.machine_link + (sent - within) / s.network_link
    return Plan(way, B, recompute, accumulation, memory, sent, compute_s, link_s)


def flops_per_token(config, T):
    with torch.device("meta"):
        return GPT(dataclasses.replace(config, n_layer=1)).flops_per_token(T) + (
            config.n_layer - 1
        ) * one_block_flops(config, T)


def one_block_flops(config, T):
    _, block = group_sizes(config)
    return 3 * (2 * block + 4 * config.n_head * config.head_dim * T)


def bottleneck(s, config, devices, plan):
    """What limits this many devices first, in words."""
    tokens = devices * plan.micro_batch * plan.accumulation * s.block_size
    if tokens > LARGEST_BATCH:
        return f"the batch: {tokens / 1e6:,.0f}M tokens a step, more than were ever useful"
    stops_a_day = STOPS_PER_DEVICE_DAY * devices
    save_s = 12 * count_parameters(config) / (s.disk * max(1, devices / s.per_machine))
    if plan.link_s > plan.compute_s:
        return f"the links: {plan.link_s / plan.compute_s:.1f} times as long as computing"
    if stops_a_day > 1:
        return f"failures: {stops_a_day:.1f} a day, save at least every {interval(save_s, stops_a_day)}"
    if save_s > 60:
        return f"checkpoints: {save_s / 60:,.0f} minutes each on one disk a machine"
    return "computing: more devices are faster"


def interval(save_s, stops_a_day):
    """The best time between checkpoints, in minutes (Young 1974): sqrt(2 x save x between stops)."""
    return f"{math.sqrt(2 * save_s * 86400 / stops_a_day) / 60:.0f} minutes"


def described(plan):
    kind = ", recomputing" if plan.recompute else ""
    return f"{plan.way}, {plan.accumulation} x {plan.micro_batch} sequences{kind}"


def main(argv):
    s = configure(Settings, argv)
    config = dataclasses.replace(PRESETS[s.model], block_size=s.block_size)
    found, refused = plans(s, s.devices)
    print(
        f"{s.model}: {count_parameters(config):,} parameters; {s.devices} devices of {s.memory_gb:g} GB"
    )
    for way, reason in refused.items():
        print(f"  {way} does not fit: {reason}")
    for way in ("ddp", "fsdp", "hsdp"):
        of_way = [plan for plan in found if plan.way == way][:1]
        for plan in of_way:
            parts = ", ".join(f"{name} {value / GB:.1f}" for name, value in plan.memory.items())
            rate = s.devices * plan.micro_batch * plan.accumulation * s.block_size / plan.step_s
            days = s.tokens / rate / 86400
            print(f"  {described(plan)}: {plan.total / GB:.1f} GB ({parts})")
            print(
                f"    {plan.sent / GB:,.1f} GB sent a step; computing {plan.compute_s:.2f} s, links "
                f"{plan.link_s:.2f} s; {rate:,.0f} tokens/s; {days:,.1f} days"
            )
    if found:
        print(f"the fastest: {described(found[0])}")
    if s.table:
        print(
            "\n| devices | fastest | GB each | s a step | days | limited by |\n|---|---|---|---|---|---|"
        )
        for devices in COUNTS:
            found, refused = plans(s, devices)
            if not found:
                print(f"| {devices:,} | none fits | | | | memory: {refused} |")
                continue
            plan = found[0]
            rate = devices * plan.micro_batch * plan.accumulation * s.block_size / plan.step_s
            print(
                f"| {devices:,} | {described(plan)} | {plan.total / GB:.1f} | {plan.step_s:.2f} | "
                f"{s.tokens / rate / 86400:,.1f} | {bottleneck(s, config, devices, plan)} |"
            )
