"""Every request of a run as a row of Parquet; prompts and answers are not in it."""

from __future__ import annotations

from pathlib import Path

from loadtest.drive.case import Result


def write(results: list[Result], path: Path) -> None:
    """Write requests.parquet; times are in seconds after the case's start."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "case": result.case.title,
            "row": one.row,
            "adapter": one.adapter,
            "answered_by": one.answered_by,
            "status": str(one.status),
            "reason": one.reason,
            "scheduled": one.scheduled - result.start,
            "sent": one.sent - result.start if one.sent else None,
            "ended": one.ended - result.start if one.ended else None,
            "arrivals": [at - result.start for at in one.times],
            "tokens": list(one.counts),
            "prompt_tokens": one.prompt_tokens,
            "queue_s": one.queue_s,
            "adapter_wait_s": one.adapter_wait_s,
            "server_ttft_s": one.server_ttft_s,
            "canary": one.canary,
        }
        for result in results
        for one in sorted(result.records, key=lambda record: record.row)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
