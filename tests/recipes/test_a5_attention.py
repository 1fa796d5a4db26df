import io

import pytest
from rich.console import Console
from torch import nn

from householder.recipes import a5_attention
from householder.train import Comparison, ConfigError, Evaluation, TrainConfig, TrainResult


def result(mixer, num_layers, accuracy):
    config = TrainConfig(
        task="a5", mixer=mixer, num_householder=1, num_layers=num_layers, length=4, eval_length=4
    )
    evaluation = Evaluation("prefix", (1, 2, 3, 4), accuracy, 10)
    return TrainResult(config, nn.Identity(), evaluation, 1, 1, 1.0)


RESULTS = [
    result("path_attention", 1, (1.0, 1.0, 0.9, 0.2)),
    result("path_attention", 2, (1.0, 1.0, 0.95, 0.91)),
    result("rotary_attention", 1, (1.0, 0.5, 0.4, 0.2)),
    result("rotary_attention", 2, (1.0, 0.95, 0.4, 0.2)),
]


def test_fewest_layers_must_exceed_the_level():
    assert a5_attention.fewest_layers(RESULTS) == {
        "path_attention": {1: 1, 2: 1, 3: 2, 4: 2},
        "rotary_attention": {1: 1, 2: 2, 3: None, 4: None},
    }
    assert a5_attention.fewest_layers(RESULTS[::-1]).keys() == {
        "path_attention",
        "rotary_attention",
    }


def test_files_and_table(tmp_path):
    a5_attention.write_layers(RESULTS, tmp_path)
    assert (tmp_path / "layers.csv").read_text().splitlines() == [
        "length,path_attention,rotary_attention",
        *("1,1,1", "2,1,2", "3,2,", "4,2,"),
    ]
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=120, file=io.StringIO())
    console.print(a5_attention.layers_table(RESULTS))
    rows = [x for x in console.file.getvalue().splitlines() if x.startswith("│")]
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]
    assert cells == [
        ["PaTH", "1", "1", "2", "2"],
        ["RoPE", "1", "2", "more than 2", "more than 2"],
    ]


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_settings_compare_the_same_models(size):
    configs = Comparison.from_settings(a5_attention.settings(size)).configs
    depths = {}
    for config in configs:
        depths.setdefault(config.mixer, []).append(config.num_layers)
    assert depths["path_attention"] == depths["rotary_attention"]
    with pytest.raises(ConfigError, match="`size` must be one of cpu, gpu"):
        a5_attention.settings("tpu")
