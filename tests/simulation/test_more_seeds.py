"""The other half of the seeds, and the mutants: see ``test_seeds``."""

import time

import pytest

from tests import mutants
from tests.mutants import Mutant
from tests.simulation.job import simulate, simulation
from tests.simulation.seeds import check_happened, proof, run_seeds

NUM_SEEDS = 5_000
# A mutant that is not found in so many seeds would hide in a real run, too.
MOST_SEEDS_PER_MUTANT = 2_000


def test_five_thousand_more_seeds_break_no_rule() -> None:
    started = time.monotonic()
    counts = run_seeds(range(NUM_SEEDS, 2 * NUM_SEEDS))
    print(proof(counts, time.monotonic() - started))
    assert counts["seeds"] == NUM_SEEDS
    check_happened(counts)


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (mutants.exists_then_put, "the record never changes"),
        (mutants.same_data_key, "the record's data is what the record says"),
        (mutants.unconditional_put, "the record never changes"),
        (mutants.trusted_refusal, "the record's data stays"),
        (mutants.collected_undecided, "the record's data stays"),
        (mutants.cleaned_in_doubt, "attempts at an undecided shard are not collected"),
        (mutants.uncollected, "a run that is done leaves no orphan"),
        (mutants.put_lease, "a lease never changes"),
        (mutants.put_plan, "the plan never changes"),
        (mutants.sealed_early, "a snapshot is what the records say"),
        (mutants.signed_marker, "the success marker is the same, whoever writes it"),
    ],
)
def test_every_mutant_is_found_out(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, broken: str
) -> None:
    with simulation():
        mutant(monkeypatch)
        found = None
        for seed in range(MOST_SEEDS_PER_MUTANT):
            outcome = simulate(seed)
            if outcome.broken is not None and outcome.broken.startswith(broken):
                found = outcome
                break
        monkeypatch.undo()
    assert found is not None
    print(f"PROOF mutant {mutant.__name__}: seed {found.seed} shows that not {found.broken}")
    assert "RULE BROKEN" in found.schedule
