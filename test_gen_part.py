"""Tests of sample.py and bench.py, for test_model.py: everything on random models and in a fraction of a minute."""
import json
import os
import subprocess
import sys

import pytest
import torch

import bench
import sample
from model import (KV, Config, HybridLM, byte_characters, choose, join_projections, load_pretrained, load_tokenizer,
                   save_pretrained)

HERE = os.path.dirname(os.path.abspath(__file__))
LAYOUTS = {"attention": "t t t", "mamba": "m2 m2 m2", "mixed": "m2 t m2 t", "removed": "t n m2 i"}
SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"]


def small(layout="m2 t m2 t", **more):
    """A random model whose logits differ enough that greedy choices are no coin flips."""
    torch.manual_seed(0)
    layout = tuple(layout.split())
    model = HybridLM(Config(262, 32, len(layout), 4, 2, 16, 48, layout=layout, d_state=8, bos_id=256, eos_ids=(257,),
                            max_length=64, **more)).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2 and "A_log" not in name:
            p.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a small hybrid and a tokenizer of 256 bytes and 6 special tokens."""
    path = tmp_path_factory.mktemp("ckpt")
    save_pretrained(small(), path)
    vocab = {character: byte for character, byte in byte_characters().items()}
    vocab |= {text: 256 + i for i, text in enumerate(SPECIAL)}
    added = [{"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "special": True,
              "normalized": False} for i, text in enumerate(SPECIAL)]
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    with open(path / "tokenizer.json", "w") as f:
        json.dump({"added_tokens": added, "normalizer": None, "pre_tokenizer": pre, "decoder": pre,
                   "model": {"type": "BPE", "vocab": vocab, "merges": []}}, f)
    return str(path)


def script(name, *args, stdin="", env=()):
    """Run a script in a process of its own -> (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, os.path.join(HERE, name), *map(str, args)], input=stdin, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env))
    return done.returncode, done.stdout, done.stderr


def run_main(module, monkeypatch, capsys, *args, stdin=None):
    """Run a script's main() in this process, which is faster -> (stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", stdin)
    module.main()
    return capsys.readouterr()


# Generation: one model call per token, whatever else is in the batch.

@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ragged_batch_gives_what_each_prompt_gives_alone(layout):
    model = small(layout)
    prompts = [[5], [7, 8], [9, 10, 11, 12, 13, 14, 15], [1, 2, 3], [20] * 12]             # some shorter than the conv
    together = model.generate(prompts, 12, stop=())
    assert together == [model.generate([p], 12, stop=())[0] for p in prompts]
    assert len({tuple(o) for o in together}) > 1                                           # not all the same text


def test_sampled_text_does_not_depend_on_the_rest_of_the_batch(checkpoint, monkeypatch, capsys, tmp_path):
    lines = ["a", "bbb bbb bbb", "", "cc"]
    (tmp_path / "prompts").write_text("\n".join(lines) + "\n")
    common = ("--model", checkpoint, "--device", "cpu", "--temperature", "0.8", "--max-new-tokens", 8, "--seed", 5, "--json")
    out, _ = run_main(sample, monkeypatch, capsys, *common, "--prompt-file", tmp_path / "prompts", "--num-samples", 2)
    batch = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in batch] == [line for line in lines for _ in range(2)]
    for i, line in enumerate(lines):
        out, _ = run_main(sample, monkeypatch, capsys, *common, "--prompt", line, "--num-samples", 2)
        assert [json.loads(row)["ids"] for row in out.splitlines()] == [row["ids"] for row in batch[2 * i:2 * i + 2]]
    assert batch[0]["ids"] != batch[1]["ids"]                                              # two samples, two texts


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_chunked_prefill_equals_whole_prefill(layout):
    model, prompts = small(layout), [torch.randint(256, (n,)).tolist() for n in (23, 5, 17)]
    for batch in (prompts, prompts[:1]):
        whole, state = model.prefill(batch, 4)
        for chunk in (1, 2, 3, 7, 22, 23, 100):
            logits, other = model.prefill(batch, 4, chunk=chunk)
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
            for a, b in zip(state.layers, other.layers):
                for x, y in zip(a or (), b or ()):
                    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_cloned_state_is_untouched_by_what_the_original_does():
    model = small()
    logits, state = model.prefill([[3, 4, 5, 6, 7]], 20)
    copy, many = state.clone(), state.take([0, 0, 0])
    bigger = state.resize(40)
    first = [next_token.item() for next_token, _ in take(model.decode(logits, state), 10)]
    model.hidden(torch.tensor([[9, 9, 9]]), state)                                         # writes into the caches
    assert [t.item() for t, _ in take(model.decode(logits, copy), 10)] == first
    assert [t.item() for t, _ in take(model.decode(logits, bigger), 10)] == first
    rows = [t.tolist() for t, _ in take(model.decode(logits[[0, 0, 0]], many), 10)]
    assert rows == [[t] * 3 for t in first]
    assert bigger.nbytes()[0] == state.nbytes()[0] * 40 // 25 and bigger.nbytes()[1] == state.nbytes()[1]


def take(generator, n):
    return [next(generator) for _ in range(n)]


def test_joined_projections_change_nothing(tmp_path):
    model, tokens = small("t m2 n t i"), torch.randint(256, (2, 9))
    before = model(tokens)[0]
    join_projections(model)
    torch.testing.assert_close(model(tokens)[0], before, rtol=1e-5, atol=1e-5)
    attention = model.layers[0].self_attn                                                  # views, not copies
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.joined.untyped_storage().data_ptr()
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens)[0], before, rtol=1e-5, atol=1e-5)


def test_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).repeat(4000, 1)
    rngs = [torch.Generator().manual_seed(i) for i in range(len(logits))]
    draw = lambda **kw: choose(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "rngs": rngs} | kw)
    share = lambda tokens: torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(share(draw()), logits[0].softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(share(draw(temperature=2.0)), (logits[0] / 2).softmax(-1), atol=0.03, rtol=0)
    assert share(draw(temperature=0.0)).tolist() == [1, 0, 0, 0]
    assert share(draw(top_k=1)).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(share(draw(top_k=2)), torch.cat([logits[0, :2].softmax(-1), torch.zeros(2)]), atol=0.03, rtol=0)
    p = logits[0].softmax(-1)                                                              # 0.61 0.22 0.14 0.03
    assert share(draw(top_p=float(p[0]) - 0.01)).tolist() == [1, 0, 0, 0]
    assert (share(draw(top_p=float(p[0]) + 0.01)) > 0).tolist() == [True, True, False, False]
    assert (share(draw(top_k=100)) > 0).sum() == 4                                         # more than there are


# sample.py

def test_streamed_text_equals_the_decoded_tokens_at_split_characters(checkpoint, monkeypatch, capsys):
    text, enc, model = "a\u00e9\u20ac\U0001f600 \u4f60\u597d z", load_tokenizer(checkpoint), load_pretrained(checkpoint)
    ids = enc.encode(text)                                                                 # one token per byte
    assert len(ids) == len(text.encode())
    pieces = []
    for tail in ([257], [0xF0, 0x9F, 257]):                                                # the second ends inside an emoji
        script_of = iter([torch.tensor([token]) for token in ids + tail])
        monkeypatch.setattr(HybridLM, "decode", lambda *a, **k: ((token, None) for token in script_of))
        args = sample.argparse.Namespace(max_new_tokens=99, temperature=0, top_k=0, top_p=1, seed=0)
        pieces.append([])
        outputs, _, last, _ = sample.answer(model, enc, args, torch.zeros(1, 262), None, [0], pieces[-1].append)
        assert outputs[0] == ids + tail[:-1] and last == 257
    assert "".join(pieces[0]) == text and "\ufffd" not in "".join(pieces[0])
    assert "".join(pieces[1]) == text + "\ufffd"


def test_same_seed_same_text_and_another_seed_another(checkpoint, monkeypatch, capsys):
    run = lambda *more: run_main(sample, monkeypatch, capsys, "--model", checkpoint, "--device", "cpu", "--prompt", "hi",
                                 "--temperature", 1, "--max-new-tokens", 20, *more)[0]
    assert run("--seed", 1) == run("--seed", 1) != run("--seed", 2)
    assert run("--seed", 1, "--prefill-chunk", 1) == run("--seed", 1)


def test_json_has_the_promised_keys_and_true_byte_counts(checkpoint, monkeypatch, capsys):
    out, err = run_main(sample, monkeypatch, capsys, "--model", checkpoint, "--device", "cpu", "--prompt", "", "--raw",
                        "--max-new-tokens", 7, "--json")
    row, = map(json.loads, out.splitlines())
    assert {"prompt", "text", "tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "kv_bytes", "state_bytes"} <= set(row)
    _, state = small().prefill([[256]], 7)                                                 # an empty prompt is the begin token
    assert (row["kv_bytes"], row["state_bytes"]) == state.nbytes()
    assert row["tokens"] == len(row["ids"]) <= 7 and row["ids"] == small().generate([[256]], 7)[0]
    assert "prefill" in err and "KV cache" in err and "trained on" not in err


def test_a_context_above_the_trained_length_warns(checkpoint, monkeypatch, capsys):
    _, err = run_main(sample, monkeypatch, capsys, "--model", checkpoint, "--device", "cpu", "--prompt", "x" * 80,
                      "--max-new-tokens", 2)
    assert "trained on 64" in err


def test_chat_keeps_its_state_between_turns(checkpoint, monkeypatch, capsys):
    """Two turns with the state kept = one prompt that holds the whole conversation."""
    import io
    out, _ = run_main(sample, monkeypatch, capsys, "--model", checkpoint, "--device", "cpu", "--chat",
                      "--max-new-tokens", 9, stdin=io.StringIO("hello\nand again\n"))
    model, enc = load_pretrained(checkpoint), load_tokenizer(checkpoint)
    ids = enc.encode("<s>[INST] hello [/INST]", allowed_special="all")
    first = model.generate([ids], 9)[0]
    ids += first + enc.encode("</s>[INST] and again [/INST]", allowed_special="all")
    texts = [enc.decode(new) for new in (first, model.generate([ids], 9)[0])]
    assert out == "".join(text + "\n" for text in texts)


@pytest.mark.parametrize("name, args, words", [
    ("sample.py", ["--model", "no/such/dir"], "no such directory"), ("sample.py", ["--top-p", "0"], "--top-p"),
    ("sample.py", ["--prompt-file", "missing.txt", "--model", "CKPT"], "cannot read missing.txt"),
    ("bench.py", ["--shape", "70b"], "known are 15b"), ("bench.py", ["--ctx", "many"], "whole numbers")])
def test_user_errors_are_one_line_and_exit_code_2(checkpoint, name, args, words):
    code, out, err = script(name, *(checkpoint if a == "CKPT" else a for a in args))
    assert code == 2 and out == "" and words in err and err.count("\n") == 1, err


# bench.py

@pytest.mark.parametrize("shape", ["tiny", "1b"])
@pytest.mark.parametrize("k", [0, 25, 50])
def test_byte_accounting_equals_the_real_tensors(shape, k):
    config = bench.hybrid(bench.SHAPES[shape], k)
    assert config.layout.count("m2") == round(k * config.n_layer / 50)
    for dtype in (torch.float32, torch.bfloat16):
        size = bench.sizes(config, dtype, 24)
        with torch.device("meta"):                                                         # real sizes, no memory
            model = HybridLM(config)
            model = model.to(dtype) if dtype == torch.float32 else cast_like_loading(model, dtype)
            state = model.new_state(3, 24)
        assert tuple(n * 3 for n in (size["kv_bytes"], size["state_bytes"])) == state.nbytes()
        assert size["weight_bytes"] == sum(p.nbytes for p in model.parameters())
        assert size["params"] == sum(p.numel() for p in model.parameters())


def cast_like_loading(model, dtype):
    from model import cast
    return cast(model, "meta", dtype)


def test_the_random_model_and_its_filled_state_have_the_planned_sizes():
    config = bench.hybrid(bench.replace(bench.SHAPES["tiny"], n_layer=4, layout=()), 25)
    for dtype in (torch.float32, torch.bfloat16):
        size, model = bench.sizes(config, dtype, 40), bench.random_model(config, torch.device("cpu"), dtype)
        assert size["weight_bytes"] == sum(p.nbytes for p in model.parameters())
        with torch.no_grad():
            state = bench.filled_state(model, 2, 40)
            assert state.nbytes() == (2 * size["kv_bytes"], 2 * size["state_bytes"])
            assert all((m != 0).float().mean() > 0.99 for layer in state.layers for m in layer)
            part = bench.narrow(state, 1, 3)
            assert part.position == 37 and all(m.shape[0] == 1 for layer in part.layers for m in layer)
            assert bench.decode_steps(model, torch.tensor([[5]]), part, 3).shape == (1, 1)
        assert isinstance(state.layers[0], KV) or isinstance(state.layers[-1], KV)


def test_the_published_layers_are_the_ones_replaced():
    config = bench.SHAPES["15b"]
    assert sorted(bench.ORDER) == list(range(50))
    kept = [i for i, kind in enumerate(bench.hybrid(config, 30).layout) if kind == "t"]
    assert kept == [0, 1, 2, 4, *range(9, 20), 26, 28, 29, 34, 48]
    size = bench.sizes(bench.hybrid(config, 0), torch.bfloat16, 32768)                     # figures of gpu-design section 4
    assert abs(size["params"] / 14.97e9 - 1) < 1e-3 and abs(size["kv_bytes"] / 6.71e9 - 1) < 1e-3
    assert abs(bench.limit(size, 16, 4.3e12) / 506 - 1) < 0.01


def test_bench_end_to_end_on_the_tiny_shape(tmp_path):
    log = tmp_path / "rows.jsonl"
    code, out, err = script("bench.py", "--device", "cpu", "--ctx", 64, "--replace", "0,40", "--batch", "1,max", "--seconds", 0,
                            "--memory", 0.03, "--prefill-tokens", 32, "--what", "prefill,decode,scan", "--json", log)
    assert code == 0, err
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["row"] for row in rows] == ["H-0", "H-40", "scan loop", "scan chunk"]
    assert out.index("limit (batch)") < out.index("measured") and "instead of prefilling" in out
    for row in rows[:2]:
        assert row["decode"][-1]["batch"] == row["largest_batch"] > 1 and row["prefill_tokens_per_s"] > 0
        for cell in row["decode"]:
            share = 100 * cell["tokens_per_s"] / cell["limit_tokens_per_s"]
            assert abs(cell["percent_of_limit"] - share) < 1e-6
    assert rows[1]["ratio_to_h0"] > 0 and {"torch", "commit", "device", "dtype", "triton"} <= set(rows[0])


def test_a_row_that_does_not_fit_says_so_and_the_others_go_on(checkpoint, monkeypatch, capsys):
    out, _ = run_main(bench, monkeypatch, capsys, "--device", "cpu", "--model", checkpoint, "--replace", "0,50", "--ctx", 4096,
                      "--memory", 0.001, "--seconds", 0, "--batch", "1", "--what", "decode")
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()[:1]}
    assert "does not fit" in lines["H-0"] and "(1)" in lines["H-50"] and "does not fit" in lines["model"]
