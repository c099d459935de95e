"""What the schema cannot say about a run: how its parts fit together, with the launch, and with the disk.

Nothing is imported or loaded here: kinds are read off the folders, DeepSpeed's keys are known by name.
"""

from __future__ import annotations

import difflib
import json
import pkgutil
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mvd_fast.config import OF_PRE_TRAINING, AugmentConfig, DataConfig, EvaluationConfig, RunConfig, TeacherConfig
from mvd_fast.errors import UserError

PACKAGE = Path(__file__).parent

# What the project's own kinds go with. A kind that is not listed (a user's own file) is not restricted.
TEACHERS_OF_OBJECTIVE = {"distillation": ("image", "video"), "pixel": (), "classification": (), "actions": ()}
OBJECTIVE_OF_MODEL = {
    "student": "distillation",
    "videomae": "pixel",
    "mae": "pixel",
    "classifier": "classification",
    "detector": "actions",
}
DATA_OF_MODEL = {
    "student": ("video",),
    "videomae": ("video",),
    "mae": ("image", "frame"),
    "classifier": ("labelled",),
    "detector": ("ava",),
}
DECODERS_OF_MODEL = {"student": True, "videomae": True, "mae": True, "classifier": False, "detector": False}
ROLE_OF_TEACHER = {"mae": "image", "videomae": "video"}
SINGLE_IMAGE_DATA = ("image", "frame")

SIZE_OF_WIDTH = {384: "s", 768: "b", 1024: "l", 1280: "h"}
PUBLIC_TEACHERS = {
    "mae": ("the MAE project's release (facebookresearch/mae on GitHub)", "blh"),
    "videomae": ("VideoMAE's model zoo (MODEL_ZOO.md of MCG-NJU/VideoMAE on GitHub)", "sblh"),
}

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.accumulation",
    "optimizer": "the fields of optim",
    "scheduler": "optim.base_lr, optim.base_min_lr and optim.warmup_epochs",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "gradient_clipping": "optim.clip_grad",
    "steps_per_print": "log.every",
}

# Top-level keys that DeepSpeed 0.19 reads; it ignores all others without a word.
KNOWN_DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio autotuning checkpoint comet comms_logger communication_data_type
    compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler gradient_allreduce_op gradient_predivide_factor
    hybrid_engine log_level managed_gradient_accumulation memory_breakdown pipeline prescale_gradients
    seq_parallel_communication_data_type tensor_parallel tensorboard timers use_data_before_expert_parallelism
    vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()  # noqa: SIM905 (forty words read best as words)
)


class ConfigError(UserError):
    """A run cannot start as configured; the message is for the user, one sentence per fault."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the choice most like `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f", did you mean {found[0]!r}?" if found else ""


def available_kinds(registry: str) -> list[str]:
    """Names of the modules in a registry folder (`models`, `teachers`, `objectives`, `data/kinds`).

    A module counts when it defines `build`; its source is read, not imported.
    """
    folder = PACKAGE / registry
    return sorted(found.name for found in pkgutil.iter_modules([str(folder)]) if _defines_build(folder / found.name))


def _defines_build(module: Path) -> bool:
    source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    return source.is_file() and bool(re.search(r"^(def build\b|build *=)", source.read_text("utf-8"), re.MULTILINE))


def faults(config: RunConfig) -> list[str]:
    """One sentence for everything in `config` that cannot work together; empty when it is sound."""
    unknown = list(_kind_faults(config))
    if unknown:  # the other checks would only repeat a mistyped kind
        return unknown + list(_deepspeed_faults(config))
    checks = (
        _teacher_faults,
        _teacherless_faults,
        _cache_faults,
        _partner_faults,
        _part_faults,
        _classifier_faults,
        _shape_faults,
        _batch_faults,
        _deepspeed_faults,
    )
    return [sentence for check in checks for sentence in check(config)]


def _kind_faults(config: RunConfig) -> Iterator[str]:
    named = [
        ("model.kind", config.model.kind, "models"),
        ("objective.kind", config.objective.kind, "objectives"),
        ("data.kind", config.data.kind, "data/kinds"),
    ]
    named += [(f"teachers.{role}.kind", teacher.kind, "teachers") for role, teacher in _teachers(config).items()]
    for path, kind, registry in named:
        kinds = available_kinds(registry)
        if kind not in kinds:
            hint, choices = nearest(kind, kinds) or ";", ", ".join(kinds) or "none"
            yield f"{path}: unknown kind {kind!r}{hint} the modules of mvd_fast/{registry} are: {choices}"


def _teachers(config: RunConfig) -> dict[str, TeacherConfig]:
    both = {"image": config.teachers.image, "video": config.teachers.video}
    return {role: teacher for role, teacher in both.items() if teacher is not None}


def _teacher_faults(config: RunConfig) -> Iterator[str]:
    teachers, objective = _teachers(config), config.objective.kind
    needed = TEACHERS_OF_OBJECTIVE.get(objective, tuple(teachers))
    for role in needed:
        if role not in teachers:
            yield f"objective {objective!r} needs the {role} teacher: add teachers.{role} with kind and checkpoint"
    for role, teacher in teachers.items():
        if role not in needed:
            yield f"objective {objective!r} uses no {role} teacher: remove teachers.{role}"
            continue
        fits = ROLE_OF_TEACHER.get(teacher.kind, role)
        if fits != role:
            yield f"teachers.{role}.kind: {teacher.kind!r} is a teacher for the {fits} role: name it teachers.{fits}"
        height = teacher.image_size // teacher.patch_size
        _, side, _ = config.model.grid
        if height != side:
            yield (
                f"teachers.{role}: its token grid {height}x{height} (image_size {teacher.image_size} / patch_size "
                f"{teacher.patch_size}) must equal the student's {side}x{side}: set image_size to "
                f"{side * teacher.patch_size}"
            )


def _teacherless_faults(config: RunConfig) -> Iterator[str]:
    """Ways to save work that only distillation knows."""
    kind = config.objective.kind
    if TEACHERS_OF_OBJECTIVE.get(kind, ("any",)):
        return
    if config.teachers.cache.path:
        yield f"teachers.cache.path: objective {kind!r} has no teachers to store: leave it empty"
    if config.teachers.ahead:
        yield f"teachers.ahead: objective {kind!r} has no teachers: remove it"
    if config.objective.predict_fraction != 1.0:
        yield f"objective.predict_fraction: objective {kind!r} decodes all masked tokens: remove it"
    if config.data.masks_per_clip != 1:
        yield f"data.masks_per_clip: objective {kind!r} has no teachers to share between masks: remove it"


def _cache_faults(config: RunConfig) -> Iterator[str]:
    cache, data = config.teachers.cache, config.data
    if not cache.path:
        return
    if config.teachers.ahead:
        yield "teachers.ahead: no teachers run where targets are stored: remove it, or teachers.cache.path"
    if cache.views > config.optim.epochs:
        yield (
            f"teachers.cache.views: {cache.views} views are more than the {config.optim.epochs} epochs would show; "
            f"store {config.optim.epochs} at most"
        )
    if cache.views > 1 and data.clip == data.crop == "center" and data.flip in (0.0, 1.0):
        yield f"teachers.cache.views: with a centred clip and crop all {cache.views} views are the same: store 1"


def _partner_faults(config: RunConfig) -> Iterator[str]:
    model, objective, data = config.model.kind, config.objective.kind, config.data.kind
    expected = OBJECTIVE_OF_MODEL.get(model, objective)
    if objective in TEACHERS_OF_OBJECTIVE and objective != expected:
        yield f"objective.kind: model {model!r} is trained with {expected!r}, not with {objective!r}"
    accepted = DATA_OF_MODEL.get(model, (data,))
    if data in {kind for kinds in DATA_OF_MODEL.values() for kind in kinds} and data not in accepted:
        yield f"data.kind: model {model!r} takes {_either(accepted)}, not {data!r}"


def _part_faults(config: RunConfig) -> Iterator[str]:
    """What pre-training networks have and fine-tuned ones have not, and the reverse."""
    model = config.model
    decodes = DECODERS_OF_MODEL.get(model.kind)
    tuned = ("num_classes", "init")
    for field in OF_PRE_TRAINING if decodes else ("num_classes",) if decodes is False else ():
        if getattr(model, field) is None:
            yield f"model.{field} is missing; model {model.kind!r} needs it"
    for field in tuned if decodes else OF_PRE_TRAINING if decodes is False else ():
        if getattr(model, field):
            yield f"model.{field}: model {model.kind!r} has no use for it: remove it"
    if config.optim.layer_decay != 1.0 and decodes:
        yield f"optim.layer_decay: it is for fine-tuning, and model {model.kind!r} is pre-trained: remove it"


def _classifier_faults(config: RunConfig) -> Iterator[str]:
    """What only classifiers and their clips have."""
    kind = config.model.kind
    if kind in DECODERS_OF_MODEL and kind != "classifier":
        for path, off in (
            ("model.head_dropout", config.model.head_dropout == 0.0),
            ("optim.ema", config.optim.ema == 0.0),
            ("augment", config.augment == AugmentConfig()),
            ("evaluation", config.evaluation == EvaluationConfig()),
            ("data.clip", config.data.clip != "segments"),
        ):
            if not off:
                yield f"{path}: it is for fine-tuning a classifier, and model {kind!r} has no use for it: remove it"
    if kind == "classifier" and config.model.num_classes == 1:
        yield "model.num_classes: got 1; a classifier needs at least 2"
    mixes = config.augment.mixup or config.augment.cutmix
    if mixes and config.augment.mix_probability and (config.batch.micro or config.batch.size) < 2:
        yield "augment.mixup: a single clip has no other to be mixed with; raise batch.micro, or switch mixing off"


def _shape_faults(config: RunConfig) -> Iterator[str]:
    if config.data.kind in SINGLE_IMAGE_DATA:
        for field in ("num_frames", "tubelet_size"):
            value = getattr(config.model, field)
            if value != 1:
                yield f"model.{field}: data kind {config.data.kind!r} gives single images, so it must be 1, not {value}"
    _, height, width = config.model.grid
    tokens, ratio = height * width, config.data.mask_ratio
    masked = int(ratio * tokens)
    if not 0 < masked < tokens:
        yield (
            f"data.mask_ratio: {ratio} of the {tokens} tokens of a slice masks {masked}; at least one must be masked "
            "and one visible"
        )


def _batch_faults(config: RunConfig) -> Iterator[str]:
    batch = config.batch
    fixed = (batch.micro or 1) * (batch.accumulation or 1)
    if batch.size % fixed:
        yield (
            f"batch.size: {batch.size} is not a multiple of {_factors(config)} for any number of ranks; "
            f"the nearest sizes are {_nearest_multiples(batch.size, fixed)}"
        )


def check_batch(config: RunConfig, world_size: int) -> tuple[int, int]:
    """`(micro, accumulation)` with `batch.size = micro x accumulation x world_size`.

    What the config leaves out is derived (both missing: accumulation 1).

    Raises:
        ConfigError: the numbers conflict; the sentence proposes the nearest ones that fit.
    """
    batch = config.batch
    unit = (batch.micro or 1) * (batch.accumulation or 1) * world_size
    rest, remainder = divmod(batch.size, unit)
    complete = batch.micro is not None and batch.accumulation is not None
    if remainder or (complete and rest != 1):
        raise ConfigError(_batch_conflict(config, world_size, unit))
    micro, accumulation = (
        (rest, batch.accumulation or 1) if batch.micro is None else (batch.micro, batch.accumulation or rest)
    )
    if micro % config.data.masks_per_clip:
        raise ConfigError(
            f"a forward pass has {micro} samples, not a multiple of data.masks_per_clip {config.data.masks_per_clip}; "
            "change batch.micro or batch.size"
        )
    return micro, accumulation


def _batch_conflict(config: RunConfig, world_size: int, unit: int) -> str:
    batch = config.batch
    parts = " x ".join(part for part in (_factors(config), f"{world_size} ranks") if part)
    per_rank, uneven = divmod(batch.size, world_size)
    proposals = []
    if batch.micro and batch.accumulation:
        conflict = f"batch.size {batch.size} is not {parts} = {unit}"
        proposals.append(f"batch.size {unit}")
        if not uneven and per_rank % batch.micro == 0:
            proposals.append(f"batch.accumulation {per_rank // batch.micro}")
    else:
        product = f" = {unit}" if unit != world_size else ""
        conflict = f"batch.size {batch.size} is not a multiple of {parts}{product}"
        proposals.append(f"batch.size {_nearest_multiples(batch.size, unit)}")
        for name in ("micro", "accumulation"):
            value = getattr(batch, name)
            if value and not uneven:
                proposals.append(f"batch.{name} {_nearest_divisor(per_rank, value)}")
    if uneven:
        proposals.append(f"{_nearest_divisor(batch.size, world_size)} ranks")
    return f"{conflict}; nearest that fits: {', or '.join(proposals)}"


def _factors(config: RunConfig) -> str:
    parts = (("micro", config.batch.micro), ("accumulation", config.batch.accumulation))
    return " x ".join(f"{name} {value}" for name, value in parts if value)


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _nearest_divisor(value: int, wanted: int) -> int:
    return min((n for n in range(1, value + 1) if value % n == 0), key=lambda n: (abs(n - wanted), n))


def _deepspeed_faults(config: RunConfig) -> Iterator[str]:
    for key in config.deepspeed:
        if key in OWNED_DEEPSPEED_KEYS:
            yield f"deepspeed.{key}: this config decides that itself; use {OWNED_DEEPSPEED_KEYS[key]} instead"
        elif key not in KNOWN_DEEPSPEED_KEYS:
            hint = nearest(key, KNOWN_DEEPSPEED_KEYS | OWNED_DEEPSPEED_KEYS.keys()) or "; its JSON reference lists them"
            yield f"deepspeed.{key}: DeepSpeed knows no such key{hint}"
    zero = config.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        yield (
            f"deepspeed.zero_optimization: got {json.dumps(zero)}; it must be an object whose stage is 0, 1, 2 or 3, "
            'e.g. {"stage": 1}'
        )


def missing_files(config: RunConfig) -> list[str]:
    """One sentence for each input that is not on disk, saying how to get it. Paths start at the working directory."""
    found = list(_missing_data(config.data))
    if config.data.excluded and not Path(config.data.excluded).is_file():
        found.append(f"data.excluded: {config.data.excluded} does not exist; give AVA's file, or leave it empty")
    if config.model.init and not Path(config.model.init).exists():
        found.append(
            f"model.init: {config.model.init} does not exist; name a pre-trained run or checkpoint, or leave it empty "
            "to train from scratch"
        )
    if config.evaluation.list and not Path(config.evaluation.list).exists():
        found.append(
            f"evaluation.list: {config.evaluation.list} does not exist; name a list of `path label` lines to validate "
            "on, or leave it empty"
        )
    for role, teacher in _teachers(config).items():
        if not Path(teacher.checkpoint).is_file():
            found.append(_missing_teacher(role, teacher))
    return found


def _missing_data(data: DataConfig) -> Iterator[str]:
    train, what = Path(data.train), "images" if data.kind == "image" else "videos"
    ways = (
        f"give a text file with one of the {what} a line (path, then label) or a folder of class folders: "
        "--set data.train=PATH"
    )
    if data.kind == "ava":
        ways = "give AVA's file of annotations, such as ava_train_v2.2.csv: --set data.train=PATH"
    if not train.exists():
        yield f"data.train: {data.train} does not exist; {ways}"
    elif train.is_dir() and not any(train.iterdir()):
        yield f"data.train: the folder {data.train} is empty; {ways}"
    if data.root and not Path(data.root).is_dir():
        yield (
            f"data.root: {data.root} is not a folder; name the one that the list's relative paths start from, "
            "or leave it empty for the list's own folder"
        )


def _missing_teacher(role: str, teacher: TeacherConfig) -> str:
    path, size = f"teachers.{role}.checkpoint", SIZE_OF_WIDTH.get(teacher.embed_dim)
    source, published = PUBLIC_TEACHERS.get(teacher.kind, ("", ""))
    ways = []
    if size and size in published:
        ways.append(f"take the pre-trained ViT-{size.upper()} from {source}")
    if size and source:
        recipe = f"configs/{teacher.kind}_vit{size}.json"
        ways.append(f"train it with `deepspeed mvd_fast/train.py --config {recipe}`")
    ways = ways or [f"train it first with a recipe for model kind {teacher.kind!r}"]
    return f"{path}: {teacher.checkpoint} does not exist; {', or '.join(ways)}, and name the file: --set {path}=PATH"


def _either(choices: Iterable[str]) -> str:
    return " or ".join(repr(choice) for choice in choices)
