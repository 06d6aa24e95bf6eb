"""A new space for a new model."""

from __future__ import annotations

import pytest

from crossrep.errors import ModelError, SpecError
from crossrep.spec import Space, next_name
from models.declare import declare
from tests.cluster import ROOT, SPEC


def test_it_aggregates_as_the_old_one_with_the_models_dims() -> None:
    odd = SPEC.replace("[inputs]", 'vectors = "float32"\nhistory = "90m"\n[inputs]') + 'key = "scenario"\n'.join(["[entities.place]\n", ""])
    odd += '[entities.place.columns.cr]\nsource = "cr"\ndim = 8\naggregate = "decayed_mean"\nhalf_life = "700ms"\n'
    old = Space.parse(odd.format(name="ads-v9", partitions=3))
    text = declare(old, {"cr": 48, "ur": 16, "ir": 16, "spare": 3}, "ads@2")
    new = Space.parse(text)
    assert text.startswith("# For model ads@2; aggregates as ads-v9 does.\n") and new.name == "ads-v10"
    assert new.sources == {"cr": 48, "ur": 16, "ir": 16} and new.entities["user"].columns["clicks"].dim == 0
    back = text.replace("dim = 48", "dim = 8").replace("dim = 16", "dim = 4").replace("ads-v10", "ads-v9")
    assert Space.parse(back).toml_dict == old.toml_dict and Space.parse(back).hash == old.hash
    assert Space.parse(declare(old, {"cr": 8, "ur": 4, "ir": 4}, "ads@2", name="other")).name == "other"


def test_what_the_model_does_not_give() -> None:
    old = Space.load(ROOT / "spaces" / "kuairand-v1.toml")
    with pytest.raises(ModelError, match=r"item.ir of space 'kuairand-v1' takes ir, but model ads@2 gives cr\[64\], ur\[32\]"):
        declare(old, {"cr": 64, "ur": 32}, "ads@2")
    with pytest.raises(SpecError, match="dim"):
        declare(old, {"cr": 10_000, "ur": 32, "ir": 32}, "ads@2")
    with pytest.raises(SpecError, match="name"):
        declare(old, {"cr": 64, "ur": 32, "ir": 32}, "ads@2", name="Not a name")


def test_next_names() -> None:
    assert [next_name(name) for name in ("kuairand-v1", "a-v9", "ads", "a2-b")] == ["kuairand-v2", "a-v10", "ads2", "a2-b2"]
