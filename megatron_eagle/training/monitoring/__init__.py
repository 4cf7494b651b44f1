"""What a run says of itself: logs, metrics, heartbeat, profiler, report."""
