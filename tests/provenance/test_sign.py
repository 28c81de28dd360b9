"""An image is signed with a manifest that C2PA's reader accepts; later changes are detected and reported."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

import authority
from diptych.cli.app import call
from diptych.data.images import broken_seal, encode, open_image, read_provenance, save_image
from diptych.data.seal import chunks, holds_manifest
from diptych.errors import UserError
from diptych.provenance import manifest
from diptych.provenance.sign import sign, sign_bytes, source_type
from diptych.provenance.trace import trace
from diptych.utils.paths import packaged

KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
TOLD = {
    "prompt": "a cat «ñ» 猫",
    "seed": 2**64 - 1,
    "seeds": [1, 2],
    "scale": 0.1,
    "fingerprints": [None],
    "model": "x",
}


CAT = str(packaged("examples/references/cat.png"))
DRAW = ["generate", "--model", "pocket", "--reference", CAT, "--prompt", "a cat on the moon", "--steps", "2"]


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> authority.Signer:
    return authority.make(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One picture that the pocket student drew from a reference, as a file of each kind."""
    folder = tmp_path_factory.mktemp("drawn")
    assert call([*DRAW, "--out", f"{folder}/generated/"]) == 0
    (generated,) = folder.glob("generated/*.png")
    image, told = open_image(generated), read_provenance(generated)
    for kind in KINDS:
        save_image(image, folder / f"cat.{kind}", told)
    return {kind: folder / f"cat.{kind}" for kind in KINDS}


@pytest.fixture
def pictures(drawn: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies to sign."""
    return {kind: Path(shutil.copy(path, tmp_path)) for kind, path in drawn.items()}


@pytest.fixture(scope="module")
def identity(signer: authority.Signer) -> Any:
    from diptych.provenance.sign import load_identity

    return load_identity(signer.chain, signer.key)


def small(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), kind, TOLD)


def links(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    chain = found["chain"]
    return {each["what"]: (each["status"], f"{each['where']} {each['says']}") for each in [chain, *chain["links"]]}


def as_others_read(path: Path, trust: Path | None = None) -> dict[str, Any]:
    """A file's manifest store as C2PA's library reads it with its own settings, and `trust` as its trust list."""
    settings = {"trust": {"trust_anchors": trust.read_text()}} if trust else {}
    with c2pa.Reader(path, context=c2pa.Context.from_dict(settings)) as reader:
        return json.loads(reader.json())


def command(files: list[Path] | Path, signer: authority.Signer, *more: str) -> int:
    names = [str(file) for file in (files if isinstance(files, list) else [files])]
    return call(["sign", *names, "--certificate", str(signer.chain), "--key", str(signer.key), *more])


# What is signed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_others_read_what_made_a_signed_picture(
    kind: str, pictures: dict[str, Path], signer: authority.Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = pictures[kind]
    told = read_provenance(picture)
    assert told is not None
    assert command(picture, signer) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    store = as_others_read(picture, signer.trust)
    assert store["validation_state"] == "Trusted" and len(store["manifests"]) == 1
    found = store["manifests"][store["active_manifest"]]
    assert found["title"] == picture.name and found["signature_info"]["common_name"] == "Ann"
    (ingredient,) = found["ingredients"]
    assert ingredient["relationship"] == "inputTo" and ingredient["title"] == "cat.png"
    assert ingredient["instance_id"] == f"sha256:{told['reference_sha256']}"
    data = {each["label"]: each["data"] for each in found["assertions"]}
    (action,) = data["c2pa.actions.v2"]["actions"]
    assert action["action"] == "c2pa.created" and action["softwareAgent"]["name"] == "diptych"
    assert action["softwareAgent"]["version"] == told["versions"]["diptych"]
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert len(action["parameters"]["ingredients"]) == 1
    assert json.loads(data["diptych.provenance"]["json"]) == told


@pytest.mark.parametrize("kind", KINDS)
def test_a_signed_picture_is_traced_as_before_and_shows_the_same(
    kind: str, pictures: dict[str, Path], signer: authority.Signer
) -> None:
    picture = pictures[kind]
    before, pixels, told = trace(picture), open_image(picture).tobytes(), read_provenance(picture)
    assert before["verified"] and "manifest" not in links(before)
    sign([picture], signer.chain, signer.key)
    after = trace(picture)
    status, says = links(after)["manifest"]
    assert status == "ok" and says.startswith(authority.SIGNER) and "--trust" in says
    after["chain"]["links"] = [each for each in after["chain"]["links"] if each["what"] != "manifest"]
    assert after == before
    assert broken_seal(picture) == [] and read_provenance(picture) == told
    assert open_image(picture).tobytes() == pixels


def test_a_signed_picture_is_found_again_by_the_command_that_drew_it(
    drawn: dict[str, Path], signer: authority.Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawn["png"].parent / "generated", tmp_path / "pictures")
    (picture,) = (tmp_path / "pictures").glob("*.png")
    sign([picture], signer.chain, signer.key)
    signed = picture.read_bytes()
    capsys.readouterr()
    assert call([*DRAW, "--out", f"{tmp_path}/pictures/", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["skipped"] == [str(picture)] and picture.read_bytes() == signed


@pytest.mark.parametrize("kind", KINDS.values())
def test_any_provenance_is_signed_word_for_word(kind: str, identity: Any) -> None:
    # The prompt makes the manifest longer than a JPEG's segment, so it lies in two.
    told = {**TOLD, "prompt": "猫" * 10_000}
    data = encode(Image.new("RGB", (12, 12), "red"), kind, told)
    signed = sign_bytes(data, kind, identity, title="x")
    found = manifest.read(signed, kind)
    assert found.provenance == told and found.wrong == [] and found.trusted is None
    assert broken_seal(signed) == [] and holds_manifest(signed) and not holds_manifest(data)


def test_a_picture_drawn_without_a_reference_names_none(identity: Any) -> None:
    signed = sign_bytes(small("PNG"), "PNG", identity, title="x")
    store = json.loads(c2pa.Reader("image/png", io.BytesIO(signed)).json())
    assert not store["manifests"][store["active_manifest"]].get("ingredients")


def test_a_relit_picture_that_holds_its_reference_is_a_composite() -> None:
    assert source_type({"light": "dusk", "detail": 0}).endswith("/trainedAlgorithmicMedia")
    for told in ({"light": "dusk", "detail": 1.0}, {"light": "dusk", "detail": 0, "mask": "ab"}):
        assert source_type(told).endswith("/compositeWithTrainedAlgorithmicMedia")


@pytest.mark.parametrize(
    ("key", "algorithm", "named"),
    [
        (ec.generate_private_key(ec.SECP384R1()), None, "Es384"),
        (ec.generate_private_key(ec.SECP521R1()), "es512", "Es512"),
        (ed25519.Ed25519PrivateKey.generate(), None, "Ed25519"),
        (rsa.generate_private_key(65537, 2048), None, "Ps256"),
        (rsa.generate_private_key(65537, 2048), "ps512", "Ps512"),
    ],
)
@pytest.mark.parametrize("purpose", list(manifest.PURPOSES))
def test_keys_and_purposes_that_c2pa_takes(
    key: Any, algorithm: str | None, named: str, purpose: str, tmp_path: Path
) -> None:
    signer = authority.make(tmp_path, key, purposes=[x509.ObjectIdentifier(purpose)])
    picture = tmp_path / "a.png"
    picture.write_bytes(small("PNG"))
    sign([picture], signer.chain, signer.key, algorithm=algorithm)
    assert links(trace(picture, trust=[signer.trust]))["manifest"][0] == "ok"
    store = as_others_read(picture)
    assert store["manifests"][store["active_manifest"]]["signature_info"]["alg"] == named


# What changed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_flipped_bit_outside_the_manifest_is_always_found(kind: str, identity: Any) -> None:
    data = small(kind)
    signed = sign_bytes(data, kind, identity, title="x")
    start = next(at for at in range(len(data)) if data[at] != signed[at]) if kind != "WEBP" else len(data)
    inside = range(start, start + len(signed) - len(data))
    for at in range(0, len(signed), 7):
        if at not in inside:
            assert changes(signed, kind, at), at


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_flipped_bit_in_the_manifest_is_found_wherever_it_says_something(kind: str, identity: Any) -> None:
    signed = sign_bytes(small(kind), kind, identity, title="x")
    for words in (b"c2pa.created", b"trainedAlgorithmicMedia", b"a cat", b"softwareAgent", b"Test Studio"):
        at = signed.rindex(words) if kind == "WEBP" else signed.index(words)
        assert changes(signed, kind, at + 1), words
    for at in range(0, len(signed), 5):  # what is damaged ends in a line and never in a traceback
        changes(signed, kind, at)


def changes(signed: bytes, kind: str, at: int) -> bool:
    """Whether a bit that flips is found, by the picture's seal or by its manifest."""
    changed = bytearray(signed)
    changed[at] ^= 1 << at % 8
    data = bytes(changed)
    try:
        told = read_provenance(data)
        if told is None or broken_seal(data):
            return True
        return holds_manifest(data) and bool((found := manifest.read(data, kind)).wrong or found.provenance != told)
    except UserError:
        return True


def test_trace_says_what_changed_and_fails(
    pictures: dict[str, Path], signer: authority.Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    for picture in pictures.values():
        assert command(picture, signer) == 0
    for kind, words in (("png", b"IDAT"), ("webp", b"VP8L"), ("jpg", b"\xff\xda")):
        data = bytearray(pictures[kind].read_bytes())
        at = data.rindex(words) if kind == "jpg" else data.index(words)  # two bytes may stand in a signature before
        data[at + 60] ^= 4
        changed = pictures[kind].with_name(f"changed.{kind}")
        changed.write_bytes(bytes(data))
        capsys.readouterr()
        assert call(["trace", str(changed)]) == 1
        output = capsys.readouterr()
        if kind == "jpg":
            assert "changed since it was signed" in output.out
        else:  # compressed without loss: the bytes no longer unpack
            assert "damaged or incomplete" in output.err
    for picture in pictures.values():
        data = picture.read_bytes().replace(b"c2pa.created", b"c2pa.edited!")
        picture.write_bytes(data)
        if picture.suffix == ".png":
            assert call(["trace", str(picture)]) == 1
            assert "its caBX chunk is damaged" in capsys.readouterr().err
            picture.write_bytes(with_true_checksums(data))
        assert call(["trace", str(picture)]) == 1
        said = capsys.readouterr().out
        assert "✓ picture" in said and "✗ manifest" in said and "its assertion c2pa.actions.v2 changed" in said


def with_true_checksums(png: bytes) -> bytes:
    """A PNG whose chunks changed, as who meant to change them would leave it."""
    whole = bytearray(png)
    for kind, start, end in chunks(png):
        whole[end : end + 4] = zlib.crc32(kind + png[start:end]).to_bytes(4, "big")
    return bytes(whole)


def test_a_manifest_moved_to_another_picture_does_not_fit(signer: authority.Signer, tmp_path: Path) -> None:
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    save_image(Image.new("RGB", (8, 8), "red"), one, TOLD)
    save_image(Image.new("RGB", (8, 8), "blue"), other, {**TOLD, "prompt": "a dog"})
    sign([one], signer.chain, signer.key)
    signed, plain = one.read_bytes(), other.read_bytes()
    length = int.from_bytes(signed[33:37], "big") + 12  # the chunk that follows the header
    assert signed[37:41] == b"caBX"
    other.write_bytes(plain[:33] + signed[33 : 33 + length] + plain[33:])
    status, says = links(trace(other))["manifest"]
    assert status == "differs" and "changed since it was signed" in says and "the image's text" in says


# Who signed ----------------------------------------------------------------------------------------------------------


def test_a_signer_is_trusted_by_a_list_and_by_no_other(
    pictures: dict[str, Path], signer: authority.Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = authority.make(tmp_path / "other")
    assert call(["trace", str(pictures["png"]), "--trust", str(signer.trust)]) == 1
    assert "✗ manifest" in capsys.readouterr().out
    assert command(pictures["png"], signer) == 0
    assert call(["trace", str(pictures["png"]), "--trust", str(other.trust)]) == 1
    assert f"✗ manifest  {authority.SIGNER}  its signer is not in a file of --trust" in capsys.readouterr().out
    assert call(["trace", str(pictures["png"]), "--trust", str(other.trust), "--trust", str(signer.trust)]) == 0
    assert f"✓ manifest  {authority.SIGNER}  its signer is trusted" in capsys.readouterr().out
    (tmp_path / "empty.pem").write_text("nothing")
    for wrong in ("empty.pem", "absent.pem"):
        assert call(["trace", str(pictures["png"]), "--trust", str(tmp_path / wrong)]) == 2
        assert wrong in capsys.readouterr().err
    assert call(["trace", "pocket.safetensors", "--trust", str(signer.trust)]) == 2


def test_an_expired_certificate_no_longer_proves_anything_unless_a_timestamp_is_trusted(
    tmp_path: Path, timestamps: Timestamps
) -> None:
    ends = time.monotonic() + 8
    signer = authority.make(tmp_path, seconds=(-86_400, 8))
    for name, address in (("plain.png", None), ("stamped.png", timestamps.url)):
        (tmp_path / name).write_bytes(small("PNG"))
        sign([tmp_path / name], signer.chain, signer.key, timestamp=address)
    assert links(trace(tmp_path / "plain.png"))["manifest"][0] == "ok"
    time.sleep(max(0, ends + 1 - time.monotonic()))
    trust = [signer.trust, timestamps.trust]
    status, says = links(trace(tmp_path / "plain.png", trust=trust))["manifest"]
    assert status == "differs" and "has expired" in says
    assert links(trace(tmp_path / "stamped.png"))["manifest"][0] == "differs"  # nobody vouches for the timestamp
    status, says = links(trace(tmp_path / "stamped.png", trust=trust))["manifest"]
    assert status == "ok" and f"; {time.strftime('%Y', time.gmtime())}-" in says


class Timestamps:
    """An RFC 3161 timestamp authority: OpenSSL's, behind a real server."""

    def __init__(self, folder: Path) -> None:
        signer = authority.make(
            folder, rsa.generate_private_key(65537, 2048), purposes=[ExtendedKeyUsageOID.TIME_STAMPING]
        )
        self.trust = signer.trust
        options = folder / "openssl.cnf"
        options.write_text(
            f"[tsa]\nserial = {folder}/serial\nsigner_cert = {signer.chain}\ncerts = {signer.trust}\n"
            f"signer_key = {signer.key}\nsigner_digest = sha256\ness_cert_id_alg = sha256\n"
            "default_policy = 1.2.3.4.1\ndigests = sha256, sha384, sha512\n"
        )

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = folder / "query.tsq"
                query.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
                words = ["openssl", "ts", "-reply", "-config", options, "-section", "tsa", "-queryfile", query]
                reply = subprocess.run(words, capture_output=True, check=True).stdout
                self.send_response(200)
                self.send_header("Content-Type", "application/timestamp-reply")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def timestamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Timestamps]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Timestamps(tmp_path / "timestamps")
    yield found
    found.server.shutdown()
    found.server.server_close()


# Files and runs ------------------------------------------------------------------------------------------------------


def test_an_interrupted_command_goes_on_and_signs_nothing_twice(
    pictures: dict[str, Path], signer: authority.Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(pictures["png"], signer) == 0
    first = pictures["png"].read_bytes()
    capsys.readouterr()
    assert command(list(pictures.values()), signer, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] == [str(pictures["png"])] and len(told["signed"]) == 2 and told["signer"] == authority.SIGNER
    assert pictures["png"].read_bytes() == first
    assert command(pictures["png"], signer, "--overwrite") == 0
    assert pictures["png"].read_bytes() != first
    assert len(as_others_read(pictures["png"])["manifests"]) == 1  # in place of the first, not on top of it


def test_out_is_a_file_or_a_folder_and_replaces_nothing_by_default(
    pictures: dict[str, Path], signer: authority.Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {kind: path.read_bytes() for kind, path in pictures.items()}
    assert command(pictures["png"], signer, "--out", str(tmp_path / "new.png")) == 0
    assert command(list(pictures.values()), signer, "--out", f"{tmp_path}/signed/") == 0
    assert {kind: path.read_bytes() for kind, path in pictures.items()} == before
    assert all(holds_manifest((tmp_path / "signed" / path.name).read_bytes()) for path in pictures.values())
    assert not list(tmp_path.rglob(".*.tmp"))
    (tmp_path / "mine.png").write_bytes(before["png"])
    for out, word in (("mine.png", "--overwrite"), ("new.jpg", "new.jpg"), ("new.gif", ".png")):
        capsys.readouterr()
        assert command(pictures["png"], signer, "--out", str(tmp_path / out)) == 2
        assert word in capsys.readouterr().err
    assert command(list(pictures.values()), signer, "--out", str(tmp_path / "one.png")) == 2
    again = tmp_path / "again"
    again.mkdir()
    assert command([pictures["png"], Path(shutil.copy(pictures["png"], again))], signer, "--out", f"{tmp_path}/x/") == 2
    assert command(tmp_path / "new.png", signer, "--out", str(tmp_path / "newer.png")) == 2
    assert "error[output_exists]" in capsys.readouterr().err


def test_all_images_are_checked_before_one_is_written(
    pictures: dict[str, Path], signer: authority.Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "story.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "notes.png").write_text("hello")
    for name in ("photo.png", "story.pdf", "notes.png", "absent.png", "."):
        assert command([pictures["png"], tmp_path / name], signer) == 2
        assert str(tmp_path / name) in (said := capsys.readouterr().err) and said.count("\n") == 1
    edited = bytearray(pictures["jpg"].read_bytes())
    edited[-20] ^= 1
    pictures["jpg"].write_bytes(bytes(edited))
    assert command([pictures["png"], pictures["jpg"]], signer) == 1
    error = capsys.readouterr().err
    assert "error[trace_invalid]" in error and "changed since" in error
    assert not holds_manifest(pictures["png"].read_bytes())


EMAIL = ExtendedKeyUsageOID.EMAIL_PROTECTION

# Certificates and keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"seconds": (-86_400 * 9, -86_400)}, "expired on "),
        ({"seconds": (86_400, 86_400 * 9)}, "not valid before "),
        ({"self_signed": True}, "self-signed"),
        ({"purposes": [ExtendedKeyUsageOID.SERVER_AUTH]}, "extended key usage"),
        ({"purposes": []}, "extended key usage"),
        ({"purposes": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]}, "anyExtendedKeyUsage"),
        ({"purposes": [EMAIL, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]}, "anyExtendedKeyUsage"),
        ({"purposes": [EMAIL, ExtendedKeyUsageOID.TIME_STAMPING]}, "timeStamping"),
        ({"purposes": [EMAIL, ExtendedKeyUsageOID.OCSP_SIGNING]}, "OCSPSigning"),
        ({"authority_key": False}, "authority key identifier"),
        ({"signs": False}, "digitalSignature"),
        ({"key": ec.generate_private_key(ec.SECP256K1())}, "P-256"),
        ({"key": rsa.generate_private_key(65537, 1024)}, "2048"),
    ],
)
def test_a_certificate_that_c2pa_does_not_accept_is_rejected_with_the_reason(
    wrong: dict[str, Any], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected(tmp_path, authority.make(tmp_path, **wrong), word, capsys)


def rejected(folder: Path, signer: authority.Signer, word: str, capsys: pytest.CaptureFixture[str], *more: str) -> None:
    """One line, exit code 2, nothing written, and no private key in the output."""
    picture = folder / "picture.png"
    picture.write_bytes(small("PNG"))
    assert command(picture, signer, *more) == 2
    output = capsys.readouterr()
    assert word in output.err and output.err.count("\n") == 1 and not output.out
    assert not holds_manifest(picture.read_bytes())
    secret = signer.key.read_text().splitlines() if signer.key.exists() else []
    assert not any(line in output.err for line in secret if line and "PRIVATE KEY" not in line)


def test_chains_and_keys_that_do_not_fit_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = authority.make(tmp_path / "good"), authority.make(tmp_path / "other")
    leaf, above = (part + "-----END CERTIFICATE-----\n" for part in good.chain.read_text().split("-----END")[:2])
    above = above.split("-----BEGIN", 1)[1]
    (tmp_path / "above.pem").write_text(f"-----BEGIN{above}{leaf}")
    (tmp_path / "foreign.pem").write_text(leaf + other.trust.read_text())
    (tmp_path / "nothing.pem").write_text("nothing")
    absent = tmp_path / "absent.pem"
    for chain, key, word in (
        (good.chain, other.key, "not the key of the first certificate"),
        (tmp_path / "above.pem", good.key, "put the signer's first"),
        (tmp_path / "foreign.pem", good.key, "certificate 2 did not issue certificate 1"),
        (tmp_path / "nothing.pem", good.key, "no certificates in PEM"),
        (absent, good.key, "cannot be read"),
        (good.chain, absent, "cannot be read"),
        (good.chain, good.chain, "no private key in PEM"),
    ):
        rejected(tmp_path, authority.Signer(chain, key, good.trust), word, capsys)
    rejected(tmp_path, good, "did you mean 'es256'?", capsys, "--algorithm", "es265")
    rejected(tmp_path, good, "es256", capsys, "--algorithm", "ps256")
    rejected(tmp_path, good, "not an address", capsys, "--timestamp", "timestamps.example")


def test_a_key_comes_from_the_environment_and_may_be_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = authority.make(tmp_path, key)
    picture = tmp_path / "a.png"
    picture.write_bytes(small("PNG"))
    words = ["sign", str(picture), "--certificate", str(signer.chain)]
    assert call(words) == 2
    assert "DIPTYCH_SIGN_KEY" in capsys.readouterr().err
    monkeypatch.setenv("DIPTYCH_SIGN_KEY", authority.private(key, "a password").decode())
    assert call(words) == 2
    assert "DIPTYCH_SIGN_PASSWORD" in capsys.readouterr().err
    monkeypatch.setenv("DIPTYCH_SIGN_PASSWORD", "another")
    assert call(words) == 2
    assert "DIPTYCH_SIGN_PASSWORD is wrong" in capsys.readouterr().err
    monkeypatch.setenv("DIPTYCH_SIGN_PASSWORD", "a password")
    assert call(words) == 0
    monkeypatch.delenv("DIPTYCH_SIGN_KEY")
    assert call([*words, "--key", str(signer.key), "--overwrite"]) == 0  # a password, and a key that needs none


def test_a_timestamp_that_does_not_come_is_a_failure(
    tmp_path: Path, signer: authority.Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(small("PNG"))
    assert command(picture, signer, "--timestamp", "http://127.0.0.1:9/") == 1
    said = capsys.readouterr().err
    assert str(picture) in said and "127.0.0.1:9" in said
    assert not holds_manifest(picture.read_bytes())


def test_the_identity_shows_no_key(identity: Any) -> None:
    assert b"PRIVATE KEY" in identity.key and "PRIVATE" not in repr(identity)


# The library ---------------------------------------------------------------------------------------------------------


def test_without_the_library_a_manifest_is_seen_and_the_extra_is_named(
    pictures: dict[str, Path], signer: authority.Signer, tmp_path: Path
) -> None:
    """In a process of its own, where `c2pa` and `cryptography` cannot be imported."""
    sign(list(pictures.values()), signer.chain, signer.key)
    (tmp_path / "plain.png").write_bytes(small("PNG"))
    program = (
        "import sys\n"
        "sys.modules['c2pa'] = sys.modules['cryptography'] = None\n"
        "from diptych.cli.app import main\n"
        "main(sys.argv[1:])\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)

    for picture in pictures.values():
        done = run("trace", str(picture))
        assert done.returncode == 0 and "? manifest" in done.stdout and "pip install 'diptych[c2pa]'" in done.stdout
    assert "manifest" not in run("trace", str(tmp_path / "plain.png")).stdout
    for words in (
        ["sign", str(tmp_path / "plain.png"), "--certificate", str(signer.chain), "--key", str(signer.key)],
        ["trace", str(tmp_path / "plain.png"), "--trust", str(signer.trust)],
    ):
        done = run(*words)
        assert done.returncode == 2 and "pip install 'diptych[c2pa]'" in done.stderr and done.stderr.count("\n") == 1


def test_no_native_library_is_loaded_from_the_folder_of_the_pictures(tmp_path: Path) -> None:
    (own,) = (p for p in Path(c2pa.__file__).parent.rglob("*c2pa_c.*") if p.suffix in (".so", ".dylib", ".dll"))
    (tmp_path / own.name).symlink_to(own)
    program = "from diptych.provenance.manifest import library; print(library().c2pa._lib._name)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == own


def test_the_certificate_that_the_documentation_makes_signs(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    page = (Path(__file__).parents[2] / "docs/signing.md").read_text("utf8")
    (commands,) = [block.split("```")[0] for block in page.split("```bash\n") if block.startswith("openssl ")]
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    signer = authority.Signer(tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "trust.pem")
    (tmp_path / "a.png").write_bytes(small("PNG"))
    sign([tmp_path / "a.png"], signer.chain, signer.key)
    assert links(trace(tmp_path / "a.png", trust=[signer.trust]))["manifest"][0] == "ok"
