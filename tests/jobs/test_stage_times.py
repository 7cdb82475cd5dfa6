from jobs.stage_times import StageTimes, busy_line
from pipeline.tables import ShardReceipt


def receipt(decode_s, annotate_s, publish_s):
    return ShardReceipt(
        shard_id=0,
        won=True,
        num_rows=1,
        num_ok=1,
        size_bytes=1,
        decode_s=decode_s,
        annotate_s=annotate_s,
        publish_s=publish_s,
    )


def test_the_busiest_stage_comes_first():
    times = StageTimes()
    for _ in range(4):
        times.add(receipt(3.0, 4.0, 0.5))
    shares = times.busy(10.0, num_actors=2, num_io_tasks=4)
    assert shares == {"model": 0.8, "decode": 0.3, "publish": 0.05}
    assert list(shares) == ["model", "decode", "publish"]
    assert "the model stage limits" in busy_line(shares)
    few = times.busy(10.0, num_actors=16, num_io_tasks=1)
    assert next(iter(few)) == "decode"


def test_no_time_at_all():
    shares = StageTimes().busy(0.0, num_actors=1, num_io_tasks=1)
    assert set(shares.values()) == {0.0}


def test_full_is_full():
    times = StageTimes()
    times.add(receipt(1.0, 30.0, 1.0))
    assert times.busy(10.0, num_actors=2, num_io_tasks=2)["model"] == 1.0
