"""`--slurm KEY=V,...`: what it reads, and what it refuses."""

from __future__ import annotations

import pytest

from spiralrope_cli.core.config.slurm import Allocation, minutes_of, read_allocation
from spiralrope_cli.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("24h", 1440),
        ("90m", 90),
        ("1d12h", 2160),
        ("2d", 2880),
        # As sbatch has it: a number alone is of minutes.
        ("30", 30),
        ("30:01", 31),
        ("24:00:00", 1440),
        ("1-0", 1440),
        ("1-12:30", 2190),
        ("2-00:00:30", 2881),
    ],
)
def test_times_are_ours_or_those_of_sbatch(text, minutes):
    assert minutes_of(text) == minutes


def test_a_value_may_have_commas_and_a_flag_no_value():
    found = read_allocation(
        "partition=gpu,nodes=2,gpus-per-node=a100:8,time=24h,exclude=node[1-3,7],node9,exclusive,"
        "cpus_per_task=64,--qos=high,constraint=a100&nvlink,signal=USR2@600,array=%4"
    )
    assert found == Allocation(
        minutes=1440,
        nodes=2,
        gpus=8,
        signal_seconds=600,
        at_once=4,
        more={
            "partition": "gpu",
            "gpus-per-node": "a100:8",
            "exclude": "node[1-3,7],node9",
            "exclusive": True,
            "cpus-per-task": "64",
            "qos": "high",
            "constraint": "a100&nvlink",
        },
    )


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("gpu", "--slurm gpu: sbatch has no such option", "such as --slurm partition=gpu"),
        ("partitoin=gpu,time=1h", "partitoin=gpu: sbatch has no such", "did you mean partition?"),
        ("partition,time=1h", "--slurm partition has no value", "such as --slurm"),
        ("exclusive=,time=1h", "--slurm exclusive= has no value", "such as --slurm"),
        ("qos=a,time=1h,qos=b", "--slurm qos is given twice", "leave one of them out"),
        ("partition=gpu", "--slurm has no time", "time=24h"),
        ("time=1w", "--slurm time=1w is no time", "such as 24h"),
        ("time=", "--slurm time= has no value", "such as"),
        ("time=2m", "--slurm time is 2 min", "give more time"),
        ("time=1h,nodes=0", "--slurm nodes=0; it must be a whole number", ""),
        ("time=1h,nodes=2-4", "--slurm nodes=2-4; it must be a whole number", ""),
        ("time=1h,gpus-per-node=all", "gpus-per-node=all; it must be a number of GPUs", ""),
        ("time=1h,signal=TERM@60", "signal=TERM@60; it must be USR2@SECONDS", ""),
        ("time=1h,array=0-3", "array=0-3; it must be %N", ""),
        ("time=1h,gres=gpu:8", "--slurm gres=gpu:8: a job may not have it", "gpus-per-node=N"),
        ("time=1h,gpus=8", "--slurm gpus=8: a job may not have it", "gpus-per-node=N"),
        ("time=1h,ntasks=8", "--slurm ntasks=8: a job may not have it", "one task per machine"),
        ("time=1h,output=x", "--slurm output=x: a job may not have it", "slurm/ of the run folder"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines(text, message, hint):
    with pytest.raises(ConfigError) as caught:
        read_allocation(text)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value).replace("\n", "", 1)


def test_generic_resources_other_than_gpus_are_allowed():
    assert read_allocation("time=1h,gres=nvme:1").more == {"gres": "nvme:1"}
