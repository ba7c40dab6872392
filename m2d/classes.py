"""The seven ISIC diagnoses. Every room reads them from here; class index = position in CLASSES."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """One diagnosis: its ISIC 2018 code, names, and plot colour (Okabe-Ito, readable by the colour-blind)."""

    code: str
    name: str
    chinese_name: str
    colour: str


DIAGNOSES: tuple[Diagnosis, ...] = (
    Diagnosis("AKIEC", "actinic keratosis", "光化性角化病", "#E69F00"),
    Diagnosis("BCC", "basal cell carcinoma", "基底细胞癌", "#56B4E9"),
    Diagnosis("BKL", "benign keratosis", "良性角化病", "#009E73"),
    Diagnosis("DF", "dermatofibroma", "皮肤纤维瘤", "#F0E442"),
    Diagnosis("MEL", "melanoma", "黑色素瘤", "#000000"),
    Diagnosis("NV", "melanocytic nevus", "黑色素细胞痣", "#0072B2"),
    Diagnosis("VASC", "vascular lesion", "血管病变", "#CC79A7"),
)
CLASSES: tuple[str, ...] = tuple(diagnosis.code for diagnosis in DIAGNOSES)
NUM_CLASSES = len(CLASSES)  # also the index of the null class for guidance


def class_index(code: str) -> int:
    """Index of a class code; KeyError names the known ones."""
    try:
        return CLASSES.index(code)
    except ValueError:
        raise KeyError(f"unknown class {code}; known: {' '.join(CLASSES)}") from None
