"""From options and data to a configuration: the documented commands, what data decides, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, accumulation, resolve, stage_count
from diffit.errors import UserError

RGB32 = DataFacts(channels=3, image_size=(32, 32))
LABELLED = DataFacts(channels=3, image_size=(32, 32), num_classes=10, class_names=tuple("abcdefghij"))

# CONTRACT §4, the numbers of the first two commands.
CIFAR = {
    "resolution": (32, 32),
    "batch_gpu": 128,
    "base_dim": 128,
    "hidden_dim": 256,
    "num_heads": 4,
    "num_blocks": (2,),
    "lr": 1e-3,
    "kimg": 200_000.0,
}
FFHQ = CIFAR | {"resolution": (64, 64), "batch_gpu": 64, "num_blocks": (4,), "lr": 2e-4}


@pytest.mark.parametrize(("preset", "options"), [("cifar10", CIFAR), ("ffhq64", FFHQ)])
@pytest.mark.parametrize("known", [True, False], ids=["with data", "without"])
def test_the_documented_commands_are_the_presets(preset, options, known):
    facts = DataFacts(3, options["resolution"]) if known else None
    spelled, named = resolve(None, options, facts, processes=4), resolve(preset, {}, facts)
    assert spelled.model == named.model == get_preset(preset).model
    assert spelled.preset == preset
    assert spelled.diffusion == named.diffusion
    assert spelled.sampling == named.sampling
    assert spelled.training == named.training.model_copy(update={"batch_gpu": options["batch_gpu"]})


def test_the_documented_command_takes_metrics_too():
    config = resolve(None, CIFAR | {"metrics": ("fid10k_full",), "metrics_ticks": 50, "data": "a.zip"}, processes=4)
    assert config.training.metrics == ("fid10k_full",)
    assert config.training.metrics_ticks == 50
    assert config.data.path == "a.zip"


@pytest.mark.parametrize(
    ("size", "preset"), [((128, 128), "imagenet256"), ((96, 208), "imagenet256"), ((512, 512), "imagenet512")]
)
def test_large_images_call_for_the_latent_model(size, preset):
    config = resolve(None, {"resolution": size})
    assert config.preset == preset
    assert config.model.input_size == (size[0] // 8, size[1] // 8)
    assert config.image_shape == (3, *size)


def test_the_documented_imagenet_command_is_the_preset_with_its_own_depth_and_guidance():
    network = {"resolution": (256, 256), "base_dim": 128, "hidden_dim": 1152, "num_heads": 16, "num_blocks": (30,)}
    recipe = {"batch_gpu": 32, "lr": 3e-4, "kimg": 1_000_000.0, "cond": True, "label_drop": 0.1, "cfg_scale": 4.6}
    config = resolve(None, network | recipe, processes=8)
    preset = get_preset("imagenet256")
    assert config.model == preset.model.model_copy(update={"depth": 30})
    assert config.sampling == preset.sampling.model_copy(update={"cfg_scale": 4.6})
    assert config.training == preset.training.model_copy(update={"batch_gpu": 32})


def test_without_labels_the_latent_model_has_no_classes_and_no_guidance():
    config = resolve("latent-s", {}, DataFacts(3, (256, 256), 5))
    assert config.model.num_classes == 0
    assert config.sampling.cfg_scale == 1
    assert resolve("latent-s", {"cond": True}, DataFacts(3, (256, 256), 5)).model.num_classes == 5


def test_without_label_drop_nothing_is_guided_since_nothing_trains_the_null_class():
    facts = DataFacts(3, (256, 256), 5)
    sampling = resolve("imagenet256", {"label_drop": 0.0}, facts).sampling
    assert (sampling.cfg_scale, sampling.cfg_power) == (1.0, None)
    for preset in ("imagenet256", "cifar10"):
        size = DataFacts(3, (256, 256) if preset == "imagenet256" else (32, 32), 5)
        with pytest.raises(UserError, match=r"guidance \(cfg_scale 3\) needs the null class, which label_drop 0"):
            resolve(preset, {"label_drop": 0.0, "cfg_scale": 3.0, "cond": True}, size)


def test_a_vae_for_an_image_space_model_is_refused():
    with pytest.raises(UserError, match="--vae folder: preset cifar10 is an image-space model"):
        resolve("cifar10", {"vae": "folder"})
    assert resolve("latent-s", {"vae": "folder"}).autoencoder.vae == "folder"


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_discrete_schedule_for_pixels_brings_a_sampler_and_clips(name):
    config = resolve("cifar10", {"diffusion": name})
    assert (config.diffusion.kind, config.diffusion.schedule, config.diffusion.clip) == ("adm", name, True)
    assert (config.sampling.sampler, config.sampling.steps) == ("ddim", 50)
    latent = resolve("latent-s", {"diffusion": name})
    assert (latent.diffusion.schedule, latent.diffusion.clip, latent.sampling.sampler) == (name, False, "ddpm")


def test_the_latent_model_has_no_edm():
    with pytest.raises(UserError, match="--diffusion edm: the latent model has a discrete schedule"):
        resolve("latent-s", {"diffusion": "edm"})
    assert resolve("cifar10", {"diffusion": "edm"}) == resolve("cifar10", {})


def test_a_recipe_that_was_not_asked_for_does_not_ask_for_labels():
    facts = DataFacts(3, (256, 256), 5)
    unasked, asked = (resolve(preset, {}, facts) for preset in (None, "imagenet256"))
    assert (unasked.data.cond, unasked.model.num_classes, unasked.sampling.cfg_scale) == (False, 0, 1)
    assert (asked.data.cond, asked.model.num_classes, asked.sampling.cfg_scale) == (True, 5, 4.4)


def test_latents_of_another_vae_bring_their_channels_and_factor():
    facts = DataFacts(3, (256, 384), latent_scale=0.5, latent_shape=(16, 16, 24))
    config = resolve("latent-s", {}, facts)
    assert config.model.sample_shape == (16, 16, 24)
    assert config.autoencoder.factor == 16
    assert config.image_shape == (3, 256, 384)


def test_cached_latents_choose_the_latent_model_and_bring_their_scale():
    facts = DataFacts(3, (512, 512), latent_scale=0.13025)
    assert resolve(None, {}, facts).preset == "latent-s"
    assert resolve(None, {"num_blocks": (28,)}, facts).preset == "imagenet512"
    assert resolve("latent-b", {}, facts).autoencoder.scale == 0.13025
    with pytest.raises(UserError, match="data are latents, preset cifar10"):
        resolve("cifar10", {}, facts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": (256, 200)}, "200x256: .*multiples of 16.*192x256"),
        ({"dropout": 0.1}, "--dropout 0.1: the latent model has none"),
        ({"num_blocks": (2, 4)}, "--num-blocks 2,4: .*one depth"),
        ({"diffusion": "edm"}, "--diffusion edm: .*linear or cosine"),
        ({"augment": 0.1}, "latents cannot be augmented"),
        ({"hidden_dim": 100}, "hidden_size 100 does not divide"),
    ],
)
def test_what_the_latent_model_cannot_do_is_said(options, said):
    with pytest.raises(UserError, match=said):
        resolve("imagenet256", options)


def test_pixels_train_on_a_discrete_schedule_when_asked():
    config = resolve("cifar10", {"diffusion": "cosine"})
    assert (config.diffusion.kind, config.diffusion.schedule, config.diffusion.clip) == ("adm", "cosine", True)
    assert config.sampling.sampler == "ddim"
    assert config.diffusion.prediction == "epsilon"
    assert resolve("cifar10", {"diffusion": "cosine", "prediction": "v"}).diffusion.prediction == "v"
    assert resolve("imagenet256", {"prediction": "v"}).diffusion.prediction == "v"
    with pytest.raises(UserError, match=r"--prediction v: .*use --diffusion cosine or linear"):
        resolve("cifar10", {"prediction": "v"})


@pytest.mark.parametrize(
    ("facts", "preset"),
    [(RGB32, "small32"), (DataFacts(1, (64, 48)), "small64"), (DataFacts(1, (8, 8)), "small8"),
     (DataFacts(3, (16, 9)), "small16"), (DataFacts(3, (28, 28)), "small32"), (DataFacts(3, (256, 256)), "latent-s")],
)  # fmt: skip
def test_without_a_preset_the_data_chooses(facts, preset):
    config = resolve(None, {}, facts)
    assert config.preset == preset
    assert config.image_shape == (facts.channels, *facts.image_size)


def test_without_anything_to_go_by_the_remedy_is_named():
    with pytest.raises(UserError, match=r"--preset.*--data.*--resolution"):
        resolve(None, {})


def test_options_that_are_none_leave_the_preset():
    options = dict.fromkeys([*CIFAR, "dropout", "seed", "cond", "data", "window_size", "augment"])
    assert resolve("cifar10", options) == get_preset("cifar10")


@pytest.mark.parametrize(("option", "value"), [("dropout", 0.0), ("augment", 0.0), ("label_drop", 0.0), ("seed", 0)])
def test_a_zero_is_not_an_absence(option, value):
    config = resolve("cifar10", {option: value})
    assert getattr(config.model if option == "dropout" else config.training, option) == value


@pytest.mark.parametrize(
    ("preset", "augment", "labels"), [("cifar10", 0.0, 0), ("digits", 0.1, 9), ("cifar10", 1.0, 9)]
)
def test_the_network_takes_augment_labels_where_there_is_augmentation(preset, augment, labels):
    assert resolve(preset, {"augment": augment}).model.augment_dim == labels


def test_options_reach_the_stages_they_speak_of():
    config = resolve(
        "ffhq64", {"base_dim": 32, "hidden_dim": 48, "num_heads": 2, "num_blocks": (1, 2, 3), "window_size": 2}
    )
    stages = [(s.width, s.heads, s.blocks, s.window) for s in config.model.stages]
    assert stages == [(32, 2, 1, 2), (48, 2, 2, 2), (48, 2, 3, 2)]


def test_one_number_of_blocks_is_for_all_stages():
    assert [stage.blocks for stage in resolve("cifar10", {"num_blocks": (3,)}).model.stages] == [3, 3, 3]


@given(st.integers(1, 127), st.integers(1, 127))
def test_any_small_image_has_a_model_whose_bottleneck_is_about_8(height, width):
    config = resolve(None, {}, DataFacts(3, (height, width))) if min(height, width) > 1 else None
    if config is None:
        return
    count = len(config.model.stages)
    assert config.model.image_size == (height, width)
    if max(height, width) not in (32, 64):
        side = min(height, width) / 2 ** (count - 1)
        assert count == 2 or 8 <= side < 16


@pytest.mark.parametrize(("side", "stages"), [(8, 2), (16, 2), (28, 2), (32, 3), (48, 3), (63, 3), (64, 4), (127, 4)])
def test_stages_halve_down_to_8(side, stages):
    assert stage_count((side, side)) == stage_count((side, 2 * side)) == stages


# --- classes --------------------------------------------------------------------------------------------------------


def test_classes_come_from_the_data_when_asked_for():
    config = resolve("cifar10", {"cond": True}, LABELLED)
    assert config.model.num_classes == 10
    assert config.data.cond
    assert config.data.class_names == LABELLED.class_names


@pytest.mark.parametrize("cond", [None, False])
def test_labels_that_are_not_asked_for_stay_out(cond):
    config = resolve("cifar10", {"cond": cond}, LABELLED)
    assert config.model.num_classes == 0
    assert not config.data.cond
    assert config.data.class_names is None


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_a_resolution_other_than_that_of_the_images_names_both_in_width_x_height():
    with pytest.raises(UserError, match=r"--resolution 64x48.*32x32.*diffit data convert --resolution 64x48"):
        resolve("cifar10", {"resolution": (48, 64)}, RGB32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 3}, r"model\.stages\.0.*128.*3 heads"),
        ({"lr": 0.0}, r"training\.lr: 0\.0"),
        ({"kimg": -5.0}, r"training\.kimg: -5\.0"),
        ({"batch": 0}, r"training\.batch: 0"),
        ({"label_drop": 2.0}, r"training\.label_drop: 2\.0"),
        ({"cfg_scale": -1.0}, r"sampling\.cfg_scale: -1\.0"),
        ({"dropout": 1.0}, r"model\.dropout: 1\.0"),
        ({"window_size": 0}, r"model\.stages\.0\.window: 0"),
        ({"num_blocks": (2,) * 7}, "7 stages halve 32x32"),
        ({"num_blocks": (2, 0, 2)}, r"model\.stages\.1\.blocks: 0"),
        ({"seed": -1}, r"training\.seed: -1"),
        ({"precision": "fp8"}, r"training\.precision: 'fp8'"),
    ],
)
def test_an_impossible_value_is_named_in_one_line(options, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve("cifar10", options)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused_before_anything_else():
    with pytest.raises(UserError, match="unknown preset 'cfiar10'"):
        resolve("cfiar10", {"lr": -1.0}, RGB32)


# --- microbatches ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.none() | st.integers(1, 600), st.integers(1, 16))
def test_microbatches_make_up_the_batch_or_a_batch_that_works_is_named(batch, batch_gpu, processes):
    share = min(batch_gpu or batch, batch // processes)
    if share and batch % (share * processes) == 0:
        size, rounds = accumulation(batch, batch_gpu, processes)
        assert size * rounds * processes == batch
        assert size == share
        return
    with pytest.raises(UserError, match=f"--batch {batch} ") as caught:
        accumulation(batch, batch_gpu, processes)
    if "use --batch" in str(caught.value):
        remedy = int(str(caught.value).split("use --batch ")[1].split(",")[0])
        assert accumulation(remedy, batch_gpu, processes)[0] == batch_gpu


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((512, 128, 4), (128, 1)),
        ((512, 128, 1), (128, 4)),
        ((512, None, 4), (128, 1)),
        ((256, 64, 8), (32, 1)),
        ((8, 64, 1), (8, 1)),
    ],
)
def test_the_microbatch_is_the_one_asked_for_or_the_share_of_a_process(arguments, expected):
    assert accumulation(*arguments) == expected


# --- proportion -----------------------------------------------------------------------------------------------------


def test_unknown_keys_are_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match=r"unknown option 'learning_rate'"):
        resolve("debug", {"learning_rate": 1})
    with pytest.raises(UserError, match=r"unknown option 'num_block': did you mean num_blocks"):
        resolve("debug", {"num_block": (1,)})


def test_a_short_run_has_a_short_ramp_and_half_life_and_prints_some_lines():
    training = resolve("cifar10", {"kimg": 10.0}).training
    assert training.lr_rampup_kimg == pytest.approx(0.5)
    assert training.ema_halflife_kimg == pytest.approx(0.5)
    assert 20 <= training.kimg / training.tick <= 100
    assert set(training.chosen) == {"lr_rampup_kimg", "ema_halflife_kimg", "tick", "ema_decay"}
    spelled = resolve("cifar10", {"kimg": 10.0, "lr_rampup_kimg": 3.0, "ema_halflife_kimg": 2.0, "tick": 1.0}).training
    assert (spelled.lr_rampup_kimg, spelled.ema_halflife_kimg, spelled.tick) == (3.0, 2.0, 1.0)


def test_a_longer_run_keeps_the_recipe_of_its_preset():
    longer, own = resolve("cifar10", {"kimg": 400_000.0}).training, get_preset("cifar10").training
    assert longer.lr_rampup_kimg == own.lr_rampup_kimg
    assert longer.ema_halflife_kimg == own.ema_halflife_kimg
    assert longer.tick == own.tick


def test_a_whole_configuration_takes_the_place_of_a_preset():
    base = resolve("ffhq64", {"num_blocks": (1, 2, 3), "lr": 5e-4, "kimg": 100.0})
    again = resolve(base, {})
    assert again.model == base.model
    assert again.training.model_dump(exclude={"chosen"}) == base.training.model_dump(exclude={"chosen"})
    assert resolve(base, {"lr": 1e-4}).training.lr == 1e-4


def test_a_share_of_the_time_for_metrics_takes_the_place_of_ticks_where_it_is_asked_for():
    budget = {"metrics": ("fd100_full:pixels",), "metrics_budget": 0.05}
    assert resolve("debug", budget).training.metrics_ticks == 1
    base = resolve("debug", budget | {"metrics_ticks": 7})
    assert (base.training.metrics_ticks, resolve(base, {}).training.metrics_ticks) == (7, 7)


def test_noise_distribution_patches_and_mlps_can_be_chosen():
    assert resolve("cifar10", {"P_mean": -0.4, "P_std": 1.0}).diffusion.P_mean == -0.4
    assert resolve("latent-s", {"patch_size": 4, "mlp_ratio": 2.0}).model.patch_size == 4
    assert resolve("cifar10", {"mlp_ratio": 2.0}).model.mlp_ratio == 2.0
    with pytest.raises(UserError, match=r"--patch-size 2: preset cifar10 has no patches"):
        resolve("cifar10", {"patch_size": 2})
    with pytest.raises(UserError, match=r"--P_mean -1: of EDM's noise distribution"):
        resolve("latent-s", {"P_mean": -1.0})


def test_a_grid_too_large_to_be_read_again_is_refused_with_one_that_is_not():
    facts = DataFacts(channels=3, image_size=(512, 512))
    with pytest.raises(UserError, match=r"^--grid 32x16: 134 million pixels; at 512x512 use at most 13x13$"):
        resolve("cifar10", {"resolution": (512, 512), "grid": (32, 16)}, facts)
    assert resolve("cifar10", {"resolution": (512, 512), "grid": (13, 13)}, facts).training.grid == (13, 13)


def test_a_recipe_changes_how_weights_begin_and_move_and_options_go_before_it():
    published, small = get_preset("cifar10"), get_preset("small16")
    training = resolve("cifar10", {"recipe": "muon"}).training
    changed = {"optimizer": "muon", "init": "fan_in", "weighting": "uncertainty", "lr_decay": 0.5}
    assert training == published.training.model_copy(update=changed)
    assert resolve("cifar10", {"recipe": "paper"}).training == published.training
    as_published = resolve("small16", {"recipe": "paper"}).training
    assert (as_published.optimizer, as_published.init, as_published.conv_lr) == ("adam", "xavier", 1.0)
    assert (as_published.weighting, small.training.weighting) == (None, "uncertainty")
    assert as_published.lr == small.training.lr
    assert resolve("cifar10", {"recipe": "muon", "optimizer": "adam"}).training.optimizer == "adam"
    latent = resolve("latent-s", {"recipe": "muon"}).training
    assert (latent.optimizer, latent.init) == ("muon", resolve("latent-s", {}).training.init)
    cosine = resolve("small16", {"diffusion": "cosine"})
    for other in (latent, cosine.training, resolve(cosine, {"recipe": "muon"}).training):
        assert other.weighting is None
    asked = resolve("small16", {"diffusion": "cosine", "weighting": "uncertainty"})
    assert asked.training.weighting == "uncertainty"
    with pytest.raises(UserError, match="recipe 'sgd': use paper or muon"):
        resolve("cifar10", {"recipe": "sgd"})
