"""The long-context picture: no curve is hidden under another, and every point has a name."""

from matplotlib.figure import Figure

from experiments.suites import longcontext_report

ROWS = [
    ("whole cache", "whole cache", 1.0, 0.97),
    ("int8", "storage type", 0.28, 0.97),
    ("int4", "storage type", 0.39, 0.96),
    ("snapkv:budget=4", "SnapKV", 0.2, 0.5),
    ("snapkv:budget=8", "SnapKV", 0.3, 0.6),
    ("pyramidkv:budget=4", "PyramidKV", 0.2, 0.5),
    ("pyramidkv:budget=8", "PyramidKV", 0.3, 0.6),
]


def results():
    names = ("method", "family", "bytes_ratio", "accuracy")
    rows = [dict(zip(names, row, strict=True)) for row in ROWS]
    return {
        "models": {"mha": {}},
        "rows": [row | {"layout": "mha", "refused": "", "top1": 1.0} for row in rows],
    }


def test_every_method_is_named_once_and_equal_curves_share_a_line(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: kept.append(self))
    longcontext_report.draw(results(), tmp_path / "picture.png")
    ((axes,),) = [figure.axes for figure in kept]
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["whole cache", "int8", "int4", "SnapKV = PyramidKV"]
    drawn = [tuple(map(tuple, line.get_xydata().tolist())) for line in axes.lines]
    assert len(set(drawn)) == len(drawn)
    assert drawn[-1] == ((0.2, 0.5), (0.3, 0.6))
