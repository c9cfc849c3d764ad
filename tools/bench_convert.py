"""Speed and memory of conversion, on a checkpoint made on the spot, against plain reading and writing on the same disk.

    python tools/bench_convert.py [--folder DIR] [--gigabytes 8] [--processes 2] [--rounds 2]

Both sides are whole processes, start and imports included, and both leave their files on the disk (fsync). Plain is the
safetensors library's load_file and save_file, file by file. They take turns, and the best round of each counts, for other
work on a machine only ever slows. Memory is the largest sum of the resident sets of a conversion and all its processes,
which counts what they share several times.
Ends with an error when a rate is below 60% of plain or memory above 1.5 GB. Everything made is removed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rl.config.families import read_architecture
from megatron_rl.weights.hf_output import plan_files, write_rest
from megatron_rl.weights.map import WeightMap

SMALLEST_RATE, LARGEST_MEMORY = 0.6, 1.5e9
SHARD = 10**9
PLAIN = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
for path in sorted(source.glob("*.safetensors")):
    save_file(load_file(path), target / path.name)
    with open(target / path.name, "rb") as file:
        os.fsync(file.fileno())
"""
LAYER_BYTES = 2 * (3 * 2048 * 768 * 32 + 2 * 4096 * 2048 + 2 * 512 * 2048)
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Run:
    """A process that was measured."""

    seconds: float
    memory: int  # bytes


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """A Qwen3-MoE of random numbers and about that size; returns its bytes."""
    folder.mkdir()
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    weight_map = WeightMap(read_architecture(folder))
    files = plan_files(weight_map, "bfloat16", frozenset(), SHARD)
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).bfloat16()  # tensors begin at different places
    place = 0
    for file in files:
        with file.open(folder / file.name) as writer:
            for output in file.tensors:
                count = torch.Size(output.shape).numel()
                place = (place + 7919) % (noise.numel() - count)
                writer.write(output.name, noise[place : place + count].view(output.shape))
    write_rest(folder, files, json.loads((folder / "config.json").read_text()), [])
    return sum(file.bytes for file in files)


def measured(command: list[str]) -> Run:
    """Run a command, watching the memory of all its processes."""
    start = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})
    memory = 0
    while process.poll() is None:
        memory = max(memory, sum(map(resident, family(process.pid))))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return Run(time.monotonic() - start, memory)


def family(process: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return [process]
    return [process, *(each for child in children for each in family(int(child)))]


def resident(process: int) -> int:
    """Bytes of memory that a process holds now."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0  # it has ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def conversion(source: Path, target: Path, processes: int, *more: str) -> list[str]:
    command = [sys.executable, "-m", "megatron_rl.cli", "convert", "--from", str(source), "--to", str(target)]
    return [*command, "--processes", str(processes), "--shard-size", f"{SHARD // 10**6}MB", *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to make files: the disk")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=arguments.folder))
    try:
        good = bench(root, arguments.gigabytes, arguments.processes, arguments.rounds)
    finally:
        shutil.rmtree(root)
    raise SystemExit(0 if good else 1)


def bench(root: Path, gigabytes: float, processes: int, rounds: int) -> bool:
    source, megatron, hf, plain = (root / name for name in ("source", "megatron", "hf", "plain"))
    size = make_checkpoint(source, gigabytes)
    print(f"checkpoint of {size / 1e9:.1f} GB in {len(list(source.glob('*.safetensors')))} files, {processes} processes")
    layout = ["--format", "megatron", "layout.tensor=2", "layout.expert=2"]
    commands = {
        "plain": [sys.executable, "-c", PLAIN, str(source), str(plain)],
        "HF to Megatron": conversion(source, megatron, processes, *layout),
        "Megatron to HF": conversion(megatron, hf, processes, "--format", "hf"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    same = True
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(measured(command))
            print(f"  {name}: {size / 1e6 / runs[name][-1].seconds:,.0f} MB/s", flush=True)
        same = same and all((hf / path.name).read_bytes() == path.read_bytes() for path in source.glob("*.safetensors"))
        for folder in (plain, megatron, hf):
            shutil.rmtree(folder)
    print(f"files after the round trip are {'the same bytes' if same else 'NOT the same'}")
    return same and verdicts(size, runs)


def verdicts(size: int, runs: dict[str, list[Run]]) -> bool:
    best = {name: min(run.seconds for run in each) for name, each in runs.items()}
    print(f"plain read and write: {size / 1e6 / best['plain']:,.0f} MB/s, {runs['plain'][0].memory / 1e9:.2f} GB of memory")
    good = True
    for name in list(runs)[1:]:
        share, memory = best["plain"] / best[name], max(run.memory for run in runs[name])
        enough, small = share >= SMALLEST_RATE, memory <= LARGEST_MEMORY
        good = good and enough and small
        print(
            f"{name}: {size / 1e6 / best[name]:,.0f} MB/s, {share:.0%} of plain ({'ok' if enough else 'TOO SLOW'}), "
            f"{memory / 1e9:.2f} GB of memory ({'ok' if small else 'TOO MUCH'})"
        )
    return good


if __name__ == "__main__":
    main()
