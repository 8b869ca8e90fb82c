"""Runs of TorchTitan's own trainer for `test_torchtitan.py`, in processes of their own: it changes global state.

python -m tests.torchtitan_runs SCENARIO RESULTS          # RESULTS is written with torch.save
"""

import dataclasses
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from examples import torchtitan_bags as example  # first: it lets TorchTitan run on the CPU
from npp_kernels import PatchSchedule
from npp_kernels.integrations import torchtitan as integration
from npp_kernels.integrations.torchtitan import LinearPatchLoss, with_patches

import torchtitan.models.common.attention as attention  # isort: skip
import torchtitan.trainer  # isort: skip
from torch.distributed.fsdp import FSDPModule, fully_shard  # isort: skip
from torch.distributed.tensor import DTensor  # isort: skip
from torch.nn.attention.flex_attention import create_block_mask  # isort: skip
from torchtitan.components.loss import ChunkedLossWrapper  # isort: skip
from torchtitan.distributed import cudagraph  # isort: skip

attention._compiled_create_block_mask = create_block_mask  # compiling takes longer than all that is run here
torchtitan.trainer.time = SimpleNamespace(perf_counter=torchtitan.trainer.time.perf_counter, sleep=lambda seconds: None)

SEQ_LEN, BATCH_SIZE, PEAK_LR = 96, 2, 1e-3


def recipe(steps, *, accumulate=1, num_chunks=4, **training):
    config = example.small_recipe()
    config.model_spec.model.layers = config.model_spec.model.layers[:1]
    config.loss = dataclasses.replace(config.loss, num_chunks=num_chunks)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:  # the default needs a later torch than 2.13 for FSDP
        config.parallelism = dataclasses.replace(config.parallelism, spmd_backend="partial_dtensor")
    values = {"steps": steps, "seq_len": SEQ_LEN, "local_batch_size": BATCH_SIZE, **training}
    config.training = dataclasses.replace(config.training, global_batch_size=accumulate * BATCH_SIZE * ranks, **values)
    config.optimizer.param_groups[-1].optimizer_kwargs["lr"] = PEAK_LR
    config.lr_scheduler = dataclasses.replace(config.lr_scheduler, warmup_steps=5, decay_ratio=0.0)
    config.validator = dataclasses.replace(config.validator, enable=False)
    return config


def whole(model):
    """Return the parameters of a model, gathered from all ranks."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def run(config, *, until=None):
    """Train, and return what the trainer logs of each step, its validation losses, and the weights at both ends."""
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # Gloo has no sum that multiplies as well
    steps, validation = {}, {}

    def log(step, loss, max_loss, grad_norm, extra_metrics):
        flops = trainer.metrics_processor.num_flops_per_token
        steps[step] = {
            "loss": loss, "max_loss": max_loss, "grad_norm": grad_norm, "flops_per_token": flops, **extra_metrics
        }  # fmt: skip

    trainer.metrics_processor.log = log
    trainer.metrics_processor.log_validation = lambda loss, step: validation.update({step: loss})
    first = whole(trainer.model_parts[0])
    if until is not None:
        trainer.should_continue_training = lambda: trainer.step < until
    trainer.train()
    trainer.close()
    return {"steps": steps, "validation": validation, "first": first, "last": whole(trainer.model_parts[0])}


def documents(tokens, labels, positions):
    """Yield the tokens and labels of each document of a batch."""
    for row_tokens, row_labels, row_positions in zip(tokens, labels, positions, strict=True):
        starts = [index for index, place in enumerate(row_positions.tolist()) if place == 0 or index == 0]
        for start, end in zip(starts, [*starts[1:], len(row_tokens)], strict=True):
            yield row_tokens[start:end], row_labels[start:end]


def batches(config, ranks, dataloader=None):
    """Return the iterators of all ranks' batches."""
    dataloader = dataloader or config.dataloader
    return [
        iter(
            dataloader.build(
                dp_world_size=ranks, dp_rank=rank, tokenizer=example.Letters.Config().build(),
                seq_len=SEQ_LEN, local_batch_size=BATCH_SIZE,
            )
        )
        for rank in range(ranks)
    ]  # fmt: skip


def plain_model(config, weights):
    """Return TorchTitan's model without its trainer, on given weights."""
    model = config.model_spec.model.build()
    model.load_state_dict(weights, strict=False)
    return model


def summed_loss(model, tokens, labels, patch):
    """Return the sum of one document's losses in plain torch, one patch after another, and their number."""
    num_patches = len(tokens) // patch
    if not num_patches:
        return 0.0, 0
    patches = tokens[: num_patches * patch].view(num_patches, patch)
    hidden = F.embedding(patches, model.tok_embeddings.weight).mean(1).unsqueeze(0)
    causal = SimpleNamespace(mask_mod=lambda b, h, query, key: query >= key)
    for layer in model.layers.values():
        hidden = layer(hidden, causal, None)
    logits = model.lm_head(model.norm(hidden))[0]
    rows, targets = [], []
    for row in range(num_patches):
        for index in range((row + 1) * patch - 1, min((row + 2) * patch - 1, len(labels))):
            if labels[index] != -100:
                rows.append(row)
                targets.append(labels[index])
    if not rows:
        return 0.0, 0
    return F.cross_entropy(logits[rows], torch.stack(targets), reduction="sum"), len(rows)


def reference(config, schedule, weights, rates, *, ranks, accumulate=1):
    """Train in plain torch, document by document, on the batches of all ranks; return each step's loss."""
    model = plain_model(config, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    loaders, losses = batches(config, ranks), {}
    for step in range(1, config.training.steps + 1):
        total, count = 0.0, 0
        for loader in loaders * accumulate:
            inputs, labels = next(loader)
            for document in documents(inputs["input"], labels, inputs["positions"]):
                loss, number = summed_loss(model, *document, schedule.at(step - 1).patch)
                total, count = total + loss, count + number
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        losses[step] = (total / count).item()
    return losses, {name: value.detach().clone() for name, value in model.named_parameters()}


def learning_rates(result):
    """Return the learning rate of each step, which TorchTitan logs under one name."""
    return {
        step: next(value for name, value in values.items() if "lr" in name) for step, values in result["steps"].items()
    }


def against_plain(ranks):
    """Train a hundred steps as TorchTitan does, and with patches of 1."""
    plain = run(recipe(100))
    ours = run(with_patches(recipe(100), PatchSchedule([(1, 100)])))
    return {"plain": plain, "ours": ours}


def against_reference(ranks):
    """Train patches of 4, then tokens, with accumulation, and the same in plain torch."""
    schedule = PatchSchedule([(4, 20), (1, 30)])
    ours = run(with_patches(recipe(30, accumulate=2), schedule))
    losses, last = reference(recipe(30), schedule, ours["first"], learning_rates(ours), ranks=ranks, accumulate=2)
    return {"ours": ours, "losses": losses, "last": last}


def with_linear_loss(config):
    """Return a recipe with output layer and loss in one, in several chunks even here."""
    config.loss = LinearPatchLoss.Config(chunk_rows=16)
    return config


def linear_loss(ranks):
    """Train with output layer and loss in one, and in chunks as TorchTitan does, in two micro-batches a step."""
    schedule = PatchSchedule([(4, 6), (1, 12)])

    def own(loss):
        return loss(recipe(12, accumulate=2))

    def patches(loss):
        config = recipe(12, accumulate=2)
        config.validator = dataclasses.replace(config.validator, enable=True, freq=3, steps=2)
        return with_patches(loss(config), schedule)

    def tied(loss):
        config = recipe(12, accumulate=2)
        config.model_spec.model.enable_weight_tying = True
        config.parallelism = dataclasses.replace(config.parallelism, fsdp_reshard_after_forward="always")
        return with_patches(loss(config), schedule)

    return {
        make.__name__: {"ours": run(make(with_linear_loss)), "chunked": run(make(lambda config: config))}
        for make in (own, patches, tied)
    }


def linear_loss_sharded(ranks):
    """Return loss and gradients of an output layer that FSDP shards alone, and what plain torch has for all ranks."""
    torch.manual_seed(3)
    hidden, targets = torch.randn(ranks, 2, 8, 16), torch.randint(60, (ranks, 2, 8, 4))
    targets[0, :, :5] = -100  # the ranks have different numbers of targets
    head = torch.nn.Linear(16, 60)
    whole_head = torch.nn.Linear(16, 60)
    whole_head.load_state_dict(head.state_dict())
    fully_shard(head)
    head.set_gradient_divide_factor(1.0)  # both as TorchTitan's trainer and these runs have them
    head.set_force_sum_reduction_for_comms(True)
    rank = int(os.environ["RANK"])
    count = (targets != -100).sum()

    loss_fn = LinearPatchLoss.Config(chunk_rows=6).build()
    loss_fn.set_lm_head(head)
    own = hidden[rank].clone().requires_grad_()
    loss, _ = loss_fn(own, targets[rank], count)
    loss.backward()
    sharded_after = [isinstance(head.weight, DTensor)]
    with torch.no_grad():
        summed, _ = loss_fn(own, targets[rank])
    sharded_after.append(isinstance(head.weight, DTensor))

    everything = hidden.clone().requires_grad_()
    logits = whole_head(everything).unsqueeze(-2).expand(*targets.shape, 60)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    (losses.sum() / count).backward()
    return {
        "ours": [loss.detach(), summed, own.grad, head.weight.grad.full_tensor(), head.bias.grad.full_tensor()],
        "expected": [
            losses[rank].sum().detach() / count, losses[rank].sum().detach(), everything.grad[rank],
            whole_head.weight.grad, whole_head.bias.grad,
        ],
        "sharded_after": sharded_after,
    }  # fmt: skip


def linear_loss_of_a_slice(ranks):
    """Return what is said of an output layer that tensor parallelism cuts."""
    config = with_linear_loss(recipe(1))
    config.parallelism = dataclasses.replace(config.parallelism, tensor_parallel_degree=ranks)
    config.training.global_batch_size = BATCH_SIZE
    try:
        run(config)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def loader(ranks):
    """Return the first rows of TorchTitan's own data loader, and the documents that went in."""
    (rows,) = batches(recipe(1), 1)
    letters = example.Letters.Config().build()
    texts = example.generated_text("train")["text"]
    return {"batch": next(rows), "documents": [letters.encode(text) for text in texts[:10]]}


def chunks(ranks):
    """Train patches of 4 with losses in 8, 2 and no chunks."""
    schedule = PatchSchedule([(4, 10)])
    results = {number: run(with_patches(recipe(10, num_chunks=number), schedule)) for number in (8, 2)}
    whole_loss = recipe(10)
    assert isinstance(whole_loss.loss, ChunkedLossWrapper.Config)
    whole_loss.loss = whole_loss.loss.loss_fn
    results[0] = run(with_patches(whole_loss, schedule))
    return results


def resumed(ranks):
    """Train over a stage's end in one go, and interrupted inside the first stage, and inside the second."""
    schedule = PatchSchedule([(4, 8), (1, 14)])
    once = run(with_patches(recipe(14), schedule))
    config = with_patches(recipe(14), schedule)
    config.checkpoint = dataclasses.replace(config.checkpoint, enable=True, interval=1, last_save_model_only=False)
    parts = [run(config, until=until) for until in (5, 10, None)]
    return {"once": once, "parts": parts}


def validated(ranks):
    """Validate in a stage of patches, and with plain torch on single tokens and the same weights."""
    config = with_patches(recipe(7), PatchSchedule([(4, 7)]))
    config.validator = dataclasses.replace(config.validator, enable=True, freq=7, steps=3)
    ours = run(config)
    model, total, count = plain_model(recipe(7), ours["last"]), 0.0, 0
    (loader,) = batches(config, 1, dataclasses.replace(config.validator.dataloader, infinite=True))
    with torch.no_grad():
        for inputs, labels in (next(loader) for _ in range(3)):
            for document in documents(inputs["input"], labels, inputs["positions"]):
                loss, number = summed_loss(model, *document, 1)
                total, count = total + loss, count + number
    return {"ours": ours, "expected": (total / count).item()}


def graphs_on_gpu(ranks):
    """Train over a stage's end with TorchTitan's CUDA graphs, and without, with either loss."""
    schedule = PatchSchedule([(4, 6), (1, 12)])
    results = {}
    for name, change in (("chunked", lambda config: config), ("linear", with_linear_loss)):
        results[name] = {}
        for disabled in (False, True):
            config = change(recipe(12, accumulate=2, seq_len=512, disable_cuda_graphs=disabled))
            config.validator = dataclasses.replace(config.validator, enable=True, freq=3, steps=2)
            results[name][disabled] = run(with_patches(config, schedule))
    return results


def graphs(ranks):
    """Train over a stage's end under TorchTitan's own check of what a CUDA graph is replayed on."""
    wrapped = []

    class Replayed(cudagraph.CUDAGraphWrapper):
        def __call__(self, *arguments):
            self._validate_inputs(arguments)
            return self._fn(*arguments)

    def wrap(forward_backward):
        wrapped.append(None)

        def replayed(inputs, labels, global_valid_tokens, extra):
            positions = extra["positions"]
            if wrapped[-1] is None:
                wrapped[-1] = Replayed(lambda *_: None, [inputs, labels, global_valid_tokens, positions])
            wrapped[-1](inputs, labels, global_valid_tokens, positions)
            return forward_backward(inputs, labels, global_valid_tokens, extra)

        return replayed

    cudagraph._manager = SimpleNamespace(
        maybe_initialize=lambda: None, register=lambda wrapper: None, teardown=lambda: wrapped.append("torn down")
    )
    cudagraph.wrap_with_cuda_graph = torchtitan.trainer.wrap_with_cuda_graph = wrap
    schedule = PatchSchedule([(4, 4), (1, 8)])
    ours = run(with_patches(recipe(8, disable_cuda_graphs=False), schedule))
    events = [event if isinstance(event, str) else "wrapped" for event in wrapped]

    integration.PatchTrainer._begin_stage = lambda self, patch: None  # without it, the check has to fail
    try:
        run(with_patches(recipe(8, disable_cuda_graphs=False), schedule))
    except ValueError as error:
        return {"ours": ours, "events": events, "without": str(error)}
    return {"ours": ours, "events": events, "without": None}


SCENARIOS = {
    function.__name__: function
    for function in (
        against_plain, against_reference, linear_loss, linear_loss_sharded, linear_loss_of_a_slice, loader, chunks,
        resumed, validated, graphs, graphs_on_gpu,
    )
}  # fmt: skip


def main(names, path):
    """Run the scenarios, comma-separated, and let the first rank save their results."""
    results = {name: SCENARIOS[name](int(os.environ["WORLD_SIZE"])) for name in names.split(",")}
    if os.environ["RANK"] == "0":
        torch.save(results, path)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
