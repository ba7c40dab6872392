"""What an image can prove of itself: a C2PA manifest, signed and written into its PNG beside the text.

Called by those who write images and by `verify`. c2pa-python is optional, so it is imported late. A private key stays
in its file: tasks and replicas are given the file's path, and Ray, logs and records never see the key.
"""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from m2d import __version__
from m2d.errors import ConfigError, first_line
from m2d.files.atomic import PARTIAL, write_whole
from m2d.files.progress import say
from m2d.generation.settings import SELF_MADE

KEY_NAME, CERTIFICATES_NAME = ".signing_key.pem", "certificates.pem"
OF_NOBODY = "M2D, self-made certificate"  # the organisation that a self-made one names
FACTS = "m2d.generation"  # label of the assertion that repeats the PNG's text
_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_UNTRUSTED = "signingCredential.untrusted"  # says nothing about the image
_YEARS = 20  # of a self-made certificate: without a time stamp a signature holds no longer than its certificate
# No look into the network: neither for manifests that are elsewhere nor for what a certificate's maker says of it.
_OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False}


def require_c2pa(setting: str) -> None:
    """Raise ConfigError, in one line, where c2pa-python is not installed. setting: what needs it."""
    try:
        import c2pa  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs c2pa-python, which is not here ({error}); pip install c2pa-python"
        ) from None


# --- signing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Signing:
    """By whom images are signed. Cheap to pickle, and without the key."""

    chain: Path  # PEM of the certificates, the signer's own first
    key: Path  # PEM of its private key; may be the same file
    sha256: str  # of the certificate

    def sign(self, png: bytes, name: str, facts: Mapping[str, str]) -> bytes:
        """The PNG with a manifest that says what made it and repeats the facts.

        About 4 KB longer, in 2 ms. Two calls give different bytes, for a manifest is salted. Raises ConfigError where
        the files cannot be read here, or hold another certificate than they did.
        """
        import c2pa

        algorithm, chain, key = _read(self)
        software = {"name": "M2D", "version": __version__}
        made = {"action": "c2pa.created", "digitalSourceType": _SOURCE, "softwareAgent": software}
        manifest = {
            "claim_generator_info": [software],
            "title": name,
            "format": "image/png",
            "assertions": [
                {"label": "c2pa.actions.v2", "created": True, "data": {"actions": [made]}},
                {"label": FACTS, "created": True, "data": dict(facts)},
            ],
        }
        settings = {"builder": {"thumbnail": {"enabled": False}}, "verify": _OFFLINE}
        signed = io.BytesIO()
        with (
            c2pa.Context.from_dict(settings) as context,
            c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, key, None)) as signer,
            c2pa.Builder(manifest, context) as builder,
        ):
            builder.sign(signer, "image/png", io.BytesIO(png), signed)
        return signed.getvalue()


def signing_of(sign: str | None, sign_key: str | None) -> Signing | None:
    """Of the settings; None where nothing is signed, or by a certificate that `self_made` makes of a folder.

    Raises ConfigError where the package is missing, or certificate and key cannot be used.
    """
    if sign is None:
        return None
    require_c2pa("sign")
    return None if sign == SELF_MADE else _usable(Path(sign), Path(sign_key or sign))


def self_made(folder: Path) -> Signing:
    """By a certificate that is made for a folder, once: its key is there, for the user alone, until `forget_key`.

    certificates.pem gets every certificate of the folder, the newest first. Raises OSError.
    """
    place = folder / KEY_NAME
    if not place.exists():
        partial = folder / f"{KEY_NAME}{PARTIAL}"  # hidden; OutputFolder removes what a killed run left of it
        with open(partial, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(_key_and_chain())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    if place.stat().st_mode & 0o077:
        say(f"warning: {place} can be read by others: its file system, or somebody, has let them; keep them out")
    signing = _usable(place, place)
    public, chain = folder / CERTIFICATES_NAME, _read(signing)[1].decode()
    known = public.read_text(encoding="utf-8") if public.exists() else ""
    if chain not in known:
        if known:
            say("warning: the key that signed the images in this folder is gone; new ones are signed by another one")
        write_whole(public, chain + known)
    say(f"signing by a self-made certificate ({public}): it shows that an image was not changed, not who made it")
    return signing


def forget_key(folder: Path) -> None:
    """From now on nobody can sign in the name of the folder's certificate."""
    (folder / KEY_NAME).unlink(missing_ok=True)


def _usable(chain: Path, key: Path) -> Signing:
    """Raises ConfigError unless a picture that these sign proves sound."""
    from cryptography.hazmat.primitives import hashes

    own = read_certificates("sign", chain)[1][0]
    signing = Signing(chain=chain, key=key, sha256=own.fingerprint(hashes.SHA256()).hex())
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, format="PNG")
    try:
        found = read_manifest(signing.sign(picture.getvalue(), "trial.png", {}))
        faults = None if found is None else found.faults
    except ConfigError:
        raise
    except Exception as error:  # c2pa's errors have no class of their own that is public
        faults = (first_line(error),)
    if faults is None or faults:
        raise ConfigError(
            f"sign: {chain} cannot sign ({', '.join(faults or ())}); C2PA wants a certificate that another one has "
            "signed (give both), valid now, for digital signatures and e-mail protection"
        )
    return signing


@lru_cache(maxsize=4)
def _read(signing: Signing) -> tuple[str, bytes, bytes]:
    """(algorithm, chain, key), both PEM. By its hash a certificate that takes another's place is another entry."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        chain = x509.load_pem_x509_certificates(signing.chain.read_bytes())
        key = serialization.load_pem_private_key(signing.key.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"sign_key: {error.filename} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:  # a TypeError: there is a password
        raise ConfigError(f"sign_key: {signing.key} holds no private key without a password in PEM") from error
    if chain[0].fingerprint(hashes.SHA256()).hex() != signing.sha256:
        raise ConfigError(f"sign: {signing.chain} is another certificate here than where the run began; all need one")
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    algorithm = curves.get(key.curve.name) if isinstance(key, ec.EllipticCurvePrivateKey) else None
    algorithm = "ed25519" if isinstance(key, ed25519.Ed25519PrivateKey) else algorithm
    algorithm = "ps256" if isinstance(key, rsa.RSAPrivateKey) else algorithm
    if algorithm is None:
        raise ConfigError(f"sign_key: {signing.key} is of a kind that C2PA does not know; take ES256, Ed25519 or RSA")
    if key.public_key() != chain[0].public_key():
        raise ConfigError(f"sign_key: {signing.key} is not the key of the first certificate in {signing.chain}")
    return (
        algorithm,
        b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _key_and_chain() -> bytes:
    """PEM of a new key and of its certificate, which a root signs whose own key nobody keeps: C2PA refuses less."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    pem, today = serialization.Encoding.PEM, datetime.now(UTC).replace(microsecond=0)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def name(of: str) -> x509.Name:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, OF_NOBODY), x509.NameAttribute(NameOID.COMMON_NAME, of)]
        )

    def certificate(subject: str, public_key: ec.EllipticCurvePublicKey, *, is_root: bool) -> x509.Certificate:
        others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign")
        no = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
        usage = x509.KeyUsage(digital_signature=not is_root, key_cert_sign=is_root, **no)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("root"))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - timedelta(days=1))  # clocks differ
            .not_valid_after(today + timedelta(days=365 * _YEARS))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        if not is_root:
            mail = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(mail, critical=False)
        return builder.sign(root_key, hashes.SHA256())

    return b"".join(
        (
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
            certificate("signer of one folder", key.public_key(), is_root=False).public_bytes(pem),
            certificate("root", root_key.public_key(), is_root=True).public_bytes(pem),
        )
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read_certificates(setting: str, path: Path) -> tuple[bytes, list[Any]]:
    """A PEM file, and the certificates in it. Raises ConfigError where there are none."""
    from cryptography import x509

    try:
        pem = path.read_bytes()
        return pem, x509.load_pem_x509_certificates(pem)
    except OSError as error:
        text = f"{setting}: {path} cannot be read ({error.strerror}); name a PEM file of certificates"
        raise ConfigError(text) from None
    except ValueError as error:
        raise ConfigError(f"{setting}: {path} holds no certificates in PEM ({first_line(error)})") from None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What c2pa-python finds in an image: whatever its writer put there, to be trusted as far as the faults allow."""

    state: Literal["Invalid", "Valid", "Trusted"]  # Valid: sound, by a signer that nobody vouches for
    faults: tuple[str, ...]  # codes of C2PA for what does not hold; () where the image is as it was signed
    signer: str  # organisation that the certificate names
    serial: str  # of the certificate, hexadecimal
    generator: str  # name and version of what made the claim
    sources: tuple[str, ...]  # digital source types, by their last word
    facts: dict[str, str]  # of M2D's images, the PNG's text


def read_manifest(image: bytes, trust: str | None = None) -> Manifest | None:
    """Of an image file; None where it has none. trust: PEM of certificates whose word counts.

    Raises c2pa.C2paError for a manifest that cannot be decoded.
    """
    import c2pa

    settings: dict[str, Any] = {"verify": _OFFLINE}
    if trust is not None:
        settings["trust"] = {"user_anchors": trust}
    with c2pa.Context.from_dict(settings) as context:
        reader = c2pa.Reader.try_create(None, io.BytesIO(image), context=context)
        if reader is None:
            return None
        with reader:
            told = json.loads(reader.json())
    manifest = told["manifests"][told["active_manifest"]]
    results = told.get("validation_results", {})
    parts = [results.get("activeManifest", {})]
    parts += [one.get("validationDeltas", {}) for one in results.get("ingredientDeltas", [])]
    failures = [str(one["code"]) for part in parts for one in part.get("failure", [])]
    by_label = {one["label"]: one["data"] for one in manifest.get("assertions", [])}
    actions = [one for label, data in by_label.items() if label.startswith("c2pa.actions") for one in data["actions"]]
    signature, (generator, *_) = manifest.get("signature_info", {}), manifest.get("claim_generator_info") or [{}]
    return Manifest(
        state=told["validation_state"],
        faults=tuple(dict.fromkeys(code for code in failures if code != _UNTRUSTED)),
        signer=str(signature.get("issuer") or signature.get("common_name") or "a certificate without a name"),
        serial=f"{int(signature.get('cert_serial_number') or 0):x}",
        generator=f"{generator.get('name', '')} {generator.get('version', '')}".strip(),
        sources=tuple(
            dict.fromkeys(
                str(one["digitalSourceType"]).rpartition("/")[2] for one in actions if "digitalSourceType" in one
            )
        ),
        facts={str(name): str(value) for name, value in dict(by_label.get(FACTS) or {}).items()},
    )
