"""One look per method, for every eye."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dashboards.style import COLOURS, PLACES, STYLES, styles

# Severe colour blindness in linear RGB: Machado, Oliveira and Fernandes (2009).
SEEN_BY = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(colour: str, eye: str) -> np.ndarray:
    """CIELAB of a colour as somebody sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(np.asarray(SEEN_BY[eye]) @ linear, 0, 1) / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", SEEN_BY)
def test_colours_differ_to_every_eye(eye: str) -> None:
    for one, other in itertools.combinations(COLOURS, 2):
        assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 10, (one, other)


def test_a_method_keeps_its_style_whatever_is_beside_it() -> None:
    alone = styles(["fire_opd"])["fire_opd"]
    assert styles(["opd", "fire_opd", "scope", "my_method"])["fire_opd"] == alone
    assert styles(["kat_lab"])["kat_lab"] == styles(["kat"])["kat"]
    assert styles(["my_method"]) == {"my_method": styles(["zebra", "my_method"])["my_method"]}


def test_no_two_methods_look_alike() -> None:
    assert len(set(styles(PLACES).values())) == len(PLACES)
    assert len({style.colour for style in styles(PLACES[:6]).values()}) == 6
    many = styles(f"method {i}" for i in range(STYLES))
    assert len(set(many.values())) == STYLES == 168
    crowd = [f"method {i}" for i in range(STYLES + 40)]
    assert set(styles(crowd)) == set(crowd)  # some share a style, none is without
