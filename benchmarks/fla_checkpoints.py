"""Compare converted checkpoints with flash-linear-attention's own models, on a GPU.

    python benchmarks/fla_checkpoints.py             # all configurations
    python benchmarks/fla_checkpoints.py path_attn   # those whose names begin so
    python benchmarks/fla_checkpoints.py --table     # of the rows, as in docs/transformers.md

Random models are made and saved by flash-linear-attention, converted to ours, and back. Theirs
runs in two ways: in its fast one (chunks, or its parallel kernels of PaTH, which round reflectors
to float16) and in its plain one (its recurrent kernels, or PaTH token by token through its cache).
A row has the largest difference of logits between theirs in its plain way and ours, and between its
two ways; the errors of all against ours in float64; and how long greedy continuations agree. All
are relative to the largest logit. `problems` is what has to hold; the exit status is 1 where it
does not.

Their kernels run in the first of their tuning configurations, and `torch.compile` inside theirs
is off: both cost minutes and change nothing here. Their products of float32 are not TF32.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recording import RESULTS, append

FILE = "fla-checkpoints-h200.csv"
COLUMNS = (
    "date", "case", "dtype", "difference", "theirs_two_ways", "error", "error_theirs",
    "error_theirs_fast", "cached", "greedy", "tie", "note", "seconds", "device", "torch",
    "transformers",
)  # fmt: skip
DTYPES = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
B, T, PROMPT, NEW_TOKENS, VOCABULARY = 2, 200, 40, 24, 211

MODELS = {
    "delta_net": "DeltaNet",
    "gated_deltanet": "GatedDeltaNet",
    "gated_deltaproduct": "GatedDeltaProduct",
    "path_attn": "PaTHAttention",
}
SHARED: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
# By name, which begins with the kind of model: what differs from their defaults.
CASES: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 2},
    "delta_net-neg-tied": {"num_heads": 2, "allow_neg_eigval": True, "tie_word_embeddings": True},
    "delta_net-no-conv": {"num_heads": 4, "use_short_conv": False, "allow_neg_eigval": True},
    "delta_net-gate-expand": {"num_heads": 2, "use_gate": True, "expand_k": 0.5, "expand_v": 1.5},
    "delta_net-relu-sum": {"num_heads": 4, "qk_activation": "relu", "qk_norm": "sum"},
    "delta_net-elu-conv3": {"num_heads": 2, "qk_activation": "elu", "conv_size": 3},
    "delta_net-attention": {
        "num_heads": 2,
        "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": None},
    },
    "gated_deltanet": {"num_heads": 2, "head_dim": 48},
    "gated_deltanet-neg-128": {
        "num_heads": 1, "head_dim": 128, "expand_v": 1.0, "allow_neg_eigval": True,
        "tie_word_embeddings": True,
    },
    "gated_deltanet-no-gate-no-conv": {
        "num_heads": 2, "head_dim": 64, "expand_v": 1.5, "use_gate": False,
        "use_short_conv": False,
    },
    "gated_deltanet-value-heads": {
        "num_heads": 2, "num_v_heads": 4, "head_dim": 32, "expand_v": 1.0,
        "allow_neg_eigval": True,
    },
    "gated_deltanet-window": {
        "num_heads": 2, "head_dim": 64, "expand_v": 1.0,
        "attn": {"layers": [0, 2], "num_heads": 2, "window_size": 16, "rope_theta": 5_000.0},
    },
    "gated_deltaproduct-1": {"num_heads": 2, "head_dim": 64, "use_forget_gate": True},
    "gated_deltaproduct-2-neg": {
        "num_heads": 2, "head_dim": 64, "expand_v": 1.0, "num_householder": 2,
        "use_forget_gate": True, "allow_neg_eigval": True,
    },
    "gated_deltaproduct-2-no-gates-tied": {
        "num_heads": 2, "head_dim": 32, "num_householder": 2, "use_output_gate": False,
        "allow_neg_eigval": True, "tie_word_embeddings": True,
    },
    "gated_deltaproduct-3-no-conv": {
        "num_heads": 2, "head_dim": 64, "expand_v": 1.0, "num_householder": 3,
        "use_short_conv": False, "allow_neg_eigval": True,
    },
    "gated_deltaproduct-3-neg": {
        "num_heads": 2, "head_dim": 32, "expand_v": 1.5, "num_householder": 3,
        "use_forget_gate": True, "allow_neg_eigval": True,
    },
    "path_attn": {"num_heads": 2},
    "path_attn-gates": {"num_heads": 2, "use_forget_gate": True, "tie_word_embeddings": True},
    "path_attn-key-heads": {"num_heads": 4, "num_kv_heads": 2, "use_forget_gate": True},
    "path_attn-no-conv": {"num_heads": 2, "use_w_shortconv": False, "use_forget_gate": True},
    "path_attn-whole-w": {"num_heads": 2, "use_low_rank_w": False},
}  # fmt: skip


def prepare() -> None:
    """Set what must be set before their modules are imported."""
    import triton.runtime.autotuner as autotuner

    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    made = autotuner.Autotuner.__init__

    def with_one_configuration(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.configs = self.configs[:1]

    autotuner.Autotuner.__init__ = with_one_configuration
    import fla.layers.attn

    # flash_attn may not be installed, and their attention layers want nothing else of it.
    if fla.layers.attn.flash_attn_func is None:
        fla.layers.attn.flash_attn_func = attend
        fla.layers.attn.flash_attn_varlen_func = attend_packed


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """Answer as `flash_attn_func` does; q is `[B, T', HQ, K]`, the last of the keys' T tokens."""
    assert causal
    queries, keys = q.shape[1], k.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if window_size[0] >= 0:
        seen = seen.triu(keys - queries - window_size[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Answer as `flash_attn_varlen_func` does; q is `[T', HQ, K]`, all sequences end to end."""
    rows = zip(
        *(x.split(options["cu_seqlens_q"].diff().tolist()) for x in (q,)),
        *(x.split(options["cu_seqlens_k"].diff().tolist()) for x in (k, v)),
        strict=True,
    )
    window = options["window_size"]
    return torch.cat([attend(*(x[None] for x in row), True, window)[0] for row in rows])


def make_theirs(case: str, seed: int = 0) -> Any:
    """Return their model with random parameters, none of them where an error would not show."""
    import fla.models

    name = MODELS[case.split("-")[0]]
    torch.manual_seed(seed)
    config = getattr(fla.models, f"{name}Config")(**SHARED, **CASES[case])
    model = getattr(fla.models, f"{name}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "conv1d" in name or name.endswith("proj.bias"):
                parameter.normal_(std=0.5)
    return model.eval()


def plain_logits(theirs: Any, tokens: Tensor) -> Tensor:
    """Return the logits of their model in its plain way."""
    if theirs.config.model_type == "path_attn":
        return cached_logits(theirs, tokens, 1)
    modes = {}
    for layer in theirs.model.layers:
        modes[layer] = getattr(layer.attn, "mode", None)
        layer.attn.mode = "fused_recurrent"
    logits = theirs(tokens, use_cache=False).logits
    for layer, mode in modes.items():
        layer.attn.mode = mode
    return logits


def cached_logits(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    """Return the logits of a prompt read at once and of the tokens behind it, one at a time."""
    mask = torch.ones_like(tokens)
    options: dict[str, Any] = {"use_cache": True}
    output = model(tokens[:, :prompt], attention_mask=mask[:, :prompt], **options)
    logits = [output.logits]
    for t in range(prompt, tokens.shape[1]):
        output = model(
            tokens[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            past_key_values=output.past_key_values,
            **options,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def convert_both_ways(theirs: Any, folder: Path) -> tuple[Any, Any, Any]:
    """Return ours, theirs, and theirs made of ours, each as transformers loads it."""
    from transformers import AutoModelForCausalLM

    import householder.hf.modeling  # noqa: F401 - registers the model
    from householder.hf.fla import convert

    theirs.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    convert(folder / "ours", folder / "back")
    ours = AutoModelForCausalLM.from_pretrained(folder / "ours", dtype="auto")
    loaded, again = (
        type(theirs).from_pretrained(folder / name, dtype="auto") for name in ("theirs", "back")
    )
    return ours.eval(), loaded.eval(), again.eval()


@torch.no_grad()
def measure(case: str, dtype: str, device: str) -> dict[str, object]:
    """Return a row's figures.

    Raises:
        AssertionError: theirs made of ours again has other parameters.
    """
    theirs = make_theirs(case).to(getattr(torch, dtype))
    tokens = torch.randint(1, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, again = convert_both_ways(theirs, Path(folder))
    state = again.state_dict()
    for name, x in theirs.state_dict().items():
        assert x.dtype == state[name].dtype, name
        assert torch.equal(x, state[name]), name
    exact_model = copy.deepcopy(ours.model).double()
    exact = exact_model(tokens).to(device)
    ours = ours.to(device, getattr(torch, dtype))
    theirs, again, tokens = theirs.to(device), again.to(device), tokens.to(device)
    results = {
        "ours": ours(tokens).logits,
        "theirs": plain_logits(theirs, tokens),
        "cached": cached_logits(ours, tokens[:, : PROMPT + NEW_TOKENS], PROMPT),
    }
    note = ""
    try:
        results["fast"] = theirs(tokens, use_cache=False).logits
    except AssertionError as error:  # some of their kernels refuse float32
        note = str(error)
    largest = exact.abs().max()

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a.double() - b.double()).abs().max() / largest).item()

    decoded = exact[:, : PROMPT + NEW_TOKENS]
    row: dict[str, object] = {
        "difference": distance(results["ours"], results["theirs"]),
        "error": distance(results["ours"], exact),
        "error_theirs": distance(results["theirs"], exact),
        "cached": distance(results["cached"], decoded),
        "note": note,
    }
    if "fast" in results:
        row["theirs_two_ways"] = distance(results["fast"], results["theirs"])
        row["error_theirs_fast"] = distance(results["fast"], exact)
    return {**row, **compare_greedy(ours, theirs, exact_model, tokens[:, :PROMPT])}


def compare_greedy(ours: Any, theirs: Any, exact: Any, prompt: Tensor) -> dict[str, object]:
    """Return how long greedy continuations agree, and why not longer."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    continued = ours.generate(prompt, attention_mask=mask, **options)
    try:
        expected = theirs.generate(prompt, attention_mask=mask, **options)
    except AssertionError:  # their PaTH in some versions of transformers
        expected = continue_greedily(theirs, prompt)
    return agreement(exact, continued.cpu(), expected.cpu())


def continue_greedily(model: Any, tokens: Tensor) -> Tensor:
    mask = tokens.new_ones(tokens.shape[0], PROMPT + NEW_TOKENS)
    read, past = 0, None
    while tokens.shape[1] < PROMPT + NEW_TOKENS:
        output = model(
            tokens[:, read:],
            attention_mask=mask[:, : tokens.shape[1]],
            past_key_values=past,
            use_cache=True,
        )
        read, past = tokens.shape[1], output.past_key_values
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def agreement(exact: Any, ours: Tensor, theirs: Tensor) -> dict[str, object]:
    """Return how many new tokens agree, and of rows that part how near the two tokens were.

    Args:
        exact: our model in float64.
        ours: tokens `[B, PROMPT + NEW_TOKENS]`.
        theirs: the same from theirs.
    """
    counts, gaps = [], []
    for row, other in zip(ours, theirs, strict=True):
        same = int((row == other).long().cumprod(0).sum())
        counts.append(same - PROMPT)
        if same < len(row):
            logits = exact(row[None, :same])[0, -1]
            gaps.append(
                ((logits[row[same]] - logits[other[same]]).abs() / logits.abs().max()).item()
            )
    return {
        "greedy": "/".join(map(str, counts)) + f" of {NEW_TOKENS}",
        "tie": max(gaps, default=0.0),
    }


def problems(row: dict[str, Any]) -> list[str]:
    """Return what of a row must not be: nothing, where the converted model is the same.

    Ours may err twice as much as theirs, plus one rounding, and in float32 a few roundings, where
    both are the same function; greedy continuations part only where two tokens are as near as the
    errors.
    """
    if "tie" not in row:
        return [str(row["note"])]
    rounding = DTYPES[row["dtype"]]
    errors = [row["error_theirs"], row.get("error_theirs_fast", 0.0)]
    allowed = 2 * max(errors) + rounding
    limits = {"error": allowed, "cached": allowed, "tie": 2 * max(row["cached"], *errors)}
    if row["dtype"] == "float32":
        limits |= {"error": 100 * rounding, "cached": 100 * rounding}
        # Their forget gates are log(1 + exp(x)), which keeps few digits of small ones: 3.5e-5.
        limits["difference"] = 1e-4
    return [
        f"{name} must be at most {limit:.1e}"
        for name, limit in limits.items()
        if not row[name] <= limit  # nor NaN
    ]


def run(task: tuple[str, str, str]) -> dict[str, object]:
    case, dtype, device = task
    import transformers

    row: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "case": case,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    begun = time.perf_counter()
    try:
        return row | measure(case, dtype, device) | {"seconds": int(time.perf_counter() - begun)}
    except Exception as error:  # one failure does not lose the rest, and its row says so
        traceback.print_exc()
        return row | {"note": f"{type(error).__name__}: {str(error)[:200]}"}


def table(path: Path) -> str:
    """Return the newest row of each configuration as a line of Markdown."""
    with path.open(newline="") as file:
        rows = {(row["case"], row["dtype"]): row for row in csv.DictReader(file)}
    lines = [
        "| configuration | float32: ours and theirs | theirs, two ways | greedy "
        "| bfloat16: errors of ours, theirs plain, theirs fast | greedy |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        cells = [f"`{case}`"]
        for dtype, names in (
            ("float32", ("difference", "theirs_two_ways")),
            ("bfloat16", ("error", "error_theirs", "error_theirs_fast")),
        ):
            row = rows.get((case, dtype), {})
            figures = [row.get(name) or "–" for name in names]
            cells += figures if dtype == "float32" else [", ".join(figures)]
            tie = float(row.get("tie") or 0.0)
            greedy = row.get("greedy", "–").replace("/", ", ").replace(f" of {NEW_TOKENS}", "")
            cells.append(greedy + (f"; gap {tie:.1e}" if tie else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prefix", nargs="?", default="")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(options.results / FILE))
        return 0
    dtypes = [options.dtype] if options.dtype else DTYPES
    tasks = [(c, d, options.device) for d in dtypes for c in CASES if c.startswith(options.prefix)]
    wrong = 0
    with multiprocessing.get_context("spawn").Pool(options.workers, prepare) as pool:
        for row in pool.imap_unordered(run, tasks):
            figures = {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in row.items()}
            append(options.results / FILE, COLUMNS, [figures])
            print(*(figures.get(c, "") for c in COLUMNS[1:13]), sep="  ", flush=True)
            for problem in problems(row):
                wrong += 1
                print(f"    WRONG: {problem}", flush=True)
    print(f"{len(tasks)} rows, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
