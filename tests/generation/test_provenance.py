"""Signed images: what they say is what was written, a change is found out, and no key leaves its file."""

import io
import pickle
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image, PngImagePlugin

from m2d import __version__
from m2d.cli import main
from m2d.errors import ConfigError
from m2d.generation.output import OutputFolder, encode_png
from m2d.generation.provenance import KEY_NAME, Signing, forget_key, read_manifest, self_made, signing_of
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.generation.verify import tell
from m2d.generation.workers import GroupWriter
from tests.generation import conftest

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
ROW, RECIPE = conftest.row(), replace(conftest.RECIPE, sign="self-made")


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    """Self-made."""
    return self_made(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def signed(signing: Signing) -> bytes:
    return encode_png(PIXELS, ROW, RECIPE, signing)


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content), as RFC 2083 has them."""
    place = 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        place += length + 12


def with_one_pixel_changed(png: bytes) -> bytes:
    """Every chunk as it was, but the red of the first pixel by one grey level."""
    data = bytearray(zlib.decompress(b"".join(content for kind, content in chunks(png) if kind == b"IDAT")))
    data[1] ^= 1  # behind the filter of the first row
    parts, written = [png[:8]], False
    for kind, content in chunks(png):
        if kind == b"IDAT" and written:
            continue
        if kind == b"IDAT":
            content, written = zlib.compress(data), True
        crc = struct.pack(">I", zlib.crc32(kind + content))
        parts += [struct.pack(">I", len(content)), kind, content, crc]
    return b"".join(parts)


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image)


def saved_again(png: bytes, *, text: bool) -> bytes:
    """By another program, which keeps the text or not."""
    kept = PngImagePlugin.PngInfo()
    with Image.open(io.BytesIO(png)) as image:
        for name, value in image.info.items() if text else ():
            kept.add_text(name, value)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", pnginfo=kept)
    return buffer.getvalue()


def test_a_signed_image_says_what_its_text_says(signed: bytes) -> None:
    manifest = read_manifest(signed)
    assert manifest is not None
    assert (manifest.state, manifest.faults) == ("Valid", ())
    assert manifest.sources == ("trainedAlgorithmicMedia",)
    assert manifest.generator == f"M2D {__version__}"
    assert manifest.signer == "M2D, self-made certificate"
    with Image.open(io.BytesIO(signed)) as image:
        assert manifest.facts == image.info
    assert (manifest.facts["class"], manifest.facts["seed"], manifest.facts["checkpoint"]) == (
        "MEL", str(2**62 + 1), "ab" * 32
    )  # fmt: skip
    assert np.array_equal(pixels(signed), PIXELS)
    assert tell(signed).verdict == "signed, and unchanged since"
    assert "not who made it" in tell(signed).signer


def test_one_changed_pixel_is_found_out(signed: bytes) -> None:
    changed = with_one_pixel_changed(signed)
    assert np.abs(pixels(changed).astype(int) - PIXELS).sum() > 0
    told = tell(changed)
    expected = (False, "changed since it was signed", "assertion.dataHash.mismatch")
    assert (told.fine, told.verdict, told.reason) == expected


def test_changed_text_is_found_out(signed: bytes) -> None:
    assert tell(signed.replace(b"class\x00MEL", b"class\x00NEV")).verdict == "cannot be read"  # the chunk's CRC
    name, text = b"tEXtclass\x00", b"MEL"
    lie = signed.replace(name + text + struct.pack(">I", zlib.crc32(name + text)),
                         name + b"NEV" + struct.pack(">I", zlib.crc32(name + b"NEV")))  # fmt: skip
    assert lie != signed
    assert tell(lie).verdict == "changed since it was signed"


@pytest.mark.parametrize(("text", "verdict"), [(False, "says nothing of itself"), (True, "its C2PA manifest is gone")])
def test_an_image_that_was_saved_again_has_at_most_its_text(signed: bytes, text: bool, verdict: str) -> None:
    told = tell(saved_again(signed, text=text))
    assert (told.fine, told.verdict) == (False, verdict)


def test_an_unsigned_image_is_fine_and_said_to_prove_nothing() -> None:
    told = tell(encode_png(PIXELS, ROW, replace(RECIPE, sign=None)))
    assert told.fine
    assert told.verdict.startswith("not signed")
    assert "class MEL, index 3" in told.details[0]


@pytest.mark.parametrize("cut", [0, 100, -30])
def test_what_is_no_whole_image_cannot_be_read(signed: bytes, cut: int) -> None:
    assert tell(signed[:cut]).verdict == "cannot be read"


# --- one's own certificate --------------------------------------------------------------------------------------------

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP384R1())


def certificate(name: str, of: Key, issuer: str, by: Key, *, days: int = 9, **extension: object) -> str:
    """PEM. extension: `uses`, object identifiers of an extended key usage; without it, an authority's."""
    named, naming = (x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, one)]) for one in (name, issuer))
    began = datetime.now(UTC) - timedelta(days=10)
    builder = x509.CertificateBuilder().subject_name(named).issuer_name(naming).public_key(of.public_key())
    builder = builder.serial_number(7).not_valid_before(began).not_valid_after(began + timedelta(days=10 + days))
    builder = builder.add_extension(x509.BasicConstraints("uses" not in extension, None), critical=True)
    key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    builder = builder.add_extension(key_id, critical=False)
    if "uses" in extension:
        uses = [x509.ObjectIdentifier(one) for one in extension["uses"]]  # type: ignore[attr-defined]
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        builder = builder.add_extension(x509.KeyUsage(True, *[False] * 8), critical=True)
    return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def pem(key: Key, password: bytes | None = None) -> bytes:
    """As `openssl ecparam -genkey` writes it."""
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, how)


MAIL = ["1.3.6.1.5.5.7.3.4"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root.pem; chain.pem and key.pem of a hospital that it has certified; more that cannot be used."""
    folder = tmp_path_factory.mktemp("authority")
    root, key, other = new_key(), new_key(), new_key()
    roots = certificate("Root", root, "Root", root)
    chain = certificate("A hospital", key, "Root", root, uses=MAIL) + roots
    files = {
        "root.pem": roots,
        "chain.pem": chain,
        "expired.pem": certificate("A hospital", key, "Root", root, uses=MAIL, days=-1) + roots,
        "server.pem": certificate("A hospital", key, "Root", root, uses=["1.3.6.1.5.5.7.3.1"]) + roots,
        "nothing.pem": "hello",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "key.pem").write_bytes(pem(key))
    (folder / "other_key.pem").write_bytes(pem(other))
    (folder / "locked.pem").write_bytes(pem(key, b"secret"))
    return folder


def test_ones_own_chain_is_trusted_by_who_trusts_its_root_and_by_nobody_else(authority: Path, signing: Signing) -> None:
    own = signing_of(str(authority / "chain.pem"), str(authority / "key.pem"))
    assert own is not None
    image = encode_png(PIXELS, ROW, RECIPE, own)
    roots = (authority / "root.pem").read_text()
    of_others = (signing.chain.parent / "certificates.pem").read_text()
    states = [
        found and (found.state, found.signer) for found in (read_manifest(image, t) for t in (None, roots, of_others))
    ]
    assert states == [("Valid", "A hospital"), ("Trusted", "A hospital"), ("Valid", "A hospital")]
    assert "--trust vouches" in tell(image, roots).signer
    assert "nobody vouches" in tell(image).signer


def test_the_self_made_certificate_of_a_folder_is_trusted_by_who_has_it(signing: Signing, signed: bytes) -> None:
    manifest = read_manifest(signed, (signing.chain.parent / "certificates.pem").read_text())
    assert manifest is not None
    assert manifest.state == "Trusted"


@pytest.mark.parametrize(
    ("chain", "key", "said"),
    [
        ("absent.pem", "key.pem", "sign"),
        ("nothing.pem", "key.pem", "sign"),
        ("expired.pem", "key.pem", "cannot sign"),
        ("server.pem", "key.pem", "cannot sign"),
        ("chain.pem", "absent.pem", "sign_key"),
        ("chain.pem", None, "sign_key"),
        ("chain.pem", "other_key.pem", "sign_key"),
        ("chain.pem", "locked.pem", "password"),
    ],
)
def test_what_cannot_sign_is_refused_before_anything_is_made(
    authority: Path, chain: str, key: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        signing_of(str(authority / chain), key and str(authority / key))
    assert "\n" not in str(refused.value)


def test_a_key_without_a_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="sign_key"):
        GenerateConfig(checkpoint="x", sign_key="key.pem", sign="self-made")


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_the_users_alone_and_goes_nowhere(tmp_path: Path) -> None:
    signing = self_made(tmp_path)
    assert (tmp_path / KEY_NAME).stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in (tmp_path / "certificates.pem").read_bytes()
    assert b"PRIVATE" not in pickle.dumps(signing)
    assert self_made(tmp_path) == signing  # who resumes signs by the same


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a file system that knows no permissions."""
    self_made(tmp_path)
    assert "warning" not in capsys.readouterr().err
    (tmp_path / KEY_NAME).chmod(0o644)
    self_made(tmp_path)
    assert "can be read by others" in capsys.readouterr().err


def test_a_folder_whose_key_is_gone_gets_another_one_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = self_made(tmp_path)
    assert "warning" not in capsys.readouterr().err
    images = [encode_png(PIXELS, ROW, RECIPE, first)]
    forget_key(tmp_path)
    second = self_made(tmp_path)
    images.append(encode_png(PIXELS, ROW, RECIPE, second))
    assert first.sha256 != second.sha256
    assert "warning: the key" in capsys.readouterr().err
    known = (tmp_path / "certificates.pem").read_text()
    found = [read_manifest(image, known) for image in images]
    assert [one and one.state for one in found] == ["Trusted", "Trusted"]


def test_a_writer_refuses_another_certificate_in_the_place_of_its_own(tmp_path: Path) -> None:
    """On another node, say, or because somebody has put a new one there."""
    first = self_made(tmp_path)
    forget_key(tmp_path)
    self_made(tmp_path)
    with pytest.raises(ConfigError, match="another certificate"):
        replace(first, sha256="0" * 64).sign(b"", "", {})


# --- the command ------------------------------------------------------------------------------------------------------


def ends_with(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main("verify", arguments)
    assert ended.value.code == code


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A run's folder of two signed images in a format, with a contact sheet beside them."""

    def make(output_format: str) -> Path:
        recipe = replace(RECIPE, format=output_format)
        with closing(OutputFolder(tmp_path, recipe)) as made:
            signing = self_made(tmp_path)
            writer = GroupWriter(root=tmp_path, recipe=recipe, gates=GateConfig(enabled=False), signing=signing)
            writer.write([ROW, replace(ROW, id="MEL_000004", index=4)], np.stack([PIXELS, 255 - PIXELS]), None)
            assert made.accepted.num_rows == 0  # not settled
        Image.fromarray(PIXELS).save(tmp_path / "contact_sheet.png")
        return tmp_path

    return make


@pytest.mark.parametrize("output_format", ["folder", "webdataset", "parquet"])
def test_a_folder_of_signed_images_is_in_order(
    folder: Callable[[str], Path], output_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder(output_format)
    capsys.readouterr()
    main("verify", [str(place)])
    assert capsys.readouterr().out.splitlines()[0] == "2 images"
    main("verify", [str(place), "--trust", str(place / "certificates.pem")])
    assert "2 signed, and unchanged since; by M2D, self-made" in capsys.readouterr().out


def test_what_is_not_in_order_is_named_and_is_exit_code_3(
    folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder("folder")
    capsys.readouterr()
    changed = place / "MEL" / "MEL_000004.png"
    changed.write_bytes(with_one_pixel_changed(changed.read_bytes()))
    ends_with(3, str(place))
    said = capsys.readouterr()
    assert f"{changed}: changed since it was signed" in said.out
    assert "MEL_000003" not in said.out
    assert said.err.startswith("1 of 2 images")
    ends_with(3, str(place / "contact_sheet.png"))
    assert "says nothing of itself" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("beside", "name", "images"),
    [("evaluation.json", "confusion.png", 2), ("evaluation.json", "DF_1.png", 3), ("notes.json", "confusion.png", 3)],
)
def test_the_pictures_of_an_evaluation_are_passed_over_and_others_in_a_folder_of_that_name_are_not(
    folder: Callable[[str], Path], beside: str, name: str, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder("folder")
    (place / "evaluation").mkdir()
    (place / "evaluation" / beside).write_text("{}")
    Image.fromarray(PIXELS).save(place / "evaluation" / name)
    capsys.readouterr()
    with suppress(SystemExit):
        main("verify", [str(place)])
    assert f"{images} images" in capsys.readouterr().out.splitlines()


def test_a_file_that_is_named_is_told_of_in_full(
    folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder("folder") / "MEL" / "MEL_000003.png"
    capsys.readouterr()
    main("verify", [str(place)])
    first, signer, manifest, text = capsys.readouterr().out.splitlines()
    assert first == f"{place}: signed, and unchanged since"
    assert "not who made it" in signer
    assert f"trainedAlgorithmicMedia; made by M2D {__version__}; synthetic true, class MEL, index 3" in manifest
    assert text.strip() == "PNG text: the same"


def test_a_place_without_images_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, tmp_path / "absent.png"):
        ends_with(2, str(place))
        assert capsys.readouterr().err.startswith(f"error: files: {place}")


def test_a_file_cannot_move_the_terminals_cursor() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "M2D")
    text.add_text("class", "\x1b[2J" + "x" * 1000)
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format="PNG", pnginfo=text)
    (told,) = tell(buffer.getvalue()).details
    assert told.isprintable()
    assert len(told) < 300


def test_without_the_package_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    ends_with(2, str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: verify needs c2pa-python")
    assert line.endswith("pip install c2pa-python")
    with pytest.raises(ConfigError, match="c2pa-python"):
        signing_of("self-made", None)
