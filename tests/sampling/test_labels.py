"""Classes by name and number."""

import pytest

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config, Data
from diffit.errors import UserError
from diffit.sampling.labels import choose_labels, class_names, find_class, sampled_classes


def config_of(*names: str) -> Config:
    base = get_preset("debug")
    model = base.model.model_copy(update={"num_classes": len(names)})
    return base.model_copy(update={"model": model, "data": Data(cond=True, class_names=names)})


@pytest.mark.parametrize(
    ("given", "index"),
    [("Crane", 0), ("crane", 2), ("goldfish", 1), ("Carassius auratus", 1), ("GOLDFISH, carassius auratus", 1), (3, 3),
     ("3", 3), ("two", 3)],
)  # fmt: skip
def test_a_class_is_found_by_number_exact_name_case_or_synonym(given, index):
    assert find_class(given, config_of("Crane", "goldfish, Carassius auratus", "crane", "two")) == index


def test_an_exact_name_goes_before_a_number():
    assert find_class("1", config_of("1", "0")) == 0
    assert find_class(1, config_of("1", "0")) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("CRANE", r"may be 0 \(Crane\), 2 \(crane\)"),
        ("golfish", "knows Crane, goldfish, Carassius, crane, two, or 0-3"),
        ("4", "0-3"),
        (4, "0-3"),
        (-1, "-1: unknown"),
        ("qqqq", "Crane, goldfish"),
    ],
)
def test_what_is_unknown_or_not_unique_is_refused_with_what_is_near(given, said):
    with pytest.raises(UserError, match=said) as caught:
        find_class(given, config_of("Crane", "goldfish, Carassius", "crane", "two"))
    assert "\n" not in str(caught.value)


def test_of_many_classes_those_that_are_near_are_named():
    names = [f"bird {i}" for i in range(30)]
    with pytest.raises(UserError, match="knows goldfish, …, or 0-30"):
        find_class("golfish", config_of(*names, "goldfish"))
    with pytest.raises(UserError, match=r"knows bird 0, bird 1, .*, bird 19, …, or 0-30"):
        find_class("qqqq", config_of(*names, "goldfish"))


def test_a_model_without_classes_says_so():
    with pytest.raises(UserError, match="no classes"):
        find_class("cat", get_preset("debug"))


def test_imagenet_has_its_names_without_any_in_the_file():
    pytest.importorskip("torchvision")
    config = get_preset("imagenet256")
    assert config.data.class_names is None
    # WordNet's order, which everybody's ImageNet models share.
    known = {"tench": 0, "goldfish": 1, "golden retriever": 207, "Golden Retriever": 207, "toilet tissue": 999}
    assert {name: find_class(name, config) for name in known} == known
    assert len(set(class_names(config))) == 1000


def test_a_class_without_images_is_never_sampled():
    config = config_of("ant", "bee", "cat", "dog")
    data = config.data.model_copy(update={"empty_classes": (1, 3)})
    config = config.model_copy(update={"data": data})
    assert sampled_classes(config) == [0, 2]
    assert choose_labels(config, range(4), "balanced").tolist() == [0, 2, 0, 2]
    assert set(choose_labels(config, range(50)).tolist()) == {0, 2}
    for given in ("bee", 3):
        with pytest.raises(UserError, match=f"class {given}: had no image in training"):
            find_class(given, config)
