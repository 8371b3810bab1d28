"""What training asks of its data."""

import json
import zipfile

import pytest
import torch

from diffit.configs.resolve import resolve
from diffit.data.open import facts_of, open_data, open_val
from diffit.errors import UserError
from diffit.training.run_dir import same_run
from helpers import write_archive


def renamed(source, dest, class_names, labels):
    """The same images with other labels."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, "w") as new:
        names = sorted(name for name in old.namelist() if name.endswith(".png"))[: len(labels)]
        for name in names:
            new.writestr(name, old.read(name))
        meta = {"labels": list(zip(names, labels, strict=True)), "class_names": class_names}
        new.writestr("dataset.json", json.dumps(meta))
    return dest


@pytest.fixture
def pets(tmp_path):
    return open_data(write_archive(tmp_path / "pets.zip", 9), True, None)


def config_for(archive):
    return resolve("debug", {"cond": True, "batch": 4}, facts_of(archive))


def test_the_facts_are_those_of_the_archive(pets):
    facts = facts_of(pets)
    assert facts is not None
    assert (facts.channels, facts.image_size, facts.num_classes) == (3, (16, 16), 3)
    assert facts.class_names == ("ant", "bee", "cat")
    assert facts_of(None) is None


def test_held_out_classes_get_the_numbers_of_training_by_their_names(pets, tmp_path):
    path = renamed(pets.path, tmp_path / "val.zip", ["cat", "ant"], [0, 1, 1, 0])
    val = open_val(path, pets, config_for(pets))
    assert val.labels.tolist() == [2, 0, 0, 2]
    assert (val.num_classes, val.class_names) == (3, ["ant", "bee", "cat"])
    assert val.labels.dtype == torch.int64


def test_held_out_classes_that_training_lacks_are_named(pets, tmp_path):
    path = renamed(pets.path, tmp_path / "val.zip", ["cat", "dog", "elk"], [0, 1, 2])
    with pytest.raises(UserError, match="the training images have no class dog, elk; leave those images out"):
        open_val(path, pets, config_for(pets))


def test_classes_without_names_are_compared_by_number(pets, tmp_path):
    path = renamed(pets.path, tmp_path / "val.zip", None, [2, 0])
    assert open_val(path, pets, config_for(pets)).labels.tolist() == [2, 0]
    path = renamed(pets.path, tmp_path / "more.zip", None, [3, 0])
    with pytest.raises(UserError, match="4 classes, the training images have 3"):
        open_val(path, pets, config_for(pets))


def test_classes_without_images_are_known_to_the_configuration_and_do_not_begin_another_run(pets, tmp_path):
    whole, gap = config_for(pets), renamed(pets.path, tmp_path / "gap.zip", ["ant", "bee", "cat"], [0, 2, 2, 0])
    holed = resolve("debug", {"cond": True, "batch": 4}, facts_of(open_data(gap, True, None)))
    assert (holed.model.num_classes, holed.data.empty_classes) == (3, (1,))
    assert same_run(holed, whole)
