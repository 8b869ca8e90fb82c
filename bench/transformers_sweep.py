"""Every causal type of transformers, tiny and random: is its loss on patches of one token its own?

    python -m bench.transformers_sweep                   # all types, 15 minutes; writes docs/transformers.md
    python -m bench.transformers_sweep llama mixtral     # some of them, printed alone

Each type runs in a process of its own, with a limit of time and memory. Loss and gradients of `apply(model, patch=1)`
are compared with the model's own, and at patch 4 with the model's own logits and `F.cross_entropy` of every target.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"
SECONDS, GIGABYTES = 45, 8
PATCH, LENGTH = 4, 32
TOLERANCE = 1e-4  # of the loss, and of the norm of all gradients; what differs by more is an error of this library

# What makes a configuration small, where it has the name. Widths of experts and of low ranks come after the others.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 128),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "global_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "kv_lora_rank", "q_lora_rank", "rotary_dim", "attention_head_dim"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 256),
    **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"], 1),
    **dict.fromkeys(["mamba_chunk_size", "mamba_d_state"], 16),
    "output_router_logits": True,
    "is_decoder": True,
}
# Given where the configuration has the name, even if it is None by default.
ALWAYS = ("head_dim", "num_key_value_heads", "pad_token_id", "is_decoder", "output_router_logits")
# What the general sizes do not fit; an ellipsis leaves the default.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 16},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v4": {"output_router_logits": False},  # no experts in the first two layers, as for flint
    "flint": {"output_router_logits": False},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": ..., "layer_types": ...},
    "zamba2": {"num_hidden_layers": ..., "layer_types": ...},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {
        **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16},
        **{"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "xlstm": {"num_blocks": 2, "num_heads": 4, "head_dim": ...},
}


def small_options(known: dict[str, Any]) -> dict[str, Any]:
    """Return what makes a configuration with these names and defaults small, nested ones too."""
    options = {name: value for name, value in SMALL.items() if known.get(name) is not None}
    options |= {name: SMALL[name] for name in ALWAYS if name in known}
    if "kv_lora_rank" in known:  # latent attention has as many heads for keys
        options["num_key_value_heads"] = options["num_attention_heads"]
    if known.get("layer_types"):
        options["layer_types"] = known["layer_types"][: options.get("num_hidden_layers", 2)]
    for name, value in known.items():
        if isinstance(value, dict) and "model_type" in value:
            options[name] = {"model_type": value["model_type"], **small_options(value)}
    return options


class Row(NamedTuple):
    """One type's line of the table."""

    type: str
    model: str
    outcome: str
    note: str = ""
    loss: float | None = None
    gradient: float | None = None
    patch_loss: float | None = None


def small_model(kind: str) -> Any:
    """Return a tiny random model of this type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config_class = type(AutoConfig.for_model(kind))
    known = config_class().to_dict()
    options = small_options(known)
    options |= SPECIAL.get(kind, {})
    options = {name: value for name, value in options.items() if value is not ...}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**options), attn_implementation="eager")
    if sum(parameter.numel() for parameter in model.parameters()) > 30e6:
        raise MemoryError("more than 30M parameters with every size that is known made small")
    with torch.no_grad():  # so that logits differ, and arithmetic that is lost shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model.eval()


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """Return all gradients of a loss, in one vector."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([
        (torch.zeros_like(parameter) if grad is None else grad).flatten().double()
        for parameter, grad in zip(parameters, found, strict=True)
    ])  # fmt: skip


def expected_at_patch(model: Any, patched: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss at `PATCH` as one would write it: mean embeddings, the model's own logits, targets one by one."""
    inputs = model.get_input_embeddings()(ids).unflatten(1, (-1, PATCH)).mean(2) * patched.formulation.input_scale
    outputs = model(inputs_embeds=inputs, **patched.no_cache)
    targets = labels.unflatten(1, (-1, PATCH))[:, 1:]
    logits = outputs.logits[:, :-1].float().unsqueeze(2).expand(-1, -1, PATCH, -1)
    loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
    auxiliary = getattr(outputs, "aux_loss", None)
    if auxiliary is None:
        return loss
    names = ("router_aux_loss_coef", "aux_loss_coef")
    weight = next(getattr(model.config, name) for name in names if hasattr(model.config, name))
    return loss + weight * auxiliary


def compare(kind: str) -> Row:
    """Build one type's model and compare."""
    from npp_kernels.integrations.transformers import UnsupportedModelError, apply

    try:
        model = small_model(kind)
    except Exception as error:
        return Row(kind, "", "not built", _first_line(error))
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 100, (2, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, 5:9] = labels[1, 20:] = -100
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    try:
        own = model(input_ids=ids, labels=labels, **options).loss
        own_gradients = gradients(model, own)
    except Exception as error:
        return Row(kind, name, "own forward fails", _first_line(error))
    try:
        patched = apply(model, 1)
    except UnsupportedModelError as error:
        return Row(kind, name, "refused", str(error).removeprefix("model: "))
    formulation = patched.formulation
    ours = model(input_ids=ids, labels=labels).loss
    difference = (gradients(model, ours) - own_gradients).norm() / own_gradients.norm()
    patched.patch = PATCH
    coarse = model(input_ids=ids, labels=labels).loss
    expected = expected_at_patch(model, patched, ids, labels)
    outcome = "fused" if formulation.fused else "own logits"
    notes = [formulation.reason]
    if formulation.softcap is not None:
        notes.append(f"soft cap {formulation.softcap:g}")
    if formulation.input_scale != 1:
        notes.append(f"embeddings times {formulation.input_scale:g}")
    if not formulation.inside:
        notes.append("the loss is formed after the model's forward")
    figures = (abs(ours - own).item(), difference.item(), abs(coarse - expected).item())
    if not max(figures) <= TOLERANCE:
        outcome = "DIFFERS"
    return Row(kind, name, outcome, "; ".join(filter(None, notes)), *figures)


def _first_line(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _child(kind: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = GIGABYTES << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        pipe.send(compare(kind))
    except Exception as error:
        pipe.send(Row(kind, "", "FAILS", _first_line(error)))


def run(kind: str) -> Row:
    """Compare in a process of its own, and end it after its time."""
    context = multiprocessing.get_context("fork")  # transformers is imported once
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv() if ours.poll(SECONDS) else Row(kind, "", "not built", f"took more than {SECONDS} s")
    except EOFError:
        row = Row(kind, "", "not built", f"the process died (more than {GIGABYTES} GiB, or a crash)")
    process.kill()
    process.join()
    return row


def table(rows: list[Row]) -> str:
    """Return the rows in Markdown."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}"

    head = "| type | model | loss | difference of the loss | of the gradients | at patch 4 | note |"
    lines = [head, "| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        note = row.note.replace("|", "\\|")
        figures = " | ".join(map(shown, row[4:]))
        lines.append(f"| {row.type} | {row.model} | {row.outcome} | {figures} | {note} |")
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    """Return the page that is kept in docs/."""
    import transformers

    counts = Counter(row.outcome for row in rows)
    listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    return f"""# Causal language models of transformers

Written by `python -m bench.transformers_sweep`; transformers {transformers.__version__}, torch {torch.__version__}.
Each type that `AutoModelForCausalLM` knows, as a tiny random model in fp32: its loss and gradients at patch 1 against
its own (absolute; relative, in the norm of all), and its loss at patch 4 against the model's own logits on mean
embeddings, with every target scored by itself.

{len(rows)} types: {listed}.

- **fused**: the loss applies the output layer, and the logits never exist.
- **own logits**: the loss takes the logits that the model computes, for the reason in the note.
- **refused**: `apply` raises `UnsupportedModelError`, with the note.
- **own forward fails**: the model itself does not run on ids and labels alone, as it was made small here.
- **not built**: no tiny model could be made from the type's configuration with the sizes that the script knows.

{table(rows)}
"""


def main() -> int:
    """Run the types that are asked for; without any, all of them, and write the page."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    kinds = options.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = []
    for index, kind in enumerate(kinds):
        rows.append(run(kind))
        print(f"[{index + 1}/{len(kinds)}]", *rows[-1], flush=True)
    if not options.types:
        PAGE.write_text(page(rows), encoding="utf-8")
    print(dict(Counter(row.outcome for row in rows)))
    return int(any(row.outcome in ("DIFFERS", "FAILS") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
