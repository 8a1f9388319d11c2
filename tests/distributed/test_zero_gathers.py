"""Which sizes and leaves a DeepSpeed JSON of stage 3 gets where it leaves them open."""

import pytest

from gem_ds.distributed.zero_gathers import fill_stage3

BLOCKS = {"Block": 100, "Large": 1000}


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({}, (["Block", "Large"], 1000, 2000, 0, 1000)),
        ({"stage3_max_live_parameters": 999}, (["Block"], 100, 999, 0, 100)),
        ({"stage3_max_live_parameters": 99}, (None, 90, 99, 100, None)),
        ({"stage3_prefetch_bucket_size": 7}, (["Block", "Large"], 7, 2000, 0, 1000)),
        ({"leaf_module": {"classes": ["Other"]}}, (["Other"], 90, None, 100, None)),
        ({"stage3_module_granularity_threshold": 5}, (None, 90, None, 100, None)),
    ],
    ids=["all", "one too large", "all too large", "a size told", "leaves told", "by granularity"],
)
def test_blocks_are_leaves_unless_they_are_too_large_or_the_json_decides(given, filled):
    zero = {"stage3_param_persistence_threshold": "auto"} | given
    fill_stage3(zero, 10, BLOCKS)
    found = (
        zero.get("leaf_module", {}).get("classes"),
        zero["stage3_prefetch_bucket_size"],
        zero.get("stage3_max_live_parameters"),
        zero["stage3_param_persistence_threshold"],
        zero.get("stage3_max_reuse_distance"),
    )
    assert found == filled
