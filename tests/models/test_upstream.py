"""Finding and loading a model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crossrep.errors import ModelError
from models.upstream import load, read_manifest

ROOT = Path(__file__).parents[2]


def test_the_protocol_and_the_features_import_without_torch() -> None:
    code = "import sys, models.upstream, models.features; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"manifest\.json is missing"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object"),
        ("{}", "unknown kind None; known: lfm4ads"),
        ('{"kind": "other"}', "unknown kind 'other'; known: lfm4ads"),
        ('{"kind": ["lfm4ads"]}', "unknown kind"),
        ('{"kind": "lfm4ads"}', "KeyError"),
    ],
)
def test_bad_manifest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_missing_torch_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "lfm4ads"}))
    monkeypatch.delitem(sys.modules, "models.lfm4ads", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelError, match=r"needs torch: pip install 'crossrep\[model\]'"):
        load(tmp_path)
    assert read_manifest(tmp_path)["kind"] == "lfm4ads"
