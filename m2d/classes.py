"""Sets of diagnoses: isic7, the default, isic8, milk11, binary, a dataset's own folders, or a user's file.

A dataset has one, and its catalog, the run, the checkpoint and all that is made of them carry it. A class's index is
its place in the set; the index after the last is the null class of guidance.
"""

import colorsys
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from m2d.errors import ConfigError, refuse_repeated_keys

_CODE = re.compile(r"[^\W_][\w+-]{0,39}")  # it becomes the name of a folder
_RESERVED = {"train", "val", "test", "shards", "parts"}
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#000000", "#0072B2", "#CC79A7", "#D55E00")


@dataclass(frozen=True)
class Diagnosis:
    """One class: its code, names, plot colour, and the other words that datasets use for it, in lower case.

    A word also covers what a taxonomy puts below it, as "nevus, spitz" below "nevus". `alone`: words that say enough
    only where nothing more specific is given.
    """

    code: str
    name: str
    chinese_name: str
    colour: str
    aliases: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassSet:
    """Diagnoses in the order of their indices."""

    name: str
    diagnoses: tuple[Diagnosis, ...]

    def __post_init__(self) -> None:
        if len(self.diagnoses) < 2:
            raise ConfigError(f"data.classes: {self.name} has {len(self.diagnoses)} class; it must have two or more")
        seen: set[str] = set()
        for code in (diagnosis.code for diagnosis in self.diagnoses):
            if not _CODE.fullmatch(code) or code.casefold() in _RESERVED:
                raise ConfigError(f"data.classes: {self.name} has the code {code!r}; use letters, digits, _ + and -")
            if code.casefold() in seen:
                raise ConfigError(f"data.classes: {self.name} has the code {code} twice; keep one")
            seen.add(code.casefold())

    def __len__(self) -> int:
        return len(self.diagnoses)

    @cached_property
    def codes(self) -> tuple[str, ...]:
        """Class codes, in the order of their indices."""
        return tuple(diagnosis.code for diagnosis in self.diagnoses)

    @cached_property
    def colours(self) -> dict[str, str]:
        """Plot colour by code."""
        return {diagnosis.code: diagnosis.colour for diagnosis in self.diagnoses}

    @cached_property
    def names(self) -> dict[str, str]:
        """English name by code."""
        return {diagnosis.code: diagnosis.name for diagnosis in self.diagnoses}

    def index(self, code: str) -> int:
        """Index of a class code; KeyError names the known ones."""
        try:
            return self.codes.index(code)
        except ValueError:
            raise KeyError(f"unknown class {code}; known: {' '.join(self.codes)}") from None

    def find(self, *levels: str, own: Mapping[str, str] | None = None) -> str | None:
        """The code of a label, or of a diagnosis given in levels from general to specific; None where it is no class.

        own: the user's words -> codes, which go before those of the set. Letter case, _ and - do not count. The most
        specific level that is known decides.
        """
        words = self._words | {_plain(word): code for word, code in (own or {}).items()}
        for depth, level in reversed(list(enumerate(levels, 1))):
            code = (own or {}).get(level) or words.get(_plain(level))
            if code is None and depth == len(levels):
                code = self._alone.get(_plain(level))
            if code is not None:
                return code
        return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """What `as_dict` gave. Raises KeyError or TypeError for anything else."""
        diagnoses = [
            Diagnosis(**{**one, "aliases": tuple(one.get("aliases", ())), "alone": tuple(one.get("alone", ()))})
            for one in record["diagnoses"]
        ]
        return cls(record["name"], tuple(diagnoses))

    @cached_property
    def _words(self) -> dict[str, str]:
        kinds = (lambda one: one.aliases, lambda one: (one.chinese_name, one.name), lambda one: (one.code,))
        return {_plain(word): one.code for kind in kinds for one in self.diagnoses for word in kind(one)}

    @cached_property
    def _alone(self) -> dict[str, str]:
        return {_plain(word): one.code for one in self.diagnoses for word in one.alone}


def _plain(word: str) -> str:
    return " ".join(re.sub(r"[_-]", " ", word).casefold().split())


_AKIEC = Diagnosis(
    "AKIEC",
    "actinic keratosis",
    "光化性角化病",
    "#E69F00",
    # Bowen's disease is a squamous cell carcinoma in situ, which HAM10000's AKIEC includes.
    ("ak", "ack", "actinic keratoses", "solar or actinic keratosis", "squamous cell carcinoma in situ"),
)
_BCC = Diagnosis("BCC", "basal cell carcinoma", "基底细胞癌", "#56B4E9")
_BKL = Diagnosis(
    "BKL",
    "benign keratosis",
    "良性角化病",
    "#009E73",
    (
        "seborrheic keratosis", "sek", "solar lentigo", "lichenoid keratosis", "lichen planus like keratosis",
        "pigmented benign keratosis", "benign keratosis like lesions", "benign keratinocytic lesion",
    ),
)  # fmt: skip
_DF = Diagnosis("DF", "dermatofibroma", "皮肤纤维瘤", "#F0E442")
_MEL = Diagnosis(
    "MEL",
    "melanoma",
    "黑色素瘤",
    "#000000",
    ("melanoma, nos", "melanoma in situ", "melanoma invasive"),
    ("malignant melanocytic proliferations (melanoma)",),
)
_NV = Diagnosis(
    "NV", "melanocytic nevus", "黑色素细胞痣", "#0072B2", ("nevus", "nev", "nevi", "nevus spilus", "melanocytic nevi")
)
_VASC = Diagnosis(
    "VASC",
    "vascular lesion",
    "血管病变",
    "#CC79A7",
    # "Vascular skin lesions in the dataset range from cherry angiomas to angiokeratomas and pyogenic granulomas.
    # Hemorrhage is also included in this category": the HAM10000 paper, Scientific Data 5:180161.
    ("vascular lesions", "angioma", "hemangioma", "angiokeratoma", "pyogenic granuloma", "hemorrhagic lesions"),
    ("benign soft tissue proliferations vascular",),  # all that HAM10000's carry; below it is a lymphangioma, too
)  # fmt: skip
_SCC = Diagnosis("SCC", "squamous cell carcinoma", "鳞状细胞癌", "#D55E00", ("squamous cell carcinoma, nos",))

ISIC7 = ClassSet("isic7", (_AKIEC, _BCC, _BKL, _DF, _MEL, _NV, _VASC))
ISIC8 = ClassSet("isic8", (_AKIEC, _BCC, _BKL, _DF, _MEL, _NV, _SCC, _VASC))
MILK11 = ClassSet(
    "milk11",
    (
        _AKIEC,
        _BCC,
        Diagnosis("BEN_OTH", "other benign proliferation", "其他良性增生", "#999999"),
        _BKL,
        _DF,
        Diagnosis("INF", "inflammatory or infectious condition", "炎症或感染性疾病", "#7F5539"),
        Diagnosis("MAL_OTH", "other malignant proliferation", "其他恶性增生", "#882255"),
        _MEL,
        _NV,
        Diagnosis(
            "SCCKA",
            "squamous cell carcinoma or keratoacanthoma",
            "鳞状细胞癌或角化棘皮瘤",
            "#D55E00",
            ("scc", "squamous cell carcinoma", "squamous cell carcinoma, nos", "keratoacanthoma"),
        ),
        _VASC,
    ),
)
BINARY = ClassSet(
    "binary", (Diagnosis("BENIGN", "benign", "良性", "#0072B2"), Diagnosis("MALIGNANT", "malignant", "恶性", "#D55E00"))
)
NAMED = {one.name: one for one in (ISIC7, ISIC8, MILK11, BINARY)}


def named_class_set(name: str) -> ClassSet:
    """One of NAMED, or that of a YAML file: a list of {code, name, chinese_name, colour, aliases}, code alone required.

    Raises ConfigError for an unknown name and a file that cannot be used.
    """
    if name in NAMED:
        return NAMED[name]
    import yaml

    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        refuse_repeated_keys(text, f"data.classes: {name}")
        entries = yaml.safe_load(text)
        records = [{"code": str(one)} if not isinstance(one, dict) else one for one in entries]
        by_code = {one["code"]: one for one in records}
        return class_set_of([one["code"] for one in records], Path(name).stem, by_code)
    except OSError as error:
        raise ConfigError(
            f"data.classes: {name} is none of {' '.join(NAMED)} folders, and no file ({error.strerror})"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.classes: {name} is not a YAML list of {{code, name, chinese_name, colour, aliases}} "
            f"({' '.join(str(error).split())[:100]})"
        ) from None


def class_set_of(
    words: Iterable[str], name: str = "folders", records: Mapping[str, Mapping[str, Any]] | None = None
) -> ClassSet:
    """A set of a dataset's own words, each made fit for a folder's name; colours as distinct as their number allows."""
    diagnoses = []
    for place, word in enumerate(words):
        record = dict((records or {}).get(word, {}))
        code = re.sub(r"[^\w+-]+", "_", str(record.pop("code", word))).strip("_")
        aliases = (word, *record.pop("aliases", ()))
        settings = {"name": word, "chinese_name": word, "colour": _colour(place)} | record
        diagnoses.append(Diagnosis(code, **settings, aliases=tuple(map(str, aliases))))
    return ClassSet(name, tuple(diagnoses))


def _colour(place: int) -> str:
    """The first eight can be told apart by the colour-blind; the others go round the hues by the golden angle."""
    if place < len(_OKABE_ITO):
        return _OKABE_ITO[place]
    red, green, blue = colorsys.hsv_to_rgb(0.61803 * place % 1, 0.9 - 0.3 * (place % 2), 0.55 + 0.2 * (place % 3))
    return f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"
