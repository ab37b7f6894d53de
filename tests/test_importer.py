"""`vllm-flute import` as a whole: what it writes, what it refuses, what it leaves behind."""

import json
import shutil

import pytest
import torch
from source_checkpoints import make_upstream_flute

from vllm_flute import FluteError
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, import_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_upstream_flute(tmp_path_factory.mktemp("import") / "source")


@pytest.mark.parametrize("older", [False, True])
def test_the_output_is_the_sources_weights(tmp_path, older):
    made = make_upstream_flute(tmp_path / "source", older=older)
    report = import_checkpoint(made.path, tmp_path / "out")
    assert report.kind == "flute-upstream" and len(report.layers) == 14 and all(layer.exact for layer in report.layers)
    assert {layer.name for layer in check_checkpoint(tmp_path / "out")} == {layer.name for layer in report.layers}
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    assert plain.headers.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        assert torch.equal(plain.tensor(name), weight), name
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "README.md"} <= files and "flute_config.json" not in files


def test_a_broken_source_leaves_nothing_behind(source, tmp_path):
    """The last shard's words lose their meaning only when they are read: the headers are sound."""
    broken = tmp_path / "broken"
    shutil.copytree(source.path, broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(FluteError, match=r"scales is \[\d+, \d\].*expected"):
        import_checkpoint(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
