"""What a person may write as a setting's range."""

import pytest

from m2d.errors import ConfigError
from m2d.tuning.space import parse_distribution


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("loguniform(0.1, 10)", "loguniform", (0.1, 10.0)),
        (" Uniform( -1 ,1 ) ", "uniform", (-1.0, 1.0)),
        ("choice(1e-4, 1e-3, 1e-2)", "choice", (1e-4, 1e-3, 1e-2)),
        ("fixed(3)", "fixed", (3.0,)),
    ],
)
def test_a_range_is_read_as_it_is_written(text: str, kind: str, numbers: tuple[float, ...]) -> None:
    found = parse_distribution("lr", text)
    assert (found.kind, found.numbers) == (kind, numbers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1..10", "it must be loguniform"),
        ("normal(0, 1)", "it must be loguniform"),
        ("uniform(a, b)", "between the brackets stand numbers"),
        ("uniform()", "finite numbers"),
        ("uniform(0, inf)", "finite numbers"),
        ("uniform(2, 1)", "low below high"),
        ("uniform(1, 2, 3)", "low below high"),
        ("loguniform(0, 1)", "begins above 0"),
        ("fixed(1, 2)", "takes one number"),
    ],
)
def test_anything_else_is_refused_in_words_that_name_the_setting(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_distribution("optimizer.lr", text)
    assert str(refused.value).startswith("sweep.space: optimizer.lr is ")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "logarithmic"),
    [("loguniform(1, 2)", True), ("uniform(1, 1000)", False), ("choice(1, 1000)", True), ("choice(1, 2)", False)],
)
def test_an_axis_is_logarithmic_where_values_span_decades(text: str, logarithmic: bool) -> None:
    assert parse_distribution("lr", text).is_logarithmic is logarithmic
