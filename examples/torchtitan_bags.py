"""TorchTitan: a small Llama on bags of 4 tokens for half of the run, then on single tokens, beside a plain run.

    pip install '.[integrations]'
    python examples/torchtitan_bags.py

Everything is TorchTitan's own: trainer, model, data loader, chunked loss, optimizer, validator. `with_patches`, at the
bottom, makes its recipe one of patches. The text is generated. On a GPU the same file runs with TorchTitan's attention
and CUDA graphs; on a CPU, for which TorchTitan is not made, `run_on_cpu` gives it what it lacks.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask


def run_on_cpu() -> None:
    """Let TorchTitan take the CPU for its device; it asks a device for a name and for its memory."""
    torch._utils._get_available_device_type = lambda: "cpu"
    stand_ins = {
        "get_device_name": lambda device=None: "CPU",
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=2**34),
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda device=None: {},
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cpu, name, stand_in)


if not hasattr(torch.distributed, "set_timeout"):  # TorchTitan 0.3 calls by that name what torch 2.13 calls otherwise
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
ON_CPU = not torch.cuda.is_available()
if ON_CPU:
    run_on_cpu()

# TorchTitan looks for its device when it is imported.
from datasets import Dataset  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.hf_datasets import DatasetConfig  # noqa: E402
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from npp_kernels import PatchSchedule  # noqa: E402
from npp_kernels.integrations.torchtitan import with_patches  # noqa: E402

STEPS, SEQ_LEN, BATCH_SIZE, PATCH = 120, 256, 4, 4
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"


class Letters(BaseTokenizer):
    """One id for each letter; 0 begins a document, 1 ends it."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, tokenizer_path: str | None = None) -> None:
        super().__init__()
        self.eos_id = 1

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the ids of a text."""
        return [0] * add_bos + [2 + ALPHABET.index(letter) for letter in text] + [1] * add_eos

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return "".join(ALPHABET[index - 2] for index in ids if index > 1)

    def get_vocab_size(self) -> int:
        """Return the number of ids."""
        return 2 + len(ALPHABET)


def generated_text(path: str) -> Dataset:
    """Return documents of 20 to 400 letters, in a few words each, which repeat themselves; ``path`` is the seed."""
    words_of = random.Random("words")
    words = ["".join(words_of.choices(ALPHABET[:26], k=words_of.randint(2, 8))) for _ in range(300)]
    text_of = random.Random(path)
    documents = []
    for _ in range(1000):
        topic = text_of.sample(words, 12)
        sentence = " ".join(text_of.choices(topic, k=80))
        documents.append(sentence[: text_of.randint(20, 400)])
    return Dataset.from_dict({"text": documents})


DATASETS["generated"] = DatasetConfig(
    path="train", loader=generated_text, sample_processor=lambda sample: sample["text"]
)


class AttentionOnCPU(FlexAttention):
    """TorchTitan's masks as booleans, through PyTorch's attention: flex attention has no backward on a CPU."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """That of ``FlexAttention``."""

    def forward(self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks, scale=None, enable_gqa=False, **_):
        """Attend where the mask says so."""
        batch, length = q_BLNH.shape[:2]
        mask = create_mask(attention_masks.mask_mod, batch, None, length, length, device=q_BLNH.device)
        query, key, value = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


def small_recipe() -> Trainer.Config:
    """Return TorchTitan's debug model, cut down to what a CPU trains in half a minute."""
    config = llama3_debugmodel()
    model = config.model_spec.model
    model.layers = model.layers[:2]
    model.vocab_size = model.tok_embeddings.num_embeddings = model.lm_head.out_features = 2 + len(ALPHABET)
    config.tokenizer = Letters.Config()
    config.dataloader.dataset = "generated"
    config.training.steps, config.training.seq_len, config.training.local_batch_size = STEPS, SEQ_LEN, BATCH_SIZE
    config.optimizer.param_groups[-1].optimizer_kwargs["lr"] = 2e-3
    config.lr_scheduler.warmup_steps = 20
    config.validator.enable, config.validator.freq, config.validator.steps = True, STEPS // 4, 4
    config.validator.dataloader = HuggingFaceTextDataLoader.Config(dataset="generated", dataset_path="validation")
    config.dump_folder = tempfile.mkdtemp()
    config.debug.seed = 0
    if ON_CPU:
        config.activation_checkpoint = None
        config.training.mixed_precision_param = "float32"
        config.training.disable_cuda_graphs = True
        for layer in model.layers:
            layer.attention.inner_attention = AttentionOnCPU.Config()
    return config


def train(config: Trainer.Config) -> tuple[dict[int, float], float]:
    """Return the validation losses by step, and the seconds that the run took."""
    trainer, losses = config.build(), {}
    trainer.metrics_processor.log_validation = lambda loss, step: losses.update({step: loss})
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start - 2  # TorchTitan sleeps for two seconds at its end
    trainer.close()
    return losses, seconds


def main() -> None:
    """Train both, and print what came of it."""
    logging.getLogger().setLevel(logging.ERROR)  # without this line TorchTitan reports every step
    for name, value in ONE_PROCESS.items():
        os.environ.setdefault(name, value)

    plain, plain_seconds = train(small_recipe())
    schedule = PatchSchedule([(PATCH, STEPS // 2), (1, STEPS)])
    patches, patch_seconds = train(with_patches(small_recipe(), schedule))

    print(f"{'step':>5}  {'patch':>5}  {'loss on single tokens':>21}  {'plain run':>9}")
    for step in plain:
        print(f"{step:>5}  {schedule.at(step - 1).patch:>5}  {patches[step]:>21.3f}  {plain[step]:>9.3f}")
    cost = schedule.relative_cost((SEQ_LEN,))
    print(f"{patch_seconds:.1f} s with patches, {plain_seconds:.1f} s without; {cost:.3f} of the positions")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
