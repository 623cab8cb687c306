"""STUB, dropped at merge: only the helpers of the real train_sft.py that sample.py and bench.py import."""
import sys

import torch

from model import UserError


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there; another name is checked. UserError if it is not available."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in have if have[kind]))
    if not have.get(name.split(":")[0], False):
        raise UserError(f"device {name!r} is not available here")
    return torch.device(name)


def pick_dtype(name, device):
    """"auto" -> bfloat16 on cuda, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype {name!r}: use float32 or bfloat16")
    return getattr(torch, name)


def run_main(main):
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def format_prompt(question):
    return f"<s>[INST] {question} [/INST]"
