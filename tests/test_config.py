"""Configs: every recipe against the tables of the papers, and every way to get one wrong against its sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from mvd_fast.config import checks, kinds, load
from mvd_fast.config.base import ConfigError
from mvd_fast.config.checks import check_batch, missing_files
from mvd_fast.config.load import list_recipes, load_config, save_config
from mvd_fast.data.clips import Random, Segments
from mvd_fast.data.crops import MultiScale, RandomResized

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: object) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def refusal(config: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    return str(caught.value)


# name: student, teachers, decoder depth/width/heads, batch, peak lr, min lr, drop path, epochs (MVD, CVPR 2023)
MVD_TABLE = {
    "vits_from_vitb": ("s", "b", (2, 384, 6), 1024, 6e-4, 4e-4, 0.1, 400),
    "vits_from_vitl": ("s", "l", (2, 384, 6), 1024, 6e-4, 4e-4, 0.1, 400),
    "vitb_from_vitb": ("b", "b", (2, 768, 12), 1024, 6e-4, 4e-4, 0.1, 400),
    "vitb_from_vitl": ("b", "l", (2, 768, 12), 1024, 6e-4, 4e-4, 0.1, 400),
    "vitl": ("l", "l", (4, 512, 8), 512, 3e-4, 2e-4, 0.1, 400),
    "vitl_800e": ("l", "l", (4, 512, 8), 512, 3e-4, 2e-5, 0.1, 800),
    "vith": ("h", "h", (8, 640, 8), 512, 3e-4, 2e-5, 0.2, 800),
}
# name: size, decoder depth/width/heads, patch, batch, peak lr, min lr, mask ratio
STAGE_1_TABLE = {
    "mae_vits": ("s", (8, 512, 16), 16, 4096, 2.4e-3, 0.0, 0.75),
    "mae_vitb": ("b", (8, 512, 16), 16, 4096, 2.4e-3, 0.0, 0.75),
    "mae_vitl": ("l", (8, 512, 16), 16, 4096, 2.4e-3, 0.0, 0.75),
    "mae_vith": ("h", (8, 512, 16), 14, 4096, 2.4e-3, 0.0, 0.75),
    "videomae_vits": ("s", (4, 192, 3), 16, 1024, 6e-4, 4e-5, 0.9),
    "videomae_vitb": ("b", (4, 384, 6), 16, 2048, 1.2e-3, 8e-5, 0.9),
    "videomae_vitl": ("l", (12, 512, 8), 16, 512, 3e-4, 2e-5, 0.9),
    "videomae_vith": ("h", (12, 640, 8), 16, 1024, 6e-4, 4e-5, 0.9),
}


def scaled(config, rate: float) -> float:
    return rate * config.batch.size / 256


def encoder(part) -> tuple[int, int, int]:
    return part.embed_dim, part.depth, part.num_heads


def decoder(part) -> tuple[int, int, int]:
    return part.depth, part.dim, part.num_heads


@pytest.mark.parametrize("name", MVD_TABLE)
def test_mvd_recipe_equals_table(name):
    student, teacher, decoder_shape, batch, peak, low, drop_path, epochs = MVD_TABLE[name]
    config = load_config(name)
    assert config.name == name and config.output_dir == f"runs/{name}"
    assert encoder(config.model) == SIZES[student]
    assert {decoder(one) for one in config.decoders} == {decoder_shape}
    image, video = config.targets
    assert [(one.title, one.kind) for one in config.targets] == [("image", "mae"), ("video", "videomae")]
    assert encoder(image) == encoder(video) == SIZES[teacher]
    assert config.batch.size == batch and config.optim.epochs == epochs and config.model.drop_path == drop_path
    assert scaled(config, config.optim.base_lr) == pytest.approx(peak, rel=1e-12)
    assert scaled(config, config.optim.base_min_lr) == pytest.approx(low, rel=1e-12)
    assert config.model.activation_checkpointing == (name == "vith")
    assert (image.patch_size, image.image_size) == ((14, 196) if teacher == "h" else (16, 224))
    assert config.task == "distill" and not any(one.normalize for one in config.targets)
    assert (image.weight, video.weight, config.mask.predict_fraction, config.mask.per_clip) == (1.0, 1.0, 1.0, 1)


@pytest.mark.parametrize("name", STAGE_1_TABLE)
def test_stage_1_recipe_equals_table(name):
    size, decoder_shape, patch, batch, peak, low, ratio = STAGE_1_TABLE[name]
    config = load_config(name)
    model, data = config.model, config.data
    assert config.name == name and config.task == name.split("_")[0]
    assert encoder(model) == SIZES[size] and decoder(config.decoder) == decoder_shape and model.patch_size == patch
    assert config.batch.size == batch and config.mask.ratio == ratio and config.optim.epochs == 800
    assert scaled(config, config.optim.base_lr) == pytest.approx(peak, rel=1e-12)
    assert scaled(config, config.optim.base_min_lr) == pytest.approx(low, rel=1e-12)
    assert config.normalize_pixels and model.drop_path == 0.0
    if config.task == "mae":
        assert (data.kind, data.crop, data.flip) == ("image", RandomResized(area=(0.2, 1.0)), 0.5)
        assert model.grid == (1, 224 // patch, 224 // patch)


@pytest.mark.parametrize("name", [*MVD_TABLE, *STAGE_1_TABLE])
def test_recipes_share_optimiser_and_clip(name):
    config = load_config(name)
    optim, data = config.optim, config.data
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip_grad) == ((0.9, 0.95), 1e-8, 0.05, 0.0)
    assert optim.warmup_epochs == 40 and optim.warmup_lr == 0.0
    stage = 0 if config.model.embed_dim <= 768 else 1
    assert config.precision == "bf16" and config.deepspeed == {"zero_optimization": {"stage": stage}}
    if config.task != "mae":
        assert config.model.grid == (8, 14, 14) and data.clip == Random(sampling_rate=4)
        assert (data.kind, data.crop, data.flip) == ("video", MultiScale(scales=(1, 0.875, 0.75, 0.66)), 0.0)
        assert config.mask.ratio == 0.9


# name: size, classes, peak lr per 256, epochs, batch, layer decay, drop path, head dropout, min lr per 256
FINETUNE_TABLE = {
    "k400_vits": ("s", 400, 5e-4, 150, 384, 0.75, 0.1, 0.0, 1e-6),
    "k400_vitb": ("b", 400, 5e-4, 75, 384, 0.75, 0.1, 0.0, 1e-6),
    "k400_vitl": ("l", 400, 1e-3, 50, 512, 0.75, 0.3, 0.5, 1e-6),
    "k400_vith": ("h", 400, 1e-3, 50, 256, 0.75, 0.3, 0.5, 1e-6),
    "ssv2_vits": ("s", 174, 1e-3, 40, 384, 0.7, 0.1, 0.0, 1e-6),
    "ssv2_vitb": ("b", 174, 5e-4, 30, 384, 0.75, 0.1, 0.0, 1e-6),
    "ssv2_vitl": ("l", 174, 5e-4, 30, 256, 0.75, 0.3, 0.5, 1e-6),
    "ssv2_vith": ("h", 174, 5e-4, 30, 128, 0.75, 0.3, 0.5, 1e-5),
    "ucf101_vitb": ("b", 101, 5e-4, 75, 384, 0.75, 0.1, 0.0, 1e-6),
    "hmdb51_vitb": ("b", 51, 5e-4, 75, 384, 0.75, 0.1, 0.0, 1e-6),
}


@pytest.mark.parametrize("name", FINETUNE_TABLE)
def test_finetuning_recipe_equals_table(name):
    config = load_config(f"finetune/{name}")
    model, optim, data, augment = config.model, config.optim, config.data, config.augment
    own = (optim.base_lr, optim.epochs, config.batch.size, optim.layer_decay, model.drop_path, model.head_dropout)
    assert (model.num_classes, *own, optim.base_min_lr) == FINETUNE_TABLE[name][1:]
    assert config.name == name and encoder(model) == SIZES[FINETUNE_TABLE[name][0]] and model.grid == (8, 14, 14)
    assert (optim.betas, optim.weight_decay, optim.warmup_epochs, optim.ema) == ((0.9, 0.999), 0.05, 5, 0.0)
    assert (data.kind, data.crop) == ("labelled", RandomResized(area=(0.08, 1.0)))
    assert (augment.rand_augment.layers, augment.rand_augment.magnitude, augment.rand_augment.deviation) == (4, 7, 0.5)
    assert (augment.repeats, augment.random_erasing, augment.label_smoothing) == (2, 0.25, 0.1)
    mixing = augment.mixup, augment.cutmix, augment.mix_probability, augment.cutmix_probability
    assert mixing == (0.8, 1.0, 1.0, 0.5)
    test = config.evaluation.sampling, config.evaluation.clips, config.evaluation.crops
    ssv2 = name.startswith("ssv2")
    assert test == (("uniform", 2, 3) if ssv2 else ("dense", 5, 3))
    assert (data.clip, data.flip) == ((Segments(), 0.0) if ssv2 else (Random(sampling_rate=4), 0.5))


@pytest.mark.parametrize(
    "recipe, overrides, said",
    [
        ("finetune/k400_vitb", ["model.num_classes=null"], "model.num_classes: got null; it must be a whole number"),
        ("finetune/k400_vitb", ["model.num_classes=1"], "model.num_classes: got 1; a classifier needs at least 2"),
        (
            "finetune/k400_vitb",
            ["decoder.dim=64"],
            "decoder: unknown key of task 'classify'; it is one of task 'distill' and 'mae'",
        ),
        ("finetune/k400_vitb", ["mask.ratio=0.5"], "mask: unknown key"),
        ("finetune/k400_vitb", ["data.kind=video"], "task 'classify' needs labels and video: take 'labelled'"),
        (
            "finetune/k400_vitb",
            ['data={"kind": "image", "train": "x"}'],
            "'image' gives image, and task 'classify' needs",
        ),
        (
            "finetune/k400_vitb",
            ["batch.micro_batch_size=1"],
            "augment.mixup: a single clip has no other to be mixed with",
        ),
        ("finetune/k400_vitb", ["mask.per_clip=2"], "mask: unknown key"),
        ("finetune/k400_vitb", ["optim.ema=1"], "optim.ema: got 1; it must be less than 1"),
        ("finetune/k400_vitb", ["augment.mixup=-1"], "augment.mixup: got -1; it must be greater than or equal to 0"),
        ("finetune/ssv2_vitb", ["data.clip.sampling_rate=2"], "data.clip.sampling_rate: unknown key"),
        ("finetune/ssv2_vitb", ["evaluation.sampling=dense"], "dense takes every n-th frame, and data.clip segments"),
        ("vitl", ["augment.mixup=0.8"], "augment: unknown key"),
        ("vitl", ["optim.layer_decay=0.7"], "optim.layer_decay: unknown key"),
        ("vitl", ["evaluation.list=a.txt"], "evaluation: unknown key"),
        ("vitl", ["data.clip=segments"], "data.clip.kind: unknown kind 'segments'; there are: random, center"),
        ("vitl", ["init=a.pth"], "init: unknown key"),
        ("vitl", ["decoder=null"], "decoder is missing; the targets image, video have none of their own"),
        ("mae_vitb", ["targets=[]"], "targets: unknown key"),
        ("mae_vitb", ["teachers.prefetch=true"], "teachers: unknown key"),
        ("mae_vitb", ["mask.predict_fraction=0.5"], "mask.predict_fraction: unknown key"),
        ("mae_vitb", ["model.num_frames=4"], "model.num_frames: unknown key"),
        ("finetune/ava_vitb", ["augment.mixup=0.8"], "augment: unknown key"),
        ("finetune/ava_vitb", ["model.head_dropout=0.5"], "model.head_dropout: unknown key"),
    ],
)
def test_finetuning_and_pretraining_do_not_mix(recipe, overrides, said):
    assert said in refusal(recipe, *overrides)


def test_missing_start_and_validation_list_are_named(tmp_path):
    overrides = [f"data.train={tmp_path}", f"init={tmp_path}/start.pth", f"evaluation.list={tmp_path}/val.txt"]
    sentences = " ".join(missing_files(load_config("finetune/k400_vitb", overrides)))
    assert "start.pth does not exist; name a pre-trained run" in sentences
    assert "val.txt does not exist; name a list of `path label` lines" in sentences


def test_tables_name_every_recipe_and_every_recipe_loads():
    recipes = list_recipes()
    assert {name for name in recipes if "/" not in name} == {*MVD_TABLE, *STAGE_1_TABLE}
    assert {"demo/image_teacher", "demo/video_teacher", "demo/student"} <= set(recipes)
    assert {f"finetune/{name}" for name in FINETUNE_TABLE} <= set(recipes)
    for name, path in recipes.items():
        assert load_config(name) == load_config(str(path))


def test_recipe_is_found_by_name_and_inside_the_package(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    assert load_config("vitl.json") == load_config("vitl") == load_config(str(CONFIGS / "vitl.json"))
    installed = tmp_path / "site" / "configs"
    write("site/configs/mine.json", json.loads(load_config("vitl", ["name=mine"]).model_dump_json()))
    monkeypatch.setattr(load, "RECIPE_FOLDERS", (installed, tmp_path / "nowhere"))
    assert load_config("mine").name == "mine" and list(list_recipes()) == ["mine"]


def test_missing_file_names_nearest_recipe():
    assert "configs/vitll.json does not exist, did you mean 'vitl'?" in refusal("configs/vitll.json")
    assert "the recipes are" in refusal("zzzzzz") and "vitb_from_vitl" in refusal("zzzzzz")


def test_extends_merges_in_order(write):
    write("parts/a.json", {"extends": "vitl", "optim": {"epochs": 50}, "data": {"crop": {"scales": [1.0, 0.5]}}})
    write("parts/b.json", {"optim": {"epochs": 60}, "deepspeed": {"zero_optimization": {"stage": 2}}})
    run = write(
        "run.json", {"extends": ["parts/a.json", "parts/b"], "name": "run", "data": {"crop": {"scales": [0.7]}}}
    )
    config = load_config(run)
    assert config.optim.epochs == 60 and config.optim.base_min_lr == 1e-4  # objects merge ...
    assert config.data.crop.scales == (0.7,) and config.deepspeed["zero_optimization"] == {
        "stage": 2
    }  # ... lists replace


def test_extends_refuses_cycles_and_nonsense(write):
    write("a.json", {"extends": "b.json"})
    first = write("b.json", {"extends": "a.json"})
    assert "extends itself: b.json -> a.json -> b.json" in refusal(first)
    assert "extends: got 3; it must be a file name" in refusal(write("c.json", {"extends": 3}))
    assert "d.json: extends: config lost.json does not exist" in refusal(write("d.json", {"extends": "lost.json"}))


def test_extends_twice_the_same_base_is_no_cycle(write):
    write("left.json", {"extends": "vitl", "seed": 1})
    write("right.json", {"extends": "vitl"})
    assert load_config(write("run.json", {"extends": ["left.json", "right.json"]})).seed == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"name": "x",\n  "seed": 1,}', "line 2, column"),
        ('{"seed": 1, "seed": 2}', "'seed' stands twice"),
        ('{"seed": NaN}', "NaN is not a number"),
        ("[1]", "must hold one JSON object"),
    ],
)
def test_bad_json_is_located(write, text, said):
    assert said in refusal(write("run.json", text))


def test_not_utf8_is_refused(tmp_path):
    (tmp_path / "run.json").write_bytes(b'{"name": "\xff"}')
    assert "is not valid JSON" in refusal(str(tmp_path / "run.json"))


def test_overrides_are_json_or_strings():
    overrides = [
        "optim.epochs=7",
        "optim.warmup_epochs=1",
        "name=my run",
        "batch.micro_batch_size=null",
        "data.crop.scales=[1, 0.5]",
    ]
    config = load_config("vitl", [*overrides, 'run_dir="7"', 'deepspeed={"dump_state": true}', "data.root=a=b"])
    assert (config.optim.epochs, config.name, config.batch.micro_batch_size) == (7, "my run", None)
    assert (config.data.crop.scales, config.run_dir, config.data.root) == ((1.0, 0.5), "7", "a=b")
    assert config.deepspeed == {"dump_state": True}  # an object replaces what was there


@pytest.mark.parametrize("override", ["epochs", "=3", "optim.=3", ".epochs=3"])
def test_override_without_key_or_value(override):
    assert "--set takes KEY=VALUE" in refusal("vitl", override)


@pytest.mark.parametrize(
    "override, said",
    [
        ("model.dept=3", "model.dept: unknown key, did you mean 'depth'? valid here: image_size"),
        ("epochs=3", "epochs: unknown key, did you mean 'optim.epochs'?"),
        ("model.zzz=3", "model.zzz: unknown key; valid here: image_size"),
        ("targets.image.widht=3", "targets[0].widht: unknown key"),
        ("model.depth=twelve", 'model.depth: got "twelve"; it must be a whole number'),
        ('model.depth="12"', 'model.depth: got "12"; it must be a whole number'),
        ("model.depth=12.5", "model.depth: got 12.5; it must be a whole number"),
        ("model.depth=0", "model.depth: got 0; it must be greater than 0"),
        ("mask.ratio=1.5", "mask.ratio: got 1.5; it must be less than 1"),
        ("log.tensorboard=1", "log.tensorboard: got 1; it must be true or false"),
        ("name=3", "name: got 3; it must be a string"),
        ("optim=3", "optim: got 3; it must be an object"),
        ("optim.betas=[0.9, true]", "optim.betas[1]: got true; it must be a number"),
        ("precision=bf17", "precision: got \"bf17\"; it must be 'fp32' or 'bf16', did you mean 'bf16'?"),
        ("model={}", "model.embed_dim is missing"),
        ("data={}", "data.kind is missing; it is one of ava, frame, image, labelled, video"),
        ('data={"kind": "video"}', "data.train is missing; it is the list file"),
        ("data=3", "data: got 3; it must be an object"),
        ("targets=3", "targets: got 3; it must be a list"),
        ("model.num_heads=7", "model: embed_dim 1024 is not a multiple of num_heads 7"),
        ("optim.warmup_epochs=401", "optim: warmup_epochs is 401, longer than the 400 epochs"),
    ],
)
def test_schema_faults_are_sentences_that_name_where_they_come_from(write, tmp_path, override, said):
    tree = json.loads(load_config("vitl").model_dump_json())
    sound = refusal(write("sound.json", tree), override)
    named = said.startswith(override.partition("=")[0] + ": ") or "[1]" in said
    source = f"{tmp_path}/sound.json with --set {override}"
    if named:
        assert sound.startswith(f"--set {said}")
    else:
        assert sound.startswith(source) and said in sound

    load._apply_override(tree, override)
    faulty = refusal(write("faulty.json", tree), "seed=1")
    assert faulty.startswith(f"{tmp_path}/faulty.json") and said in faulty and "--set" not in faulty
    for message in (sound, faulty):
        assert "pydantic" not in message and "Value error" not in message and "type=" not in message


def test_several_faults_stand_one_a_line(write):
    file = write("run.json", {"extends": "vitl", "model": {"dept": 3}, "seed": -1})
    lines = refusal(file).splitlines()
    assert lines[0] == f"{file} has 2 errors:" and len(lines) == 3
    assert len(refusal("vitl", "seed=-1").splitlines()) == 1
    heading, *rest = refusal(file, "precision=fp8").splitlines()
    assert heading == "3 errors:" and '  --set precision: got "fp8"' in "\n".join(rest)
    assert sum(line.startswith(f"  {file}: ") for line in rest) == 2


@pytest.mark.parametrize(
    "recipe, overrides, said",
    [
        ("vitl", ["task=distil"], "task: unknown kind 'distil', did you mean 'distill'?"),
        ("vitl", ["task=3"], "task: got 3; it must be one of classify, detect, distill, mae, videomae"),
        ("vitl", ["data.kind=zzz"], "data.kind: unknown kind 'zzz'; there are: ava, frame, image, labelled, video"),
        ("vitl", ["data.crop=centre"], "data.crop.kind: unknown kind 'centre', did you mean 'center'?"),
        ("vitl", ["targets.video.kind=vidomae"], "kind: unknown kind 'vidomae', did you mean 'videomae'?"),
        ("vitl", ["targets=[]"], "targets: got []; it must"),
        ("vitl", ["targets.video.name=image"], "targets: two are named 'image'; give one another name"),
        ("vitl", ["targets.image.weight=0", "targets.video.weight=0"], "all weights are 0, and nothing is left to"),
        ("vitl", ["targets.sound.weight=0"], "no entry 'sound' in the list, which is image, video, or a number below"),
        (
            "vith",
            ["targets.image.image_size=224"],
            "grid 16x16 (image_size 224 / patch_size 14) must equal the student's 14x14: set image_size to 196",
        ),
        ("vitl", ["mask.ratio=0.001"], "0.001 of the 196 tokens of a slice masks 0"),
        ("vitl", ["data.kind=frame"], "'frame' gives image, and task 'distill' needs video: take 'ava' or 'lab"),
        ("demo/image_teacher", ["data.kind=video"], "data.kind: 'video' gives video, and task 'mae' needs image: take"),
        (
            "vitl",
            ["batch.micro_batch_size=3"],
            "batch.size: 512 is not a multiple of micro_batch_size 3 for any number of ranks; the nearest",
        ),
    ],
)
def test_parts_that_do_not_fit(recipe, overrides, said):
    assert said in refusal(recipe, *overrides)


def test_entries_of_a_list_are_meant_by_name_kind_or_number():
    settings = ["targets.image.weight=2", "targets.videomae.precision=int8", "targets.1.normalize=true"]
    image, video = load_config("vitl", settings).targets
    assert (image.weight, image.precision, image.normalize) == (2.0, None, False)
    assert (video.weight, video.precision, video.normalize) == (1.0, "int8", True)


def test_an_entry_without_a_name_has_its_kinds(write):
    tree = json.loads(load_config("vitl").model_dump_json())
    for target in tree["targets"]:
        del target["name"]
    config = load_config(write("run.json", tree), ["targets.video.weight=3"])
    assert [(target.title, target.weight) for target in config.targets] == [("image", 1.0), ("video", 3.0)]


def test_targets_have_their_own_decoders_or_the_runs():
    config = load_config("vitl", ['targets.video.decoder={"dim": 32, "depth": 1, "num_heads": 2}'])
    assert [decoder(one) for one in config.decoders] == [(4, 512, 8), (1, 32, 2)]


def test_a_kind_may_be_given_by_its_name_alone():
    assert load_config("vitl", ["data.crop=center"]) == load_config("vitl", ['data.crop={"kind": "center"}'])


def test_an_object_of_another_kind_replaces_the_one_it_extends(write):
    cut = write("run.json", {"extends": "vitl", "data": {"crop": {"kind": "random_resized"}, "flip": 0.5}})
    data = load_config(cut).data
    assert data.crop == RandomResized() and data.flip == 0.5 and data.clip == Random(sampling_rate=4)
    same = write("run.json", {"extends": "vitl", "data": {"kind": "video", "flip": 0.5}})
    assert load_config(same).data.train == load_config("vitl").data.train
    other = write("run.json", {"extends": "vitl", "data": {"kind": "labelled", "flip": 0.5}})
    assert "data.train is missing" in refusal(other)


def test_a_task_takes_any_data_that_has_what_it_needs():
    assert load_config("vitl", ["data.kind=labelled"]).data.gives > load_config("vitl").needs


def test_one_masked_token_and_one_visible_token_are_enough():
    for ratio, visible in ((1 / 196 + 1e-9, 195), (195.5 / 196, 1)):
        assert load_config("vitl", [f"mask.ratio={ratio}"]).request.masks.num_visible == 8 * visible


@pytest.mark.parametrize(
    "key, field",
    [("optimizer", "optim"), ("fp16", "precision"), ("train_batch_size", "batch.size"), ("steps_per_print", "log.ev")],
)
def test_deepspeed_block_leaves_the_configs_own_fields_alone(key, field):
    message = refusal("vitl", f"deepspeed.{key}={{}}")
    assert f"deepspeed.{key}: this config decides that itself; use" in message and field in message


def test_deepspeed_keys_are_checked():
    assert "did you mean 'zero_optimization'?" in refusal("vitl", 'deepspeed.zero_optimisation={"stage": 1}')
    for stage in ("4", "-1", "true", '"1"'):
        assert "stage is 0, 1, 2 or 3" in refusal("vitl", f"deepspeed.zero_optimization.stage={stage}")
    assert "stage is 0, 1, 2 or 3" in refusal("vitl", "deepspeed.zero_optimization=2")
    good = '{"zero_optimization": {"stage": 3}, "wall_clock_breakdown": true, "aio": {}}'
    assert load_config("vitl", [f"deepspeed={good}"]).deepspeed["aio"] == {}


def batched(size: int, micro: int | None = None, accumulation: int | None = None):
    config = load_config("vitl")
    batch = config.batch.model_copy(update={"size": size, "micro_batch_size": micro, "grad_accum_steps": accumulation})
    return config.model_copy(update={"batch": batch})


@pytest.mark.parametrize(
    "size, micro, accumulation, ranks, expected",
    [
        (512, None, None, 8, (64, 1)),
        (512, 8, None, 8, (8, 8)),
        (512, None, 4, 8, (16, 4)),
        (512, 8, 8, 8, (8, 8)),
        (1, None, None, 1, (1, 1)),
    ],
)
def test_batch_is_derived(size, micro, accumulation, ranks, expected):
    assert check_batch(batched(size, micro, accumulation), ranks) == expected


@pytest.mark.parametrize(
    "size, micro, accumulation, ranks, said",
    [
        (
            512,
            8,
            4,
            8,
            "is not micro_batch_size 8 x grad_accum_steps 4 x 8 ranks = 256; nearest that fits: batch.size 256, or "
            "batch.grad_accum_steps 8",
        ),
        (512, None, None, 6, "not a multiple of 6 ranks; nearest that fits: batch.size 510 or 516, or 4 ranks"),
        (
            512,
            48,
            None,
            8,
            "not a multiple of micro_batch_size 48 x 8 ranks = 384; nearest that fits: batch.size "
            "384 or 768, or batch.micro_ba",
        ),
        (512, None, 6, 8, "batch.grad_accum_steps 4"),
        (4, None, None, 8, "batch.size 8"),
    ],
)
def test_batch_conflict_proposes_what_fits(size, micro, accumulation, ranks, said):
    with pytest.raises(ConfigError) as caught:
        check_batch(batched(size, micro, accumulation), ranks)
    assert said in str(caught.value)


def test_missing_files_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, image, video = missing_files(load_config("vith"))
    assert data.startswith("data.train: data/k400/train.txt does not exist") and "--set data.train=PATH" in data
    assert "targets.image.checkpoint: checkpoints/mae_vith.pth" in image and "ViT-H from the MAE project" in image
    assert "VideoMAE's model zoo" in video and "--config configs/videomae_vith.json" in video
    assert all("\n" not in sentence for sentence in (data, image, video))
    [demo] = [line for line in missing_files(load_config("demo/student")) if "targets.image" in line]
    assert "train it first" in demo and "ViT-" not in demo


def test_a_target_of_weight_0_needs_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentences = missing_files(load_config("vith", ["targets.image.weight=0"]))
    assert [sentence.partition(":")[0] for sentence in sentences] == ["data.train", "targets.video.checkpoint"]


def test_missing_files_sees_what_is_there(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    config = load_config("vitb_from_vitb", ["data.root=videos"])
    for path in (config.data.train, *(target.checkpoint for target in config.targets)):
        write(path, "x")
    [root] = missing_files(config)
    assert root.startswith("data.root: videos is not a folder")
    (tmp_path / "videos").mkdir()
    assert missing_files(config) == []
    [empty] = missing_files(config.model_copy(update={"data": config.data.model_copy(update={"train": "videos"})}))
    assert "the folder videos is empty" in empty


@pytest.mark.parametrize("name", ["vith", "mae_vitb", "demo/student"])
def test_saved_config_loads_equal(tmp_path, name):
    config = load_config(name, ["seed=5"])
    save_config(config, tmp_path / "new" / "config.json")
    assert load_config(str(tmp_path / "new" / "config.json")) == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "config.json"
    save_config(load_config("vitl"), target)
    before = target.read_text()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(load.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_config(load_config("vith"), target)
    assert target.read_text() == before and list(tmp_path.iterdir()) == [target]


def test_kinds_are_read_off_the_folders_without_importing(tmp_path, monkeypatch, write):
    write("first/tasks/mine.py", "raise SystemExit\nclass Config(RunConfig):\n    pass\n")
    write("second/tasks/helper.py", "def build():\n    class Config:\n        pass\n")
    folders = [tmp_path / "first", tmp_path / "second", tmp_path]  # the last without tasks
    monkeypatch.setenv("MVD_PLUGINS", os.pathsep.join(map(str, folders)))
    own = [str(Path(kinds.__file__).parents[1] / "tasks")]
    found = kinds.with_plugins(own, "mvd_fast.tasks")
    assert found == [*own, *(str(folder / "tasks") for folder in folders)]
    assert kinds.kinds_in(found) == ("classify", "detect", "distill", "mae", "mine", "videomae")
    write("second/tasks/mae.py", "class Config(RunConfig):\n    pass\n")
    with pytest.raises(ConfigError, match=r"second/tasks/mae\.py and .*/mae\.py are both kind 'mae'; rename yours"):
        kinds.kinds_in(found)
    monkeypatch.setenv("MVD_PLUGINS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"MVD_PLUGINS: .*/none is no folder"):
        kinds.with_plugins(own, "mvd_fast.tasks")
    monkeypatch.delenv("MVD_PLUGINS")
    assert kinds.with_plugins(own, "mvd_fast.tasks") == own


def test_known_deepspeed_keys_are_those_it_reads():
    """Every key that we let pass is named in the installed DeepSpeed's own config code."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None:
        pytest.skip("DeepSpeed is not installed")
    folder = Path(spec.origin).parent
    files = [*folder.rglob("*config*.py"), *folder.rglob("constants.py")]
    quoted = set(re.findall(r"""["']([a-z0-9_]+)["']""", "".join(file.read_text("utf-8") for file in files)))
    assert set() == checks.KNOWN_DEEPSPEED_KEYS - quoted
    assert set() == checks.OWNED_DEEPSPEED_KEYS.keys() - quoted
