"""Saved figures: the same bytes for the same data, the plotted numbers beside them."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from utils.figures import ROLES, band, example_strip, reference_slope, save_figure, use_theme


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_theme()
    yield tmp_path
    plt.close("all")
    matplotlib.rcdefaults()


def draw(data):
    figure, ax = plt.subplots()
    for role, style in ROLES.items():
        ax.loglog(data.k, data.value * (1 + len(role)), label=f"{role} $k^{{-1/2}}$", **style)
    band(ax, data.k, 0.5 * data.value, 2 * data.value)
    reference_slope(ax, data.k, 1.0, -0.5, label="slope -1/2")
    ax.set(xlabel="samples k", ylabel="‖H$_k$‖")
    ax.legend()
    return figure


def table():
    return pd.DataFrame({"k": [1, 10, 100, 1000], "value": [1.0, 1 / 3, 0.1, 0.03]})


@pytest.mark.slow
def test_same_data_give_the_same_bytes(folder):
    data, files = table(), [f"curve{suffix}" for suffix in (".pdf", ".png", ".csv")]
    path = save_figure(draw(data), "quickstart", "curve", data)
    assert path.as_posix() == "figures/quickstart/curve.png" and path.is_file()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        files
    )  # no temporary file is left
    first = {name: (path.parent / name).read_bytes() for name in files}
    plt.close("all")
    save_figure(draw(data), "quickstart", "curve", data)
    assert {name: (path.parent / name).read_bytes() for name in files} == first
    assert first["curve.pdf"].startswith(b"%PDF") and first["curve.png"].startswith(b"\x89PNG")
    # other data give another picture: the comparison above could have failed
    data.loc[2, "value"] = 0.2
    save_figure(draw(data), "quickstart", "curve", data)
    assert all((path.parent / name).read_bytes() != first[name] for name in files)


def test_plotted_numbers_stand_beside(folder):
    data = table()
    path = save_figure(plt.figure(), "study", "curve", data)
    pd.testing.assert_frame_equal(pd.read_csv(path.with_suffix(".csv")), data, check_exact=True)


def test_what_was_there_survives_a_failure(folder):
    data = table()
    path = save_figure(plt.figure(), "study", "curve", data)
    before = path.with_suffix(".pdf").read_bytes()

    class Broken:
        def savefig(self, file, **_):
            file.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_figure(Broken(), "study", "curve", data)
    assert path.with_suffix(".pdf").read_bytes() == before
    assert len(list(path.parent.iterdir())) == 3


def test_roles_and_helpers(folder):
    assert len({style["color"] for style in ROLES.values()}) == len(
        ROLES
    )  # one colour, one meaning
    _, ax = plt.subplots()
    reference_slope(ax, [2, 8, 32], 5.0, -1.0)
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(y, [5.0, 1.25, 0.3125])
    assert x.tolist() == [2, 8, 32]
    band(ax, [1, 2], [0.0, 1.0], [2.0, 3.0], role="bound")
    (shade,) = ax.collections
    assert matplotlib.colors.to_hex(shade.get_facecolor()[0]).upper() == ROLES["bound"]["color"]


def test_example_strip(folder):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([3, 1, 4])
    parts = {
        "grey": (torch.rand(3, 1, 4, 4, generator=generator), labels),
        "colour": (torch.rand(3, 3, 4, 4, generator=generator), labels),
        "vectors": (torch.rand(3, 7, generator=generator), labels),
        "constant": (torch.zeros(3, 1, 4, 4), labels),
    }
    figure = example_strip(parts, columns=5)
    axes = np.array(figure.axes).reshape(4, 5)
    assert [ax.get_title() for ax in axes[0]] == ["3", "1", "4", "", ""]
    assert [row[0].get_ylabel() for row in axes] == list(parts)
    assert [len(axes[i, 0].images) for i in range(4)] == [1, 1, 0, 1] and len(axes[2, 0].lines) == 1
    figure.canvas.draw()
