"""Patterns of layers: Python's own answers, in bounded time."""

import random
import re

import pytest
from paths import GOLDEN

from skembed.adapters.lora import LoraSettings
from skembed.adapters.patterns import NamePattern
from skembed.adapters.targets import expected_shapes, find_targets
from skembed.model.network import backbone_on_meta
from skembed.model.sources import read_config, resolve_source

NAMES = [name for name, _ in backbone_on_meta(read_config(resolve_source(GOLDEN))).named_modules()]
# As people write them, and each construct by itself.
PATTERNS = [
    "q_proj", ".*q_proj", r".*\.(q|k|v)_proj", r"^layers\.\d+\.self_attn\.(q_proj|v_proj)$",
    r"^(?!.*mlp).*(?:q_proj|k_proj)$", r"(?:(?!mlp).)*_proj", r"(?i).*Q_PROJ",
    r"(?=layers).*o_proj", r"layers\.[0-9]\.mlp\.(?P<which>up|down)_proj", r".*[^o]_proj",
    r".*[]q]_proj", r".*\Bproj", r"layers\.\d{1,2}\..*", r"layers\.\d{2,}\..*",
    r"layers\.\d{1}\..*", r"layers\.\d{,1}\..*", r".*?_proj??", r"(layers|norm)(\..*)?",
    r"\x6corm|\u006eorm", r"\Anorm\Z", r"a{,}|norm", r"(a|b|)*norm", r"()*norm", r"", r"|norm",
    r"(?:$|n|o|r|m)+", r"(?:^|n){3}orm", r"layers\.(0|1(?=\.mlp))\..*gate_proj", r"\w+",
    r"[\w.]+", r"\S*\.\d\.\D+",
]  # fmt: skip
# Exponential or polynomial of high degree in Python's matcher.
EXPLOSIVE = [
    r"(a+)+b", r"(.*)*x", r"(.+)+x", r"(\w|\w)*!", r"(l|la|lay|layers|.)*!", r"((.*)*)*x",
    r"(.?){60}x", ".*" * 30 + "x", r"(.*.*.*.*.*.*)+x", r"((((.+)+)+)+)+x", r"(?:(?=(.+)+x).)*",
    r"(.|..|...|....)+!", r"(.{1,1000}){1,1000}x", r"(a?){4000000000}x", r"(?:(?:)*)*x",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_answers_are_pythons(pattern: str) -> None:
    ours, theirs = NamePattern(pattern), re.compile(pattern)
    for name in [*NAMES, "a", "aa", "abab", "nnnorm", "NORM", ""]:
        assert ours.matches(name) == (theirs.fullmatch(name) is not None), name


def test_the_answers_to_random_patterns_are_pythons() -> None:
    """Over a small alphabet, so that many match."""
    rng = random.Random(0)

    def make(depth: int) -> str:
        kind = rng.randrange(9) if depth else rng.randrange(3)
        if kind < 3:
            return rng.choice(["a", "b", ".", "[ab]", "[^a]", r"\w", "ab", "$", "^", r"\b"])
        if kind == 3:
            return f"({make(depth - 1)}|{make(depth - 1)})"
        if kind == 4:
            inner = f"(?:{make(depth - 1)})"
            return inner + rng.choice(["*", "+", "?", "{1,2}", "{2}", "*?", "{0,3}?"])
        if kind == 5:
            return f"(?{rng.choice('=!')}{make(depth - 1)})"
        return make(depth - 1) + make(depth - 1)

    n_matches = 0
    for _ in range(2_000):
        pattern = make(3)
        ours, theirs = NamePattern(pattern), re.compile(pattern)
        for _ in range(8):
            name = "".join(rng.choices("ab", k=rng.randrange(7)))
            found = theirs.fullmatch(name) is not None
            assert ours.matches(name) == found, (pattern, name)
            n_matches += found
    assert n_matches > 1_000


@pytest.mark.parametrize("pattern", EXPLOSIVE)
def test_no_pattern_takes_long(pattern: str) -> None:
    """With Python's matcher this test would not end."""
    config = read_config(resolve_source(GOLDEN))
    settings = LoraSettings(2, 4.0, 0.0, pattern)
    assert expected_shapes(config, settings) == {}
    with pytest.raises(ValueError, match="`target_modules` parameter of `ContrastiveTrainer`"):
        find_targets(config, settings)
    assert not NamePattern(pattern).matches("layers.0.self_attn.q_proj" * 3)


@pytest.mark.parametrize(
    "pattern",
    [
        "(", "[", "*", "a{2,1}", r"(a)\1", r"(?P<n>a)(?P=n)", r"(?<=a)b", r"(?<!a)b",
        r"(a)?(?(1)b|c)",
        "(?x) a # b", "(?i:a)", "(" * 60 + ")" * 60, "(" * 50_000, "a" * 10_001, "\\",
    ],
)  # fmt: skip
def test_what_has_no_such_matcher_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="not supported|no regular|nested too|characters"):
        NamePattern(pattern)
