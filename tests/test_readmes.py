"""Each page in English and in Chinese says the same: commands, settings, numbers, links, headings, tables."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pytest
from rich.markdown import Markdown

from m2d.classes import ISIC7

ROOT = Path(__file__).resolve().parent.parent
CHINESE = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.zh-CN.md"))
FLAG = re.compile(r"--[A-Za-z][\w.*-]*")
NUMBER = re.compile(r"(?<![\w.-])\d+(?:[.,]\d+)*", re.ASCII)
PATH = re.compile(r"[\w*.-]*[/_*][\w*./-]*|[\w-]+\.[a-z]+\b|\*\.\w+", re.ASCII)
COMMENT = re.compile(r"(?:^|\s)#.*")
HAN = r"[\u4e00-\u9fff]"
MARK = "，。；：？！、（）"


@dataclass
class Section:
    """What stands under one heading. `prose` is the text with each inline code as one backtick."""

    title: str
    level: int
    prose: str = ""
    codes: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    bold: int = 0
    blocks: list[tuple[str, list[str]]] = field(default_factory=list)  # language, lines
    tables: list[list[int]] = field(default_factory=list)  # for each table the cells of each row


def sections(path: Path) -> list[Section]:
    """The parts of a README, in order. Read by the parser that rich brings, so that what counts is what is rendered."""
    found: list[Section] = []
    for token in Markdown(path.read_text(encoding="utf-8")).parsed:
        if token.type == "heading_open":
            found.append(Section(title="", level=int(token.tag[1])))
        elif token.type == "fence":
            found[-1].blocks.append((token.info, token.content.splitlines()))
        elif token.type == "table_open":
            found[-1].tables.append([])
        elif token.type == "tr_open":
            found[-1].tables[-1].append(0)
        elif token.type in ("th_open", "td_open"):
            found[-1].tables[-1][-1] += 1
        elif token.type == "inline":
            found[-1].title = found[-1].title or token.content
            for part in token.children or []:
                _add_text(found[-1], part.type, part.content, str(part.attrs.get("href", "")))
            found[-1].prose += "\n\n"
    return found


def _add_text(section: Section, kind: str, content: str, target: str) -> None:
    section.prose += {"text": content, "softbreak": "\n", "code_inline": "`"}.get(kind, "")
    section.bold += kind == "strong_open"
    if kind == "code_inline":
        section.codes.add(content)
    if kind == "link_open":
        section.links.append(target)


def english_of(chinese: Path) -> Path:
    return chinese.with_name(chinese.name.replace(".zh-CN", ""))


def side_by_side(page: Path) -> list[tuple[Section, Section]]:
    """English and Chinese sections in pairs. Without the same headings there are none, and the failure shows both."""
    english, chinese = sections(english_of(page)), sections(page)
    if [section.level for section in english] != [section.level for section in chinese]:
        titles = [[f"{'#' * section.level} {section.title}" for section in readme] for readme in (english, chinese)]
        pairs = "\n".join(f"{a}  |  {b}" for a, b in zip_longest(*titles, fillvalue="(none)"))
        pytest.fail(f"number or levels of headings differ:\n{pairs}", pytrace=False)
    return list(zip(english, chinese, strict=True))


def commands(section: Section) -> list[str]:
    return [COMMENT.sub("", line).rstrip() for language, lines in section.blocks if language == "sh" for line in lines]


def layouts(section: Section) -> list[str]:
    """Of each block that is no command: for each line its indent and the paths in it."""
    return [_indented_paths(line) for language, lines in section.blocks if language != "sh" for line in lines]


def _indented_paths(line: str) -> str:
    return line[: len(line) - len(line.lstrip())] + " ".join(PATH.findall(line))


def settings(section: Section) -> list[str]:
    return sorted(section.codes | set(FLAG.findall(section.prose)))


def links(section: Section) -> list[str]:
    """Of a page that is there in both languages, the English name; without the link from one language to the other."""
    targets = {link.replace(".zh-CN", "") for link in section.links}
    return sorted(targets - {english_of(page).name for page in CHINESE if section.level == 1})


def numbers(section: Section) -> list[str]:
    return sorted(NUMBER.findall(section.prose))


def block_kinds(section: Section) -> list[str]:
    return [language for language, _ in section.blocks]


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
@pytest.mark.parametrize(
    "read",
    [
        commands,
        layouts,
        settings,
        numbers,
        links,
        block_kinds,
        lambda section: section.tables,
        lambda section: section.bold,
    ],
    ids=["commands", "layouts", "settings", "numbers", "links", "kinds of blocks", "shapes of tables", "bold phrases"],
)
def test_each_section_has_the_same(read: Callable[[Section], object], page: Path) -> None:
    different = [
        f"\n{english.title} / {chinese.title}: {difference(read(english), read(chinese))}"
        for english, chinese in side_by_side(page)
        if read(english) != read(chinese)
    ]
    assert different == [], "".join(different)


def difference(english: object, chinese: object) -> str:
    if not (isinstance(english, list) and isinstance(chinese, list)):
        return f"English has {english}, Chinese has {chinese}"
    only = [
        f"only in {name}: {', '.join(f'{one}' for one in ours if one not in theirs)}"
        for name, ours, theirs in (("English", english, chinese), ("Chinese", chinese, english))
        if any(one not in theirs for one in ours)
    ]
    return "; ".join(only) or f"another order or number: {english} and {chinese}"


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_each_links_to_the_other_in_its_first_lines(page: Path) -> None:
    for readme, other in ((page, english_of(page)), (english_of(page), page)):
        first = readme.read_text(encoding="utf-8").splitlines()[:4]
        assert f"]({other.name})" in "".join(first), f"{readme.name} starts with {first} and no link to {other.name}"


PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md") for path in ROOT.glob(pattern))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    """To a file, and to a heading where they name one. The site is built by the same links: scripts/docs_site.py."""
    dead = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(f"{target}#{anchor}" if anchor else target)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """As forges and mkdocs make them of headings: in lower case, blanks as hyphens, without other marks."""
    return {re.sub(r"[^\w -]", "", section.title.lower()).replace(" ", "-") for section in sections(page)}


def test_chinese_names_of_the_classes_are_those_of_the_package() -> None:
    text = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    absent = [name for d in ISIC7.diagnoses if (name := f"{d.code}（{d.chinese_name}）") not in text.replace("\n", "")]
    assert absent == [], f"README.zh-CN.md lacks {', '.join(absent)}"


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("a line break that shows as a gap", rf"{HAN}\n{HAN}|[{MARK}]\n(?!\n)|\n[{MARK}]"),
        ("no space between Chinese and Latin", rf"{HAN}[`A-Za-z0-9]|[`A-Za-z0-9%]{HAN}"),
        ("a half-width mark beside Chinese", rf"{HAN}[,.;:?!()]|[,;:?!()]{HAN}"),
        ("a space beside a full-width mark", rf"[{MARK}] | [{MARK}]"),
    ],
)
def test_chinese_prose_is_set_as_chinese(fault: str, pattern: str, page: Path) -> None:
    prose = "\n".join(section.prose for section in sections(page))
    found = [prose[max(0, m.start() - 10) : m.end() + 10] for m in re.finditer(pattern, prose)]
    assert found == [], f"{fault}: {found}"
