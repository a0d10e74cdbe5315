"""What personal and secret things look like in text: a pattern that finds candidates, and a check that tells them from look-alikes.

In: a text.  Out: spans. Numbers with a check digit are judged by python-stdnum (Luhn, IBAN, ISO 7064, US SSN), phone numbers by
phonenumbers (Google's), addresses by `ipaddress`. API keys have the shapes their issuers document. Digits that stand in longer words or
numbers are never candidates; the characters of other scripts may stand right beside one, as they do in Chinese.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache

import phonenumbers
from stdnum import iban, luhn
from stdnum.iso7064 import mod_11_2
from stdnum.us import ssn

NOT_BEFORE, NOT_AFTER = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9_])"
APART = r"(?<![A-Za-z0-9_.+-])"  # nor the end of a decimal, a version or a signed number


@dataclass(frozen=True)
class Candidate:
    """A place in a text and what stands there, without what is written for the eye alone."""

    start: int
    stop: int
    value: str


@dataclass(frozen=True)
class Kind:
    """One kind of thing; `hint` is in every text that holds one, and is looked for first, for that is cheap."""

    hint: re.Pattern[str]
    find: Callable[[str], Iterator[Candidate]]


def _matching(pattern: str, check: Callable[[str], str | None], flags: int = 0) -> Callable[[str], Iterator[Candidate]]:
    """Find by a pattern, group `value` of it where it has one; `check` gives the canonical value, or None for a look-alike."""
    compiled = re.compile(pattern, flags)
    group = "value" if "value" in compiled.groupindex else 0

    def find(text: str) -> Iterator[Candidate]:
        for match in compiled.finditer(text):
            if value := check(match[group]):
                yield Candidate(*match.span(group), value)

    return find


# ---- what has a check digit ------------------------------------------------------------------------------------------------------------

ISSUERS = re.compile(  # leading digits and lengths, ISO/IEC 7812 as the networks publish them
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720))\d*|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|62\d{14,17}|35(?:2[89]|[3-8]\d)\d{12,15}|220[0-4]\d{12,15}"
)


def _card(found: str) -> str | None:
    digits = re.sub(r"[ -]", "", found)
    if digits.startswith(("51", "52", "53", "54", "55", "22", "23", "24", "25", "26", "27")) and len(digits) != 16:
        return None
    return digits if ISSUERS.fullmatch(digits) and luhn.is_valid(digits) else None


def _iban(found: str) -> str | None:
    """The longest beginning that is one: words in capitals may follow."""
    groups = found.split(" ")
    compact = found.replace(" ", "")
    return compact if len(groups) < 12 and iban.is_valid(compact) else None


def find_ibans(text: str) -> Iterator[Candidate]:
    for match in IBAN.finditer(text):
        found = match[0]
        for stop in range(len(found), 14, -1):
            if (stop == len(found) or not found[stop].isalnum() or found[stop - 1] == " ") and (value := _iban(found[:stop].rstrip(" "))):
                yield Candidate(match.start(), match.start() + len(found[:stop].rstrip(" ")), value)
                break


IBAN = re.compile(rf"{NOT_BEFORE}[A-Z]{{2}}\d\d(?: ?[A-Z0-9]{{1,4}}){{3,8}}{NOT_AFTER}")


def _resident(found: str) -> str | None:
    """A resident identity number of the mainland: region, a date of birth, a check digit (GB 11643)."""
    value = found.upper()
    try:
        born = date(int(value[6:10]), int(value[10:12]), int(value[12:14]))
    except ValueError:
        return None
    regions = (11, 15), (21, 23), (31, 37), (41, 46), (50, 54), (61, 65), (71, 71), (81, 83)
    known = any(low <= int(value[:2]) <= high for low, high in regions)
    return value if known and 1880 < born.year <= date.today().year and mod_11_2.is_valid(value) else None


def _ssn(found: str) -> str | None:
    digits = re.sub(r"\D", "", found)
    return digits if ssn.is_valid(digits) else None


# ---- addresses -------------------------------------------------------------------------------------------------------------------------

VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|rev|build|chapter|section|sec|clause|firmware|版本|章节)[.:\s=]{0,3}|§\s?)$", re.IGNORECASE
)


def find_addresses(text: str) -> Iterator[Candidate]:
    """IPv4 and IPv6 addresses of somebody: no loopback, no mask, no version number."""
    for match in IPV4.finditer(text):
        try:
            found = ipaddress.IPv4Address(match[0])
        except ValueError:
            continue
        nobody = found.is_loopback or found.is_multicast or found.packed[0] in (0, 255)
        numbered = found.packed[0] != 10 and sum(octet < 10 for octet in found.packed) >= 3  # 8.2.4.45 is a section, or a public resolver
        if not (nobody or numbered or VERSION.search(text, max(0, match.start() - 12), match.start())):
            yield Candidate(*match.span(), str(found))
    if "::" in text or text.count(":") >= 7:
        for match in IPV6.finditer(text):
            try:
                address = ipaddress.IPv6Address(match[0])
            except ValueError:
                continue
            first = address.packed[0]  # 2000::/3, fc00::/7 and fe80::/10 are given out; the rest are words such as dead::beef
            local = first & 0xFE == 0xFC or (first == 0xFE and address.packed[1] & 0xC0 == 0x80)
            if (first & 0xE0 == 0x20 and any(map(str.isdigit, match[0]))) or local:
                yield Candidate(*match.span(), address.compressed)


IPV4 = re.compile(r"(?<![A-Za-z0-9_.])(?:\d{1,3}\.){3}\d{1,3}(?![A-Za-z0-9_]|\.\d)")
IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])[0-9A-Fa-f]{4}:[0-9A-Fa-f:]{2,34}(?![A-Za-z0-9_:])")

# ---- phone numbers ---------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"(?<![A-Za-z0-9_.+/=#$€£¥-])(?:\+|00(?=[1-9]))?\(?\d[\d ().\u00a0/–-]{4,22}\d(?![A-Za-z0-9_]|[.,-]\d)")  # noqa: RUF001
MENTIONED = re.compile(
    r"(?:phone|tel|call|mobile|cell|fax|whatsapp|contact|dial|ring|sms|电话|手机|传真|致电|联系|拨打|座机|热线)[^\d\n]{0,20}$", re.I
)
LONE = re.compile(r"[^\d(]\d$")  # no country writes a single digit by itself at the end
MOBILE = re.compile(r"1[3-9]\d{9}")
DATES = re.compile(r"(?:19|20)\d\d[-./ ][01]?\d[-./ ][0-3]?\d(?!\d)|[0-3]?\d[-./][01]?\d[-./](?:19|20)\d\d(?!\d)")


def find_phones(text: str, regions: tuple[str, ...]) -> Iterator[Candidate]:
    """Numbers with a country's code, and those that are valid in one of these regions and written as phone numbers are."""
    for match in NUMBER.finditer(text):
        for start, stop in _pieces(match[0]):
            found = match[0][start:stop]
            if (value := _phone(found, text[max(0, match.start() + start - 32) : match.start() + start], regions)) is not None:
                yield Candidate(match.start() + start, match.start() + stop, value)


def _pieces(found: str) -> Iterator[tuple[int, int]]:
    """A run of digits and marks whole, where it can be one number; else its parts between wide gaps."""
    if sum(map(str.isdigit, found)) <= 15 and "  " not in found:
        yield 0, len(found)
        return
    for part in re.finditer(r"\S+(?: \S+)*?(?=  |$)|\S+", found):
        yield part.span()


def _phone(found: str, before: str, regions: tuple[str, ...]) -> str | None:
    digits = re.sub(r"\D", "", found)
    if found.count("(") != found.count(")") or DATES.match(found) or LONE.search(found) or not 7 <= len(digits) <= 15:
        return None
    if found.startswith(("+", "00")):
        number = _parse("+" + digits.removeprefix("00") if found.startswith("00") else found, None)
        return _written(number) if number and phonenumbers.is_possible_number(number) else None
    bare, mentioned = digits == found, MENTIONED.search(before) is not None
    if MOBILE.fullmatch(digits) and re.fullmatch(r"1\d\d[ -]?\d{4}[ -]?\d{4}", found) and "CN" in regions:
        return f"+86{digits}"
    if bare and not mentioned:
        return None
    for region in regions:
        number = _parse(found, region)
        if number and phonenumbers.is_valid_number_for_region(number, region) and (mentioned or _is_spelled(found, digits, region)):
            return _written(number)
    return None


def _is_spelled(found: str, digits: str, region: str) -> bool:
    """Whether it is written as that country writes phone numbers, not as a sum, a range or a date."""
    shapes = {
        "US": r"(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}",
        "CN": r"\(?0\d{2,3}\)?[ -]?\d{3,4}[ -]?\d{4}|[48]00-?\d{3}-?\d{4}",
    }
    return re.fullmatch(shapes.get(region, r"\(?0\d{1,5}\)?[ ./-]?\d[\d -]*\d"), found) is not None and len(digits) >= 9


def _parse(text: str, region: str | None) -> phonenumbers.PhoneNumber | None:
    try:
        return phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        return None


def _written(number: phonenumbers.PhoneNumber) -> str:
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


# ---- secrets ---------------------------------------------------------------------------------------------------------------------------

ISSUED = {  # what a key begins with -> how it goes on, as their issuers document it
    **dict.fromkeys(("AKIA", "ASIA"), r"[A-Z2-7]{16}"),  # AWS access key id
    **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"[A-Za-z0-9]{36,251}"),  # GitHub
    "github_pat_": r"[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    "glpat-": r"[A-Za-z0-9_-]{20,}",  # GitLab
    "xox": r"[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    **{f"{kind}_{mode}_": r"[A-Za-z0-9]{16,}" for kind in ("sk", "rk", "pk") for mode in ("live", "test")},  # Stripe
    "AIza": r"[A-Za-z0-9_-]{35}",  # Google
    "sk-": r"(?:proj-|svcacct-|ant-[a-z0-9]+-)?(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic
    "hf_": r"[A-Za-z0-9]{34,}",  # Hugging Face
    "npm_": r"[A-Za-z0-9]{36}",
    "pypi-": r"[A-Za-z0-9_-]{50,}",
    "SG.": r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",  # SendGrid
    "LTAI": r"[A-Za-z0-9]{12,20}",  # Alibaba Cloud
    "AKID": r"[A-Za-z0-9]{32}",  # Tencent Cloud
    "eyJ": r"[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JSON web token
}
SHAPES = {start: re.compile(rf"(?<![A-Za-z0-9_-]){re.escape(start)}{rest}(?![A-Za-z0-9_])") for start, rest in ISSUED.items()}
SHAPES["-----BEGIN "] = re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]{20,8000}?-----END (?:[A-Z]+ )*PRIVATE KEY-----")
SETTINGS = ("key", "secret", "token", "passw", "pwd")
NAMED = re.compile(
    r"(?:api[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|access[_-]?(?:key|token)|token|password|passwd|pwd)"
    r"[\"']?\s{0,3}(?::=|=>|=|:)\s{0,3}[\"'](?P<value>[^\s\"'<>{}$]{12,200})[\"']",
    re.IGNORECASE,
)


def find_keys(text: str) -> Iterator[Candidate]:
    """Keys of known shape, and quoted values of settings called password, token and so on that look random."""
    for start, shape in SHAPES.items():
        at = text.find(start)
        while at >= 0:
            match = shape.match(text, at)
            if match:
                yield Candidate(*match.span(), match[0])
            at = text.find(start, match.end() if match else at + 1)
    lowered = text.lower()
    if any(word in lowered for word in SETTINGS):
        for match in NAMED.finditer(text):
            value = match["value"]
            if _bits(value) >= 3.0 and any(map(str.isdigit, value)) and any(map(str.isalpha, value)):
                yield Candidate(*match.span("value"), value)


def _bits(text: str) -> float:
    """Shannon entropy a character: random base 64 of 20 characters has about 4, a word below 3."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


# ---- all of them -----------------------------------------------------------------------------------------------------------------------

DIGITS = re.compile(r"\d{3}")


@cache
def kinds(regions: tuple[str, ...]) -> dict[str, Kind]:
    """By name; where two find the same characters, the one that begins first counts, then the one named first here."""
    domain = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}"
    email = rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{{0,63}}@{domain}(?![A-Za-z0-9_-])"
    url = r"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.-]{1,19}://(?P<value>[^\s/@:\"'<>]{1,64}:[^\s/@\"'<>]{1,128})@(?=[A-Za-z0-9\[])"
    resident = rf"{APART}\d{{17}}[\dXx]{NOT_AFTER}"
    social = rf"{APART}\d{{3}}-\d{{2}}-\d{{4}}(?![A-Za-z0-9_-])|(?<=SSN )\d{{9}}\b|(?<=SSN: )\d{{9}}\b|(?<=[Ss]ecurity number )\d{{9}}\b"
    grouped = r"\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19}"
    card = rf"{APART}(?:{grouped})(?![A-Za-z0-9_]|[.-]\d)"
    return {
        "url": Kind(re.compile("://"), _matching(url, str)),
        "email": Kind(re.compile("@"), _matching(email, str.lower)),
        "key": Kind(re.compile(r""), find_keys),  # it has many beginnings, and looks for them itself
        "iban": Kind(re.compile(r"[A-Z]{2}\d\d"), find_ibans),
        "resident": Kind(re.compile(r"\d{17}"), _matching(resident, _resident)),
        "card": Kind(DIGITS, _matching(card, _card)),
        "ssn": Kind(re.compile(r"\d-\d|\d{9}"), _matching(social, _ssn)),
        "ip": Kind(re.compile(r"\d\.\d|:[0-9A-Fa-f:]"), find_addresses),
        "phone": Kind(DIGITS, lambda text: find_phones(text, regions)),
    }
