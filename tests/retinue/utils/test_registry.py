"""Registries of classes that users choose by name."""

import pytest

from retinue.utils.registry import Registry


class Round:
    def __init__(self, given: int, radius: float = 1.0):
        self.radius = radius


class Square:
    def __init__(self, given: int, side: float = 1.0):
        self.side = side


@pytest.fixture
def shapes() -> Registry[type]:
    shapes: Registry[type] = Registry(
        "shape", ("given",), absence="none", more=lambda cls: ("corners",) if cls is Square else ()
    )
    shapes.register("square")(Square)
    shapes.register("round")(Round)
    return shapes


def test_classes_are_found_with_their_arguments(shapes):
    assert shapes.names() == ["round", "square"]
    assert shapes.find("round") is Round
    assert shapes.resolve("round") == (Round, {})
    assert shapes.resolve({"name": "round", "radius": 2}, radius=3) == (Round, {"radius": 3})
    assert shapes.resolve({"name": "square", "corners": 4}) == (Square, {"corners": 4})


@pytest.mark.parametrize(
    "spec, message",
    [
        ("squre", r"^no shape is called 'squre'\. Did you mean 'square'\? There are: round, square, none$"),
        ({"name": ["round"]}, r"^no shape is called \['round'\]\..* There are: round, square, none$"),
        ({"name": "round", "given": 1}, r"^shape 'round' takes no 'given'\..* It takes: radius$"),
        ({"name": "round", "corners": 4}, r"^shape 'round' takes no 'corners'\..* It takes: radius$"),
        ({"radius": 1}, r"^shape must be a name or a mapping with a 'name', not {'radius': 1}$"),
        (3, r"^shape must be a name or a mapping with a 'name', not 3$"),
    ],
)
def test_a_wrong_spec_is_one_line(shapes, spec, message):
    with pytest.raises(ValueError, match=message):
        shapes.resolve(spec)


def test_a_name_is_taken_once(shapes):
    here = __name__.replace(".", r"\.")
    with pytest.raises(ValueError, match=f"^shape 'round' is registered twice: in {here} and {here}$"):
        shapes.register("round")(Square)
    with pytest.raises(ValueError, match=f"^shape 'none' is the name for none: {here} needs another one$"):
        shapes.register("none")(Square)
