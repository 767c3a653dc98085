"""The suite `generation` of the benchmark at toy sizes: its rows, and what they must agree on."""

import json

import pytest

from tests.experiments import commands


@pytest.mark.slow
@pytest.mark.usefixtures("share_compiled_programs")
def test_quick_run():
    names = ("first_token", "speculation", "long_cache", "storage")
    flags = ["--suite=generation", "--quick", "--rounds=1", *(f"--only={name}" for name in names)]
    ((code, out, error),) = commands.run("benchmark", flags)
    assert code == 0, error
    document = json.loads(out.splitlines()[-1])
    found = document["measurements"]
    assert list(found) == list(names)
    targets = {target["name"]: target for name in names for target in found[name]["targets"]}

    # Both ways of prefill give the same logits, and every way to draft the same tokens.
    assert targets["largest difference of their logits"]["value"] < 1e-4
    seconds = [row["seconds"] for row in found["first_token"]["rows"]]
    ratio = targets["time to first token with early exit, of that without"]["value"]
    assert ratio == pytest.approx(seconds[0] / seconds[1])
    rows = found["speculation"]["rows"]
    assert [row["decoding"] for row in rows[:2]] == ["plain", "1 layers draft 2"]
    assert len(rows) == 9 and all(row["same tokens"] for row in rows)

    # 8 of 32 tokens are kept, and 5 are added (the one that prefill samples, a round of warm-up
    # and one that counts); a compressed cache also knows how many it has dropped.
    sizes = {row["cache"]: row["MB"] for row in found["long_cache"]["rows"]}
    assert sizes["snapkv"] / sizes["whole cache"] == pytest.approx((8 + 5) / (32 + 5), rel=1e-2)
    assert sizes["double_sparsity"] > sizes["whole cache"]

    exact, *others = found["storage"]["rows"]
    assert exact["change"] == 0
    for row in others:
        assert row["change"] == pytest.approx(row["perplexity"] / exact["perplexity"] - 1)
        assert abs(row["change"]) < 0.03
