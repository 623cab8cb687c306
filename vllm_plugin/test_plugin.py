"""
Tests of the plugin: what vLLM serves is what model.py computes. Each is named after the property it holds.

    python -m pytest vllm_plugin            # in the environment of README.md; skipped where vLLM is missing

Greedy tokens alone hide errors, so logprobs are compared: model.py reads a prompt with the answer that vLLM gave to it,
all at once, and at each token of the answer the logprobs that vLLM returned (of the token taken and of the five
likeliest) must be model.py's. The checkpoints are small, and every parameter of them is random: no term can be dropped
unseen. What proves most is where an engine does the most at once: requests that do not fit in together, prompts that
are read in pieces while other requests decode, states taken from the prefix cache, requests thrown out and begun again.
That these things happened is counted, and asserted.

Starting vLLM takes half a minute, an engine in a started process seconds. So one process (this file, run as a script)
serves job after job, each in an engine of its own. The HTTP test has a server in processes of vLLM's making.
"""
import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import NamedTuple
from unittest import mock

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (vllm_plugin/README.md)", allow_module_level=True)

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as nano

TOLERANCE = 1e-4                             # of a logprob, in float32
# Over HTTP, where every run mixes its requests differently, less likely tokens (one in a thousand) are not compared.
# Float32 keeps fewer digits of them: on the shipped teacher's hybrid model.py itself is off by 1.5e-4 from float64
# there, and by 1e-5 at the tokens taken.
RARE = -7

# One thread: the machine may have two cores, and model.py needs one of them in another process.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # Even where the model is eager, vLLM compiles what picks logprobs: minutes of g++.
    "TORCHDYNAMO_DISABLE": "1",
}


# ----------------------------------------------------------------------------------------------------------------------
# The serving process. It reads jobs from its stdin, one JSON a line, and answers each with one line.
#
# A fault is planted where the mixer looks up what to do, in the metadata of a step: has_initial_states_p says of each
# prompt, or piece of a prompt, whether its slot of the cache holds its own beginning, or what another request left.

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}


def ignore_the_state(metadata):
    metadata.has_initial_states_p = torch.zeros_like(metadata.has_initial_states_p)


def use_a_stale_slot(metadata):
    metadata.has_initial_states_p = torch.ones_like(metadata.has_initial_states_p)


FAULTS = {"the state is ignored": ignore_the_state, "a slot is stale": use_a_stale_slot}


@contextlib.contextmanager
def watch(fault, seen):
    """Count into seen what the steps of the engines within do: mixed (both reading and decoding), continued (pieces of
    prompts that go on from a state). fault: a name of FAULTS to plant, or None."""
    from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionMetadataBuilder as Builder
    original = Builder.build

    def build(self, *args, **kwargs):
        metadata = original(self, *args, **kwargs)
        if metadata.num_prefills:
            seen["mixed"] += int(metadata.num_decodes > 0)
            seen["continued"] += int(metadata.has_initial_states_p.sum())
            if fault is not None:
                FAULTS[fault](metadata)
        return metadata

    with mock.patch.object(Builder, "build", build):
        yield


def serve(job):
    """One engine, and every prompt `rounds` times -> {"rounds": lists of answers, and what was seen}. An answer is
    {"ids": the new ids, "logprobs": per id {id: logprob}, "cached": prompt tokens from the prefix cache}."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    seen = {"mixed": 0, "continued": 0}
    rounds = []
    with watch(job["fault"], seen):
        llm = LLM(job["path"], **ENGINE | job["options"])
        params = SamplingParams(temperature=0, max_tokens=job["new"], logprobs=5, detokenize=False,
                                ignore_eos=not job["may_end"])
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        for _ in range(job["rounds"]):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            rounds.append([answer_of(output) for output in outputs])
        counters = {metric.name: metric for metric in llm.get_metrics()}
        seen["preempted"] = counters["vllm:num_preemptions"].value
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return seen | {"rounds": rounds}


def answer_of(output):
    """vLLM's RequestOutput -> an answer for JSON, see serve."""
    completion = output.outputs[0]
    logprobs = []
    for step in completion.logprobs:
        logprobs.append({id: entry.logprob for id, entry in step.items()})
    return {"ids": list(completion.token_ids), "logprobs": logprobs,
            "cached": output.num_cached_tokens}


def serve_jobs():
    """The whole of the serving process. An error is an answer, too: the next job finds the process alive."""
    answers = os.fdopen(os.dup(1), "w")
    # What vLLM prints must not stand between the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = serve(json.loads(line))
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e} {e.__cause__ or ''}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve_jobs()
    sys.exit()


@pytest.fixture(scope="session")
def serving(tmp_path_factory):
    """-> a function: path, prompts, new tokens (or fewer, if an answer may end at an end token) and more -> what serve
    returns, or {"error": text}."""
    log = tmp_path_factory.mktemp("serving") / "log.txt"
    environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with open(log, "w") as errors:
        process = subprocess.Popen([sys.executable, __file__], env=environment, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

    def ask(path, prompts, new=12, rounds=1, fault=None, may_end=False, **options):
        job = dict(path=str(path), prompts=prompts, new=new, rounds=rounds, fault=fault,
                   may_end=may_end, options=options)
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the serving process died: {log.read_text()[-3000:]}"
        return json.loads(line)

    yield ask
    process.kill()
    process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, prompts, and the comparison.

# As in the 15B: hidden size unlike heads * head_dim, several query heads per key/value head, d_state below head_dim.
SHAPE = dict(vocab_size=538, d_model=48, n_head=4, n_kv_head=2, head_dim=32, d_mlp=80, dt_rank=5,
             max_length=512)


def random_model(layout="m2 t m2 t m2", seed=0, **change):
    """A small model with every parameter random."""
    torch.manual_seed(seed)
    layout = tuple(layout.split())
    config = nano.Config(**SHAPE | {"n_layer": len(layout), "layout": layout} | change)
    model = nano.HybridLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (1.0 if name.endswith("dt_proj.bias") else 0.1))
    return model.eval()


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory):
    """The directory of a random hybrid."""
    path = tmp_path_factory.mktemp("hybrid")
    nano.save_pretrained(random_model(), path)
    return path


def some_prompts(*lengths):
    prompts = []
    for length in lengths:
        rng = torch.Generator().manual_seed(length)
        prompts.append(torch.randint(3, SHAPE["vocab_size"], (length,), generator=rng).tolist())
    return prompts


# 17, around the sizes of a block of the cache (32) and of a step (64), and far beyond.
SEVENTEEN = some_prompts(1, 2, 3, 5, 8, 13, 21, 31, 32, 33, 55, 64, 65, 89, 144, 233, 400)
SIX = some_prompts(1, 4, 33, 40, 70, 150)


class Compared(NamedTuple):
    """Served answers against model.py."""
    worst: float                             # the largest difference of a logprob
    mean: float                              # ... and the mean
    behind: float                            # how far a token taken lies behind model.py's likeliest, at most
    positions: int                           # tokens compared


@torch.no_grad()
def logprobs_of(model, prompt, ids):
    """-> (len(ids), vocab_size) float32: model.py's logprobs where each of these ids was chosen."""
    logits, _ = model(torch.tensor([prompt + ids[:-1]]))
    return logits[0, len(prompt) - 1:].float().log_softmax(dim=-1)


def compare(served, model, prompts, rarest=-float("inf")):
    """served: what serving returned; rarest: logprob below which tokens are left out -> Compared."""
    assert "error" not in served, served["error"]
    differences = []
    behind = []
    for answers in served["rounds"]:
        for prompt, answer in zip(prompts, answers, strict=True):
            wanted = logprobs_of(model, prompt, answer["ids"])
            for row, id, step in zip(wanted, answer["ids"], answer["logprobs"], strict=True):
                places = torch.tensor([int(place) for place in step])
                served_here = torch.tensor(list(step.values()))
                likely = row[places] > rarest
                differences.append((row[places] - served_here)[likely].abs().max())
                behind.append(row.max() - row[id])
    worst = torch.stack(differences).max().item()
    mean = torch.stack(differences).mean().item()
    return Compared(worst, mean, max(behind).item(), len(behind))


def assert_served(served, path, prompts, rarest=-float("inf")):
    """What was served from the directory `path` is what model.py computes, in float32."""
    compared = compare(served, nano.load_pretrained(path), prompts, rarest)
    print(compared)
    assert compared.worst < TOLERANCE
    assert compared.behind < TOLERANCE
    return compared


def shown(served):
    return {name: count for name, count in served.items() if name != "rounds"}


# ----------------------------------------------------------------------------------------------------------------------
# The properties.

def test_requests_that_wait_mix_and_come_back_are_served_as_model_py_computes_them(serving, hybrid):
    """17 prompts, 5 at a time, 64 tokens a step, twice: the second time from the prefix cache."""
    served = serving(hybrid, SEVENTEEN, new=32, rounds=2)
    compared = assert_served(served, hybrid, SEVENTEEN)
    assert compared.positions >= 1000
    assert served["mixed"] >= 20
    assert served["continued"] >= 20
    assert served["preempted"] == 0
    cached = []
    for answers in served["rounds"]:
        cached.append(sum(answer["cached"] for answer in answers))
    print(shown(served), "cached", cached)
    assert cached[0] == 0
    assert cached[1] >= 500


def test_a_request_that_was_thrown_out_goes_on_as_if_it_had_not_been(serving, hybrid):
    """So few blocks of cache that requests must make room for others in the middle of their answers: short prompts, of
    which five fit in at once, and answers several blocks long."""
    prompts = some_prompts(5, 11, 20, 26, 31, 40)
    served = serving(hybrid, prompts, new=128, max_model_len=256, num_gpu_blocks_override=24)
    assert_served(served, hybrid, prompts)
    print(shown(served))
    assert served["preempted"] >= 3


LLAMA3 = nano.RopeScaling(4.0, 1.0, 4.0, 64)
VARIANTS = {
    "attention alone": dict(layout="t t t"),
    "kinds t m2 i n": dict(layout="m2 t i n m2 t"),
    "late expansion": dict(expand_before_conv=False),
    "biases everywhere": dict(proj_bias=True),
    "no biases at all": dict(conv_bias=False, dt_bias=False),
    "d_state 8, d_conv 2, dt_rank 3": dict(d_state=8, d_conv=2, dt_rank=3),
    "d_state 32, d_conv 3": dict(d_state=32, d_conv=3),
    "widths of its own": dict(d_inner=192, d_xb=64),
    "one key/value head": dict(n_kv_head=1),
    "as many as query heads": dict(n_kv_head=4),
    "sliding window": dict(sliding_window=24),
    "tied": dict(tie_embeddings=True),
    "all Mamba": dict(layout="m2 m2 m2"),
    "15B's proportions": dict(d_model=80, n_head=4, n_kv_head=1, head_dim=32, d_state=16),
    "qkv biases": dict(qkv_bias=True, proj_bias=True, family="qwen2"),
    "q and k norms": dict(qk_norm=True, family="qwen3"),
    "llama3 rope": dict(rope_scaling=LLAMA3, family="llama"),
    "all of nanoh1_hybrid": dict(rope_scaling=LLAMA3, qkv_bias=True, qk_norm=True,
                                 sliding_window=24),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_of_the_format_is_served_as_model_py_computes_it(serving, tmp_path, variant):
    nano.save_pretrained(random_model(**VARIANTS[variant]), tmp_path)
    assert_served(serving(tmp_path, SIX), tmp_path, SIX)


def test_bfloat16_is_off_by_no_more_than_model_py_in_bfloat16(serving, tmp_path):
    """The measure is model.py's own noise: its logprobs in bfloat16 against those in float32, with the same weights
    and tokens. What is served may be off from float32 by 1.5 times that in the mean, twice at the worst."""
    nano.save_pretrained(random_model(), tmp_path, dtype=torch.bfloat16)
    served = serving(tmp_path, SEVENTEEN, new=32, dtype="bfloat16")
    exact = nano.load_pretrained(tmp_path)
    rough = nano.load_pretrained(tmp_path, dtype=torch.bfloat16)
    compared = compare(served, exact, SEVENTEEN)
    noise = compare(with_logprobs_of(rough, served, SEVENTEEN), exact, SEVENTEEN)
    print(compared, noise)
    assert compared.mean < 1.5 * noise.mean
    assert compared.worst < 2 * noise.worst


def with_logprobs_of(model, served, prompts):
    """-> served, with the logprobs that `model` gives to the same tokens in place of those that were served."""
    rounds = []
    for answers in served["rounds"]:
        changed = []
        for prompt, answer in zip(prompts, answers, strict=True):
            rows = logprobs_of(model, prompt, answer["ids"])
            steps = []
            for row, step in zip(rows, answer["logprobs"], strict=True):
                steps.append({id: row[int(id)].item() for id in step})
            changed.append(answer | {"logprobs": steps})
        rounds.append(changed)
    return served | {"rounds": rounds}


# Faults that a checkpoint can show: what a reader who takes dt's bias once, or A's rates in the wrong order, makes of
# the right directory is what a right reader makes of these.
def halve_the_bias(mixer):
    mixer.dt_proj.bias.mul_(0.5)


def turn_the_rates(mixer):
    mixer.A_log.copy_(mixer.A_log.flip(1))


WRONG = {"dt's bias counts once": halve_the_bias, "A is in the wrong order": turn_the_rates}


@pytest.mark.parametrize("fault", [*FAULTS, *WRONG])
def test_the_comparison_sees_a_planted_fault(serving, hybrid, tmp_path, fault):
    path = hybrid
    if fault in WRONG:
        path = tmp_path
        model = nano.load_pretrained(hybrid)
        with torch.no_grad():
            for block in model.layers:
                if block.kind == "m2":
                    WRONG[fault](block.mixer)
        nano.save_pretrained(model, path)
    # Two at a time: slots are used again, and 70 and 150 tokens are read in pieces of 64.
    served = serving(path, SIX, max_num_seqs=2, fault=fault if fault in FAULTS else None)
    compared = compare(served, nano.load_pretrained(hybrid), SIX)
    print(fault, compared)
    assert compared.worst > 100 * TOLERANCE


def test_every_end_token_ends_an_answer(serving, tmp_path):
    model = random_model()
    [ids] = model.generate(SIX[-1:], 12, stop=())
    model.config = dataclasses.replace(model.config, eos_ids=(2, ids[5]))
    nano.save_pretrained(model, tmp_path)
    served = serving(tmp_path, SIX[-1:], may_end=True)
    assert served["rounds"][0][0]["ids"] == ids[:ids.index(ids[5]) + 1]


@pytest.mark.parametrize("lost", ["dt_proj.bias", "conv1d.weight", "in_proj.weight", "A_log", "D"])
def test_a_lost_tensor_is_named(serving, tmp_path, lost):
    from safetensors.torch import load_file, save_file
    nano.save_pretrained(random_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.0.mixer.{lost}"]
    save_file(tensors, file, metadata={"format": "pt"})
    error = serving(tmp_path, SIX)["error"]
    assert "layers.0.mixer" in error and lost in error


# ----------------------------------------------------------------------------------------------------------------------
# Over HTTP: a server as README.md starts it, the shipped teacher with 25 layers converted, 8 clients at once.

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """-> the server's address, and the directory that it serves."""
    import distill
    path = tmp_path_factory.mktemp("h25")
    teacher = nano.load_pretrained(ROOT / "teacher")
    student = nano.load_pretrained(ROOT / "teacher")
    distill.convert(student, teacher, nano.APRIEL15B[:25])
    nano.save_pretrained(student, path, tokenizer_from=ROOT / "teacher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path),
               "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "h25",
               "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "5",
               "--kv-cache-memory-bytes", str(256 << 20)]
    log = path.parent / "server.txt"
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address, path
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(address, process, log, seconds=600):
    until = time.time() + seconds
    while time.time() < until:
        assert process.poll() is None, f"the server died: {log.read_text()[-3000:]}"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address + "/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise AssertionError(f"no server after {seconds} s: {log.read_text()[-3000:]}")


def post(address, **body):
    """-> the answer's JSON."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


QUESTIONS = [f"Ann has {7 + i} apples. Bob has {i + 2} more than Ann. How many apples does Bob have?"
             for i in range(8)]


def test_eight_clients_over_http_get_what_model_py_computes(server):
    address, path = server
    enc = nano.load_tokenizer(path)
    prompts = [f"<s>[INST] {question} [/INST]" for question in QUESTIONS]
    answers = [None] * len(prompts)

    def ask(i):
        answer = post(address + "/v1/completions", model="h25", prompt=prompts[i], temperature=0,
                      max_tokens=48, logprobs=5, ignore_eos=True, return_token_ids=True,
                      return_tokens_as_token_ids=True)
        answers[i] = answer["choices"][0]

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    ids = [enc.encode(prompt, allowed_special="all") for prompt in prompts]
    assert [answer["prompt_token_ids"] for answer in answers] == ids
    served = []
    for answer in answers:
        steps = []
        for step in answer["logprobs"]["top_logprobs"]:
            steps.append({key.removeprefix("token_id:"): value for key, value in step.items()})
        served.append({"ids": answer["token_ids"], "logprobs": steps})
    compared = assert_served({"rounds": [served]}, path, ids, RARE)
    assert compared.positions == 8 * 48


def test_a_chat_over_http_is_what_generate_writes(server):
    address, path = server
    enc = nano.load_tokenizer(path)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    answer = post(address + "/v1/chat/completions", model="h25", messages=messages, temperature=0,
                  max_tokens=64, return_token_ids=True)
    prompt = enc.encode(nano.load_chat(path, enc).prompt(messages), allowed_special="all")
    assert answer["prompt_token_ids"] == prompt
    model = nano.load_pretrained(path)
    [wanted] = model.generate([prompt], 64)
    choice = answer["choices"][0]
    print(choice)
    stopped = choice["finish_reason"] == "stop"
    assert stopped == (len(wanted) < 64)
    assert choice["token_ids"] == wanted + list(model.config.eos_ids) * stopped
