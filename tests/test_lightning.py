"""The callback for Lightning, in real runs where the package is installed, and on stand-ins for what it decides."""

import copy
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from npp_kernels import PatchSchedule, group_mean, group_tokens, linear_patch_cross_entropy
from npp_kernels.integrations.lightning import PatchStages
from tests.processes import ROOT, environment, torchrun

SCHEDULE = PatchSchedule([(2, 6), (1, 14)])
OPTIONS = {"warmup_steps": 2, "decay_ratio": 0.5, "end_factor": 0.2}
VOCAB_SIZE, GRID = 30, (4, 4)


class Logging(SimpleNamespace):
    """Stands in for a module: it keeps what is logged."""

    def log_dict(self, values, batch_size):
        self.logged = values


def test_sets_the_stage_and_the_rate_of_every_step():
    schedule = PatchSchedule([((2, 4), 10), (1, 30)])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    trainer, module = SimpleNamespace(global_step=0, optimizers=[optimizer]), Logging()

    def state_at(stages, step):
        trainer.global_step = step
        stages.on_train_batch_start(trainer, module, None, 0)
        return module.patch, trainer.optimizers[0].param_groups[0]["lr"]

    options = {"warmup_steps": 4, "decay_ratio": 0.5, "end_factor": 0.2}
    stages = PatchStages(schedule, **options)
    for step in (1, 5, 9, 10, 12, 29):
        stage = schedule.at(step)
        assert state_at(stages, step) == (stage.patch, 0.5 * schedule.lr_factor(step, 4, 0.5, 0.2))
        assert module.logged == {"stage": stage.index, "patch": 4 if step < 10 else 1}

    resumed = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    resumed.load_state_dict(optimizer.state_dict())
    trainer.optimizers = [resumed]
    assert state_at(PatchStages(schedule, **options), 15) == (1, 0.5)
    with pytest.raises(IndexError):
        state_at(stages, 30)


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor():
    lr = torch.tensor(0.5)
    trainer = SimpleNamespace(global_step=1, optimizers=[torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)])
    stages = PatchStages(SCHEDULE, **OPTIONS)
    for step in (1, 13, 4):
        trainer.global_step = step
        stages.on_train_batch_start(trainer, Logging(), None, 0)
        assert trainer.optimizers[0].param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(0.5 * SCHEDULE.lr_factor(step, 2, 0.5, 0.2))


def test_options_go_by_name():
    assert PatchStages(schedule=SCHEDULE, warmup_steps=2).lr_options[0] == 2
    with pytest.raises(TypeError, match="positional argument"):
        PatchStages(SCHEDULE, 2)


def test_bases_in_the_wrong_order():
    class Callback:
        def on_train_batch_start(self, *arguments):
            pass

    with pytest.raises(TypeError, match=r"bases: expected PatchStages before Callback.*Wrong\(PatchStages, Callback\)"):
        type("Wrong", (Callback, PatchStages), {})
    right = type("Right", (PatchStages, Callback), {})
    type("Further", (right,), {"on_train_batch_start": lambda self, *arguments: None})  # a subclass may


def test_a_checkpoint_of_another_schedule():
    state = copy.deepcopy(PatchStages(SCHEDULE, **OPTIONS).state_dict())
    PatchStages(SCHEDULE, **OPTIONS).load_state_dict(state)
    with pytest.raises(ValueError, match=r"boundaries: expected those of the checkpoint, \[\(2, 6\), \(1, 14\)\], got"):
        PatchStages(PatchSchedule([(2, 7), (1, 14)]), **OPTIONS).load_state_dict(state)
    with pytest.raises(ValueError, match=r"lr_options: expected those of the checkpoint, \[2, 0.5, 0.2\], got \[0, "):
        PatchStages(SCHEDULE).load_state_dict(state)


# Everything below runs Lightning itself. Importing it warns, which is an error in tests.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import lightning.pytorch as pl
    except ModuleNotFoundError:
        pl = None

needs_lightning = pytest.mark.skipif(pl is None, reason="needs the package lightning")
quiet = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and checkpoints


def stages_class():
    return type("Stages", (PatchStages, pl.Callback), {})


def module_of(**options):
    """Return a Lightning module that trains on patches; a factory, since the package may be missing."""

    class Module(pl.LightningModule):
        def __init__(self, *, optimizers=1, scheduler=False):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB_SIZE, 8)
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, VOCAB_SIZE)
            self.num_optimizers, self.scheduler = optimizers, scheduler
            self.automatic_optimization = optimizers == 1
            self.seen, self.validated = [], []

        def loss(self, tokens):
            groups = group_tokens(tokens, self.patch, grid=GRID)
            hidden = torch.tanh(self.body(group_mean(self.embedding.weight, groups[:, :-1])))
            return linear_patch_cross_entropy(hidden, self.head.weight, groups[:, 1:], bias=self.head.bias)

        def training_step(self, batch, index):
            loss = self.loss(batch[0])
            if self.automatic_optimization:
                rate = self.optimizers().param_groups[0]["lr"]
                self.seen.append((self.trainer.global_step, self.patch, rate, loss.item()))
            return loss

        def validation_step(self, batch, index):
            self.validated.append(self.patch)
            self.log("validation_loss", self.loss(batch[0]))

        def configure_optimizers(self):
            optimizers = [torch.optim.AdamW(self.parameters(), lr=0.02) for _ in range(self.num_optimizers)]
            if self.scheduler:
                return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]
            return optimizers

    return Module(**options)


def loader(images=28, batch_size=4):
    tokens = torch.randint(VOCAB_SIZE, (images, 16), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=batch_size)


def fit(module, *callbacks, checkpoint=None, folder=None, **options):
    options = {"max_steps": 14, "max_epochs": -1, "accelerator": "cpu", "logger": False} | options
    trainer = pl.Trainer(
        **options, callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader(), loader(8), ckpt_path=checkpoint)
    return trainer


def by_hand(steps):
    """Train the same module without Lightning."""
    module = module_of()
    optimizer = module.configure_optimizers()[0]
    batches = [batch[0] for batch in loader()]
    losses = []
    for step in range(steps):
        module.patch = SCHEDULE.at(step).patch
        optimizer.param_groups[0]["lr"] = 0.02 * SCHEDULE.lr_factor(step, 2, 0.5, 0.2)
        loss = module.loss(batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@needs_lightning
@quiet
def test_a_run_goes_through_the_stages_validates_at_patch_one_and_logs():
    module = module_of()
    trainer = fit(module, stages_class()(SCHEDULE, **OPTIONS), val_check_interval=3)
    assert [row[:2] for row in module.seen] == [(step, SCHEDULE.at(step).patch) for step in range(14)]
    assert [row[2] for row in module.seen] == pytest.approx(
        [0.02 * SCHEDULE.lr_factor(step, 2, 0.5, 0.2) for step in range(14)]
    )
    assert [row[3] for row in module.seen] == pytest.approx(by_hand(14), rel=1e-5)
    assert set(module.validated) == {1}
    assert trainer.callback_metrics["stage"] == 1
    assert trainer.callback_metrics["patch"] == 1


@needs_lightning
@quiet
def test_a_resumed_run_is_the_same_run(tmp_path):
    whole = module_of()
    fit(whole, stages_class()(SCHEDULE, **OPTIONS))

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            if trainer.global_step == 7:  # in the second stage, and at the end of an epoch
                trainer.save_checkpoint(tmp_path / "seven.ckpt")
                trainer.should_stop = True

    first = module_of()
    fit(first, stages_class()(SCHEDULE, **OPTIONS), Stop(), folder=tmp_path)
    resumed = module_of()
    fit(resumed, stages_class()(SCHEDULE, **OPTIONS), checkpoint=tmp_path / "seven.ckpt")
    assert first.seen == whole.seen[:7]
    assert resumed.seen == whole.seen[7:]
    with pytest.raises(ValueError, match="boundaries: expected those of the checkpoint"):
        fit(
            module_of(), stages_class()(PatchSchedule([(2, 5), (1, 14)]), **OPTIONS), checkpoint=tmp_path / "seven.ckpt"
        )


@needs_lightning
@quiet
def test_accumulation_counts_optimizer_steps():
    module = module_of()
    fit(module, stages_class()(SCHEDULE), accumulate_grad_batches=7, val_check_interval=5)
    assert [row[:2] for row in module.seen] == [(step, SCHEDULE.at(step).patch) for step in range(14) for _ in range(7)]


@needs_lightning
@quiet
@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        ({}, {"max_steps": 20}, "max_steps: expected the 14 steps of the schedule, got a run of 20"),
        ({}, {"max_steps": 7}, "max_steps: expected the 14 steps of the schedule, got a run of 7"),
        ({}, {"max_steps": -1, "max_epochs": 3}, "max_steps: expected the 14 steps .* got a run of 21"),
        ({"scheduler": True}, {}, r"lr_scheduler: expected none .* got \['StepLR'\]"),
        ({"optimizers": 2}, {}, "optimizers: expected one, got 2"),
    ],
)
def test_a_run_that_would_not_be_what_the_schedule_says(module, options, words):
    with pytest.raises(ValueError, match=words):
        fit(module_of(**module), stages_class()(SCHEDULE), **options)


@needs_lightning
@quiet
def test_lengths_that_fit():
    fit(module_of(), stages_class()(SCHEDULE), max_steps=-1, max_epochs=2)  # 7 batches an epoch
    fit(module_of(), stages_class()(SCHEDULE), fast_dev_run=True)


@needs_lightning
def test_the_mix_in_comes_first():
    with pytest.raises(TypeError, match=r"bases: expected PatchStages before Callback"):
        type("Wrong", (pl.Callback, PatchStages), {})


RANKS = """
import torch
from npp_kernels import PatchSchedule
from tests.test_lightning import OPTIONS, SCHEDULE, fit, module_of, stages_class

module = module_of()
fit(module, stages_class()(SCHEDULE, **OPTIONS), devices=2, strategy="ddp", val_check_interval=3)
assert [row[:2] for row in module.seen] == [(step, SCHEDULE.at(step).patch) for step in range(14)]
total = module.head.weight.detach().clone()
gathered = [torch.empty_like(total) for _ in range(2)]
torch.distributed.all_gather(gathered, total)
assert torch.equal(*gathered)
print("equal", flush=True)
torch.distributed.barrier()  # a process that ends first would abort the other
torch.distributed.destroy_process_group()
"""


@needs_lightning
def test_two_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = torchrun(2, script)
    variables = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal") == 2
