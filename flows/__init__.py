"""Flows compose: they order steps, hand keys on, and do no arithmetic. The only place that knows Prefect."""
