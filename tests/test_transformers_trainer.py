"""`Trainer` and TRL's `SFTTrainer` on a `PatchSchedule`: the packages are real, the models tiny and random."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from tests.processes import environment
from tests.transformers_models import VOCAB_SIZE, llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")

from bench import transformers_sweep as sweep  # noqa: E402
from npp_kernels import PatchSchedule  # noqa: E402
from npp_kernels.integrations.transformers import apply  # noqa: E402
from npp_kernels.integrations.transformers_trainer import PatchCollator, PatchTrainerMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)
SCHEDULE = PatchSchedule([(4, 3), (1, 6)])


class PatchTrainer(PatchTrainerMixin, transformers.Trainer):
    pass


class PatchSFTTrainer(PatchTrainerMixin, trl.SFTTrainer):
    pass


def texts(count=64, *, shortest=5):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, 33, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, 100, (length,), generator=generator).tolist()} for length in lengths]


def arguments(path, kind=transformers.TrainingArguments, **options):
    general = {
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "learning_rate": 1e-3, "disable_tqdm": True,
        "use_cpu": True, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8, "seed": 0,
    }  # fmt: skip
    return kind(str(path), **{**general, **options})


def train(path, model=None, *, schedule=SCHEDULE, resume=None, patched=True, examples=None, **options):
    """Train, and return the trainer and what it logged of each step."""
    kind = PatchTrainer if patched else transformers.Trainer
    more = {"patch_schedule": schedule} if patched else {}
    trainer = kind(
        llama() if model is None else model,
        arguments(path, max_steps=schedule.total_steps, **options),
        train_dataset=texts() if examples is None else examples,
        eval_dataset=texts(8),
        data_collator=PatchCollator(4, pad_token_id=0),
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, steps_of(trainer)


def steps_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def figures(steps):
    return torch.tensor([[step["loss"], step["grad_norm"]] for step in steps])


def test_stages_follow_the_step_and_a_run_goes_on_inside_one(tmp_path):
    schedule = PatchSchedule([(4, 5), (1, 9)])
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer, steps = train(tmp_path, schedule=schedule, **options)
    assert [step["patch"] for step in steps] == [4] * 5 + [1] * 4
    for checkpoint in (3, 6):  # inside the first stage, and inside the second
        _, resumed = train(tmp_path / "again", schedule=schedule, resume=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert [step["patch"] for step in resumed] == [step["patch"] for step in steps]
        torch.testing.assert_close(figures(resumed), figures(steps))
    trainer.patched.undo()
    assert "forward" not in vars(trainer.model.lm_head)


def test_accumulation_changes_nothing(tmp_path):
    _, whole = train(tmp_path)
    for options in ({}, {"average_tokens_across_devices": False}):
        _, parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
        torch.testing.assert_close(figures(parts), figures(whole))


@pytest.mark.parametrize("normalize", ["row", "slot"])
def test_accumulation_changes_nothing_by_other_norms(tmp_path, normalize):
    found = []
    for options in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        trainer = PatchTrainer(
            llama(), arguments(tmp_path, max_steps=3, **options), train_dataset=texts(),
            data_collator=PatchCollator(4, pad_token_id=0), patch_schedule=PatchSchedule([(4, 3)]), normalize=normalize,
            slot_weights=[1.0, 0.5, 0.25, 0.125],
        )  # fmt: skip
        trainer.train()
        found.append(figures(steps_of(trainer)))
    torch.testing.assert_close(*found)


def test_evaluation_is_the_models_own(tmp_path):
    trainer, _ = train(tmp_path, schedule=PatchSchedule([(4, 3)]), prediction_loss_only=False)
    assert trainer.patched.patch == 4
    ours = trainer.predict(texts(8))
    trainer.patched.undo()
    plain = transformers.Trainer(
        trainer.model, arguments(tmp_path), eval_dataset=texts(8), data_collator=PatchCollator(4, pad_token_id=0)
    )
    assert ours.metrics["test_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert ours.predictions.shape == (8, 32, VOCAB_SIZE)


def test_hundreds_of_steps_at_patch_one_are_those_of_the_trainer(tmp_path):
    schedule = PatchSchedule([(1, 200)])
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 10}
    _, ours = train(tmp_path, schedule=schedule, **options)
    _, own = train(tmp_path, schedule=schedule, patched=False, **options)
    assert own[-1]["loss"] < 0.9 * own[0]["loss"]
    torch.testing.assert_close(figures(ours), figures(own), rtol=2e-4, atol=2e-4)


def test_what_the_trainer_puts_around_the_model_is_kept(tmp_path):
    _, plain = train(tmp_path)
    seen = []
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    _, half = train(tmp_path, model, bf16=True)
    assert set(seen[:-1]) >= {torch.bfloat16}
    torch.testing.assert_close(figures(half), figures(plain), rtol=0.05, atol=0.05)
    assert not torch.equal(figures(half), figures(plain))

    _, noisy = train(tmp_path, neftune_noise_alpha=5.0)
    assert (figures(noisy) - figures(plain)).abs()[0].max() > 1e-3

    options = {"schedule": PatchSchedule([(4, 2), (1, 3)]), "examples": texts(shortest=32)}  # one shape: two graphs
    _, plain = train(tmp_path, llama(num_hidden_layers=1), **options)
    _, compiled = train(
        tmp_path, llama(num_hidden_layers=1), **options, torch_compile=True, torch_compile_backend="aot_eager"
    )
    torch.testing.assert_close(figures(compiled), figures(plain), rtol=1e-4, atol=1e-4)


def test_the_auxiliary_loss_is_averaged_over_micro_batches(tmp_path):
    coefficient = 5.0
    runs = []
    for options in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        model = sweep.small_model("mixtral")
        model.router_aux_loss_coef = coefficient
        model.config.router_aux_loss_coef = coefficient
        runs.append(train(tmp_path, model, schedule=PatchSchedule([(4, 1)]), **options)[1][0]["loss"])
    assert runs[0] > coefficient  # the experts' part is in it
    assert runs[1] == pytest.approx(runs[0], rel=0.05)  # of other batches, and not four times as much


def test_a_learning_rate_for_every_stage(tmp_path):
    options = {"warmup_steps": 2, "decay_ratio": 0.5, "end_factor": 0.1}
    trainer = PatchTrainer(
        llama(), arguments(tmp_path, max_steps=6), train_dataset=texts(), data_collator=PatchCollator(4, 0),
        patch_schedule=SCHEDULE, lr_options=options,
    )  # fmt: skip
    trainer.train()
    expected = [1e-3 * SCHEDULE.lr_factor(step, **options) for step in range(6)]
    assert [step["learning_rate"] for step in steps_of(trainer)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False"),
        ({"max_steps": 7}, "max_steps: expected the steps of the schedule, 6, got 7"),
    ],
)
def test_what_would_replace_the_loss_is_refused(tmp_path, options, message):
    def run():
        trainer = PatchTrainer(
            llama(), arguments(tmp_path, **{"max_steps": 6, **options}), train_dataset=texts(),
            data_collator=PatchCollator(4, 0), patch_schedule=SCHEDULE,
        )  # fmt: skip
        trainer.train()

    with pytest.raises(ValueError, match=message):
        run()


def test_batches_that_straddle_documents_stop_the_run(tmp_path):
    trainer = PatchTrainer(
        llama(), arguments(tmp_path, max_steps=6), train_dataset=[{"input_ids": list(range(2, 20))}] * 16,
        data_collator=transformers.DataCollatorWithFlattening(), patch_schedule=SCHEDULE,
    )  # fmt: skip
    with pytest.raises(ValueError, match="position_ids: expected every document to begin at a multiple of patch=4"):
        trainer.train()


def tokenizer():
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w2", unk_token="w1")


@pytest.mark.parametrize("packing", [False, True])
def test_trl(tmp_path, packing):
    from datasets import Dataset

    trainer = PatchSFTTrainer(
        llama(),
        arguments(tmp_path, trl.SFTConfig, max_steps=6, packing=packing, max_length=64, bf16=False,
                  gradient_accumulation_steps=2, per_device_train_batch_size=2, dataset_num_proc=None),
        train_dataset=Dataset.from_list(texts()),
        eval_dataset=Dataset.from_list(texts(8)),
        processing_class=tokenizer(),
        data_collator=None if packing else PatchCollator(4, pad_token_id=0),
        patch_schedule=SCHEDULE,
    )  # fmt: skip
    if packing:  # TRL takes no collator together with packing, but uses the one that it has
        trainer.data_collator = PatchCollator(4, pad_token_id=0, flatten=True)
        assert max(len(lengths) for lengths in trainer.train_dataset["seq_lengths"]) > 1
    trainer.train()
    steps = steps_of(trainer)
    assert [step["patch"] for step in steps] == [4] * 3 + [1] * 3
    losses = figures(steps)
    assert losses.isfinite().all()
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.patched.undo()
    own = trainer.model.eval()(**PatchCollator(4, pad_token_id=0)(texts(8))).loss.item()
    assert evaluated == pytest.approx(own, rel=1e-5)


def test_trl_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    from datasets import Dataset

    trainer = PatchSFTTrainer(
        llama(),
        arguments(tmp_path, trl.SFTConfig, max_steps=6, max_length=64, bf16=False, pad_to_multiple_of=4),
        train_dataset=Dataset.from_list(texts(shortest=8)),  # TRL's own collator pads here
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        patch_schedule=SCHEDULE,
    )
    trainer.train()
    assert [step["patch"] for step in steps_of(trainer)] == [4] * 3 + [1] * 3
    assert all(step["grad_norm"] > 0 for step in steps_of(trainer))


TWO_RANKS = """
import json, warnings
warnings.simplefilter("ignore")
import torch
from tests.test_transformers_trainer import LONG, ONE_BY_ONE, figures, sharded, train
for kind in ("patched", "at patch one", "own"):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo")
    schedule = LONG if kind == "patched" else ONE_BY_ONE
    trainer, steps = train({path!r}, schedule=schedule, patched=kind != "own", **options)
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    print("RESULT", json.dumps([weights.double().norm().item(), figures(steps).tolist()]), flush=True)
print("RESULT", json.dumps(sharded()), flush=True)
"""
LONG, ONE_BY_ONE = PatchSchedule([(4, 20), (1, 40)]), PatchSchedule([(1, 100)])


def sharded():
    """Return how far loss and gradients of FSDP2's shards are from those of one model, for two ways to wrap it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, batch = init_device_mesh("cpu", (2,)), PatchCollator(4, pad_token_id=0)(texts(4))
    whole = llama()
    apply(whole, 4)
    expected = whole(**batch).loss
    expected.backward()
    found = []
    for with_ends in (False, True):
        model = llama()
        apply(model, 4)
        ends = [model.model.embed_tokens, model.lm_head] if with_ends else []
        for module in (*model.model.layers, *ends, model):
            fully_shard(module, mesh=mesh)
        outputs = model(**batch)
        outputs.loss.backward()
        pairs = zip(model.parameters(), whole.parameters(), strict=True)
        worst = max((ours.grad.full_tensor() - own.grad).abs().max().item() for ours, own in pairs)
        found.append([outputs.logits is None, (outputs.loss - expected).abs().item(), worst])
    return found


def on_two_ranks(path):
    """Return for each of three runs on two gloo ranks the norms of the weights, and the steps that were logged."""
    program = path / "ranks.py"
    program.write_text(TWO_RANKS.format(path=str(path)))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(2):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "tests.rank", str(program)], cwd=path, text=True,
            env={**environment(), **{name: str(value) for name, value in variables.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
        lines = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT")]
        results.append([json.loads(line) for line in lines])
    fully_sharded = [result.pop() for result in results]
    runs = {
        kind: ([norm for norm, _ in ranks], torch.tensor(next(steps for _, steps in ranks if steps)))
        for kind, ranks in zip(("patched", "at patch one", "own"), zip(*results, strict=True), strict=True)
    }
    return {**runs, "sharded": fully_sharded}


def test_two_ranks(tmp_path):
    runs = on_two_ranks(tmp_path)

    # As one process with all of the batch.
    norms, steps = runs["patched"]
    assert norms[0] == norms[1]
    _, alone = train(tmp_path, schedule=LONG, per_device_train_batch_size=8)
    torch.testing.assert_close(steps, figures(alone), rtol=2e-4, atol=2e-4)

    # A hundred steps at patch 1 are those of the trainer.
    (norms, ours), (own_norms, own) = runs["at patch one"], runs["own"]
    assert own[-1, 0] < 0.95 * own[0, 0]
    assert norms == pytest.approx(own_norms, rel=1e-5)
    torch.testing.assert_close(ours, own, rtol=2e-4, atol=2e-4)

    # FSDP2. Where the ends are sharded by themselves, their weights are whole in their own forwards alone: no fusing.
    for found in runs["sharded"]:
        assert [fused for fused, *_ in found] == [True, False]
        assert max(difference for _, *differences in found for difference in differences) < 1e-6


def test_the_collator_keeps_documents_apart():
    examples = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}, {"input_ids": [3, 4]}]
    batch = PatchCollator(4, pad_token_id=0)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, 9, -100, -100, -100], [3, 4] + [-100] * 6]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2]
    flat = PatchCollator(4, pad_token_id=0, flatten=True)(examples)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0, 3, 4, 0, 0]]
    assert flat["labels"].tolist() == [[-100, 6, 7, 8, 9, -100, -100, -100, -100, 4, -100, -100]]
    assert flat["position_ids"].tolist() == [[*range(8), *range(4)]]
    packed = PatchCollator(4, pad_token_id=0, flatten=True)(
        [{"input_ids": [5, 6, 7, 8, 9, 3, 4], "seq_lengths": [5, 2]}]
    )
    assert packed["input_ids"].tolist() == flat["input_ids"].tolist()
    with pytest.raises(ValueError, match="seq_lengths: expected one document without flatten=True, got 2"):
        PatchCollator(4, pad_token_id=0)([{"input_ids": [5, 6], "seq_lengths": [1, 1]}])
    with pytest.raises(TypeError, match="pad_token_id: expected an int, got None"):
        PatchCollator(4, pad_token_id=None)


@pytest.mark.parametrize("patch", [4, 2, 1])
def test_flat_and_padded_batches_have_one_loss(patch):
    model, examples = llama(), texts(6)
    apply(model, patch)
    losses = [model(**PatchCollator(4, pad_token_id=0, flatten=flatten)(examples)).loss for flatten in (False, True)]
    torch.testing.assert_close(*losses)
