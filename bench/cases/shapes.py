"""What is measured: named shapes with their provenance, and the selections made of them.

A workload is one operation on one set of inputs; all its contenders are measured together. The scale stages are the
patch sizes 8, 4, 2 and 1 of next-patch prediction (arXiv 2412.15321).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

OPERATIONS = ("group_mean", "patch_mean", "patch_cross_entropy", "linear_patch_cross_entropy")
LOSSES = ("patch_cross_entropy", "linear_patch_cross_entropy")
DIRECTIONS = ("forward", "forward_backward")
STAGES = (8, 4, 2, 1)
# At patch 1 the mean over patches of embeddings is the embeddings: nothing is computed, so nothing is timed.
STAGES_OF = {operation: STAGES[:3] if operation == "patch_mean" else STAGES for operation in OPERATIONS}

# The four models of the paper are LlamaGen's (arXiv 2406.06525, table 1 and its VQ tokenizer of 16,384 codes).
VOCAB_SIZE = 16_384
HIDDEN_SIZES = {"B": 768, "L": 1024, "XL": 1280, "XXL": 1536}

# Images of 256x256 and 384x384 pixels at the tokenizer's downsampling of 16. The numbers of images keep the numbers of
# tokens of the two grids close: a loss sees about 16,384 tokens, which fill an H100; the cheaper means about 65,536.
LOSS_IMAGES = {16: 64, 24: 28}
MEAN_IMAGES = {16: 256, 24: 112}

# Without a GPU: model B with fewer images, sized so that the whole selection fits into minutes on two slow cores.
CPU_LOSS_IMAGES = 2
CPU_MEAN_IMAGES = 16


@dataclass(frozen=True)
class Workload:
    """One operation on one set of inputs."""

    operation: str
    model: str
    vocab_size: int
    hidden_size: int  # 0 where the operation has none
    grid: int
    images: int
    patch: int
    tokens: str = "real"  # "real", "uniform", or "none" where no ids are read
    reduction: str = "mean"
    host_bound: bool = False  # so small that launching is all the work: timed by the host, back to back
    directions: tuple[str, ...] = DIRECTIONS
    left_out: tuple[str, ...] = ()  # contenders that this selection does without

    @property
    def group_size(self) -> int:
        """The number of tokens in a patch, K."""
        return self.patch**2

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all images."""
        return self.images * self.grid**2

    @property
    def rows(self) -> int:
        """The number of patches of all images: the rows of a loss, the outputs of a mean."""
        return self.num_tokens // self.group_size

    @property
    def name(self) -> str:
        """A name that tells this workload from every other one."""
        parts = [self.operation, self.model, f"{self.grid}x{self.grid}", f"patch{self.patch}", self.tokens]
        parts += [self.reduction] if self.reduction != "mean" else []
        parts += ["small"] if self.host_bound else []
        return "-".join(parts)


def _workload(operation: str, model: str, grid: int, patch: int, tokens: str) -> Workload:
    """Return an operation at one of the models' shapes."""
    loss = operation in LOSSES
    return Workload(
        operation,
        # The loss on logits knows no hidden size, so it is the same for all models.
        f"V{VOCAB_SIZE}" if operation == "patch_cross_entropy" else model,
        VOCAB_SIZE,
        0 if operation == "patch_cross_entropy" else HIDDEN_SIZES[model],
        grid,
        (LOSS_IMAGES if loss else MEAN_IMAGES)[grid],
        patch,
        "none" if operation == "patch_mean" else tokens,
    )


def wide_workloads() -> list[Workload]:
    """Return the losses over vocabularies as wide as language models have.

    128,256 entries: Llama 3 (arXiv 2407.21783, section 3.2), with the hidden size 2048 of its 1B model.
    262,144 entries: Gemma 3 (arXiv 2503.19786, section 2).
    """
    both = ("forward_backward",)
    wide = [
        Workload("patch_cross_entropy", "V128256", 128_256, 0, 16, 16, 1, directions=both),
        Workload("patch_cross_entropy", "V262144", 262_144, 0, 16, 32, 2, directions=both),
    ]
    # 8,192 rows each. Apple's exact form takes seconds a call here; its filtered one stays.
    for images, patch in ((32, 1), (128, 2)):
        wide.append(
            Workload(
                "linear_patch_cross_entropy",
                "Llama3-1B",
                128_256,
                2048,
                16,
                images,
                patch,
                directions=both,
                left_out=("apple_cce_exact",),
            )
        )
    return wide


def unequal_workloads() -> list[Workload]:
    """Return the losses with a gradient of its own for every target, which no forward pass can know."""
    return [
        Workload(
            "patch_cross_entropy",
            f"V{VOCAB_SIZE}",
            VOCAB_SIZE,
            0,
            16,
            LOSS_IMAGES[16],
            patch,
            reduction="none",
            directions=("forward_backward",),
        )
        for patch in (2, 1)
    ]


def small_workloads() -> list[Workload]:
    """Return each operation on one 16x16 image at patch 4, as in sampling or a smoke test: the host is what counts."""
    return [
        replace(
            _workload(operation, "B", 16, 4, "real"),
            images=1,
            host_bound=True,
            left_out=("official_compiled", "honest_compiled"),  # the question is eager mode
        )
        for operation in OPERATIONS
    ]


def full_matrix() -> list[Workload]:
    """Return every operation, stage, model, grid and kind of tokens, with every contender."""
    regular = [
        _workload(operation, model, grid, patch, tokens)
        for operation in OPERATIONS
        for model in HIDDEN_SIZES
        for grid in (16, 24)
        for tokens in ("real", "uniform")
        for patch in STAGES_OF[operation]
    ]
    return [*dict.fromkeys([*regular, *unequal_workloads(), *wide_workloads(), *small_workloads()])]


def default_matrix() -> list[Workload]:
    """Return the smallest and the largest model on 16x16 grids with real tokens, and every special case.

    Compiling the contenders is most of the time, so the compiled official form takes part for model B on real tokens
    alone, and the forward pass alone of the linear loss is left to the full matrix.
    """
    workloads = [
        _workload(operation, model, 16, patch, tokens)
        for operation in OPERATIONS
        for model in ("B", "XXL")
        for tokens in (("real", "uniform") if operation == "group_mean" else ("real",))
        for patch in STAGES_OF[operation]
    ]
    chosen = []
    for workload in workloads:
        left_out = ("official_compiled",) if workload.model == "XXL" or workload.tokens == "uniform" else ()
        linear = workload.operation == "linear_patch_cross_entropy"
        directions = ("forward_backward",) if linear else DIRECTIONS
        chosen.append(replace(workload, left_out=left_out, directions=directions))
    return [*dict.fromkeys([*chosen, *unequal_workloads(), *wide_workloads(), *small_workloads()])]


def cpu_matrix() -> list[Workload]:
    """Return what a machine without a GPU can do in minutes: model B on few images, compiled forms at patch 2 alone."""
    workloads = []
    for workload in default_matrix():
        if workload.model == "XXL" or workload.vocab_size != VOCAB_SIZE or workload.reduction != "mean":
            continue
        images = CPU_LOSS_IMAGES if workload.operation in LOSSES else CPU_MEAN_IMAGES
        compiled = workload.patch == 2 and workload.tokens != "uniform"
        left_out = ("official_compiled",) if compiled else ("official_compiled", "honest_compiled")
        workloads.append(replace(workload, images=1 if workload.host_bound else images, left_out=left_out))
    return workloads


def selection(matrix: str, device: str) -> list[Workload]:
    """Return the workloads of ``--matrix`` on a kind of device."""
    if matrix == "full":
        return full_matrix()
    return default_matrix() if device == "cuda" else cpu_matrix()
