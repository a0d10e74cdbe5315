"""Texts with personal and secret things at known places, and with look-alikes: what de-identification is measured on.

Values are made here after the issuers' rules (check digits are computed, not taken from the code under test) and by Faker, and written the
ways people write them, in English and Chinese sentences. `python tests/unit/data/identities.py` prints precision and recall of each kind.
"""

from __future__ import annotations

import random
import string
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from faker import Faker

from megalite.data import identity

PLACES = {
    "email": ["Write to {} today.", "Contact: {}, or call us.", "mail={};", "邮箱是{}，请查收。", "<{}>", "From {}: hello", "({})"],
    "phone": ["Call {} now.", "Phone: {}", "Tel. {}, fax none", "电话{}。", "手机号：{}，谢谢", "my mobile {} is on", "contact {} please"],
    "ip": ["Server {} is down.", "from {} port 22", "host={},", "访问{}失败", "ping {}\n", "[{}]", "client {} - - GET /"],
    "card": ["Card {} was charged.", "card number: {}.", "卡号{}，", "pay with {} please", "PAN={};"],
    "iban": ["Transfer to {}.", "IBAN: {}", "Konto {}, bitte", "account {} was closed", "账户{}。"],
    "resident": ["身份证号{}。", "ID {} was checked", "证件：{}，", "id={};", "resident number {}"],
    "ssn": ["SSN {} on file", "his number is {}.", "social security: {},", "({})"],
    "url": ["clone {} first", "url={}", "见{}。", "DATABASE_URL={}\n"],
    "key": ["key {} leaked", "export TOKEN={}\n", "密钥{}，", "use {}.", "auth: {}\n"],
}
PLAIN = [
    "The meeting on {date} was moved to {time}, see section {section} of version {version}.",
    "Order {order} of {date} cost ${price} and weighs {number} kg; ref {uuid}.",
    "commit {sha} changed {small} files, {number} insertions, {small} deletions.",
    "std::vector<int> a::b = dead::beef; @decorator foo@bar x@y user@localhost git@host:repo",
    "ISBN {isbn}, pages {small}-{small}, {year}-{year}, doi 10.1000/{order}",
    "订单号{order}，金额{price}元，日期{date}，版本{version}。",
    "id={millis} seed={number} mac={mac} ratio {small}:{small} at {time}",
    "127.0.0.1 and 255.255.255.0 and 0.0.0.0 are nobody's; SDK v{version} build {quad}.",
    "password: changeme, api_key = None, token = get_token(), secret: '{{}}'",
    "Card-like {badcard} and id-like {badid} fail their checks; sum 1 234 567 890, range 100-200-300.",
    "tracking {tracking}; {number} {number} {number}; row {small} {small} {small} {small}",
    "see https://example.org/a:b@c and http://host:8080/x?id={order}&t={millis}#{small}",
]


@dataclass(frozen=True)
class Labelled:
    text: str
    spans: list[tuple[str, int, int]]


def _luhn(digits: str) -> str:
    total = sum(int(d) if n % 2 else sum(divmod(2 * int(d), 10)) for n, d in enumerate(reversed(digits)))
    return digits + str(-total % 10)


def _digits(draw: random.Random, count: int, first: str = string.digits) -> str:
    return draw.choice(first) + "".join(draw.choices(string.digits, k=count - 1))


def make_card(draw: random.Random, fake: Faker) -> str:
    prefix, length = draw.choice(
        [("4", 16), ("51", 16), ("55", 16), ("2720", 16), ("34", 15), ("37", 15), ("6011", 16), ("62", 16), ("62", 19), ("3528", 16)]
    )
    card = _luhn(prefix + _digits(draw, length - 1 - len(prefix)))
    if len(card) == 16:
        return draw.choice([card, " ".join(card[k : k + 4] for k in range(0, 16, 4)), "-".join(card[k : k + 4] for k in range(0, 16, 4))])
    return card


def make_iban(draw: random.Random, fake: Faker) -> str:
    country, length = draw.choice([("DE", 22), ("FR", 27), ("GB", 22), ("NL", 18), ("CH", 21), ("ES", 24)])
    iban = fake_iban(draw, country, length)
    return draw.choice([iban, " ".join(iban[k : k + 4] for k in range(0, len(iban), 4))])


def fake_iban(draw: random.Random, country: str, length: int) -> str:
    """ISO 13616: letters become 10 to 35, the country and the check digits go last, and the whole is 1 modulo 97."""
    makers: dict[str, Callable[[], str]] = {
        "DE": lambda: _digits(draw, 18), "CH": lambda: _digits(draw, 17),
        "GB": lambda: "NWBK" + _digits(draw, 14), "NL": lambda: "ABNA" + _elfproef(draw),
        "FR": lambda: _french(draw), "ES": lambda: _spanish(draw),
    }  # fmt: skip
    account = makers[country]()
    number = int("".join(str(int(c, 36)) for c in account + country + "00"))
    return f"{country}{98 - number % 97:02}{account}"


def _elfproef(draw: random.Random) -> str:
    while True:
        digits = _digits(draw, 10)
        if sum((10 - n) * int(d) for n, d in enumerate(digits)) % 11 == 0:
            return digits


def _french(draw: random.Random) -> str:
    bank, branch, account = _digits(draw, 5), _digits(draw, 5), _digits(draw, 11)
    return f"{bank}{branch}{account}{97 - (89 * int(bank) + 15 * int(branch) + 3 * int(account)) % 97:02}"


def _spanish(draw: random.Random) -> str:
    weights = (1, 2, 4, 8, 5, 10, 9, 7, 3, 6)
    bank, account = _digits(draw, 8), _digits(draw, 10)

    def check(digits: str) -> str:
        rest = 11 - sum(w * int(d) for w, d in zip(weights, digits, strict=True)) % 11
        return {10: "1", 11: "0"}.get(rest, str(rest))

    return f"{bank}{check('00' + bank)}{check(account)}{account}"


def make_resident(draw: random.Random, fake: Faker) -> str:
    """GB 11643-1999: region, date of birth, serial number, and a check digit with weights 2^(17 - i) modulo 11."""
    region = draw.choice(["110101", "310115", "440305", "510107", "330106", "620102", "650102"])
    body = f"{region}{draw.randint(1940, 2015)}{draw.randint(1, 12):02}{draw.randint(1, 28):02}{draw.randint(1, 999):03}"
    rest = sum(int(d) * 2 ** (17 - n) for n, d in enumerate(body)) % 11
    return body + "10X98765432"[rest]


def make_ssn(draw: random.Random, fake: Faker) -> str:
    area = draw.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03}-{draw.randint(1, 99):02}-{draw.randint(1, 9999):04}"


def make_phone(draw: random.Random, fake: Faker) -> str:
    mobile = f"1{draw.choice(['30', '31', '38', '50', '59', '66', '77', '86', '99'])}{_digits(draw, 8)}"
    area, local = draw.choice(["212", "415", "617", "303", "206"]), f"{draw.randint(200, 999)}"
    line = f"{draw.randint(0, 9999):04}"
    local = local if not local.endswith("11") else "234"
    london = f"20 7{draw.randint(100, 999)} {draw.randint(1000, 9999)}"
    return draw.choice(
        [
            mobile, f"{mobile[:3]}-{mobile[3:7]}-{mobile[7:]}", f"{mobile[:3]} {mobile[3:7]} {mobile[7:]}", f"+86 {mobile}", f"+86{mobile}",
            f"010-{_digits(draw, 8, '68')}", f"(021) {_digits(draw, 8, '56')}", f"0755-{_digits(draw, 8, '28')}",
            f"({area}) {local}-{line}", f"{area}-{local}-{line}", f"{area}.{local}.{line}", f"+1 {area} {local} {line}", f"+1-{area}-{local}-{line}",
            f"+44 {london}", f"+49 30 {_digits(draw, 8, '23456')}", f"+33 6 {draw.randint(10, 99)} {draw.randint(10, 99)} {draw.randint(10, 99)} {draw.randint(10, 99)}",
            f"+81 90-{draw.randint(1000, 9999)}-{draw.randint(1000, 9999)}", f"0044 {london}",
        ]
    )  # fmt: skip


def make_ip(draw: random.Random, fake: Faker) -> str:
    while (found := fake.ipv4()).startswith(("0.", "127.", "255.")) or 224 <= int(found.split(".")[0]) < 240:
        pass
    groups = [f"{draw.getrandbits(16):x}" for _ in range(7)]
    first = f"{draw.choice([0x2001, 0x2400, 0x2A03, 0xFD12, 0xFE80]):x}"
    return draw.choice([found, found, ":".join([first, *groups]), f"{first}:{groups[0]}::{draw.randint(1, 9999)}"])


def _chars(draw: random.Random, count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(draw.choices(alphabet, k=count))


def make_key(draw: random.Random, fake: Faker) -> str:
    upper, base = string.ascii_uppercase + "234567", string.ascii_letters + string.digits
    return draw.choice(
        [
            f"AKIA{_chars(draw, 16, upper)}", f"ghp_{_chars(draw, 36)}", f"github_pat_{_chars(draw, 22)}_{_chars(draw, 59)}",
            f"glpat-{_chars(draw, 20)}", f"xoxb-{_digits(draw, 12)}-{_digits(draw, 12)}-{_chars(draw, 24)}", f"sk_live_{_chars(draw, 24)}",
            f"AIza{_chars(draw, 35)}", f"sk-proj-{_chars(draw, 48)}", f"sk-ant-api03-{_chars(draw, 80)}", f"hf_{_chars(draw, 34, string.ascii_letters)}",
            f"npm_{_chars(draw, 36)}", f"SG.{_chars(draw, 22)}.{_chars(draw, 43)}", f"LTAI{_chars(draw, 20)}",
            f"eyJ{_chars(draw, 20)}.eyJ{_chars(draw, 40)}.{_chars(draw, 43)}",
            "-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join(_chars(draw, 64, base) for _ in range(4)) + "\n-----END RSA PRIVATE KEY-----",
        ]
    )  # fmt: skip


def make_email(draw: random.Random, fake: Faker) -> str:
    return draw.choice(
        [fake.email(), fake.company_email(), fake.free_email(), fake.email().replace("@", f"+{draw.randint(1, 99)}@"), fake.email().title()]
    )


def make_url(draw: random.Random, fake: Faker) -> str:
    scheme = draw.choice(["https", "ftp", "postgres", "mysql", "redis", "amqp", "mongodb+srv"])
    return f"{scheme}://{fake.user_name()}:{fake.password(special_chars=False)}@{fake.domain_name()}/{fake.uri_path()}"


MAKERS: dict[str, Callable[[random.Random, Faker], str]] = {
    "email": make_email, "phone": make_phone, "ip": make_ip, "card": make_card, "iban": make_iban,
    "resident": make_resident, "ssn": make_ssn, "url": make_url, "key": make_key,
}  # fmt: skip


def plain_line(draw: random.Random, fake: Faker) -> str:
    """A sentence in which nothing is to hide."""
    badcard = _luhn("4" + _digits(draw, 14))
    badcard = badcard[:-1] + str((int(badcard[-1]) + 1 + draw.randint(0, 7)) % 10)
    badid = make_resident(draw, fake)
    badid = badid[:-1] + draw.choice([c for c in "0123456789" if c != badid[-1]])
    while identity.find(badid, identity.Identity(kinds=("card",))):  # Luhn may hold by chance
        badid = "11" + badid[2:]
    return draw.choice(PLAIN).format(
        date=draw.choice([fake.date(), fake.date("%d.%m.%Y"), fake.date("%Y/%m/%d"), fake.date("%m-%d-%Y")]), time=fake.time(),
        section=f"{draw.randint(1, 9)}.{draw.randint(1, 9)}.{draw.randint(1, 9)}.{draw.randint(1, 9)}",
        version=".".join(str(draw.randint(0, 30)) for _ in range(draw.choice([2, 3, 4]))), order=_digits(draw, draw.choice([6, 8, 10, 12]), "23456789"),
        price=f"{draw.randint(1, 9999)}.{draw.randint(0, 99):02}", number=draw.randint(1, 10**7), small=draw.randint(1, 999), uuid=fake.uuid4(),
        sha=fake.sha1(), isbn=fake.isbn13(), year=draw.randint(1900, 2030), millis=draw.randint(15 * 10**11, 17 * 10**11), mac=fake.mac_address(),
        quad=f"{draw.randint(1, 9)}.{draw.randint(0, 9)}.{draw.randint(0, 9)}.{draw.randint(0, 9)}", badcard=badcard, badid=badid,
        tracking=_chars(draw, 2, string.ascii_uppercase) + _digits(draw, 9) + "CN",
    )  # fmt: skip


def generate(count: int, *, seed: int) -> list[Labelled]:
    """Documents of some lines each; about half of the lines hold one labelled thing."""
    draw, fake = random.Random(seed), Faker(["en_US", "de_DE", "fr_FR"])
    fake.seed_instance(seed)
    found = []
    for _ in range(count):
        text, spans = "", []
        for _ in range(6):
            if draw.random() < 0.5:
                kind = draw.choice(list(MAKERS))
                value = MAKERS[kind](draw, fake)
                before, after = draw.choice(PLACES[kind]).split("{}")
                start = len(text) + len(before)
                hidden = (start, start + len(value))
                if kind == "url":
                    hidden = (start + value.index("://") + 3, start + value.rindex("@"))
                spans.append((kind, *hidden))
                text += f"{before}{value}{after}\n"
            else:
                text += plain_line(draw, fake) + "\n"
        found.append(Labelled(text, spans))
    return found


def measure(documents: list[Labelled]) -> tuple[dict[str, tuple[float, float, int]], list[str]]:
    """Precision, recall and number of each kind, and what was missed or invented; a hit has the kind and the very span."""
    hits, wanted, given, wrong = Counter(), Counter(), Counter(), []
    settings = identity.Identity()
    for document in documents:
        found = {(name, c.start, c.stop) for name, c in identity.find(document.text, settings)}
        labelled = set(document.spans)
        wanted.update(name for name, *_ in labelled)
        given.update(name for name, *_ in found)
        hits.update(name for name, *_ in labelled & found)
        wrong += [f"missed {name}: {document.text[a - 12 : b + 6]!r}" for name, a, b in sorted(labelled - found)]
        wrong += [f"invented {name}: {document.text[max(0, a - 12) : b + 6]!r}" for name, a, b in sorted(found - labelled)]
    return {name: (hits[name] / max(given[name], 1), hits[name] / max(wanted[name], 1), wanted[name]) for name in MAKERS}, wrong


if __name__ == "__main__":
    made = generate(int(sys.argv[1]) if len(sys.argv) > 1 else 4000, seed=0)
    began = time.process_time()
    scores, mistakes = measure(made)
    seconds = time.process_time() - began
    print(f"{'kind':<10}{'precision':>10}{'recall':>10}{'number':>8}")
    for name, (precision, recall, number) in scores.items():
        print(f"{name:<10}{precision:>10.4f}{recall:>10.4f}{number:>8}")
    print(f"{sum(len(d.text) for d in made) / 1e6 / seconds:.1f} MB per CPU-second where every other line holds something")
    print("\n".join(mistakes[:40]))
