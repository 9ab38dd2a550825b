"""What tests share: functions run on real ranks, and commands run as a user runs them."""

from tests.helpers.launch import launch_infer, run_command
from tests.helpers.ranks import run_ranks

__all__ = ["launch_infer", "run_command", "run_ranks"]
