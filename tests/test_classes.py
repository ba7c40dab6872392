"""Sets of classes: names, words, colours, files."""

from pathlib import Path

import pytest

from m2d.classes import BINARY, ISIC7, ISIC8, MILK11, NAMED, ClassSet, class_set_of, named_class_set
from m2d.errors import ConfigError


def test_the_indices_of_isic7_are_those_of_every_checkpoint_made_before_there_were_other_sets() -> None:
    assert ISIC7.codes == ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")


@pytest.mark.parametrize(
    ("classes", "word", "code"),
    [
        (ISIC7, "akiec", "AKIEC"),
        (ISIC7, "AK", "AKIEC"),
        (ISIC7, "Actinic_Keratosis", "AKIEC"),
        (ISIC7, "seborrheic keratosis", "BKL"),
        (ISIC7, "nevus", "NV"),
        (ISIC7, "SCC", None),
        (ISIC7, "UNK", None),
        (ISIC8, "squamous cell carcinoma", "SCC"),
        (MILK11, "SCC", "SCCKA"),
        (MILK11, "SCCKA", "SCCKA"),
        (BINARY, "Malignant", "MALIGNANT"),
    ],
)
def test_the_words_of_datasets_name_their_class(classes: ClassSet, word: str, code: str | None) -> None:
    assert classes.find(word) == code


def test_the_users_words_go_before_those_of_the_set() -> None:
    assert ISIC7.find("SCC", own={"scc": "AKIEC"}) == "AKIEC"
    assert ISIC7.find("nevus", own={"Nevus": "MEL"}) == "MEL"


def test_a_set_survives_json() -> None:
    for classes in NAMED.values():
        assert ClassSet.from_dict(classes.as_dict()) == classes


def test_forty_classes_have_forty_colours() -> None:
    assert len(set(class_set_of(f"class {n}" for n in range(40)).colours.values())) == 40


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- MEL\n", "two or more"),
        ("- MEL\n- mel\n", "twice"),
        ("- MEL\n- train\n", "'train'"),
        ("- {name: melanoma}\n- NV\n", "not a YAML list"),
        ("[", "not a YAML list"),
        ("- {code: MEL, shade: red}\n- NV\n", "not a YAML list"),
    ],
)
def test_a_file_that_is_no_set_is_an_error_of_one_line(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        named_class_set(str(path))
    assert str(caught.value).startswith("data.classes: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="isic7 isic8 milk11 binary folders"):
        named_class_set("isic9")


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("- A\n- {code: B, name: one, name: two}\n")
    with pytest.raises(ConfigError, match=r"^data.classes: .* has \[1\]\.name twice"):
        named_class_set(str(tmp_path / "own.yaml"))
