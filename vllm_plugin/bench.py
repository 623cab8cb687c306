"""
Requests and tokens per second that vLLM serves: a transformer (H-0) and its hybrids, under load.

    python vllm_plugin/bench.py teacher out/h25 out/h40 --input 256 --output 128 --requests 16     # a CPU
    python vllm_plugin/bench.py H-0 H-25 H-40 --input 1 --output 16384 --requests 512              # a GPU

All requests are there from the start, so vLLM always has as many at once as its cache and --batch allow: this is the
throughput of a server with a queue, not the answer time of a quiet one. Prompts are random ids, every answer has
exactly --output tokens (no end token counts), and nothing is taken from the prefix cache. Speed does not depend on what
the weights say, but a checkpoint may be asked for more tokens than it was trained for: then its texts mean nothing.

A round measures each directory once, in turn, so that a machine that slows down slows all of them. Every measurement
has a process and an engine of its own, unless --together; loading, compiling and the warm-up are not counted.
Beside it stands bench.py --model DIR of this repository: the same weights under model.py, one batch, no scheduler.
"""
import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import UserError, checkpoint_dir, pick_dtype, provenance, read_config, run_main

import torch


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("dirs", nargs="+", metavar="DIR",
        help="checkpoint directories; the first is what the others are compared with")
    # What is asked.
    add("--input", type=int, default=1024, help="tokens of a prompt (default 1024)")
    add("--output", type=int, default=8192, help="tokens of an answer (default 8192)")
    add("--requests", type=int, default=64,
        help="requests of a measurement, all there from the start (default 64)")
    add("--rounds", type=int, default=3,
        help="measurements of every directory, in turn (default 3)")
    add("--warmup", type=int, default=2,
        help="requests of 8 new tokens that an engine answers before it is measured (default 2)")
    add("--seed", type=int, default=0, help="seed of the prompts; each round has others (default 0)")
    # How it is served.
    add("--batch", type=int, help="requests at once, at most (max_num_seqs; default: vLLM's)")
    add("--step-tokens", type=int,
        help="tokens of one step, at most (max_num_batched_tokens; default: vLLM's)")
    add("--memory", type=float,
        help="GB for caches and states (default: 1 on a CPU, vLLM's choice on a GPU)")
    add("--tensor-parallel", type=int, default=1,
        help="GPUs that share a model (default 1; more was not tried)")
    add("--dtype", default="auto",
        help="float32 or bfloat16 (default: bfloat16 on cuda, else float32)")
    add("--eager", action="store_true",
        help="neither torch.compile nor CUDA graphs: starts sooner, runs slower")
    add("--together", action="store_true", help="let the engines of all directories stay from "
        "round to round: sooner, if the memory holds them all")
    # What is counted.
    add("--cpu-time", action="store_true", help="count the process's CPU time and not the clock, "
        "with the engine in that process: for a CPU shared with other programs")
    add("--json", metavar="FILE", help="append one JSON line per directory")
    args = p.parse_args()
    counts = ("input", "output", "requests", "rounds", "batch", "step_tokens", "tensor_parallel",
              "warmup")
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return args


def engine_options(args):
    """args -> what vLLM's LLM is given, beside the directory."""
    options = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": args.input + args.output,
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": args.step_tokens,
        "tensor_parallel_size": args.tensor_parallel,
    }
    if args.memory is not None:
        options["kv_cache_memory_bytes"] = int(args.memory * 1e9)
    return {name: value for name, value in options.items() if value is not None}


def random_prompts(count, length, vocab_size, seed):
    """-> vLLM prompts of random ids; the first few ids are special ones in most vocabularies."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        ids = [rng.randrange(3, vocab_size) for _ in range(length)]
        prompts.append({"prompt_token_ids": ids})
    return prompts


# The engine of this process, see measure.
ENGINES = {}


def measure(path, vocab_size, args, turn):
    """One measurement, in a process that has the directory's engine or makes it now -> seconds for all requests."""
    from vllm import LLM, SamplingParams
    clock = time.process_time if args.cpu_time else time.perf_counter

    def answer_all(prompts, new):
        """-> seconds."""
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = clock()
        outputs = ENGINES[path].generate(prompts, params, use_tqdm=False)
        seconds = clock() - began
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)
        return seconds

    if path not in ENGINES:
        ENGINES[path] = LLM(path, **engine_options(args))
        warm = random_prompts(args.warmup, args.input, vocab_size, f"{args.seed} warm")
        answer_all(warm, min(8, args.output))
    prompts = random_prompts(args.requests, args.input, vocab_size, f"{args.seed} {turn}")
    return answer_all(prompts, args.output)


def new_process():
    """-> a pool of one process. Ended, it gives all its memory back. Its worker may have children, as vLLM wants; that
    of multiprocessing.Pool may not."""
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def measure_all(paths, args):
    """-> {path: seconds of each round}, {path: Config}."""
    configs = {path: read_config(path) for path in paths}
    seconds = {path: [] for path in paths}
    processes = {}
    for turn in range(args.rounds):
        for path in paths:
            process = processes.pop(path, None) or new_process()
            took = process.submit(measure, path, configs[path].vocab_size, args, turn).result()
            seconds[path].append(took)
            print(f"round {turn + 1} of {args.rounds}: {path} {took:.1f} s", file=sys.stderr)
            if args.together:
                processes[path] = process
            else:
                process.shutdown()
    for process in processes.values():
        process.shutdown()
    return seconds, configs


def summary(seconds, args):
    """seconds of each round -> rates at the median, and the spread of the rounds, (slowest - fastest) / median."""
    median = statistics.median(seconds)
    return {"seconds": seconds, "requests_per_s": args.requests / median,
            "tokens_per_s": args.requests * args.output / median,
            "spread": (max(seconds) - min(seconds)) / median}


def print_table(rows):
    print(f"{'directory':<24} {'Mamba':>7} {'requests/s':>11} {'tokens/s':>9} {'spread':>7} {'ratio':>6}")
    for row in rows:
        layers = f"{row['mamba_layers']}/{row['layers']}"
        speed = f"{row['requests_per_s']:>11.3f} {row['tokens_per_s']:>9.1f}"
        print(f"{row['dir'][-24:]:<24} {layers:>7} {speed} {row['spread']:>7.1%} {row['ratio']:>6.2f}")


def set_environment(args):
    """Before vLLM is imported, here or in a process that starts from here."""
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                # More tokens than the checkpoint was trained for: see above.
                "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if args.cpu_time:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main():
    args = parse_args()
    set_environment(args)
    try:
        import vllm
    except ImportError:
        raise UserError("vLLM is not installed here: see vllm_plugin/README.md") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = str(pick_dtype(args.dtype, device)).removeprefix("torch.")
    if args.memory is None and device.type == "cpu":
        args.memory = 1.0
    paths = [checkpoint_dir(path) for path in args.dirs]
    if args.json:
        # Fail now, not after the rounds.
        try:
            open(args.json, "a", encoding="utf-8").close()
        except OSError as e:
            raise UserError(f"cannot write {args.json}: {e.strerror}") from None
    seconds, configs = measure_all(paths, args)

    rows = []
    for path, config in configs.items():
        # Within one round: what a slow minute leaves in a ratio is little.
        ratios = [first / ours for first, ours in zip(seconds[paths[0]], seconds[path])]
        shape = {"mamba_layers": config.layout.count("m2"), "layers": config.n_layer}
        rates = summary(seconds[path], args)
        rows.append({"dir": path} | shape | rates | {"ratio": statistics.median(ratios)})
    print_table(rows)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("dirs", "json")}
        command = " ".join(["vllm_plugin/bench.py", *sys.argv[1:]])
        where = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "command": command,
                 "vllm": vllm.__version__}
        with open(args.json, "a", encoding="utf-8") as f:
            for row in rows:
                f.write(json.dumps(where | provenance(device) | settings | row) + "\n")


if __name__ == "__main__":
    run_main(main)
