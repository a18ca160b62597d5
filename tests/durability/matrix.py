"""The fault matrix: each fault that the server must survive, and the tests that prove it.

``python -m tests.durability.matrix`` runs them all, the long ones too, and writes a report
(``make chaos``). Leans on pytest; refuses rows without a test: ``test_matrix.py`` looks.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = "chaos-report.md"

MATRIX: dict[str, tuple[str, ...]] = {
    "kill -9 of the API between commit and 202": (
        "tests/durability/test_kills.py::test_kill_at_every_named_point_loses_and_repeats_nothing",
    ),
    "kill -9 of a worker, at each named point and at random": (
        "tests/durability/test_kills.py::test_kill_at_every_named_point_loses_and_repeats_nothing",
        "tests/durability/test_kills.py::test_kill_at_thirty_random_moments_loses_and_repeats_nothing",
        "tests/durability/test_two_servers.py::test_a_killed_server_s_run_is_taken_over_within_the_lease_and_nothing_is_repeated",
    ),
    "many kills under mixed runs on three workers": (
        "tests/durability/test_many_kills.py::test_twelve_kills_under_mixed_runs_on_three_workers_lose_and_repeat_nothing",
        "tests/durability/test_many_kills.py::test_two_hundred_kills_under_mixed_runs_on_three_workers_lose_and_repeat_nothing",
    ),
    "kill -9 at random steps of random workflows, and of what goes on with them": (
        "tests/e2e/test_random_workflows.py::test_random_workflows_that_are_killed_at_random_steps_end_as_if_nothing_had_happened",
        "tests/e2e/test_random_workflows.py::test_random_workflows_that_are_cancelled_after_a_kill_undo_all_that_had_happened",
        "tests/e2e/test_random_workflows.py::test_a_hundred_random_workflows_that_are_cancelled_after_a_kill",
        "tests/e2e/test_random_workflows.py::test_two_hundred_random_workflows_that_are_killed_at_random_steps",
    ),
    "a frozen worker wakes after its work was taken over": (
        "tests/durability/test_two_servers.py::test_a_frozen_server_that_wakes_after_the_takeover_writes_nothing_and_lives_on",
    ),
    "a run that kills its worker again and again, others beside it": (
        "tests/execution/test_queue.py::test_a_root_that_kills_its_worker_late_beside_a_task_that_waits_is_set_aside",
        "tests/execution/test_queue.py::test_a_root_above_a_task_that_waits_outlives_any_number_of_deaths",
        "tests/durability/test_blame.py::test_a_run_that_kills_its_only_worker_is_set_aside_and_those_beside_it_go_on",
        "tests/execution/test_engine.py::test_a_task_taken_up_too_often_fails_its_run_with_the_reason",
    ),
    "the tasks of one run are spread over idle workers": (
        "tests/durability/test_spread.py::test_the_tasks_of_one_run_go_to_every_worker_that_is_idle",
    ),
    "the database restarts": (
        "tests/durability/test_two_servers.py::test_postgresql_restarts_in_the_middle_of_a_run_and_nothing_is_lost_or_taken_over",
    ),
    "connections are killed": (
        "tests/durability/test_machines.py::test_connections_killed_again_and_again_lose_nothing_and_nobody_is_taken_for_dead",
        "tests/execution/test_relay.py::test_readers_go_on_when_the_wire_between_the_nodes_is_cut_and_hear_again_when_it_is_laid",
    ),
    "a network split between a server and the database": (
        "tests/durability/test_machines.py::test_a_server_cut_off_from_the_database_loses_its_run_once_and_writes_nothing_after",
    ),
    "the disk is full": (
        "tests/durability/test_machines.py::test_a_full_disk_is_a_clear_507_and_everything_goes_on_when_there_is_room",
    ),
    "the model is slow, limits, fails, resets or talks nonsense": (
        "tests/e2e/test_model_faults.py::test_a_fault_that_lasts_fails_the_run_after_bounded_tries_and_says_why",
        "tests/e2e/test_model_faults.py::test_a_fault_that_passes_is_tried_again_and_forgotten",
        "tests/e2e/test_model_faults.py::test_a_rate_limit_is_waited_for_as_long_as_it_asks",
        "tests/e2e/test_model_faults.py::test_arguments_that_do_not_parse_are_told_to_the_model_which_may_mend_them",
    ),
    "a slow reader, a reader that leaves, a proxy that cuts": (
        "tests/api/test_streams.py::test_a_reader_that_is_too_slow_is_told_and_cut_off",
        "tests/api/test_streams.py::test_a_reader_that_reads_nothing_is_given_up_and_memory_stays_bounded",
        "tests/e2e/test_streams.py::test_a_stream_cut_anywhere_resumes_exactly",
        "tests/e2e/test_streams.py::test_the_client_comes_through_a_proxy_that_cuts",
    ),
    "clocks an hour apart, a clock that jumps, summer time; two nodes that both begin what is due": (
        "tests/execution/test_later.py::test_two_nodes_begin_what_is_due_once_whatever_their_clock_does",
        "tests/execution/test_later.py::test_the_moment_is_read_from_the_clock_of_whoever_begins_the_run",
        "tests/durability/test_machines.py::test_clocks_an_hour_apart_hand_runs_over_once_and_take_nothing_from_the_living",
        "tests/execution/test_heartbeat.py::test_a_clock_that_is_an_hour_off_kills_nobody",
    ),
    "equal requests at once": (
        "tests/deploy/test_every_front.py::test_the_client_passes_against_serve",
    ),
    "a huge body, deep JSON, slow headers, a slow body": (
        "tests/deploy/test_every_front.py::test_the_client_passes_against_main_py",
        "tests/deploy/test_every_front.py::test_the_client_passes_against_serve",
        "tests/deploy/test_every_front.py::test_the_client_passes_against_two_gunicorns_behind_a_load_balancer",
        "tests/api/test_door.py::test_a_large_body_over_a_socket_is_answered_before_it_is_sent",
        "tests/api/test_door.py::test_deep_json_is_refused",
        "tests/api/test_door.py::test_a_body_that_does_not_come_is_408",
    ),
    "SIGTERM under load": (
        "tests/durability/test_two_servers.py::test_a_server_that_is_stopped_under_load_hands_its_runs_over_at_once",
        "tests/durability/test_drain.py::test_sigterm_drains_in_order_and_another_server_finishes_without_repeating",
        "tests/durability/test_drain.py::test_a_tool_that_blocks_its_thread_does_not_hold_up_the_end",
    ),
    "two versions at once, migration while serving": (
        "tests/durability/test_upgrade.py::test_servers_of_the_version_before_go_on_while_the_schema_grows_under_them",
    ),
    "10,000 idle streams": (
        "tests/durability/test_idle_streams.py::test_idle_streams_cost_little_and_all_of_them_hear_the_end",
    ),
    "a corrupt event row, and other rows that cannot be read": (
        "tests/durability/test_unreadable.py::test_what_cannot_be_read_is_set_aside_and_the_rest_is_served",
        "tests/execution/test_faults.py::test_a_stored_run_that_cannot_be_read_fails_and_the_others_go_on",
    ),
}
"""Fault → the node ids (without parameters) of its tests."""


class Outcomes:
    """Collects, for each test function, how its cases ended and how long they took."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("[")[0]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self.seen.setdefault(name, []).append(report.outcome)


def report(outcomes: Outcomes, seconds: float) -> str:
    """The matrix with what was seen, as Markdown."""
    lines = [
        "# Fault matrix",
        "",
        f"Commit {_commit()}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}, {seconds:.0f} s.",
        "",
        "| fault | test | cases | result | s |",
        "|---|---|---:|---|---:|",
    ]
    for fault, tests in MATRIX.items():
        for test in tests:
            ends = outcomes.seen.get(test, [])
            failed = sorted(set(ends) - {"passed"})
            result = ", ".join(failed) if failed else ("holds" if ends else "was not run")
            name = test.rpartition("::")[2]
            took = outcomes.seconds.get(test, 0.0)
            lines.append(f"| {fault} | `{name}` | {len(ends)} | {result} | {took:.1f} |")
    return "\n".join(lines) + "\n"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "?"


def main() -> int:
    outcomes = Outcomes()
    tests = list(dict.fromkeys(test for row in MATRIX.values() for test in row))
    started = time.monotonic()
    code = pytest.main(["--slow", "-n", "0", "-q", "-p", "no:cacheprovider", *tests], [outcomes])
    text = report(outcomes, time.monotonic() - started)
    (ROOT / REPORT).write_text(text, encoding="utf-8")
    print(text)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
