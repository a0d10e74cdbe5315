"""No option is accepted and ignored: what a form of a verb does not read is refused before anything is done, with the cure."""

from __future__ import annotations

import shlex

import pytest

from megalite import verbs
from megalite.errors import UserError


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tune gpt-7b --cluster 1x8xH100 --picture a.html", "--picture = a.html is for --explain alone"),
        ("tune gpt-7b --cluster 1x8xH100 --explain 1 --picture a.png", "--picture a.png is a page; let it end in .html"),
        ("tune gpt-7b --cluster 1x8xH100 --write a.txt", "--write a.txt is the name of a DeepSpeed JSON; let it end in .json"),
        ("tune gpt-7b --cluster 1x8xH100 --runtime nanotron", "--runtime = nanotron is for --score alone"),
        ("tune gpt-7b --cluster 1x8xH100 --hold-out", "--hold-out = true is for --score alone; give that, too, or leave --hold-out out"),
        ("tune gpt-7b --cluster 1x8xH100 --timeout 60", "--timeout = 60 is for --trials alone"),
        ("tune gpt-7b --cluster 1x8xH100 --slurm mine", "--slurm = mine is for --trials alone"),
        ("tune gpt-7b --cluster 1x8xH100 --score t.csv", "gpt-7b is of no use to --score, which predicts"),
        (
            "tune --cluster 1x8xH100 --score t.csv --top 3",
            "--top = 3 is of no use to --score, which predicts a table of runs; leave it out",
        ),
        ("tune --cluster 1x8xH100 --score t.csv --mesh.tp 2", "--mesh... is of no use to --score"),
        ("bench compare a.json b.json --steps 5", "--steps = 5 is of no use to megalite bench compare; leave it out"),
        ("bench compare a.json b.json --mesh.tp 2", "--mesh... is of no use to megalite bench compare; leave it out"),
        ("bench network --warm-up 2", "--warm-up = 2 is of no use to megalite bench network"),
        ("bench kernels --ranks 2", "--ranks = 2 is of no use to megalite bench kernels"),
        ("bench gpt-tiny --ranks 2", "--ranks 2 is for megalite bench network"),
        ("bench gpt-tiny --nodes 2", "--nodes = 2 is for --slurm alone"),
        ("bench gpt-tiny --slurm mine", "--slurm mine measures the layouts of a sweep"),
        ("bench gpt-tiny --sweep s.yaml", "gpt-tiny is of no use beside --sweep s.yaml, which names its run"),
        ("bench --sweep s.yaml --mesh.tp 2", "--mesh... is of no use to megalite bench --sweep; write it into the file, under flags"),
        ("generate runs/a --system Hello --prompt Hi", "--system = Hello is for --chat alone"),
        ("generate runs/a --prompt Hi --file a.txt", "--prompt and --file a.txt both give prompts"),
        ("generate runs/a --prompt Hi --temperature 0 --number 2", "--temperature 0 always writes the same answer, but --number = 2"),
        ("chat runs/a --prompt Hi", "--prompt = Hi is of no use to megalite chat; leave it out"),
        ("embed runs/a --data a.txt --output a.npy --top 3", "--top = 3 is for --query alone"),
        ("evaluate runs/a --data a.txt --shots 3", "--shots = 3 is for --harness alone"),
        ("evaluate runs/a --harness toy --columns a b", "--columns = a b is of no use to --harness, which has tasks of its own"),
    ],
)
def test_what_is_not_read_is_refused(line: str, words: str) -> None:
    verb, *rest = shlex.split(line)
    with pytest.raises(UserError) as refused:
        getattr(verbs, verb)(rest)
    assert words in str(refused.value)


def test_what_is_said_as_it_is_anyway_does_no_harm() -> None:
    with pytest.raises(UserError, match=r"a\.json is no results.json"):
        verbs.bench(["compare", "a.json", "b.json", "--steps", "30"])
