"""De-identification: personal and secret things in a text give way to placeholders, or to pseudonyms that keep equal things equal.

In: a text and which kinds (`kinds.py`).  Out: the text, everything else in it untouched, and how many of each kind went. A pseudonym is
HMAC-SHA-256 (RFC 2104) of kind and canonical value under a secret key, cut to 48 bits: +86 138 0013 8000 and 13800138000 are the same
person, and nobody without the key can find out who. Neither placeholder nor pseudonym is taken for something to hide, so a second run
changes nothing.
"""

from __future__ import annotations

import hmac
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from megalite.data.kinds import Candidate, kinds
from megalite.errors import UserError
from megalite.upkeep import Section

Name = Literal["url", "email", "key", "iban", "resident", "card", "ssn", "ip", "phone"]
NAMES: tuple[str, ...] = get_args(Name)
LEAST_KEY = 16  # bytes
LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")  # a pseudonym of digits might be taken for a number to hide


class Identity(Section):
    """What is hidden, and behind what."""

    kinds: tuple[Name, ...] = Field(default=NAMES, min_length=1)  # type: ignore[assignment]
    """url: user:password@ in a URL; email; key: API keys, tokens, private keys; iban; resident: Chinese resident identity numbers; card;
    ssn: US social security numbers; ip: IPv4 and IPv6; phone."""
    replace: Literal["placeholder", "pseudonym"] = "placeholder"
    """placeholder: <EMAIL>; pseudonym: <EMAIL:dpajkbcmepgi>, the same for the same address."""
    key: str | None = None
    """File whose bytes, 16 or more, are the secret key of the pseudonyms."""
    regions: tuple[str, ...] = ("CN", "US")
    """Countries (ISO 3166) whose phone numbers are known without the country's code; more of them means more look-alikes."""

    def model_post_init(self, _: Any) -> None:
        if (self.replace == "pseudonym") != (self.key is not None):
            raise UserError(f"identity.replace = {self.replace} and identity.key = {self.key}: pseudonyms need a key, nothing else does")
        import phonenumbers

        if unknown := [region for region in self.regions if region not in phonenumbers.SUPPORTED_REGIONS]:
            raise UserError(f"identity.regions = {', '.join(unknown)} is no country; give ISO 3166 codes, such as CN, US, GB")

    def read_key(self) -> bytes | None:
        """The secret, or None for placeholders."""
        if self.key is None:
            return None
        try:
            secret = Path(self.key).read_bytes().strip()
        except OSError as problem:
            raise UserError(
                f"identity.key = {self.key} cannot be read ({problem.strerror}); make one: openssl rand -hex 32 > FILE"
            ) from None
        if len(secret) < LEAST_KEY:
            raise UserError(f"identity.key = {self.key} holds {len(secret)} bytes, a secret needs {LEAST_KEY}; openssl rand -hex 32 > FILE")
        return secret


def find(text: str, settings: Identity) -> list[tuple[str, Candidate]]:
    """What would be hidden, in order and without overlaps: of two that overlap the one that begins first, then the kind named first."""
    known = kinds(settings.regions)
    found = [
        (candidate.start, rank, candidate)
        for rank, name in enumerate(known)
        if name in settings.kinds and known[name].hint.search(text)
        for candidate in known[name].find(text)
    ]
    kept: list[tuple[str, Candidate]] = []
    end = 0
    names = list(known)
    for start, rank, candidate in sorted(found, key=lambda entry: entry[:2]):
        if start >= end:
            kept.append((names[rank], candidate))
            end = candidate.stop
    return kept


class Veil:
    """Hides what `settings` names; the key is read once."""

    def __init__(self, settings: Identity) -> None:
        self.settings, self._key = settings, settings.read_key()

    def hide(self, text: str) -> tuple[str, Counter[str]]:
        """The text with everything hidden, and how many of each kind were."""
        found = find(text, self.settings)
        if not found:
            return text, Counter()
        parts, at = [], 0
        for name, candidate in found:
            parts += [text[at : candidate.start], self.name(name, candidate.value)]
            at = candidate.stop
        return "".join([*parts, text[at:]]), Counter(name for name, _ in found)

    def name(self, kind: str, value: str) -> str:
        """What stands in the place of a value."""
        if self._key is None:
            return f"<{kind.upper()}>"
        digest = hmac.digest(self._key, f"{kind}\0{value}".encode("utf-8", "surrogatepass"), "sha256")
        return f"<{kind.upper()}:{digest[:6].hex().translate(LETTERS)}>"
